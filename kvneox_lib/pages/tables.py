"""Tables for README and report that follow from the code."""

import re
from functools import cache
from pathlib import Path

import pandas as pd

from kvneox_lib.pages.report import repository
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.presses.facts import acts, attention_needed, rows_independent
from kvneox_lib.presses.registry import RATIO_PER_LAYER, REGISTRY, ROWS, UNAVAILABLE


def press_table() -> str:
    """The registry as a table in Chinese, for README and report."""
    when = {"hook": "预填充", "exit": "退出上下文时", "decoding": "解码中", "never": ""}
    lines = [
        "| 名称 | 做法 | 注意力 | 何时压缩 | 强度由谁决定 | 可整批 | 核心 | 出处 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS[1:]:
        press = make_press(row.name, [0.5] if row.strength == RATIO_PER_LAYER else 0.5)
        attention = {"any": "都可", "sdpa": "sdpa", "eager": "eager"}[attention_needed(press)]
        strength = "压缩率" if row.takes_ratio else f"`{row.strength}`"
        marks = ["✓" if true else "" for true in (rows_independent(press), row.core)]
        cells = [f"`{row.name}`", row.about, attention, when[acts(press)], strength, *marks, _linked(row.paper)]
        lines.append("| " + " | ".join(cells) + " |")
    missing = "、".join(f"`{name}`" for name in UNAVAILABLE)
    lines += ["", f"{missing} 要用训练出来的权重，只为别的模型发布过，这里无从算出；`make_press` 会说明各缺什么。"]
    return "\n".join(lines)


def core_presses() -> pd.DataFrame:
    """The core of the registry, for the report."""
    return pd.DataFrame([{"press": row.name, "来源": cited(row.name), "做法": row.about} for row in ROWS if row.core])


def cited(press: str) -> str:
    """Its paper as a citation, in the notation of the report."""
    paper = REGISTRY[press].paper
    return f"[@{keys_of_papers(repository() / 'report' / 'references.bib')[paper]}]" if paper else "—"


@cache
def keys_of_papers(bibliography: Path) -> dict[str, str]:
    """A paper, as the registry names it, to the key of its entry."""
    found = {}
    for key, entry in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}$", bibliography.read_text(encoding="utf-8"), re.M | re.S):
        for site, before in {"arXiv": "eprint = {", "openreview": "url = {https://openreview.net/forum?id="}.items():
            found |= {f"{site}:{number}": key for number in re.findall(f"{re.escape(before)}(.*)}}", entry)}
    return found


def _linked(paper: str) -> str:
    site, _, number = paper.partition(":")
    address = {"arXiv": "https://arxiv.org/abs/", "openreview": "https://openreview.net/forum?id="}.get(site)
    return f"[{number}]({address}{number})" if address else ""
