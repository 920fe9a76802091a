"""A grid of presses and ratios, each measured once and kept as a record: what notebooks 01, 02 and 05 run.

The parameters are the notebooks', and the defaults here are theirs: a run is named after those that differ.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.inputs.windows import Windows, check_int, windows
from kvneox_lib.measures.perplexity import by_distance, score_each, summarize, teacher_forced_nll
from kvneox_lib.measures.recall import RecallResult, ask_each, copy_attention
from kvneox_lib.presses.facts import acts, expand_presses, make_press, ratio_for
from kvneox_lib.studies import records
from kvneox_lib.studies.runs import Runs, Study, as_list

QUESTION_TOKENS = 64  # room for a question and its answer


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
    runs = Runs(measure_perplexity, asked)
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
            still, *control = _control(runs.loaded.model, cut, [None, *presses], control_windows, batch_size)
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


def _control(model, cut: Windows, presses: list, n_windows: int, batch_size: int) -> list[float]:
    batches, scored = cut.input_ids[:n_windows].split(batch_size), slice(cut.context_length, None)
    nll = [[teacher_forced_nll(model, ids, press=press)[:, scored] for ids in batches] for press in presses]
    return [float(torch.cat(of_press).double().mean()) for of_press in nll]


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
    modes = as_list(query_aware)
    if not modes or not all(isinstance(mode, bool) for mode in modes):
        raise ValueError(f"query_aware={query_aware!r}: must be True, False or a list of them")
    runs = Runs(measure_recall, asked)
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
    names = ["no_press", *_that_act_before(press, runs.loaded.model)]
    pending = [
        (mode, name, ratios)
        for mode in modes
        for name, ratios in runs.pending(names, compression_ratio, query_aware=mode)
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


def _that_act_before(press: str | Sequence[str], model) -> list[str]:
    """Without the presses that act while decoding: they wait for more tokens than a question has, and would pass."""
    names = expand_presses(press)
    waiting = [name for name in names if acts(make_press(name, ratio_for(name, 0.5, model))) == "decoding"]
    if waiting:
        what = "not asked, as they compress only after more tokens than a question has"
        warnings.warn(f"{what}: {', '.join(waiting)}", stacklevel=3)
    return [name for name in names if name not in waiting]


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
