"""What a press costs: how much later the first token comes, and after how many it has paid for itself.

To deliver n tokens takes the time to the first and n - 1 steps. Compression has paid for itself at the first n at which
both together are no longer than without it: when what is saved in n - 1 steps is what the prefill took more.
"""

from dataclasses import dataclass
from math import ceil, inf, isfinite, isinf, nan

import numpy as np
import pandas as pd

from kvneox_lib.measures.intervals import student_quantile
from kvneox_lib.pages import turns
from kvneox_lib.pages.figures import Dots
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.pages.selecting import bits_of
from kvneox_lib.pages.timings import at_middle_ratio, column, press_and_strength, timed_runs
from kvneox_lib.pages.turns import Ratio, took_turns, turns_of
from kvneox_lib.pages.words import listed

CELL = ["context_tokens", "batch_size", "dtype"]
COSTS = "首词元用时的对照"
FIRST, PAID = "首词元用时，不压缩的几倍", "生成多少个词元之后回本"


@dataclass(frozen=True)
class Payoff:
    """After how many tokens; `inf` is never. NaN as ends where nothing is known of them."""

    tokens: float
    low: float
    high: float

    @property
    def in_words(self) -> str:
        value, low, high = map(_whole, (self.tokens, self.low, self.high))
        return f"{value} [{low}, {high}]" if isfinite(self.low) else value


def _whole(tokens: float) -> str:
    return f"{ceil(round(tokens, 6))}" if isfinite(tokens) else "从不"  # what is whole but for rounding is whole


def break_even(extra_s: np.ndarray, saved_s: np.ndarray) -> Payoff:
    """From what each turn took more until the first token, and less for each one after it. The interval holds every
    number of tokens at which the turns do not contradict, at 95 %, that both ways took as long (Fieller's)."""
    extra, saved = float(np.mean(extra_s)), float(np.mean(saved_s))
    tokens = 1.0 if extra <= 0 else 1 + extra / saved if saved > 0 else inf
    if len(extra_s) < 2:
        return Payoff(tokens, nan, nan)
    return Payoff(tokens, *_fieller(np.asarray(extra_s), np.asarray(saved_s)))


def _fieller(extra: np.ndarray, saved: np.ndarray) -> tuple[float, float]:
    """The steps x, not below 0, at which |mean(extra - x * saved)| is within t of its standard error: where a quadratic
    in x is not above 0."""
    scale = student_quantile(len(extra) - 1) ** 2 / len(extra)
    (extra_var, both), (_, saved_var) = np.cov(extra, saved)
    square, linear, constant = (
        saved.mean() ** 2 - scale * saved_var,
        extra.mean() * saved.mean() - scale * both,
        extra.mean() ** 2 - scale * extra_var,
    )
    root = max(linear**2 - square * constant, 0.0) ** 0.5
    if square > 0 and saved.mean() < 0:  # each step takes longer for sure: it is ahead at the first token or never
        is_sure = constant > 0
        return (inf if is_sure and extra.mean() > 0 else 1.0), (1.0 if is_sure and extra.mean() < 0 else inf)
    if square > 0:
        return tuple(1 + max((linear + sign * root) / square, 0.0) for sign in (-1, 1))
    if constant <= 0 or extra.mean() < 0:  # no cost is sure, and no saving
        return 1.0, inf
    return 1 + (linear - root) / square, inf  # the root above 0: what divides is negative


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """For each press and context, beside no compression in the same turns where there were any: the time to the first
    token (`first`, a `Ratio`), a step (`step`, too) and the break-even (`paid`, a `Payoff`)."""
    timed = timed_runs(runs)
    timed = timed[(timed["engine"] == "ours") & column(timed, "prefill_chunk").isna()]
    timed = timed.dropna(subset=["prefill_s", "step_s"])
    is_plain = (timed["press"] == "no_press") & bits_of(timed).isna()
    rows = []
    for _, run in timed[timed["press"] != "no_press"].iterrows():
        plain = _beside(run, timed[is_plain])
        if plain is not None:
            rows.append(
                {**run[["press", "context_tokens", "batch_size", "dtype"]], **_compared(run, plain)} | {"run": run.name}
            )
    if not rows:
        raise Missing("speed", COSTS)
    found = pd.DataFrame(rows).set_index("run")
    return found.assign(name=press_and_strength(timed.loc[found.index]))


def _beside(run: pd.Series, plain: pd.DataFrame) -> pd.Series | None:
    """No compression in the same cell, of the same turns rather than of others."""
    same = [other for _, other in plain.iterrows() if (other[CELL] == run[CELL]).all()]
    return max(same, key=lambda other: took_turns(run, other), default=None)


def _compared(run: pd.Series, plain: pd.Series) -> dict[str, Ratio | Payoff]:
    def seconds(row: pd.Series, name: str) -> np.ndarray:
        return turns_of(row, name) if is_paired else np.array([float(row[name])])

    is_paired = all(took_turns(run, plain, name) for name in turns.COLUMN)
    extra = seconds(run, "prefill_s") - seconds(plain, "prefill_s")
    saved = seconds(plain, "step_s") - seconds(run, "step_s")
    first, step = (turns.ratio(run, plain, name) for name in ("prefill_s", "step_s"))
    return {"first": first, "step": step, "paid": break_even(extra, saved)}


# ---- for pages ------------------------------------------------------------------------------------------------------


def of_most_presses(settings: list[Records]) -> Records:
    """The setting in which what a press costs is known of most presses."""
    counts = [_n_presses(records.frame) for records in settings]
    if not any(counts):
        raise Missing("speed", COSTS)
    return settings[counts.index(max(counts))]


def _n_presses(runs: pd.DataFrame) -> int:
    try:
        return costs(runs)["press"].nunique()
    except Missing:
        return 0


def shown(runs: pd.DataFrame) -> pd.DataFrame:
    """The middle ratio at the smallest batch and in the precision of the first run: what a single reader sees."""
    timed = timed_runs(runs)
    timed = timed[timed["batch_size"] == timed["batch_size"].min()]
    return costs(at_middle_ratio(timed[timed["dtype"] == timed["dtype"].iloc[0]]))


def panels(found: pd.DataFrame) -> list[Dots]:
    """Of `shown`: a row for each press, a mark for each context; what never pays is at the right edge."""
    ordered = found.sort_values("context_tokens", kind="stable")
    last = ordered.groupby("name")["paid"].last().map(lambda paid: paid.tokens).sort_values(kind="stable")
    ordered = ordered.set_index("name", drop=False).loc[list(last.index)]
    what = {"name": ordered["name"], "of": "上下文 " + ordered["context_tokens"].astype(str)}
    first = [(one.value, one.low, one.high) for one in ordered["first"]]
    paid = [(one.tokens, one.low, one.high) for one in ordered["paid"]]
    ends = ["value", "low", "high"]
    return [
        Dots(pd.DataFrame(what).assign(**dict(zip(ends, zip(*first)))), FIRST, even=1.0),
        Dots(pd.DataFrame(what).assign(**dict(zip(ends, zip(*paid)))), PAID, beyond="从不"),
    ]


def table(found: pd.DataFrame) -> pd.DataFrame:
    """Of `costs`."""
    found = found.sort_values(["context_tokens", "batch_size"], kind="stable")
    return pd.DataFrame(
        {
            "press": found["name"],
            "上下文×批": [f"{row.context_tokens}×{row.batch_size}" for row in found.itertuples()],
            "首词元": found["first"].map(str),
            "每步": found["step"].map(str),
            "回本（词元）": [one.in_words for one in found["paid"]],
        }
    )


def costs_in_words(found: pd.DataFrame) -> str:
    """Of `shown`, at the longest context of most presses: which let the first token come later, and which does most."""
    counts = found.groupby("context_tokens")["name"].nunique()
    cell = found[found["context_tokens"] == counts.index[counts == counts.max()].max()]
    later = cell[[one.low > 1 for one in cell["first"]]]
    known = "（区间不含 1）" if _has_intervals(cell) else "（四分位数的范围不含 1）"
    text = f"{_where(cell)}，{len(cell)} 种做法里有 {len(later)} 种让首词元晚到{known if len(later) else ''}"
    if later.empty:
        return text + "。"
    dearest = later.loc[later["first"].map(lambda one: one.value).idxmax()]
    return text + f"；最慢的是 {dearest['name']}，首词元用时为不压缩的 {dearest['first']}。"


def _where(cell: pd.DataFrame) -> str:
    return f"上下文 {cell['context_tokens'].iloc[0]}、批 {cell['batch_size'].iloc[0]}"


def payoff_in_words(found: pd.DataFrame) -> str:
    """Of `shown`, at each context: which are known to pay, after how many tokens, which never do, which may."""
    return "".join(f"{_where(cell)}：{_paid_in_words(cell)}。" for _, cell in found.groupby("context_tokens"))


def _paid_in_words(cell: pd.DataFrame) -> str:
    words = {row["name"]: f"{row['name']}（{row['paid'].in_words}）" for _, row in cell.iterrows()}
    if not _has_intervals(cell):
        return _paid_by_medians(cell)
    tokens = cell.set_index("name")["paid"].map(lambda paid: paid.tokens)
    sure = tokens[[isfinite(paid.high) for paid in cell["paid"]]].sort_values(kind="stable")
    never = tokens[[isinf(paid.low) for paid in cell["paid"]]]
    slower = [row["name"] for _, row in cell.iterrows() if row["step"].low > 1 and row["name"] not in never.index]
    sure = sure.drop(slower, errors="ignore")
    rest = tokens.drop([*sure.index, *never.index, *slower])
    parts = []
    if len(sure) > 1:
        parts.append(f"{len(sure)} 种确实回本，从 {words[sure.index[0]]}到 {words[sure.index[-1]]}个词元")
    elif len(sure):
        parts.append(f"确实回本的有 {words[sure.index[0]]}个词元")
    if len(rest):
        parts.append(f"{listed(words[name] for name in rest.index)} 每步省下的时间小于误差，不能断定回本")
    if len(never):
        parts.append(f"{listed(never.index)} 每步反而更慢，从不回本")
    return "；".join([*parts, *_ahead_at_first(slower)])


def _ahead_at_first(names: list[str]) -> list[str]:
    """Of presses that have nothing to pay back, and whose steps take longer all the same."""
    return [f"{listed(names)} 首词元看不出比不压缩晚，但每步更慢，生成得多了就落后"] if names else []


def _paid_by_medians(cell: pd.DataFrame) -> str:
    after, never, slower = [], [], []
    for _, row in cell.iterrows():
        if isinf(row["paid"].tokens):
            never.append(row["name"])
        elif row["step"].value > 1:
            slower.append(row["name"])
        else:
            after.append(f"{row['name']}（{row['paid'].in_words}）")
    parts = [f"按中位数回本所需的词元数：{listed(after)}"] if after else []
    parts += [f"从不回本：{listed(never)}"] if never else []
    return "；".join([*parts, *_ahead_at_first(slower)]) + "（没有区间）"


def _has_intervals(found: pd.DataFrame) -> bool:
    return all(one.is_interval for one in found["first"])
