"""A grid of presses and ratios, each measured once and kept as a record: what notebooks 01, 02 and 05 run.

The parameters are the notebooks', and the defaults here are theirs: a run is named after those that differ.
"""

import hashlib
import inspect
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib import records
from kvneox_lib.data import HUB, Text, load_text
from kvneox_lib.models import LoadedModel, load_model
from kvneox_lib.passkeys import recall_samples
from kvneox_lib.perplexity import by_distance, score_each, summarize, teacher_forced_nll
from kvneox_lib.presses import (
    attention,
    attention_needed,
    check_press,
    expand_presses,
    make_press,
    press_row,
    ratio_for,
)
from kvneox_lib.recall import RecallResult, ask_each, copy_attention
from kvneox_lib.registry import RATIO_PER_LAYER
from kvneox_lib.windows import Windows, check_int, windows

# The first four are at the head of every run's name; where a text or a record lies does not change a figure.
NOT_IN_THE_ID = ("model", "dataset", "press", "compression_ratio", "data_dir", "output_dir", "overwrite")
QUESTION_TOKENS = 64  # room for a question and its answer


@dataclass(frozen=True)
class Study:
    """What was measured: a row of `records` for each press and ratio, and the tables beside them."""

    loaded: LoadedModel
    text: Text
    folder: Path
    records: pd.DataFrame

    def table(self, name: str) -> pd.DataFrame:
        """That table of all runs, one below the other, with `press`, `compression_ratio` and `query_aware`."""
        frames = []
        for row in self.records.to_dict("records"):
            frame = pd.read_csv(records.table_path(self.folder, row["run_id"], name))
            known = {key: row[key] for key in ("press", "compression_ratio", "query_aware") if key in row}
            frames.append(frame.assign(**known))
        return pd.concat(frames, ignore_index=True)


def measure_perplexity(
    *,
    model: str = "pythia-70m",
    weights: str = "auto",
    dataset: str = "wikitext",
    subset: str = "wikitext-103-v1",
    split: str = "test",
    sample_idx: int | None = None,
    data_dir: str | None = None,
    press: str | Sequence[str] = "snapkv",
    compression_ratio: float | Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    context_length: int = 1024,
    continuation_length: int = 256,
    context_limit: int | None = None,
    max_windows: int | None = 16,
    control_windows: int = 4,
    batch_size: int = 4,
    attn_implementation: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    output_dir: str = "results/perplexity",
    overwrite: bool = False,
) -> Study:
    """Perplexity of the continuation of each window after its context was compressed, beside the teacher-forced control
    on the first `control_windows` windows. `no_press` is always measured too: differences are to it, window by window.

    context_limit: no window, context and continuation together, is longer; its context is cut for that.
    """
    asked = locals()
    check_int("batch_size", batch_size, 1)
    check_int("control_windows", control_windows, 1)
    runs = _Runs(measure_perplexity, asked)
    context_length = runs.context_length(context_length, continuation_length, context_limit)
    cut = windows(
        runs.text,
        runs.loaded.tokenizer,
        context_length=context_length,
        continuation_length=continuation_length,
        max_windows=max_windows,
    )
    runs.parameters |= {"context_length": context_length, "continuation_length": continuation_length}
    runs.parameters |= {"max_windows": max_windows, "control_windows": control_windows, "batch_size": batch_size}
    pending = runs.pending(["no_press", *expand_presses(press)], compression_ratio)
    progress = tqdm(
        total=len(cut.input_ids) * sum(len(ratios) + 1 for _, ratios in pending), unit="窗口", desc="困惑度"
    )
    for name, ratios in pending:
        progress.set_postfix_str(name)
        started, clock = records.provenance(runs.device), time.perf_counter()
        with runs.presses(name, ratios) as presses:
            baseline, *scored = _score_windows(runs.loaded.model, cut, [None, *presses], batch_size, progress)
            still, *control = _control(runs.loaded.model, cut, [None, *presses], control_windows)
        seconds = (time.perf_counter() - clock) / len(ratios)
        for ratio, result, control_nll in zip(ratios, scored, control):
            figures = summarize(result.nll, cut.n_bytes.numpy(), cut.n_words.numpy(), baseline.nll)
            kept = result.kept / context_length  # (layers, heads)
            figures |= {
                "kept_fraction": float(kept.mean()),
                "kv_bytes": result.kv_bytes,
                "control_nll_mean": control_nll,
                "control_delta_nll": control_nll - still,
                "run_s": seconds,
            }
            tables = {
                "windows": _window_table(cut, result.nll, baseline.nll),
                "distance": by_distance(result.nll, baseline.nll),
                "heads": _head_table(kept=kept),
            }
            runs.write(name, ratio, context_length, started, figures, tables)
    progress.close()
    return runs.study()


@dataclass(frozen=True)
class _WindowsScored:
    nll: np.ndarray  # (windows, L)
    kept: np.ndarray  # (layers, heads) mean over windows
    kv_bytes: int  # of one window


def _score_windows(model, cut: Windows, presses: list, batch_size: int, progress: tqdm) -> list[_WindowsScored]:
    batches = []
    for ids in cut.input_ids.split(batch_size):
        batches.append(score_each(model, ids, n_context=cut.context_length, presses=presses))
        progress.update(len(ids) * len(presses))
    n, results = len(cut.input_ids), []
    for scored in zip(*batches):
        nll = torch.cat([part.nll for part in scored]).double().cpu().numpy()
        kept = torch.cat([part.kept.cpu() for part in scored], dim=1).double().mean(1).numpy()
        results.append(_WindowsScored(nll, kept, sum(part.kv_bytes for part in scored) // n))
    return results


def _control(model, cut: Windows, presses: list, n_windows: int) -> list[float]:
    ids, scored = cut.input_ids[:n_windows], slice(cut.context_length, None)
    return [float(teacher_forced_nll(model, ids, press=press)[:, scored].double().mean()) for press in presses]


def _window_table(cut: Windows, nll: np.ndarray, baseline: np.ndarray) -> pd.DataFrame:
    places = {"document": cut.document, "position": cut.position, "n_bytes": cut.n_bytes, "n_words": cut.n_words}
    table = pd.DataFrame({name: values.numpy() for name, values in places.items()})
    return table.assign(nll_mean=nll.mean(1), delta_nll=(nll - baseline).mean(1))


def measure_recall(
    *,
    model: str = "pythia-70m",
    weights: str = "auto",
    dataset: str = "wikitext",
    subset: str = "wikitext-103-v1",
    split: str = "test",
    sample_idx: int | None = None,
    data_dir: str | None = None,
    press: str | Sequence[str] = ("random", "streaming_llm", "snapkv", "keydiff"),
    compression_ratio: float | Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    query_aware: bool | Sequence[bool] = False,
    n_keys: int = 20,
    keys_per_context: int = 5,
    depths: Sequence[float] | None = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
    context_length: int = 1024,
    context_limit: int | None = None,
    attn_implementation: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    output_dir: str = "results/recall",
    overwrite: bool = False,
) -> Study:
    """Recall of passkeys hidden in the text, by press, ratio, depth, and whether the press saw the question.

    context_limit: no context with a question and its answer is longer; the context is cut for that.
    """
    asked = locals()
    modes = [query_aware] if isinstance(query_aware, bool | str) else list(query_aware)
    if not modes or not all(isinstance(mode, bool) for mode in modes):
        raise ValueError(f"query_aware={query_aware!r}: must be True, False or a list of them")
    runs = _Runs(measure_recall, asked)
    context_length = runs.context_length(context_length, QUESTION_TOKENS, context_limit)
    samples = recall_samples(
        runs.loaded.tokenizer,
        filler="\n\n".join(runs.text.documents),
        n_keys=n_keys,
        keys_per_context=keys_per_context,
        context_length=context_length,
        depths=depths,
        seed=seed,
    )
    runs.parameters |= {"n_keys": n_keys, "keys_per_context": keys_per_context, "context_length": context_length}
    runs.parameters |= {"depths": depths if depths is None else list(depths)}
    pending = [
        (mode, name, ratios)
        for mode in modes
        for name, ratios in runs.pending(["no_press", *expand_presses(press)], compression_ratio, query_aware=mode)
    ]
    reading = copy_attention(runs.loaded.model, samples[:4]).numpy() if pending else None
    progress = tqdm(total=n_keys * sum(len(ratios) for _, _, ratios in pending), unit="问", desc="检索")
    for mode, name, ratios in pending:
        progress.set_postfix_str(name)
        started, clock, rows = records.provenance(runs.device), time.perf_counter(), []
        with runs.presses(name, ratios) as presses:
            for sample in samples:
                for row in ask_each(runs.loaded.model, sample, presses, mode):
                    rows.append(row)
                    progress.update(len(row))
        seconds = (time.perf_counter() - clock) / len(ratios)
        for ratio, result in zip(ratios, map(RecallResult, zip(*rows))):
            table = pd.DataFrame([asdict(row) for row in result.rows])
            by_head = table.pop("digits_kept_by_head")
            kept = np.full_like(reading, np.nan) if by_head[0] is None else torch.stack([*by_head]).mean(0).numpy()
            low, high = wilson_ci95(int(table["correct"].sum()), len(table))
            figures = {
                "accuracy": result.accuracy,
                "accuracy_ci95_low": low,
                "accuracy_ci95_high": high,
                "nll_mean": result.nll,
                "n_tokens": sum(len(key.answer_ids) for sample in samples for key in sample.keys),
                **table[["digits_kept", "statement_kept", "kept_fraction", "kv_bytes"]].mean(),
                "digits_kept_where_read": (kept * reading).sum() / reading.sum(),
                "run_s": seconds,
            }
            figures = {name: None if pd.isna(value) else value for name, value in figures.items()}
            heads = _head_table(digits_kept=kept, copy_attention=reading)
            runs.write(name, ratio, context_length, started, figures, {"keys": table, "heads": heads}, query_aware=mode)
    progress.close()
    return runs.study()


def _head_table(**columns: np.ndarray) -> pd.DataFrame:
    """Long form of arrays (layers, heads)."""
    layer, head = np.indices(next(iter(columns.values())).shape)
    values = {name: array.ravel() for name, array in columns.items()}
    return pd.DataFrame({"layer": layer.ravel(), "head": head.ravel(), **values})


def wilson_ci95(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, honest near 0 and 1 too."""
    z, share = 1.959964, hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# ---- what both have in common ---------------------------------------------------------------------------------------


class _Runs:
    """The runs of one study: which are still to be done, how each is named and kept."""

    def __init__(self, measure, asked: dict):
        self.defaults = {name: parameter.default for name, parameter in inspect.signature(measure).parameters.items()}
        self.asked = asked
        names = ("weights", "attn_implementation", "dtype", "device", "seed")
        self.loaded = load_model(asked["model"], **{name: asked[name] for name in names})
        self.text = load_text(
            asked["dataset"],
            **{name: asked[name] for name in ("subset", "split", "sample_idx", "data_dir")},
            fallback="python-docs" if asked["dataset"] in HUB else None,
        )
        self.device = self.loaded.model.device
        self.folder = records.output_folder(asked["output_dir"])
        digest = hashlib.sha256("\0".join(self.text.documents).encode()).hexdigest()
        self.parameters = {  # as they turned out, which is what a figure depends on
            "model": self.loaded.name,
            "weights": self.loaded.weights,
            "dataset": self.text.name,
            "sample_idx": asked["sample_idx"],
            "text_sha256": digest[:16],
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "seed": asked["seed"],
        }
        self.wanted: list[str] = []

    def context_length(self, context_length: int, others: int, context_limit: int | None) -> int:
        trained = self.loaded.model.config.max_position_embeddings
        limit = trained if context_limit is None else context_limit
        if context_limit is not None and not others < context_limit <= trained:
            raise ValueError(
                f"context_limit={context_limit!r}: must be above {others}, what is read after the context, and at most "
                f"{trained}, the trained length of {self.loaded.name}"
            )
        return min(context_length, limit - others)

    def pending(self, names: list[str], ratios, **more) -> list[tuple[str, list]]:
        """Each press once, with the ratios whose record is not there. Presses that the model's attention cannot serve
        are refused before any of them is run."""
        ratios = [ratios] if isinstance(ratios, int | float) else list(ratios)
        pending = []
        for name in dict.fromkeys(names):
            by_ratio = press_row(name).takes_ratio or press_row(name).strength == RATIO_PER_LAYER
            own = [0.0] if name == "no_press" else ratios if by_ratio else [None]
            with self.presses(name, own) as presses:
                for press in presses:
                    check_press(press, self.loaded.model)
            missing = [ratio for ratio in own if self._find(name, ratio, more) is None]
            self.wanted += [self._run_id(name, ratio, more) for ratio in own]
            if missing:
                pending.append((name, missing))
        return pending

    @contextmanager
    def presses(self, name: str, ratios: list) -> Iterator[list]:
        """The press at each ratio, with the model on an attention that serves it if the user left that open."""
        lm = self.loaded.model
        presses = [make_press(name, *([] if ratio is None else [ratio_for(name, ratio, lm)])) for ratio in ratios]
        torch.manual_seed(self.asked["seed"])  # for presses that draw
        with attention(lm, self._attention(presses[0])):
            yield presses

    def _attention(self, press) -> str:
        needed = attention_needed(press)
        free = self.asked["attn_implementation"] == "auto" and needed != "any"
        return needed if free else self.loaded.model.config._attn_implementation

    def _all_parameters(self, name: str, ratio: float | None, more: dict) -> dict:
        with self.presses(name, [ratio]):
            used = self.loaded.model.config._attn_implementation
        return {**self.parameters, **more, "press": name, "compression_ratio": ratio, "attn_implementation": used}

    def _run_id(self, name: str, ratio: float | None, more: dict) -> str:
        stands_in = self.text.name.startswith("python-docs")
        dataset = "python-docs" if stands_in else Path(self.asked["dataset"]).resolve().name
        asked = {**self.asked, **more}
        differing = {
            key: value
            for key, value in asked.items()
            if key not in NOT_IN_THE_ID and _plain(value) != _plain(self.defaults[key])
        }
        return records.run_id(dataset, self.loaded.name, name, "own" if ratio is None else ratio, **differing)

    def _find(self, name: str, ratio: float | None, more: dict) -> dict | None:
        if self.asked["overwrite"]:
            return None
        return records.find_record(
            self.folder, self._run_id(name, ratio, more), self._all_parameters(name, ratio, more)
        )

    def write(self, name, ratio, context_length, started: dict, figures: dict, tables: dict, **more) -> None:
        run_id, parameters = self._run_id(name, ratio, more), self._all_parameters(name, ratio, more)
        for table, frame in tables.items():
            records.write_table(self.folder, run_id, table, frame)
        record = {**started, **parameters, **figures, "context_tokens": context_length}
        records.write_record(self.folder, run_id, record, parameters=parameters)

    def study(self) -> Study:
        found = records.load_records(self.folder).set_index("run_id", drop=False).loc[self.wanted]
        return Study(self.loaded, self.text, self.folder, found.reset_index(drop=True))


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
