"""Recall of passkeys under a grid of presses and ratios, each measured once and kept: what notebook 05 runs."""

import time
import warnings
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.passkeys import RecallSample, recall_samples
from kvneox_lib.inputs.templates import expand_templates
from kvneox_lib.measures.degenerate import figures_of_each
from kvneox_lib.measures.intervals import share_ci95
from kvneox_lib.measures.recall import RecallResult, ask_each, copy_attention, first_context
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.plan import (
    Planned,
    as_list,
    at_ratios,
    bits_of,
    evicts_while_decoding,
    fitting_context,
    strengths,
)
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study, bits_in, head_table

QUESTION_TOKENS = 64  # room for a question and its answer
WHY_NOT_ASKED = "not asked, as they compress only after more tokens than a question has"


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """In each wording, with the question outside, inside, or both: no compression, and each press at each ratio, in
    each number of bits."""
    length, presses = fitting_context(asked, QUESTION_TOKENS, trained), expand_presses(asked["press"])
    asleep = asleep_while_asked(presses)
    return [
        run
        for template in expand_templates(asked["template"])
        for mode in dict.fromkeys(as_list(asked["query_aware"]))
        for name in dict.fromkeys(["no_press", *presses])
        if name not in asleep
        for bits in bits_of(name, asked["kv_bits"])
        for run in at_ratios(
            name,
            *strengths(asked),
            template=template,
            query_aware=mode,
            context_length=length,
            kv_bits=bits,
        )
    ]


def asleep_while_asked(presses: list[str]) -> list[str]:
    """Those that act while decoding: they wait for more tokens than a question has, and would pass."""
    return [name for name in presses if evicts_while_decoding(name)]


def measure_recall(
    *,
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.QualityWeights = "auto",
    dataset: may_be.Dataset = "wikitext",
    subset: may_be.Subset | None = "wikitext-103-v1",
    split: may_be.Split = "test",
    sample_idx: may_be.Index | None = None,
    data_dir: may_be.Folder | None = None,
    press: may_be.Presses = ("random", "streaming_llm", "snapkv", "keydiff"),
    compression_ratio: may_be.Ratios = (0.25, 0.5, 0.75, 0.9),
    keep_tokens: may_be.Budgets | None = None,
    kv_bits: may_be.Bits = None,
    query_aware: may_be.YesesAndNoes = False,
    template: may_be.Templates = "passkey",
    n_keys: may_be.Count = 20,
    keys_per_context: may_be.Count = 5,
    n_distractors: may_be.Index = 0,
    depths: may_be.Shares | None = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
    context_length: may_be.Count = 1024,
    context_limit: may_be.Count | None = None,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/recall",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """Recall of passkeys hidden in the text, by press, ratio, depth, wording, and whether the press saw the question.

    context_limit: no context with a question and its answer is longer; the context is cut for that. keep_tokens:
    entries of each head to keep, one budget or several, in the place of compression_ratio. kv_bits: in how many bits a
    number of what is left of a context is kept; None: as it is. template, n_distractors: the wordings, and numbers that
    nobody asks for, as in `recall_samples`; names, digits and depths are the same in all of them.
    """
    runs = Runs(measure_recall, plan, locals())
    runs.say_what_takes_no_budget()
    asleep = asleep_while_asked(expand_presses(press))
    if asleep:
        warnings.warn(f"{WHY_NOT_ASKED}: {', '.join(asleep)}", stacklevel=2)
    context_length = runs.context_length()
    samples = {
        name: recall_samples(
            runs.loaded.tokenizer,
            filler="\n\n".join(runs.text.documents),
            n_keys=n_keys,
            keys_per_context=keys_per_context,
            context_length=context_length,
            depths=None if depths is None else as_list(depths),
            seed=seed,
            template=name,
            n_distractors=n_distractors,
        )
        for name in expand_templates(template)
    }
    together = runs.open_together()
    wanted = dict.fromkeys(group[0].settings["template"] for group in together)
    reading = {name: copy_attention(runs.loaded.model, samples[name][:4]).numpy() for name in wanted}
    progress = tqdm(total=n_keys * sum(map(len, together)), unit="问", desc="检索")
    for group in together:
        progress.set_postfix_str(group[0].press)
        started, clock, rows = provenance(runs.device), time.perf_counter(), []
        inside, name = (group[0].settings[what] for what in ("query_aware", "template"))
        with runs.presses(group) as presses:
            behaved = figures_of_each(runs.loaded.model, first_context(samples[name][0], inside), presses)
            for sample in samples[name]:
                for row in ask_each(runs.loaded.model, sample, presses, inside, bits_in(group)):
                    rows.append(row)
                    progress.update(len(row))
        seconds = (time.perf_counter() - clock) / len(group)
        for run, result, behaviour in zip(group, map(RecallResult, zip(*rows)), behaved):
            figures, tables = _measured(result, samples[name], reading[name])
            runs.write(run, context_length, started, {**behaviour, **figures, "run_s": seconds}, tables)
    progress.close()
    return runs.study()


def _measured(
    result: RecallResult, samples: list[RecallSample], reading: np.ndarray
) -> tuple[dict, dict[str, pd.DataFrame]]:
    """The figures of a run and its tables. reading: (layers, heads), how much each looks at the digit being said."""
    table = pd.DataFrame([asdict(row) for row in result.rows])
    table.insert(0, "context", [number for number, sample in enumerate(samples) for _ in sample.keys])
    by_head = table.pop("digits_kept_by_head")
    kept = np.full_like(reading, np.nan) if by_head[0] is None else torch.stack([*by_head]).mean(0).cpu().numpy()
    low, high = share_ci95(table["correct"].to_numpy(), table["context"].to_numpy())
    figures = {
        "accuracy": result.accuracy,
        "accuracy_ci95_low": low,
        "accuracy_ci95_high": high,
        "nll_mean": result.nll,
        "n_contexts": len(samples),
        "n_tokens": sum(len(key.answer_ids) for sample in samples for key in sample.keys),
        **table[["digits_kept", "statement_kept", "kept_fraction", "kv_bytes"]].mean(),
        "digits_kept_where_read": (kept * reading).sum() / reading.sum(),
    }
    figures = {name: None if pd.isna(value) else value for name, value in figures.items()}
    return figures, {"keys": table, "heads": head_table(digits_kept=kept, copy_attention=reading)}
