"""Whose loss a loss in perplexity is, by heads and by tokens: table `losses` of study `heads`."""

import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.measures.causes import NEAR
from kvneox_lib.pages import figures
from kvneox_lib.pages.report import Missing, Records, found_in
from kvneox_lib.pages.selecting import middle_ratio
from kvneox_lib.pages.words import listed
from kvneox_lib.studies.heads import LOST, loss_of

ACTING = {"copying": "只在抄写的头里", "others": "只在其余的头里", "all": "在所有头里"}
SEEN = {"far": "远处出现过", "near": "只在近处出现过", "new": "没有出现过"}


def lost_by_heads(losses: pd.DataFrame) -> pd.DataFrame:
    """A row for each run and group of heads in which the press acts: nat per token with its interval, the part of it
    that is of tokens which lose much and of each class of tokens, and how many of all tokens these are."""
    rows = []
    for names, part in losses.groupby(["press", "compression_ratio", "heads"], sort=False, dropna=False):
        value, low, high = loss_of(part)
        row = dict(zip(("press", "compression_ratio", "heads"), names)) | {"value": value, "low": low, "high": high}
        for which in ("lost", *SEEN):
            row[f"part_{which}"] = part[f"loss_{which}"].sum() / (part["loss"].sum() or float("nan"))
            row[f"tokens_{which}"] = part[f"n_tokens_{which}"].sum() / part["n_tokens"].sum()
        for which in SEEN:
            per_token = zip(("", "_low", "_high"), loss_of(part, f"_{which}"))
            row |= {f"nat_{which}{end}": nat for end, nat in per_token}
        rows.append(row)
    return found_in("heads", pd.DataFrame(rows), "表 losses")


def loss_table(losses: pd.DataFrame) -> pd.DataFrame:
    table = lost_by_heads(losses)
    sure = ~(table["low"] <= 0)  # shares of a loss that may be none say nothing
    parts = {name: table[f"part_{name}"].map("{:.0%}".format).where(sure, "—") for name in ("lost", *SEEN)}
    shown = {
        "press": table["press"],
        "压缩率": table["compression_ratio"],
        "press 作用": table["heads"].map(ACTING),
        "每词元多付（nat）": [f"{row.value:.4f} [{row.low:.4f}, {row.high:.4f}]" for row in table.itertuples()],
        f"多付逾 {LOST:g} nat 的词元": table["tokens_lost"].map("{:.1%}".format),
        "它们占损失": parts["lost"],
    }
    return pd.DataFrame(shown | {f"{words}的占": parts[name] for name, words in SEEN.items()})


def loss_bars(losses: pd.DataFrame) -> Figure:
    """At the middle ratio. Left: by the heads in which the press acts. Right: by where a token and the one before it
    stood side by side already."""
    table = _at_middle(lost_by_heads(losses))
    whole = table[table["heads"] == "all"]
    by_class = [
        {"group": row.press, "bar": words, "value": getattr(row, f"nat_{name}")}
        | {end: getattr(row, f"nat_{name}_{end}") for end in ("low", "high")}
        for row in whole.itertuples()
        for name, words in SEEN.items()
    ]
    acting = table.assign(group=table["press"], bar=table["heads"].map(ACTING))
    panels = {"press 作用于哪些头": acting, "哪些词元": pd.DataFrame(by_class)}
    return figures.bar_panels(panels, xlabel="每词元多付（nat）")


def _at_middle(table: pd.DataFrame) -> pd.DataFrame:
    chosen = table["compression_ratio"].isna() | (table["compression_ratio"] == middle_ratio(table))
    return table[chosen]


def by_heads(losses: pd.DataFrame) -> str:
    """Whose loss it is, at the middle ratio."""
    table, parts = _at_middle(lost_by_heads(losses)), []
    for press, rows in table.groupby("press", sort=False):
        nat = rows.set_index("heads")["value"]
        alone = f"只压抄写的头 {nat['copying']:.4f}，只压其余的头 {nat['others']:.4f}"
        parts.append(f"{press} {nat['all']:.4f} nat，{alone}")
    return f"压缩率 {middle_ratio(table):.2f}，每词元多付：{'；'.join(parts)}。{whose(losses)}"


def whose(losses: pd.DataFrame) -> str:
    """Of how many presses the copying heads alone make at least half of the loss, and more than all others do."""
    nat = _at_middle(lost_by_heads(losses)).pivot(index="press", columns="heads", values="value")
    n = int(((nat["copying"] > nat["others"]) & (nat["copying"] >= nat["all"] / 2)).sum())
    if n == len(nat):
        return f"{n} 种方法在困惑度里的损失都主要来自抄写的头丢掉的位置。"
    if n == 0:
        return "困惑度里的损失主要不来自抄写的头。"
    return f"{len(nat)} 种方法里，困惑度的损失主要来自抄写的头丢掉的位置的有 {n} 种。"


def by_tokens(losses: pd.DataFrame) -> str:
    """How few tokens carry the loss, at the middle ratio."""
    table = _at_middle(lost_by_heads(losses))
    whole = table[table["heads"] == "all"]
    parts = [f"{row.press} {row.tokens_lost:.1%} 的词元，占损失的 {row.part_lost:.0%}" for row in whole.itertuples()]
    text = f"比不压缩多付 {LOST:g} nat 以上的词元：{'；'.join(parts)}。"
    few = (whole["part_lost"] >= 0.5).sum()
    if few == len(whole):
        return text + "损失集中在极少数的词元上。"
    return text + f"{len(whole)} 种方法里，损失有一半以上集中在这样的词元上的有 {few} 种。"


def decomposed(losses: pd.DataFrame) -> str:
    """The mean loss as how many tokens lose much, times how much; at the middle ratio."""
    table = _at_middle(lost_by_heads(losses))
    parts = []
    for row in table[(table["heads"] == "all") & (table["tokens_lost"] > 0)].itertuples():
        each = row.part_lost * row.value / row.tokens_lost
        parts.append(
            f"{row.press} 的 $p$ 是 {row.tokens_lost:.2%}，$c$ 是 {each:.2f} nat，"
            f"$p c$ 是 {row.part_lost * row.value:.4f} nat，而 $\\Delta$ 是 {row.value:.4f} nat"
        )
    if not parts:
        raise Missing("heads", f"多付 {LOST:g} nat 以上的词元")
    return f"压缩率 {middle_ratio(table):.2f}，以多付 {LOST:g} nat 以上为界：{'；'.join(parts)}。"


def by_seen(losses: pd.DataFrame) -> str:
    """Which tokens pay, at the middle ratio."""
    whole = _at_middle(lost_by_heads(losses))
    whole = whole[whole["heads"] == "all"]
    parts = []
    for row in whole.to_dict("records"):
        nat, of_all = ([row[f"{what}_{name}"] for name in SEEN] for what in ("nat", "part"))
        paid = f"{listed(map('{:.3f}'.format, nat))}（占全部损失的 {listed(map('{:.0%}'.format, of_all))}）"
        parts.append(f"{row['press']} {paid}")
    shares = listed([f"{words}的 {whole[f'tokens_{name}'].mean():.0%}" for name, words in SEEN.items()])
    text = (
        f"再按“前一个词元加这个词元”这一对是否见过来分：在上下文里（最后 {NEAR} 个词元之前）{shares}。"
        f"三类每词元多付的 nat 依次是：{'；'.join(parts)}。"
    )
    most = (whole["nat_far_low"] > whole[["nat_near_high", "nat_new_high"]].max(axis=1)).sum()
    if most == len(whole):
        return text + "远处出现过、本可以照抄的词元付得最多。"
    return text + f"{len(whole)} 种方法里，远处出现过的词元付得明显最多的有 {most} 种。"


def loss_by_text(*texts: Records) -> pd.DataFrame:
    """At the middle ratio: whose loss it is, and which tokens pay."""
    rows = []
    for records in found_in("heads", texts, "表 losses"):
        table = _at_middle(lost_by_heads(records.table("losses")))
        for press, part in table.groupby("press", sort=False):
            by_heads, whole = part.set_index("heads"), part.set_index("heads").loc["all"]
            row = {"文本": records.run()["dataset"], "press": press}
            row |= {words: f"{by_heads.loc[name, 'value']:.4f}" for name, words in ACTING.items()}
            row |= {f"多付逾 {LOST:g} nat 的词元": f"{whole.tokens_lost:.1%}", "占损失": f"{whole.part_lost:.0%}"}
            rows.append(row | {f"{words}的词元占损失": f"{whole[f'part_{name}']:.0%}" for name, words in SEEN.items()})
    return pd.DataFrame(rows)
