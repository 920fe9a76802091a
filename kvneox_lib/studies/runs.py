"""The runs of one call of a study: which are open, which are done, and writing them down."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kvneox_lib.inputs.files import make_ready
from kvneox_lib.inputs.text import HUB, PYTHON_DOCS, Text, load_text
from kvneox_lib.inputs.weights import LoadedModel, find_device, find_dtype, load_model
from kvneox_lib.neox.bits import GROUP
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import attention, check_press
from kvneox_lib.presses.by_name import expand_presses, make_press, press_row, ratio_for
from kvneox_lib.presses.facts import attention_needed
from kvneox_lib.presses.registry import RATIO_PER_LAYER
from kvneox_lib.studies import records
from kvneox_lib.studies.arguments import check_arguments, values_matter
from kvneox_lib.studies.plan import Planned, identity, left_out, one_after_the_other, text_name
from kvneox_lib.studies.provenance import provenance


@dataclass(frozen=True)
class Study:
    """What was measured: a row of `records` for each run, and the tables beside them."""

    loaded: LoadedModel
    text: Text | None
    folder: Path
    records: pd.DataFrame

    def table(self, name: str) -> pd.DataFrame:
        """That table of all runs, one below the other, with what tells them apart. Not every run has each table."""
        return records.tables_of(self.records, name)


class Runs:
    """Of one call of a `measure_...` function: `open` runs are measured and written, `study` has them all."""

    def __init__(self, measure: Callable, plan: Callable, asked: dict):
        check_arguments(measure, asked)
        self.measure, self.asked = measure, asked
        reads_text = "dataset" in asked
        options = ("revision", "weights", "attn_implementation", "dtype", "device", "seed")
        names = [name for name in options if name in asked]
        how = {"weights": "pretrained", "fallback": "demo" if values_matter(measure) else "random"}
        how |= {name: asked[name] for name in names}
        self.loaded = load_model(asked["model"], **how | {"dtype": _widest(asked["dtype"], asked["device"])})
        if "revision" in asked:  # the demo in the place of another model has none
            self.asked = asked = {**asked, "revision": self.loaded.revision}
        self.device = self.loaded.model.device
        self.folder = records.output_folder(asked["output_dir"])
        self.planned = plan(asked, self.loaded.model.config.max_position_embeddings)
        self._refuse_what_cannot_be_served()
        self.turned_out = {
            "model": self.loaded.name,
            "weights": self.loaded.weights,
            "weights_id": self.loaded.weights_id,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": self.device.type,
        }
        self.text = self._load_text() if reads_text else None
        self.of_text: dict[str, dict] = {}  # where runs read several, what each turned out to be
        make_ready(self.folder)

    def _load_text(self) -> Text:
        names, dataset = ("subset", "split", "sample_idx", "data_dir"), self.asked["dataset"]
        fallback = "python-docs" if dataset in HUB and self.asked["weights"] == "auto" else None
        text = load_text(dataset, **{name: self.asked[name] for name in names}, fallback=fallback)
        digest = hashlib.sha256("\0".join(text.documents).encode()).hexdigest()
        self.turned_out |= {"dataset": text.name, "text_sha256": digest[:16]}
        return text

    def _refuse_what_cannot_be_served(self) -> None:
        """Before any of them is run."""
        for group in one_after_the_other([run for run in self.planned if run.is_press]):
            with self.presses(group) as presses:
                for press in presses:
                    check_press(press, self.loaded.model)

    def context_length(self) -> int:
        """Of all runs of a plan that fits the context; says so where the trained length has cut it."""
        asked, length = self.asked["context_length"], self.planned[0].settings["context_length"]
        if length < asked and self.asked.get("context_limit") is None:
            trained = self.loaded.model.config.max_position_embeddings
            what = f"context_length={asked} is cut to {length}"
            warnings.warn(f"{what}, so that a window has the trained length, {trained} tokens", stacklevel=3)
        return length

    def times_on_this_machine(self) -> None:
        """What is timed is compared on one machine alone."""
        name = provenance(self.device)["device_name"]
        self.turned_out |= {"n_threads": torch.get_num_threads(), "device_name": name}

    def say_what_is_left_out(self) -> None:
        self.say_what_takes_no_budget()
        asked = self.asked["kv_bits"]
        found = left_out(expand_presses(self.asked["press"]), asked)
        if found:
            why = "what evicts while decoding needs keys and values as they are"
            warnings.warn(f"kv_bits={asked!r} leaves out {', '.join(found)}: {why}", stacklevel=3)

    def say_what_takes_no_budget(self) -> None:
        asked, names = self.asked["keep_tokens"], expand_presses(self.asked["press"])
        found = [name for name in names if press_row(name).strength == RATIO_PER_LAYER]
        if asked is not None and found:
            what = f"keep_tokens={asked!r} leaves out {', '.join(found)}"
            warnings.warn(f"{what}: they take a ratio for each layer", stacklevel=3)

    # ---- open and done ----

    def open(self) -> list[Planned]:
        """Those without a record, in the order of the plan. What failed may succeed now."""
        return [run for run in self.planned if not self._is_done(run)]

    def open_together(self) -> list[list[Planned]]:
        """The same, those together that differ in the ratio and the bits alone."""
        return one_after_the_other(self.open())

    def _is_done(self, run: Planned) -> bool:
        if self.asked.get("overwrite", True):
            return False
        found = records.find_record(self.folder, self.run_id(run), self.parameters(run))
        return found is not None and not found.get("failure")

    def run_id(self, run: Planned) -> str:
        found = {"dataset": None, "model": self.loaded.name, "weights": self.loaded.weights}
        if self.text is not None:
            found["dataset"] = "python-docs" if self.text.source == PYTHON_DOCS else text_name(self.asked["dataset"])
        return run.run_id(self.measure, self.asked, **found)

    def parameters(self, run: Planned) -> dict:
        found = {**identity(self.asked, run, self.turned_out), "attn_implementation": self.attention_for(run)}
        found |= self.of_text.get(run.settings.get("dataset"), {})
        if "dtype" in run.settings:  # one of several that were asked for
            found["dtype"] = str(find_dtype(run.settings["dtype"], self.device)).removeprefix("torch.")
        return found

    def attention_for(self, run: Planned) -> str:
        used = self.loaded.model.config._attn_implementation
        if not run.is_press or self.asked["attn_implementation"] != "auto":
            return used
        needed = attention_needed(press_of(self.loaded.model, run))
        return used if needed == "any" else needed

    @contextmanager
    def presses(self, runs: list[Planned]) -> Iterator[list]:
        """The press of each, with the model on an attention that serves it if the user left that open."""
        with made_presses(
            self.loaded.model, runs, self.asked["attn_implementation"], self.asked.get("seed", 0)
        ) as presses:
            yield presses

    # ---- writing ----

    def write(self, run: Planned, n_context: int, started: dict, figures: dict, tables: dict) -> Path:
        run_id = self.run_id(run)
        for table, frame in tables.items():
            records.write_table(self.folder, run_id, table, frame)
        rows = " ".join(f"{name}={len(frame)}" for name, frame in sorted(tables.items()))
        known = {**self.parameters(run), **_blocks(run)}
        record = {**started, **known, **figures, "context_tokens": n_context, "table_rows": rows or None}
        return records.write_record(self.folder, run_id, record)

    def study(self) -> Study:
        wanted = dict.fromkeys(self.run_id(run) for run in self.planned)
        found = records.load_records(self.folder).set_index("run_id", drop=False).loc[list(wanted)]
        return Study(self.loaded, self.text, self.folder, found.reset_index(drop=True))


def _widest(dtype: str | Sequence[str], device: str) -> str | torch.dtype:
    """Of several the one in which nothing is lost that another holds."""
    if isinstance(dtype, str):
        return dtype
    place = find_device("auto" if device == "all" else device)
    return max((find_dtype(name, place) for name in dtype), key=lambda found: found.itemsize)


@contextmanager
def made_presses(model: KVNeoXForCausalLM, runs: list[Planned], attn_implementation: str, seed: int):
    """The press of each run, which want the same attention. attn_implementation="auto": meanwhile the model uses it."""
    presses = [press_of(model, run) for run in runs]
    torch.manual_seed(seed)  # for presses that draw
    needed = attention_needed(presses[0])
    free = attn_implementation == "auto" and needed != "any"
    with attention(model, needed if free else model.config._attn_implementation):
        yield presses


def press_of(model: KVNeoXForCausalLM, run: Planned):
    if run.settings.get("keep_tokens") is not None:
        return make_press(run.press, keep_tokens=run.settings["keep_tokens"])
    return make_press(run.press, *([] if run.ratio is None else [ratio_for(run.press, run.ratio, model)]))


def bits_in(runs: list[Planned]) -> list[int | None]:
    return [run.settings["kv_bits"] for run in runs]


def _blocks(run: Planned) -> dict[str, int | None]:
    """How rounded numbers are grouped, and how many of the last tokens are kept as they are."""
    if "kv_bits" not in run.settings:
        return {}
    rounded = run.settings["kv_bits"] is not None
    return {"kv_group": GROUP if rounded else None, "kv_residual": 0 if rounded else None}


def head_table(**columns: np.ndarray) -> pd.DataFrame:
    """Long form of arrays (layers, heads)."""
    layer, head = np.indices(next(iter(columns.values())).shape)
    values = {name: array.ravel() for name, array in columns.items()}
    return pd.DataFrame({"layer": layer.ravel(), "head": head.ravel(), **values})
