"""What a call of a study is going to write, before it runs: which runs, and how each is named.

The measuring function walks its study's plan, and the sweep declares the same plan without loading a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvneox_lib.inputs.text import HUB, digest_of_text
from kvneox_lib.inputs.weights import (
    PYTHIA_NAMES,
    Target,
    cached_folder,
    demo_folder,
    digest_of_weights,
    find_target,
    read_config,
)
from kvneox_lib.presses.budget import ratio_at
from kvneox_lib.presses.by_name import make_press, press_row
from kvneox_lib.presses.facts import decoding_part
from kvneox_lib.presses.registry import RATIO_PER_LAYER
from kvneox_lib.studies import records
from kvneox_lib.studies.arguments import defaults_of

PYTHIA_LENGTH = 2048  # the trained length of all of them
# The first four are at the head of every run's name; what the weights turned out to be is said for random ones,
# whatever was asked for.
IN_THE_HEAD = ("model", "dataset", "press", "compression_ratio", "keep_tokens", "weights")
# Of a whole grid: each run of it has its own.
OF_A_GRID = ("presses", "tasks", "context_lengths", "batch_sizes", "engines", "methods")
OF_A_GRID += ("ablation_sinks", "ablation_sizes")
# Where a text or a record lies changes no figure.
PLACES = ("data_dir", "output_dir", "overwrite")
# How a text was found and a context cut: what came of it is among the parameters, as text_sha256 and context_length.
FOUND_BY = ("subset", "split", "context_limit")


@dataclass(frozen=True)
class Planned:
    """One run: a press, or what stands in its place, at a ratio (None: its strength is its own). With `keep_tokens`
    among its settings, the ratio is the share that goes of a context of its length; None where lengths differ."""

    press: str
    ratio: float | None
    settings: dict = field(default_factory=dict)  # parameters that this run has for itself
    always_named: tuple[str, ...] = ()  # of them
    is_press: bool = True

    def run_id(self, measure: Callable, asked: dict, *, dataset: str | None, model: str, weights: str | None) -> str:
        """dataset, model, weights: as they turned out. Of the parameters those are named that differ from the default
        of `measure`, or are no parameters of it."""
        defaults, asked = defaults_of(measure), {**asked, **self.settings}
        may_be_named = [name for name in asked if name not in (*IN_THE_HEAD, *OF_A_GRID, *PLACES)]
        named = {name: asked[name] for name in may_be_named if differs(asked[name], defaults.get(name, differs))}
        named |= {"weights": weights} if weights == "random" else {}
        named |= {name: asked[name] for name in self.always_named} | ids_of_what_is_local(asked)
        return records.run_id(self.settings.get("dataset", dataset), model, self.press, self._strength(), **named)

    def _strength(self) -> float | str:
        if self.settings.get("keep_tokens") is not None:
            return f"keep{self.settings['keep_tokens']}"
        return "own" if self.ratio is None else self.ratio


def differs(value, default) -> bool:
    one, other = (list(part) if isinstance(part, tuple) else part for part in (value, default))
    return one != other


def identity(asked: dict, planned: Planned, turned_out: dict) -> dict:
    """All that a figure depends on: a record is used again if these are equal. What was asked for, less a short list,
    as it turned out."""
    kept = {name: value for name, value in asked.items() if name not in (*OF_A_GRID, *PLACES, *FOUND_BY)}
    of_the_run = {"press": planned.press, "compression_ratio": planned.ratio, **planned.settings}
    if planned.is_press:
        of_the_run["press_options"] = options_of(planned.press)
    return {**kept, **turned_out, **of_the_run}


def options_of(press: str) -> str | None:
    """Defaults of ours: where they change, what was measured before is of another press."""
    return " ".join(f"{name}={value}" for name, value in sorted(press_row(press).defaults.items())) or None


def declared(measure: Callable, plan: Callable, asked: dict) -> list[str]:
    """The names of the records that a call with these parameters (all of them) is going to write."""
    dataset = text_name(asked["dataset"]) if "dataset" in asked else None
    found = {"dataset": dataset, "model": target_of(asked).name, "weights": asked.get("weights")}
    planned = plan(asked, trained_length(asked))
    return list(dict.fromkeys(run.run_id(measure, asked, **found) for run in planned))


def ids_of_what_is_local(asked: dict) -> dict[str, str]:
    """What tells a folder of weights, or a text of yours, from others of that name."""
    found, target = {}, target_of(asked)
    if target.folder is not None and target.folder != demo_folder():
        found["weights_id"] = digest_of_weights(target.folder)[:8]
    text = asked.get("data_dir") or asked.get("dataset")
    if text not in (None, *HUB, "python-docs") and Path(text).expanduser().exists():
        found["text_id"] = digest_of_text(Path(text).expanduser())[:8]
    return found


def text_name(dataset: str) -> str:
    return Path(dataset).resolve().name


def target_of(asked: dict) -> Target:
    return find_target(asked["model"], asked.get("revision"))


def trained_length(asked: dict) -> int | None:
    """None for a model of the hub whose config is not at hand."""
    target = target_of(asked)
    if target.name in PYTHIA_NAMES and target.folder is None:
        return PYTHIA_LENGTH
    folder = target.folder or cached_folder(target.repo, asked.get("revision"))
    return None if folder is None else read_config(folder).max_position_embeddings


# ---- parts of plans -------------------------------------------------------------------------------------------------


def strengths(asked: dict) -> tuple:
    """What was asked for of ratios and, in their place, of budgets."""
    return asked["compression_ratio"], asked["keep_tokens"]


def at_ratios(press: str, ratios, keep_tokens=None, **settings) -> list[Planned]:
    """keep_tokens: budgets in the place of ratios, for what takes one. What takes one for each layer is left out."""
    if keep_tokens is None or press == "no_press" or _strength_is_its_own(press):
        return [Planned(press, ratio, {**settings, "keep_tokens": None}) for ratio in own_ratios(press, ratios)]
    if press_row(press).strength == RATIO_PER_LAYER:
        return []
    length = settings.get("context_length")
    return [
        Planned(press, None if length is None else ratio_at(budget, length), {**settings, "keep_tokens": budget})
        for budget in dict.fromkeys(as_list(keep_tokens))
    ]


def _strength_is_its_own(press: str) -> bool:
    row = press_row(press)
    return not row.takes_ratio and row.strength != RATIO_PER_LAYER


def own_ratios(press: str, ratios) -> list:
    """Those of `ratios` at which a press is measured: no_press at 0, one with a strength of its own once (None)."""
    if press == "no_press":
        return [0.0]
    return [None] if _strength_is_its_own(press) else list(dict.fromkeys(map(float, as_list(ratios))))


def bits_of(press: str, kv_bits) -> list[int | None]:
    """Those of `kv_bits` at which a press is measured: no_press at each, and as it is, which differences are to; one
    that evicts while decoding needs keys and values as they are."""
    asked = list(dict.fromkeys(as_list(kv_bits)))
    if press == "no_press":
        return list(dict.fromkeys([None, *asked]))
    return asked if asked == [None] or not evicts_while_decoding(press) else [bits for bits in asked if bits is None]


def left_out(presses: Sequence[str], kv_bits) -> list[str]:
    """The presses that are measured at none of `kv_bits`; ValueError where no other was asked for."""
    found = [name for name in presses if not bits_of(name, kv_bits)]
    if found and not set(presses) - {*found, "no_press"}:
        raise ValueError(
            f"kv_bits={kv_bits!r}: {', '.join(found)} would be left out, as what evicts while decoding needs keys and "
            "values as they are, and nothing else was asked for; allowed is None, or a list with None in it"
        )
    return found


def evicts_while_decoding(press: str) -> bool:
    ratio = [0.5] if press_row(press).strength == RATIO_PER_LAYER else 0.5
    return decoding_part(make_press(press, ratio)) is not None


def as_list(values) -> list:
    """Of one value (None is one) or several."""
    return [values] if values is None or isinstance(values, bool | int | float | str) else list(values)


def fitting_context(asked: dict, others: int, trained: int | None) -> int:
    """`context_length`, cut so that it and the `others`, the tokens after it, are no longer than context_limit and
    the trained length (None: unknown)."""
    given = asked.get("context_limit")
    if given is not None and trained is not None and given > trained:
        raise ValueError(f"context_limit={given!r}: allowed is at most {trained}, the trained length")
    limit = given or trained
    if limit is None:
        return asked["context_length"]
    if limit <= others:
        own = "continuation_length" if "continuation_length" in asked else "model"
        name = "context_limit" if given is not None else own
        what = f"the {others} tokens after the context leave no room for it in a window of {limit}"
        raise ValueError(f"{name}={asked[name]!r}: {what}")
    return min(asked["context_length"], limit - others)


def one_after_the_other(planned: Sequence[Planned]) -> list[list[Planned]]:
    """Runs that differ in what is kept and in how many bits alone, together: they are measured in one go."""
    groups: dict[tuple, list[Planned]] = {}
    for run in planned:
        groups.setdefault((run.press, *but_for_what_is_kept(run).items()), []).append(run)
    return list(groups.values())


def but_for_what_is_kept(run: Planned) -> dict:
    """What must be equal in runs that share the reading of a context."""
    return {name: value for name, value in run.settings.items() if name not in ("kv_bits", "keep_tokens")}
