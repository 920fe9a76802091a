"""One exploration, kept as a record: what notebook 06 runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kvneox_lib.inputs.text import Text
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.explore import Exploration, Reading, excerpt, explore
from kvneox_lib.studies import records
from kvneox_lib.studies.runs import Runs, own_ratios


@dataclass(frozen=True)
class Explored:
    loaded: LoadedModel
    text: Text
    exploration: Exploration
    path: Path  # of the record


def record_exploration(
    *,
    model: str = "pythia-70m",
    weights: str = "auto",
    dataset: str = "wikitext",
    subset: str = "wikitext-103-v1",
    split: str = "test",
    sample_idx: int | None = 0,
    data_dir: str | None = None,
    press: str = "snapkv",
    compression_ratio: float = 0.75,
    position: float = 0.5,
    context_length: int = 512,
    continuation_length: int = 64,
    attn_implementation: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    output_dir: str = "results/explore",
) -> Explored:
    """`explore`, always anew, with its figures in a record. They are of a single piece of text, timed once."""
    runs = Runs(record_exploration, locals())
    places = {"position": position, "context_length": context_length, "continuation_length": continuation_length}
    input_ids, n_context = excerpt(runs.text, runs.loaded, **places)
    runs.parameters |= places
    (ratio,) = own_ratios(press, compression_ratio)
    started = records.provenance(runs.device)
    with runs.presses(press, [ratio]) as (made,):
        found = explore(runs.loaded.model, runs.loaded.tokenizer, input_ids, n_context=n_context, press=made)
    figures = {field.name: getattr(found.after, field.name) for field in dataclasses.fields(Reading)[3:]}
    figures |= {"nll_mean": found.after.nll, "delta_nll": found.after.nll - found.before.nll}
    figures |= {"n_tokens": len(found.truth), "kl_nat": found.kl_nat}
    path = runs.write(press, ratio, n_context, started, figures, {})
    return Explored(runs.loaded, runs.text, found, path)
