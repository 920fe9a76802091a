"""How many times as long one run took as another, and how sure that is.

Variants that are timed together take turns, and a machine is slower in one turn than in the next. What is compared is
therefore the two times of one turn; the ratios of several turns give the interval. Records from before each turn was
written down have medians and quartiles alone: their ratio is of medians, and beside it stands a range, not an interval.
"""

import json
from dataclasses import dataclass
from math import exp, nan

import numpy as np
import pandas as pd

from kvneox_lib.measures.intervals import student_quantile

COLUMN = {"step_s": "step_turns_s", "prefill_s": "prefill_turns_s"}
TOGETHER = ("started_at", "context_tokens", "batch_size")  # runs that took turns with each other have these in common


@dataclass(frozen=True)
class Ratio:
    value: float
    low: float  # NaN where nothing is known of it
    high: float
    is_interval: bool  # of 95 %, from the turns; else the range that two medians can have come from

    @property
    def is_clear(self) -> bool:
        """One of both took longer for sure."""
        return self.low > 1 or self.high < 1

    @property
    def in_words(self) -> str:
        """For sentences that would be read as a claim."""
        return f"{self}" + ("，分不出快慢" if self.low <= 1 <= self.high else "")

    @property
    def in_table(self) -> str:
        """Where the head of the column says that it is a multiple."""
        return f"{self}".replace(" 倍", "")

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.2f} 倍"
        low, high = f"{self.low:.2f}", f"{self.high:.2f}"
        return f"{self.value:.2f} 倍" + (f" [{low}, {high}]" if self.is_interval else f"（{low}–{high}）")


def ratio(one: pd.Series, other: pd.Series, name: str = "step_s") -> Ratio:
    """How many times as long as `other` took `one`, two rows of records, for a step or for the prefill."""
    if took_turns(one, other, name):
        return paired_ratio(turns_of(one, name), turns_of(other, name))
    of = [_medians(row, name) for row in (one, other)]
    (low, middle, high), (other_low, other_middle, other_high) = of
    return Ratio(middle / other_middle, low / other_high, high / other_low, False)


def _medians(row: pd.Series, name: str) -> list[float]:
    """The lower quartile, the median, the upper one."""
    found = (row.get(f"{name}{end}") for end in ("_q25", "", "_q75"))
    return [nan if value is None else float(value) for value in found]


def paired_ratio(one: np.ndarray, other: np.ndarray) -> Ratio:
    """The geometric mean of the ratios of all turns, with Student's interval of the mean of their logarithms."""
    logs = np.log(one / other)
    half = student_quantile(len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return Ratio(*(exp(at) for at in (logs.mean(), logs.mean() - half, logs.mean() + half)), True)


def turns_of(row: pd.Series, name: str) -> np.ndarray:
    """Seconds in each turn; of a record from before they were written down, none."""
    cell = row.get(COLUMN[name])
    return np.array(json.loads(cell) if isinstance(cell, str) else [])


def took_turns(one: pd.Series, other: pd.Series, name: str = "step_s") -> bool:
    """Whether both were timed in the same turns, two at least."""
    same = all(one.get(key) == other.get(key) for key in TOGETHER)
    return same and len(turns_of(one, name)) == len(turns_of(other, name)) >= 2


def level_with(best: pd.Series, runs: pd.DataFrame, name: str = "step_s") -> pd.DataFrame:
    """Of these runs those of which nobody can say that they are faster or slower than `best`, itself not among them."""
    others = runs.drop(index=best.name, errors="ignore").dropna(subset=name)
    return others[[not ratio(row, best, name).is_clear for _, row in others.iterrows()]]


def basis(runs: pd.DataFrame) -> str:
    """What the brackets after a ratio are."""
    counts = {len(turns_of(row, "step_s")) for _, row in runs.iterrows()}
    told = "比值都在同一轮里求，方括号里是各轮比值的 95 % 区间（{} 轮，取对数，t 分布）。"
    untold = "没有留下逐轮用时的记录，倍数是中位数之比，圆括号里是由两边的四分位数推得的范围，不是置信区间。"
    several = sorted(count for count in counts if count > 1)
    if not several:
        return untold
    return told.format("、".join(map(str, several))) + (untold if min(counts) < 2 else "")
