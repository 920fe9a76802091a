"""One exploration, kept as a record: what notebook 06 runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kvneox_lib.inputs.text import Text
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.explore import Exploration, Reading, excerpt, explore
from kvneox_lib.studies.arguments import (
    Attention,
    Count,
    Dataset,
    Device,
    Dtype,
    Folder,
    Index,
    Model,
    OutputDir,
    Press,
    QualityWeights,
    Ratio,
    Share,
    Split,
    Subset,
    whole,
)
from kvneox_lib.studies.plan import Planned, at_ratios, fitting_context
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs

Continuation = Annotated[int, whole(2)]  # its first token is given


@dataclass(frozen=True)
class Explored:
    loaded: LoadedModel
    text: Text
    exploration: Exploration
    path: Path  # of the record


def plan(asked: dict, trained: int | None) -> list[Planned]:
    fitting_context(asked, asked["continuation_length"], trained)
    return at_ratios(asked["press"], asked["compression_ratio"])


def record_exploration(
    *,
    model: Model = "pythia-70m",
    weights: QualityWeights = "auto",
    dataset: Dataset = "wikitext",
    subset: Subset | None = "wikitext-103-v1",
    split: Split = "test",
    sample_idx: Index | None = 0,
    data_dir: Folder | None = None,
    press: Press = "snapkv",
    compression_ratio: Ratio = 0.75,
    position: Share = 0.5,
    context_length: Count = 512,
    continuation_length: Continuation = 64,
    attn_implementation: Attention = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Index = 0,
    output_dir: OutputDir = "results/explore",
) -> Explored:
    """`explore`, always anew, with its figures in a record. They are of a single piece of text, timed once."""
    runs = Runs(record_exploration, plan, locals())
    places = {"position": position, "context_length": context_length, "continuation_length": continuation_length}
    input_ids, n_context = excerpt(runs.text, runs.loaded, **places)
    started = provenance(runs.device)
    with runs.presses(runs.planned) as (made,):
        found = explore(runs.loaded.model, runs.loaded.tokenizer, input_ids, n_context=n_context, press=made)
    figures = {field.name: getattr(found.after, field.name) for field in dataclasses.fields(Reading)[3:]}
    figures |= {"nll_mean": found.after.nll, "delta_nll": found.after.nll - found.before.nll}
    figures |= {"n_tokens": len(found.truth), "kl_nat": found.kl_nat}
    path = runs.write(runs.planned[0], n_context, started, figures, {})
    return Explored(runs.loaded, runs.text, found, path)
