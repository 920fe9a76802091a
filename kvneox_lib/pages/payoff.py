"""What a press costs: how much later the first token comes, and after how many it has paid for itself.

To deliver n tokens takes the time to the first and n - 1 steps. Compression has paid for itself at the first n at which
both together are no longer than without it: when what is saved in n - 1 steps is what the prefill took more.
"""

import contextlib
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
    """Of `shown`: how much later the first token comes at most, which presses make it later at every length at which
    they were measured, and whether those that score nothing do."""
    ratios = listed((f"{ratio:g}" for ratio in sorted(found["compression_ratio"].dropna().unique())), none="")
    found = _in_short(found)
    later = found.assign(later=[one.low > 1 for one in found["first"]]).groupby("name", sort=False)["later"]
    always, never = (list(of.index[of]) for of in (later.all(), ~later.any()))
    lengths = "、".join(str(length) for length in sorted(found["context_tokens"].unique()))
    where = f"{ratios and f'压缩率 {ratios}、'}批 {found['batch_size'].iloc[0]}、上下文 {lengths}"
    known = "区间" if _has_intervals(found) else "四分位数的范围"
    told = f"{found['name'].nunique()} 种做法里 {len(always)} 种在测过的每种长度上都让首词元晚到（{known}都在一以上）"
    told = f"{_at_most(found, always, known)}（{where}）。{told}{_named_if_any(always)}"
    free = list(found.loc[found["press"].isin(FREE) & found["name"].isin(never), "name"].unique())
    return told + (f"；不打分的 {listed(free)} 在哪种长度上都看不出晚到。" if free else "。")


def _in_short(found: pd.DataFrame) -> pd.DataFrame:
    """Named by their presses alone where each is there at one strength."""
    is_one = found.groupby("press")["name"].nunique().max() == 1
    return found.assign(name=found["press"]) if is_one else found


def _named_if_any(names: list[str]) -> str:
    return f"：{listed(names)}" if names else ""


def _at_most(found: pd.DataFrame, names: list[str], known: str) -> str:
    """How many times as long the first token takes at most; apart from the one of these presses, if there is one, that
    costs more than all others for sure."""
    ends = pd.DataFrame({"name": found["name"], **_ends(found["first"], "low", "value", "high")}).groupby("name")
    ends = ends.agg({"low": "min", "value": ["min", "max"], "high": "max"})
    for name in names:
        others = ends.drop(index=name)
        if len(others) and ends.loc[name, ("low", "min")] > others["high", "max"].max():
            low, high = ends.loc[name, "value"]
            return (
                f"除 {name}（不压缩的 {_from_to(f'{low:.1f}', f'{high:.1f}')} 倍）之外，首词元至多是不压缩的 "
                f"{others['high', 'max'].max():.2f} 倍，按{known}的上端算"
            )
    return f"首词元至多是不压缩的 {ends['high', 'max'].max():.2f} 倍，按{known}的上端算"


def _ends(found: pd.Series, *names: str) -> dict[str, list[float]]:
    return {name: [getattr(one, name) for one in found] for name in names}


def _from_to(*ends: str) -> str:
    return "–".join(dict.fromkeys(ends))


def _where(cell: pd.DataFrame) -> str:
    return f"上下文 {cell['context_tokens'].iloc[0]}、批 {cell['batch_size'].iloc[0]}"


def payoff_in_words(found: pd.DataFrame) -> str:
    """Of `shown`: after how many tokens those are ahead that are known to pay, and which are not known to."""
    found = _in_short(found)
    if not _has_intervals(found):
        cells = found.groupby("context_tokens")
        return "".join(f"{_where(cell)}：{_paid_by_medians(cell)}。" for _, cell in cells)
    of = found["paid"].map(_verdict).mask([one.low > 1 for one in found["step"]], SLOWER)
    of = of.mask([isinf(paid.low) for paid in found["paid"]], NEVER)
    parts = [_sure_in_words(found[of == SURE])] if (of == SURE).any() else []
    for verdict in (UNKNOWN, NEVER, SLOWER):
        names = [f"{row['name']}（上下文 {row['context_tokens']}）" for _, row in found[of == verdict].iterrows()]
        parts += [f"{verdict}：{listed(names)}。"] if names else []
    return "".join(parts)


SURE, UNKNOWN = "确实回本", "每步省下的时间小于误差，不能断定回本"
NEVER, SLOWER = "每步反而更慢，从不回本", "首词元看不出比不压缩晚，但每步更慢，生成得多了就落后"


def _verdict(paid: Payoff) -> str:
    return SURE if isfinite(paid.high) else UNKNOWN


def _sure_in_words(sure: pd.DataFrame) -> str:
    """At each context the last to pay, apart from the one press that takes longer than all others for sure."""
    dear = _last_to_pay(sure)
    others = sure[sure["name"] != dear]
    most = others.groupby("context_tokens")["paid"].agg(lambda paid: max(one.high for one in paid))
    tokens = [paid.tokens for paid in sure.loc[sure["name"] == dear, "paid"]]
    but = f"除 {dear} 要生成 {_from_to(_whole(min(tokens)), _whole(max(tokens)))} 个词元之外，" if dear else ""
    by_context = listed(f"上下文 {at} 时 {_whole(tokens)} 个" for at, tokens in most.items())
    return f"{but}{SURE}的做法生成 {_whole(most.max())} 个词元就不亏，按区间的上端算" + (
        f"（{by_context}）。" if len(most) > 1 else "。"
    )


def _last_to_pay(sure: pd.DataFrame) -> str | None:
    ends = pd.DataFrame({"name": sure["name"], **_ends(sure["paid"], "low", "high")}).groupby("name")
    ends = ends.agg({"low": "min", "high": "max"})
    last = ends["low"].idxmax()
    return last if len(ends) > 1 and ends.loc[last, "low"] > ends["high"].drop(last).max() else None


def elsewhere_in_words(settings: list[Records], press: str) -> str:
    """Of a press that was timed beside the setting that is shown; nothing where it was not."""
    for records in settings:
        with contextlib.suppress(Missing):
            found = costs(records.frame)
            if records is not of_most_presses(settings) and press in set(found["press"]):
                return _timed_apart(records.run()["model"], found[found["press"] == press].iloc[0])
    return ""


def _timed_apart(model: str, row: pd.Series) -> str:
    paid = f"{row['paid'].in_words} 个词元之后回本" if isfinite(row["paid"].high) else "不能断定回本"
    return (
        f"{row['name']} 在另一次运行里计时（{model} 的形状，上下文 {row['context_tokens']}、批 {row['batch_size']}）："
        f"首词元是不压缩的 {row['first'].in_words}，每步是 {row['step'].in_words}，{paid}。"
    )


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
