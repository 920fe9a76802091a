"""A grid of presses and ratios, each measured once and kept as a record: what notebooks 01, 02 and 05 run.

The parameters are the notebooks', and the defaults here are theirs: a run is named after those that differ.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.windows import Windows, windows
from kvneox_lib.measures.perplexity import by_distance, score_each, summarize, teacher_forced_nll
from kvneox_lib.neox.checks import check_int
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies import records
from kvneox_lib.studies.runs import Runs, Study, head_table


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
                "heads": head_table(kept=kept),
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
