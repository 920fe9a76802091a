"""One exploration, kept as a record: what notebook 06 runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kvneox_lib.inputs.text import Text
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.explore import Exploration, Reading, excerpt, explore
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.arguments import whole
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
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.QualityWeights = "auto",
    dataset: may_be.Dataset = "wikitext",
    subset: may_be.Subset | None = "wikitext-103-v1",
    split: may_be.Split = "test",
    sample_idx: may_be.Index | None = 0,
    data_dir: may_be.Folder | None = None,
    press: may_be.Press = "snapkv",
    compression_ratio: may_be.Ratio = 0.75,
    position: may_be.Share = 0.5,
    context_length: may_be.Count = 512,
    continuation_length: Continuation = 64,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/explore",
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
