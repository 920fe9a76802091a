"""Runs in which a press did not do what its name says (`measures.degenerate`): named, and left out of every rank.
Figures still draw them."""

import re
from collections.abc import Iterable

import pandas as pd

from kvneox_lib.pages.selecting import with_strength
from kvneox_lib.pages.words import STUDY_NAMES, listed

MOSTLY = 0.5  # of the entries kept
NOT_COMPARED = "名不副实的设置不参加比较（@tbl-degenerate）。"  # for all sections: the table is in an appendix


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


def table(several: Iterable) -> pd.DataFrame:
    """All that is ranked nowhere in several settings (`Records`), a row a press and ratio, and in which studies. In how
    many bits it was stored changes nothing of it."""
    found = [
        records.frame.loc[is_degenerate(records.frame)].assign(study=records.study)
        for records in several
        if is_degenerate(records.frame).any()
    ]
    rows: dict[tuple[str, str], list] = {}
    for runs in found:
        for run in runs.drop(columns="kv_bits", errors="ignore").itertuples():
            setting = with_strength(run).removeprefix(run.press).removeprefix("，压缩率 ").removeprefix("，") or "自定"
            rows.setdefault((run.press, setting), []).append(run)
    told = [
        {
            "press": press,
            "设置": setting,
            "原因": "；".join(_merged("; ".join(run.degenerate for run in runs))),
            "实验": listed(dict.fromkeys(STUDY_NAMES[run.study].removesuffix("实验") for run in runs)),
        }
        for (press, setting), runs in sorted(rows.items())
    ]
    return pd.DataFrame(told, columns=["press", "设置", "原因", "实验"])


def reasons(phrases: str) -> str:
    """Why, in Chinese."""
    return "，".join(_merged(phrases))


def _merged(phrases: str) -> list[str]:
    """Each reason once, with the span of the shares that come with it."""
    shares: dict[str, list] = {}
    for phrase in phrases.split("; "):
        pattern = next((pattern for pattern in WORDS if re.fullmatch(pattern, phrase)), None)
        if pattern is None:
            raise ValueError(f"degenerate={phrase!r}: allowed is what `Behaviour.phrases` makes")
        shares.setdefault(pattern, []).append(re.fullmatch(pattern, phrase).groups())
    return [WORDS[pattern].format(*map(_span, zip(*found))) for pattern, found in shares.items()]


def _span(shares: tuple[str, ...]) -> str:
    ends = _percent(min(shares, key=float)), _percent(max(shares, key=float))
    return " 至 ".join(dict.fromkeys(ends))


def _percent(share: str) -> str:
    return f"{float(share):.1%}".replace(".0%", "%")


WORDS = {
    r"tied ([\d.]+)": "{} 的条目在同分者中随意取",
    r"kept ([\d.]+) for ([\d.]+)": "应留 {1}，实留 {0}",
    r"same as streaming_llm": "所留与 streaming_llm 完全相同",
    r"same as recent window": "只留下最近的一段",
    r"fixed ([\d.]+)": "{} 的条目是不论打分都留的窗口",
}
