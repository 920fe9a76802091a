"""The runs of one study: which are still to be done, how each is named, kept and found again."""

import hashlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kvneox_lib.inputs.text import HUB, Text, load_text
from kvneox_lib.inputs.weights import LoadedModel, load_model
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import attention, check_press
from kvneox_lib.presses.by_name import make_press, press_row, ratio_for
from kvneox_lib.presses.facts import attention_needed
from kvneox_lib.presses.registry import RATIO_PER_LAYER, REGISTRY
from kvneox_lib.studies import records

# The first four are at the head of every run's name; where a text or a record lies does not change a figure; what the
# weights turned out to be is said for random ones, whatever was asked for.
NOT_IN_THE_ID = ("model", "dataset", "press", "compression_ratio", "weights", "data_dir", "output_dir", "overwrite")
# of a whole grid; each run of it has its own
NOT_IN_THE_ID += ("context_lengths", "batch_sizes", "methods", "ablation_sinks", "ablation_sizes")
RANDOM_TOKENS = "random-tokens"
KNOWN_IN_TABLES = ("press", "compression_ratio", "query_aware", "n_sink", "window")


@dataclass(frozen=True)
class Study:
    """What was measured: a row of `records` for each press and ratio, and the tables beside them."""

    loaded: LoadedModel
    text: Text | None
    folder: Path
    records: pd.DataFrame

    def table(self, name: str) -> pd.DataFrame:
        """That table of all runs, one below the other, with what tells them apart. Not every run has
        each table."""
        frames = []
        for row in self.records.to_dict("records"):
            path = records.table_path(self.folder, row["run_id"], name)
            if not path.exists():
                continue
            frame = pd.read_csv(path)
            known = {key: row[key] for key in KNOWN_IN_TABLES if key in row}
            frames.append(frame.assign(**known))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(KNOWN_IN_TABLES))


def name_run(asked: dict, defaults: dict, *, dataset: str, model: str, weights: str, press: str, ratio) -> str:
    """The run_id of one press at one ratio (None: its strength is its own), before or after the run. `asked`: all
    parameters of the call, and those that only this run of it has."""
    differing = {
        key: value
        for key, value in asked.items()
        if key not in NOT_IN_THE_ID and (key not in defaults or _plain(value) != _plain(defaults[key]))
    }
    differing |= {"weights": weights} if weights == "random" else {}
    return records.run_id(dataset, model, press, "own" if ratio is None else ratio, **differing)


def defaults_of(measure) -> dict:
    return {name: parameter.default for name, parameter in inspect.signature(measure).parameters.items()}


class Runs:
    """Of one call of a `measure_...` function, whose parameters and their defaults name them."""

    def __init__(self, measure, asked: dict):
        self.defaults = defaults_of(measure)
        self.asked = asked
        reads_text = "dataset" in asked  # time and memory do not depend on the text
        names = ("weights", "attn_implementation", "dtype", "device", "seed")
        fallback = "demo" if reads_text else "random"
        self.loaded = load_model(asked["model"], fallback=fallback, **{name: asked[name] for name in names})
        self.device = self.loaded.model.device
        self.folder = records.output_folder(asked["output_dir"])
        self.parameters = {  # as they turned out, which is what a figure depends on
            "model": self.loaded.name,
            "weights": self.loaded.weights,
            "dataset": RANDOM_TOKENS,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "seed": asked["seed"],
        }
        self.text = self._load_text() if reads_text else None
        self.wanted: list[str] = []

    def _load_text(self) -> Text:
        names, dataset = ("subset", "split", "sample_idx", "data_dir"), self.asked["dataset"]
        fallback = "python-docs" if dataset in HUB and self.asked["weights"] == "auto" else None
        text = load_text(dataset, **{name: self.asked[name] for name in names}, fallback=fallback)
        digest = hashlib.sha256("\0".join(text.documents).encode()).hexdigest()
        self.parameters |= {"dataset": text.name, "sample_idx": self.asked["sample_idx"], "text_sha256": digest[:16]}
        return text

    def context_length(self, context_length: int, others: int, context_limit: int | None) -> int:
        trained = self.loaded.model.config.max_position_embeddings
        limit = trained if context_limit is None else context_limit
        if context_limit is not None and not others < context_limit <= trained:
            raise ValueError(
                f"context_limit={context_limit!r}: must be above {others}, what is read after the context, and at most "
                f"{trained}, the trained length of {self.loaded.name}"
            )
        if others >= limit:
            raise ValueError(f"{others} tokens after the context leave no room for it: {self.loaded.name} has {limit}")
        if context_length > limit - others and context_limit is None:
            what = f"context_length={context_length} is cut to {limit - others}"
            warnings.warn(f"{what}, so that a window has the trained length, {limit} tokens", stacklevel=3)
        self.asked["context_length"] = min(context_length, limit - others)
        return self.asked["context_length"]

    def pending(self, names: list[str], ratios, **more) -> list[tuple[str, list]]:
        """Each press once, with the ratios whose record is not there. Presses that the model's attention cannot serve
        are refused before any of them is run."""
        pending = []
        for name in dict.fromkeys(names):
            own = own_ratios(name, ratios)
            with self.presses(name, own) as presses:
                for press in presses:
                    check_press(press, self.loaded.model)
            missing = [ratio for ratio in own if self.is_missing(name, ratio, **more)]
            if missing:
                pending.append((name, missing))
        return pending

    def is_missing(self, name: str, ratio: float | None, **more) -> bool:
        """Ask for this run, whose record may be there."""
        self.wanted.append(self._run_id(name, ratio, more))
        return self._find(name, ratio, more) is None

    @contextmanager
    def presses(self, name: str, ratios: list) -> Iterator[list]:
        """The press at each ratio, with the model on an attention that serves it if the user left that open."""
        asked = self.asked["attn_implementation"]
        with made_presses(self.loaded.model, name, ratios, asked, self.asked["seed"]) as presses:
            yield presses

    def _all_parameters(self, name: str, ratio: float | None, more: dict) -> dict:
        used = self.loaded.model.config._attn_implementation
        if name in REGISTRY:
            with self.presses(name, [ratio]):
                used = self.loaded.model.config._attn_implementation
        return {**self.parameters, **more, "press": name, "compression_ratio": ratio, "attn_implementation": used}

    def _run_id(self, name: str, ratio: float | None, more: dict) -> str:
        if self.text is None:
            dataset = RANDOM_TOKENS
        else:
            stands_in = self.text.name.startswith("python-docs")
            dataset = "python-docs" if stands_in else Path(self.asked["dataset"]).resolve().name
        found = {"dataset": dataset, "model": self.loaded.name, "weights": self.loaded.weights}
        return name_run({**self.asked, **more}, self.defaults, **found, press=name, ratio=ratio)

    def _find(self, name: str, ratio: float | None, more: dict) -> dict | None:
        if self.asked["overwrite"]:
            return None
        found = records.find_record(
            self.folder, self._run_id(name, ratio, more), self._all_parameters(name, ratio, more)
        )
        return None if found and found.get("failure") else found  # what failed may succeed now

    def write(self, name, ratio, n_context, started: dict, figures: dict, tables: dict, **more) -> Path:
        run_id, parameters = self._run_id(name, ratio, more), self._all_parameters(name, ratio, more)
        for table, frame in tables.items():
            records.write_table(self.folder, run_id, table, frame)
        record = {**started, **parameters, **figures, "context_tokens": n_context}
        return records.write_record(self.folder, run_id, record, parameters=parameters)

    def study(self) -> Study:
        found = records.load_records(self.folder).set_index("run_id", drop=False).loc[self.wanted]
        return Study(self.loaded, self.text, self.folder, found.reset_index(drop=True))


@contextmanager
def made_presses(model: KVNeoXForCausalLM, name: str, ratios: list, attn_implementation: str, seed: int):
    """The press at each ratio. attn_implementation="auto": meanwhile the model uses one that serves it."""
    presses = [make_press(name, *([] if ratio is None else [ratio_for(name, ratio, model)])) for ratio in ratios]
    torch.manual_seed(seed)  # for presses that draw
    needed = attention_needed(presses[0])
    free = attn_implementation == "auto" and needed != "any"
    with attention(model, needed if free else model.config._attn_implementation):
        yield presses


def own_ratios(press: str, ratios) -> list:
    """Those of `ratios` at which a press is measured: no_press at 0, one with a strength of its own once (None)."""
    if press == "no_press":
        return [0.0]
    row = press_row(press)
    return as_list(ratios) if row.takes_ratio or row.strength == RATIO_PER_LAYER else [None]


def as_list(values) -> list:
    return [values] if isinstance(values, bool | int | float | str) else list(values)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def head_table(**columns: np.ndarray) -> pd.DataFrame:
    """Long form of arrays (layers, heads)."""
    layer, head = np.indices(next(iter(columns.values())).shape)
    values = {name: array.ravel() for name, array in columns.items()}
    return pd.DataFrame({"layer": layer.ravel(), "head": head.ravel(), **values})
