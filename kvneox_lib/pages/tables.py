"""Tables for README and report that follow from the code."""

import pandas as pd

from kvneox_lib.presses.by_name import make_press
from kvneox_lib.presses.facts import acts, attention_needed, rows_independent
from kvneox_lib.presses.registry import RATIO_PER_LAYER, ROWS, UNAVAILABLE


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
    return pd.DataFrame([{"press": row.name, "来源": row.paper or "—", "做法": row.about} for row in ROWS if row.core])


def _linked(paper: str) -> str:
    site, _, number = paper.partition(":")
    address = {"arXiv": "https://arxiv.org/abs/", "openreview": "https://openreview.net/forum?id="}.get(site)
    return f"[{number}]({address}{number})" if address else ""
