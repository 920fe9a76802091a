"""Runs in which a press did not do what its name says (`measures.degenerate`): named, and left out of every rank."""

import re

import pandas as pd

from kvneox_lib.pages.selecting import with_strength
from kvneox_lib.pages.words import listed

MOSTLY = 0.5  # of the entries kept


def is_degenerate(runs: pd.DataFrame) -> pd.Series:
    """Of each run, or row of a table; of records from before it was looked for, none."""
    return runs["degenerate"].notna() if "degenerate" in runs else pd.Series(False, runs.index)


def healthy(runs: pd.DataFrame) -> pd.DataFrame:
    """What can be compared and ranked: runs, or rows of their tables, but for degenerate ones."""
    return runs[~is_degenerate(runs)]


def degenerate_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The press, its strength in words, and why; each once."""
    found = runs[is_degenerate(runs)]
    rows = [(run.press, with_strength(run), reasons(run.degenerate)) for run in found.itertuples()]
    return pd.DataFrame(rows, columns=["press", "设置", "原因"]).drop_duplicates("设置", ignore_index=True)


def said(runs: pd.DataFrame) -> list[str]:
    """A sentence on the runs that are ranked nowhere, one on those that keep mostly a window; none where none are."""
    lines, mostly = [], healthy(runs)
    found = degenerate_runs(runs)
    if len(found):
        parts = [f"{setting}（{why}）" for setting, why in zip(found["设置"], found["原因"])]
        lines.append(f"这些设置名不副实，不参加排名与比较：{'；'.join(parts)}。")
    if "fixed_share" in runs:
        mostly = mostly[pd.to_numeric(mostly["fixed_share"]) > MOSTLY]
        parts = dict.fromkeys(f"{with_strength(run)} 时占 {run.fixed_share:.0%}" for run in mostly.itertuples())
        if parts:
            lines.append(f"这些设置留下的条目里，不论打分都留的窗口占了一半以上：{listed(parts)}。")
    return lines


def reasons(phrases: str) -> str:
    """Why, in Chinese."""
    return "，".join(_reason(phrase) for phrase in phrases.split("; "))


def _reason(phrase: str) -> str:
    for pattern, words in WORDS.items():
        match = re.fullmatch(pattern, phrase)
        if match:
            return words(*match.groups())
    raise ValueError(f"degenerate={phrase!r}: allowed is what `Behaviour.phrases` makes")


def _percent(share: str) -> str:
    return f"{float(share):.1%}".replace(".0%", "%")


WORDS = {
    r"tied ([\d.]+)": lambda share: f"留下的条目里 {_percent(share)} 是在同分者中随意取的",
    r"kept ([\d.]+) for ([\d.]+)": lambda kept, asked: f"应留 {_percent(asked)}，实留 {_percent(kept)}",
    r"same as streaming_llm": lambda: "留下的与 streaming_llm 完全相同",
    r"same as recent window": lambda: "留下的恰是最近的一段",
    r"fixed ([\d.]+)": lambda share: f"留下的条目里 {_percent(share)} 是不论打分都留的窗口",
}
