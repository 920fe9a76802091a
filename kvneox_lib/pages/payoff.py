"""What a press costs: how much later the first token comes, and after how many it has paid for itself.

To deliver n tokens takes the time to the first and n - 1 steps. Compression has paid for itself at the first n at which
both together are no longer than without it: when what is saved in n - 1 steps is what the prefill took more.
"""

from dataclasses import dataclass
from functools import cache
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
                {
                    **run[["press", "compression_ratio", "context_tokens", "batch_size", "dtype"]],
                    **_compared(run, plain),
                }
                | {"run": run.name}
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
    counts = [_n_presses(records) for records in settings]
    if not any(counts):
        raise Missing("speed", COSTS)
    return settings[counts.index(max(counts))]


@cache
def _n_presses(records: Records) -> int:
    try:
        return costs(records.frame)["press"].nunique()
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
            "首词元": [one.in_table for one in found["first"]],
            "每步": [one.in_table for one in found["step"]],
            "回本（词元）": [one.in_words for one in found["paid"]],
        }
    )


def by_context(found: pd.DataFrame) -> pd.DataFrame:
    """Of `shown`, the presses that were measured at most lengths, for a figure: a step as a multiple of one without
    compression, with its interval where there is one."""
    lengths = found.groupby("name")["context_tokens"].transform("nunique")
    chosen = found[lengths == lengths.max()].sort_values(["context_tokens", "press"])
    ends = [(one.value, *((one.low, one.high) if one.is_interval else (nan, nan))) for one in chosen["step"]]
    columns = ["times", "times_ci95_low", "times_ci95_high"]
    return pd.DataFrame(ends, columns=columns).assign(
        press=chosen["press"].to_numpy(), context_tokens=chosen["context_tokens"].to_numpy()
    )


def longer_in_words(found: pd.DataFrame) -> str:
    """Of `shown`: whether compression gains more at the longest context than at the shortest."""
    shown = by_context(found)
    lengths = sorted(shown["context_tokens"].unique())
    if len(lengths) < 2:
        raise Missing("speed", "几种长度的上下文")
    short, long = (shown[shown["context_tokens"] == at].set_index("press") for at in (lengths[0], lengths[-1]))
    apart = short["times_ci95_low"] > long["times_ci95_high"]
    text = (
        f"{listed(short.index)} 压缩之后的一步与不压缩之比，上下文 {lengths[0]} 时是 {_range(short['times'])}，上下文 "
        f"{lengths[-1]} 时是 {_range(long['times'])}"
    )
    if apart.all():
        return text + "：上下文越长，缓存在一步所读的字节里占得越多，压缩省得也越多。"
    return text + f"；两处的区间分得开的有{listed(apart.index[apart])}。"


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low}–{high}"


FREE = ("random", "streaming_llm")  # choose by lot, or by place alone: scoring takes them no time


def costs_in_words(found: pd.DataFrame) -> str:
    """Of `shown`: which let the first token come later at every length at which they were measured, and which at none;
    those that score nothing show what the machine alone does."""
    ratios = listed((f"{ratio:g}" for ratio in sorted(found["compression_ratio"].dropna().unique())), none="")
    found = _in_short(found)
    later = found.assign(later=[one.low > 1 for one in found["first"]]).groupby("name", sort=False)["later"]
    always, never = (list(of.index[of]) for of in (later.all(), ~later.any()))
    lengths = "、".join(str(length) for length in sorted(found["context_tokens"].unique()))
    known = "区间都在一以上" if _has_intervals(found) else "四分位数的范围都在一以上"
    n = found["name"].nunique()
    told = (
        f"{ratios and f'压缩率 {ratios}、'}批 {found['batch_size'].iloc[0]}、上下文 {lengths}：{n} 种做法里，"
        f"在测过的每种长度上首词元都晚到（{known}）的有 {len(always)} 种{_named_if_any(always)}。"
        f"{_dearest(found, always)}"
    )
    rest = [name for name in later.groups if name not in (*always, *never)]
    told += f"{listed(rest)} 只在一部分长度上看得出。" if rest else ""
    if not never:
        return told
    free = list(found.loc[found["press"].isin(FREE) & found["name"].isin(never), "name"].unique())
    return told + f"在哪种长度上都看不出的有 {listed(never)}" + (f"；其中 {listed(free)} 不打分。" if free else "。")


def _in_short(found: pd.DataFrame) -> pd.DataFrame:
    """Named by their presses alone where each is there at one strength."""
    is_one = found.groupby("press")["name"].nunique().max() == 1
    return found.assign(name=found["press"]) if is_one else found


def _named_if_any(names: list[str]) -> str:
    return f"：{listed(names)}" if names else ""


def _dearest(found: pd.DataFrame, names: list[str]) -> str:
    """Of these presses the one that costs most, where all its intervals lie above those of all others."""
    ends = found.assign(
        low=[one.low for one in found["first"]],
        value=[one.value for one in found["first"]],
        high=[one.high for one in found["first"]],
    )
    ends = ends.groupby("name").agg({"low": "min", "value": ["min", "max"], "high": "max"})
    for name in names:
        others = ends.drop(index=name)
        if len(others) and ends.loc[name, ("low", "min")] > others["high", "max"].max():
            low, high = ends.loc[name, "value"]
            return (
                f"其中 {name} 最贵，首词元用时是不压缩的 {low:.1f}–{high:.1f} 倍；其余做法的区间都不超过 "
                f"{others['high', 'max'].max():.2f} 倍。"
            )
    return ""


def _where(cell: pd.DataFrame) -> str:
    return f"上下文 {cell['context_tokens'].iloc[0]}、批 {cell['batch_size'].iloc[0]}"


def payoff_in_words(found: pd.DataFrame) -> str:
    """Of `shown`, at each context: which are known to pay, after how many tokens, which never do, which may."""
    cells = _in_short(found).groupby("context_tokens")
    return "".join(f"{_where(cell)}：{_paid_in_words(cell)}。" for _, cell in cells)


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
    parts = [_sure_in_words(cell[cell["name"].isin(sure.index)], words)] if len(sure) else []
    if len(rest):
        parts.append(f"{listed(words[name] for name in rest.index)}每步省下的时间小于误差，不能断定回本")
    if len(never):
        parts.append(f"{listed(never.index)} 每步反而更慢，从不回本")
    return "；".join([*parts, *_ahead_at_first(slower)])


def _sure_in_words(cell: pd.DataFrame, words: dict[str, str]) -> str:
    """Those that pay for sure: how soon all of them do, or all but one that takes longer than any other for sure."""
    if len(cell) == 1:
        return f"确实回本的有 {words[cell['name'].iloc[0]]}个词元"
    last = cell.loc[cell["paid"].map(lambda paid: paid.low).idxmax()]
    most = max(paid.high for name, paid in zip(cell["name"], cell["paid"]) if name != last["name"])
    if last["paid"].low > most:
        within = f"除 {words[last['name']]}之外都在 {_whole(most)} 个词元以内"
    else:
        within = f"都在 {_whole(max(most, last['paid'].high))} 个词元以内"
    return f"{len(cell)} 种确实回本，{within}（区间的上端）"


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
