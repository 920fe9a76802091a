"""Recall of passkeys under a grid of presses and ratios, each measured once and kept: what notebook 05 runs."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.measures.intervals import wilson_ci95
from kvneox_lib.measures.recall import RecallResult, ask_each, copy_attention
from kvneox_lib.presses.by_name import expand_presses, make_press, ratio_for
from kvneox_lib.presses.facts import acts
from kvneox_lib.studies import records
from kvneox_lib.studies.runs import Runs, Study, as_list, head_table

QUESTION_TOKENS = 64  # room for a question and its answer


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
            heads = head_table(digits_kept=kept, copy_attention=reading)
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
