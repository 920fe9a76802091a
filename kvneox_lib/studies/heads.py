"""Which heads copy, what recall depends on, and where a loss in perplexity comes from: what notebook 08 runs.

Heads are found on keys of one seed and tried on those of another. No compression, and each press at each ratio, is then
tried under the conditions of `causes`; and what each press loses on running text is taken apart by heads and tokens.
"""

import math
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.inputs.windows import Windows, windows
from kvneox_lib.measures.causes import (
    check_choosing,
    control_heads,
    find_copying_heads,
    nll_by_heads,
    try_each,
    where_seen,
)
from kvneox_lib.measures.intervals import interval, share_ci95
from kvneox_lib.measures.recall import copy_attention
from kvneox_lib.presses.applying import check_press
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.presses.copying import copying_scores
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.plan import Planned, at_ratios, fitting_context, one_after_the_other
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study, head_table, press_of

QUESTION_TOKENS = 64  # room for a question and its answer
LOST = 2.0  # nat: a token that loses more was known and is known no longer
SEEN = {"far": 2, "near": 1, "new": 0}  # see `where_seen`
SEARCH_SEED = 1_000_003  # added to the seed: heads are found on other keys than they are tried on


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """No compression, and each press at each ratio."""
    length = fitting_context(asked, QUESTION_TOKENS, trained)
    window = fitting_context(
        {**asked, "context_length": asked["window_context"]}, asked["continuation_length"], trained
    )
    return [
        run
        for name in dict.fromkeys(["no_press", *expand_presses(asked["press"])])
        for run in at_ratios(name, asked["compression_ratio"], context_length=length, window_context=window)
    ]


def measure_heads(
    *,
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.QualityWeights = "auto",
    dataset: may_be.Dataset = "wikitext",
    subset: may_be.Subset | None = "wikitext-103-v1",
    split: may_be.Split = "test",
    sample_idx: may_be.Index | None = None,
    data_dir: may_be.Folder | None = None,
    press: may_be.Presses = ("snapkv", "keydiff"),
    compression_ratio: may_be.Ratios = (0.5, 0.9),
    lender: may_be.Press = "keydiff",
    n_keys: may_be.Count = 20,
    keys_per_context: may_be.Count = 5,
    search_keys: may_be.Count = 20,
    control_draws: may_be.Count = 3,
    context_length: may_be.Count = 1024,
    window_context: may_be.Count = 1024,
    continuation_length: may_be.Count = 256,
    max_windows: may_be.Count | None = 8,
    batch_size: may_be.Count = 4,
    context_limit: may_be.Count | None = None,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/heads",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """Copying heads, found and tried; and losses by head, by token, and by where a pair of tokens stood before.

    lender: the press whose choice other presses' heads borrow, at the same ratio. search_keys: on which the heads are
    found. control_draws: how often as many other heads are drawn. context_length is that of the contexts with keys,
    window_context that of the windows of running text.
    """
    runs = Runs(measure_heads, plan, locals())
    for name in [*expand_presses(press), lender]:
        check_choosing(press_of(runs.loaded.model, Planned(name, 0.5)))
    for group in one_after_the_other(runs.planned):
        with runs.presses(group):
            for run in group:
                check_press(_lender(runs, run, lender), runs.loaded.model)
    context_length, window_context = runs.context_length(), runs.planned[0].settings["window_context"]
    keys = {"n_keys": n_keys, "keys_per_context": keys_per_context, "context_length": context_length}
    samples = _samples(runs, **keys, seed=seed)
    cut = windows(
        runs.text,
        runs.loaded.tokenizer,
        context_length=window_context,
        continuation_length=continuation_length,
        max_windows=max_windows,
    )
    together = runs.open_together()
    if not together:
        return runs.study()
    searched = _samples(runs, **{**keys, "n_keys": search_keys}, seed=seed + SEARCH_SEED)
    reading = copy_attention(runs.loaded.model, searched)
    copying = find_copying_heads(reading)
    groups = groups_of_heads(copying, seed, control_draws)
    progress = tqdm(total=sum(map(len, together)) * (len(samples) + len(cut.input_ids)), unit="段", desc="抄写的头")
    for group in together:
        progress.set_postfix_str(group[0].press)
        started, clock = provenance(runs.device), time.perf_counter()
        with runs.presses(group) as presses:
            lenders = [_lender(runs, run, lender) for run in group]
            trials = _try(runs.loaded.model, samples, presses, lenders, groups, progress)
            bare, losses = _lose(runs.loaded.model, cut, presses, copying, batch_size, progress)
        seconds = (time.perf_counter() - clock) / len(group)
        for run, trial, by_heads in zip(group, trials, losses):
            losses_of = pd.concat(_loss_rows(cut, bare, by_heads), ignore_index=True)
            tables = {"trial": trial}
            figures = _recall_figures(trial) | {"n_copying_heads": int(copying.sum()), "n_heads": copying.numel()}
            figures |= _loss_figures(losses_of, by_heads["all"]) | {"run_s": seconds}
            if run.press == "no_press":
                tested = copy_attention(runs.loaded.model, samples).numpy()
                found = {"copy_attention": reading.numpy(), "copy_attention_tried": tested, "copies": copying.numpy()}
                found["repeated_tokens"] = copying_scores(runs.loaded.model).cpu().numpy()
                tables["heads"] = head_table(**found)
            else:
                tables["losses"] = losses_of
            runs.write(run, context_length, started, figures, tables)
    progress.close()
    return runs.study()


def groups_of_heads(copying: torch.Tensor, seed: int, control_draws: int) -> dict[str, torch.Tensor]:
    """By name, (layers, heads) booleans: "copying", "control 1" ..., which are as many others, and all "others"."""
    controls = {f"control {i}": control_heads(copying, seed, i) for i in range(1, control_draws + 1)}
    return {"copying": copying, **controls, "others": ~copying}


def _samples(runs: Runs, **how) -> list:
    return recall_samples(runs.loaded.tokenizer, filler="\n\n".join(runs.text.documents), **how)


def _lender(runs: Runs, run: Planned, lender: str):
    """Of as many entries, so that the budget stays what it was; None for what has nothing to borrow."""
    return (
        None
        if run.press in ("no_press", lender) or run.ratio is None
        else press_of(runs.loaded.model, Planned(lender, run.ratio))
    )


def _try(model, samples: list, presses: list, lenders: list, groups: dict, progress: tqdm) -> list[pd.DataFrame]:
    """For each press a row for each context and condition."""
    rows: list[list[dict]] = [[] for _ in presses]
    for context, sample in enumerate(samples):
        for of_press, trials in zip(rows, try_each(model, sample, presses, lenders, groups)):
            of_press += [
                {
                    "digits": trial.condition.digits,
                    "heads": trial.condition.heads,
                    "context": context,
                    "n_keys": len(trial.correct),
                    "n_correct": sum(trial.correct),
                    "nll_mean": float(np.mean(trial.nll)),
                    "kept_fraction": trial.kept_fraction,
                }
                for trial in trials
            ]
            progress.update()
    return [pd.DataFrame(of_press) for of_press in rows]


def recall_of(trial: pd.DataFrame) -> tuple[float, float, float]:
    """The share of keys recalled in these rows of table `trial`, and its 95 % interval."""
    hits = [key < row.n_correct for row in trial.itertuples() for key in range(row.n_keys)]
    contexts = np.repeat(trial["context"], trial["n_keys"])
    return float(np.mean(hits)), *share_ci95(np.array(hits), contexts.to_numpy())


def loss_of(losses: pd.DataFrame, which: str = "") -> tuple[float, float, float]:
    """What a token loses in these rows of table `losses`, in nat, and its 95 % interval. which: only of the tokens
    "_lost", "_far", "_near" or "_new"."""
    loss, n = losses[f"loss{which}"].to_numpy(), losses[f"n_tokens{which}"].to_numpy()
    if not n.sum():
        return (math.nan,) * 3
    return float(loss.sum() / n.sum()), *interval(loss, n, losses["document"].to_numpy()).ends


def _recall_figures(trial: pd.DataFrame) -> dict:
    """Of the press as it is."""
    own = trial[trial["digits"] == "as_is"]
    kept = float(np.average(own["kept_fraction"], weights=own["n_keys"]))
    return _with_interval("accuracy", recall_of(own)) | {"kept_fraction": kept}


def _with_interval(name: str, figures: tuple[float, float, float]) -> dict:
    named = zip((name, f"{name}_ci95_low", f"{name}_ci95_high"), figures)
    return {each: None if math.isnan(value) else value for each, value in named}


def _lose(model, cut: Windows, presses: list, copying: torch.Tensor, batch_size: int, progress: tqdm):
    """nll (windows, L) of no compression; and for each press, by the heads it acts in."""
    groups = {"copying": copying, "others": ~copying, "all": torch.ones_like(copying)}
    bare, pressed = [], [{name: [] for name in groups} for _ in presses]
    for ids in cut.input_ids.split(batch_size):
        plain, found = nll_by_heads(model, ids, n_context=cut.context_length, presses=presses, groups=groups)
        bare.append(plain)
        for into, of_press in zip(pressed, found):
            for name, nll in of_press.items():
                into[name].append(nll)
        progress.update(len(ids) * len(presses))
    return torch.cat(bare).numpy(), [
        {name: torch.cat(nll).numpy() for name, nll in of_press.items()} for of_press in pressed
    ]


def _loss_figures(losses: pd.DataFrame, nll: np.ndarray) -> dict:
    figures = {"n_windows": len(nll), "n_tokens": nll.size, "nll_mean": float(nll.mean())}
    for heads, rows in losses.groupby("heads"):
        figures |= _with_interval(f"delta_nll_{heads}", loss_of(rows))
    return figures


def _loss_rows(cut: Windows, bare: np.ndarray, by_heads: dict[str, np.ndarray]) -> Iterator[pd.DataFrame]:
    """For each window and group of heads: tokens and the nat they lose, of all, of those that lose or gain much, and by
    where a token stood after the one before it already."""
    seen = where_seen(cut.input_ids, cut.context_length).numpy()
    for heads, nll in by_heads.items():
        delta = nll - bare
        chosen = {"": np.ones_like(seen, dtype=bool), "_lost": delta > LOST, "_gained": delta < -LOST}
        chosen |= {f"_{name}": seen == value for name, value in SEEN.items()}
        places = {"document": cut.document, "part": cut.part, "position": cut.position}
        table = pd.DataFrame({name: values.numpy() for name, values in places.items()}).assign(heads=heads)
        for end, those in chosen.items():
            table[f"n_tokens{end}"], table[f"loss{end}"] = those.sum(1), (delta * those).sum(1)
        yield table
