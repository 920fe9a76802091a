"""Perplexity under a grid of presses and ratios, each measured once and kept: what notebooks 01 and 02 run.

The parameters are the notebooks', and the defaults here are theirs: a run is named after those that differ.
"""

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.windows import Windows, windows
from kvneox_lib.measures.chunks import check_reading
from kvneox_lib.measures.degenerate import figures_of_each
from kvneox_lib.measures.perplexity import Scored, by_distance, score_each, summarize, teacher_forced_nll
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.presses.facts import calibration_seconds
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.plan import (
    Planned,
    at_ratios,
    bits_of,
    fitting_context,
    left_out,
    one_after_the_other,
    strengths,
)
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study, bits_in, head_table


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """No compression, and each press at each ratio, in each number of bits."""
    if asked["evict_while_reading"] and asked["prefill_chunk"] is None:
        raise ValueError("evict_while_reading=True: allowed beside a prefill_chunk, after each of which is evicted")
    length = fitting_context(asked, asked["continuation_length"], trained)
    presses = expand_presses(asked["press"])
    left_out(presses, asked["kv_bits"])
    return [
        run
        for name in dict.fromkeys(["no_press", *presses])
        for bits in bits_of(name, asked["kv_bits"])
        for run in at_ratios(name, *strengths(asked), context_length=length, kv_bits=bits)
    ]


def measure_perplexity(
    *,
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.QualityWeights = "auto",
    dataset: may_be.Dataset = "wikitext",
    subset: may_be.Subset | None = "wikitext-103-v1",
    split: may_be.Split = "test",
    sample_idx: may_be.Index | None = None,
    data_dir: may_be.Folder | None = None,
    press: may_be.Presses = "snapkv",
    compression_ratio: may_be.Ratios = (0.25, 0.5, 0.75, 0.9),
    keep_tokens: may_be.Budgets | None = None,
    kv_bits: may_be.Bits = None,
    context_length: may_be.Count = 1024,
    continuation_length: may_be.Count = 256,
    context_limit: may_be.Count | None = None,
    max_windows: may_be.Count | None = 16,
    control_windows: may_be.Count = 4,
    batch_size: may_be.Count = 4,
    prefill_chunk: may_be.Count | None = None,
    evict_while_reading: may_be.YesOrNo = False,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/wikitext_ppl",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """Perplexity of the continuation of each window after its context was compressed, beside the teacher-forced control
    on the first `control_windows` windows. `no_press` is always measured too: differences are to it, window by window.

    context_limit: no window, context and continuation together, is longer; its context is cut for that.
    keep_tokens: entries of each head to keep, one budget or several, in the place of compression_ratio.
    kv_bits: in how many bits a number of what is left of a context is kept; None: as it is.
    prefill_chunk, evict_while_reading: how a context is read under a press; without one it is read in one pass.
    """
    runs = Runs(measure_perplexity, plan, locals())
    runs.say_what_is_left_out()
    context_length = runs.context_length()
    reading = {"prefill_chunk": prefill_chunk, "evict_while_reading": evict_while_reading}
    _refuse_what_cannot_be_read_so(runs, context_length, reading)
    cut = windows(
        runs.text,
        runs.loaded.tokenizer,
        context_length=context_length,
        continuation_length=continuation_length,
        max_windows=max_windows,
    )
    together = runs.open_together()
    progress = tqdm(total=len(cut.input_ids) * sum(len(group) + 1 for group in together), unit="窗口", desc="困惑度")
    for group in together:
        progress.set_postfix_str(group[0].press)
        started, clock = provenance(runs.device), time.perf_counter()
        with runs.presses(group) as presses:
            baseline, *scored = _score_windows(
                runs.loaded.model, cut, list(zip(presses, bits_in(group))), batch_size, reading, progress
            )
            still, *control = _control(runs.loaded.model, cut, [None, *presses], control_windows, batch_size)
            behaved = figures_of_each(runs.loaded.model, cut.input_ids[:1, :context_length], presses)
        seconds = (time.perf_counter() - clock) / len(group)
        for run, result, control_nll, behaviour in zip(group, scored, control, behaved):
            documents = cut.document.numpy()
            figures = summarize(result.nll, cut.n_bytes.numpy(), cut.n_words.numpy(), baseline.nll, documents)
            kept = result.kept / context_length  # (layers, heads)
            figures |= behaviour | {
                "kept_fraction": float(kept.mean()),
                "kv_bytes": result.kv_bytes,
                "control_nll_mean": control_nll,
                "control_delta_nll": control_nll - still,
                "run_s": seconds,
            }
            calibrated = calibration_seconds(presses[group.index(run)])
            figures |= {} if calibrated is None else {"calibration_s": calibrated}
            tables = {
                "windows": _window_table(cut, result.nll, baseline.nll),
                "distance": by_distance(result.nll, baseline.nll, documents),
                "heads": head_table(kept=kept),
            }
            runs.write(run, context_length, started, figures, tables)
    progress.close()
    return runs.study()


def _refuse_what_cannot_be_read_so(runs: Runs, context_length: int, reading: dict) -> None:
    """Before any of them is run."""
    for group in one_after_the_other([run for run in runs.planned if run.press != "no_press"]):
        with runs.presses(group) as presses:
            for press in presses:
                check_reading(runs.loaded.model, context_length, press, **reading)


@dataclass(frozen=True)
class _WindowsScored:
    nll: np.ndarray  # (windows, L)
    kept: np.ndarray  # (layers, heads) mean over windows
    kv_bytes: int  # of one window


def _score_windows(
    model, cut: Windows, stored: list[tuple], batch_size: int, reading: dict, progress: tqdm
) -> list[_WindowsScored]:
    """No press and nothing rounded, then each of `stored`, a press and the bits in which what it leaves is kept."""
    batches = []
    for ids in cut.input_ids.split(batch_size):
        batches.append(_score_batch(model, ids, cut.context_length, stored, reading))
        progress.update(len(ids) * (len(stored) + 1))
    n, results = len(cut.input_ids), []
    for scored in zip(*batches):
        nll = torch.cat([part.nll for part in scored]).double().cpu().numpy()
        kept = torch.cat([part.kept.cpu() for part in scored], dim=1).double().mean(1).numpy()
        results.append(_WindowsScored(nll, kept, sum(part.kv_bytes for part in scored) // n))
    return results


def _score_batch(model, ids: torch.Tensor, n_context: int, stored: list[tuple], reading: dict) -> list[Scored]:
    presses, kv_bits = map(list, zip(*stored))
    how = {"n_context": n_context}
    if reading["prefill_chunk"] is None or all(press is None for press in presses):
        return score_each(model, ids, presses=[None, *presses], kv_bits=[None, *kv_bits], **how)  # of one pass
    baseline = score_each(model, ids, presses=[None], **how)
    return baseline + score_each(model, ids, presses=presses, kv_bits=kv_bits, **how, **reading)


def _control(model, cut: Windows, presses: list, n_windows: int, batch_size: int) -> list[float]:
    batches, scored = cut.input_ids[:n_windows].split(batch_size), slice(cut.context_length, None)
    nll = [[teacher_forced_nll(model, ids, press=press)[:, scored] for ids in batches] for press in presses]
    return [float(torch.cat(of_press).double().mean()) for of_press in nll]


def _window_table(cut: Windows, nll: np.ndarray, baseline: np.ndarray) -> pd.DataFrame:
    places = {"document": cut.document, "position": cut.position, "n_bytes": cut.n_bytes, "n_words": cut.n_words}
    places |= {"part": cut.part} if cut.part.any() else {}  # of a large document
    table = pd.DataFrame({name: values.numpy() for name, values in places.items()})
    return table.assign(nll_mean=nll.mean(1), delta_nll=(nll - baseline).mean(1))
