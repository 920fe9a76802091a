"""Whose loss a loss in perplexity is, by heads and by tokens: table `losses` of study `heads`."""

import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.measures.causes import NEAR
from kvneox_lib.pages import figures
from kvneox_lib.pages.report import Missing, Records, found_in
from kvneox_lib.pages.selecting import middle_ratio
from kvneox_lib.pages.words import listed, number
from kvneox_lib.studies.heads import LOST, loss_of

PROTOCOL = ["model", "weights_id", "context_length", "window_context", "continuation_length"]
WINDOW = ["document", "part", "position"]

ACTING = {"copying": "只在抄写的头里", "others": "只在其余的头里", "all": "在所有头里"}
PARTS = ("lost", "gained", "far", "near", "new")
SEEN = {"far": "远处出现过", "near": "只在近处出现过", "new": "没有出现过"}


def lost_by_heads(losses: pd.DataFrame) -> pd.DataFrame:
    """A row for each run and group of heads in which the press acts: nat per token with its interval, the part of it
    that is of tokens which lose or gain much and of each class of tokens, and how many of all tokens these are. `sure`:
    there is a loss at all, beyond its interval; the parts of one that may be none say nothing."""
    rows, losses = [], found_in("heads", losses, "表 losses")
    for names, part in losses.groupby(["press", "compression_ratio", "heads"], sort=False, dropna=False):
        value, low, high = loss_of(part)
        row = dict(zip(("press", "compression_ratio", "heads"), names)) | {"value": value, "low": low, "high": high}
        row["sure"] = not low <= 0  # of too few windows for an interval nothing is known to the contrary
        for which in ("lost", "gained", *SEEN):
            row[f"part_{which}"] = part[f"loss_{which}"].sum() / (part["loss"].sum() or float("nan"))
            row[f"tokens_{which}"] = part[f"n_tokens_{which}"].sum() / part["n_tokens"].sum()
        for which in SEEN:
            per_token = zip(("", "_low", "_high"), loss_of(part, f"_{which}"))
            row |= {f"nat_{which}{end}": nat for end, nat in per_token}
        rows.append(row)
    return pd.DataFrame(rows)


def loss_table(losses: pd.DataFrame) -> pd.DataFrame:
    table = lost_by_heads(losses)
    parts = {name: table[f"part_{name}"].map("{:.0%}".format).where(table["sure"], "—") for name in PARTS}
    shown = {
        "press": table["press"],
        "压缩率": table["compression_ratio"],
        "press 作用": table["heads"].map(ACTING),
        "每词元多付（nat）": [f"{row.value:.4f} [{row.low:.4f}, {row.high:.4f}]" for row in table.itertuples()],
        f"多付逾 {LOST:g} nat 的词元": table["tokens_lost"].map("{:.1%}".format),
        "它们占损失": parts["lost"],
        f"少付逾 {LOST:g} nat 的词元": table["tokens_gained"].map("{:.1%}".format),
        "它们抵去": parts["gained"].str.removeprefix("-"),
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


def at_which_ratio(losses: pd.DataFrame) -> str:
    """That of `_at_middle`, in words."""
    ratio = middle_ratio(losses)
    return "各按自己的强度" if ratio is None else f"压缩率 {ratio:.2f}"


def of_text(losses: pd.DataFrame) -> str:
    return f"在 {listed(losses['dataset'].unique())} 上"


def _whole(losses: pd.DataFrame) -> pd.DataFrame:
    """At the middle ratio, the presses acting in all heads."""
    table = _at_middle(lost_by_heads(losses))
    return table[table["heads"] == "all"]


def by_heads(losses: pd.DataFrame) -> str:
    """Whose loss it is, at the middle ratio."""
    table, parts = _at_middle(lost_by_heads(losses)), []
    for press, rows in table.groupby("press", sort=False):
        nat = rows.set_index("heads")["value"]
        alone = f"只压抄写的头 {nat['copying']:.4f}，只压其余的头 {nat['others']:.4f}"
        parts.append(f"{press} {nat['all']:.4f} nat，{alone}")
    return f"{of_text(losses)}，{at_which_ratio(losses)}，每词元多付：{'；'.join(parts)}。{whose(losses)}"


def whose(losses: pd.DataFrame) -> str:
    """Of which presses the copying heads alone make more of the loss than all others do and at least half of it, window
    by window beyond the interval; at the middle ratio."""
    chosen = _at_middle(losses)
    mostly = {press: _mostly_copying(part) for press, part in chosen.groupby("press", sort=False)}
    told = {press: is_so for press, is_so in mostly.items() if is_so is not None}
    unsure = [press for press, is_so in mostly.items() if is_so is None]
    but = f"；{listed(unsure)} 的损失本身与零分不开，不分" if unsure else ""
    if not told:
        return f"{listed(unsure)} 的损失与零分不开，说不上来自哪些头。"
    these = [press for press, is_so in told.items() if is_so]
    if len(these) == len(told):
        which = f"{len(these)} 种方法在困惑度里的损失都" if len(these) > 1 else f"{these[0]} 在困惑度里的损失"
        return f"{which}主要来自抄写的头丢掉的条目（至少一半，也多于其余的头，同样的窗口上的区间都这样说）{but}。"
    if not these:
        return f"这些窗口不足以说困惑度里的损失主要来自抄写的头{but}。"
    return f"{len(told)} 种方法里，困惑度的损失主要来自抄写的头丢掉的条目的有 {len(these)} 种（{listed(these)}）{but}。"


def _mostly_copying(part: pd.DataFrame) -> bool | None:
    """None where there is no loss to tell of."""
    by_group = {name: rows.set_index(WINDOW) for name, rows in part.groupby("heads")}
    copying, others, whole = (by_group[name] for name in ("copying", "others", "all"))
    if loss_of(whole.reset_index())[1] <= 0:
        return None
    beyond = (copying["loss"] - others["loss"], copying["loss"] - whole["loss"] / 2)
    return all(loss_of(whole.assign(loss=ahead).reset_index())[1] > 0 for ahead in beyond)


def by_tokens(losses: pd.DataFrame) -> str:
    """How few tokens carry the loss, at the middle ratio. Those that lose much are chosen by what became of them, and
    so would have a share in a loss that is none; those that gain as much stand beside them."""
    whole = _whole(losses)
    parts = [_lost_and_gained(row) for row in whole.itertuples()]
    text = f"比不压缩多付 {LOST:g} nat 以上的词元：{'；'.join(parts)}。"
    sure = whole[whole["sure"]]
    few = (sure["part_lost"] + sure["part_gained"] >= 0.5).sum()
    if sure.empty:
        return text
    if few == len(sure):
        return text + "两相抵之后，损失的一半以上仍在这样的词元上。"
    return text + f"两相抵之后，{len(sure)} 种方法里，损失有一半以上在这样的词元上的有 {few} 种。"


def _lost_and_gained(row) -> str:
    if not row.sure:
        return (
            f"{row.press} {row.tokens_lost:.1%}，少付这么多的也有 {row.tokens_gained:.1%}（损失与零分不开，不谈占比）"
        )
    against = f"少付 {LOST:g} nat 以上的有 {row.tokens_gained:.1%}，抵去 {-row.part_gained:.0%}"
    return f"{row.press} {row.tokens_lost:.1%}，占损失的 {row.part_lost:.0%}（{against}）"


def decomposed(losses: pd.DataFrame) -> str:
    """The mean loss as how many tokens lose much, times how much; at the middle ratio, of presses that lose at all."""
    whole = _whole(losses)
    parts = []
    for row in whole[whole["sure"] & (whole["tokens_lost"] > 0)].itertuples():
        each = row.part_lost * row.value / row.tokens_lost
        parts.append(
            f"{row.press} 的 $p$ 是 {row.tokens_lost:.2%}，$c$ 是 {each:.2f} nat，"
            f"$p c$ 是 {row.part_lost * row.value:.4f} nat，而 $\\Delta$ 是 {row.value:.4f} nat"
        )
    if not parts:
        raise Missing("heads", f"损失不是零、又有词元多付 {LOST:g} nat 以上的运行")
    return f"{of_text(losses)}，{at_which_ratio(losses)}，以多付 {LOST:g} nat 以上为界：{'；'.join(parts)}。"


def by_seen(losses: pd.DataFrame) -> str:
    """Which tokens pay, at the middle ratio."""
    whole = _whole(losses)
    parts = []
    for row in whole.to_dict("records"):
        nat, of_all = ([row[f"{what}_{name}"] for name in SEEN] for what in ("nat", "part"))
        shares = f"占全部损失的 {listed(map('{:.0%}'.format, of_all))}" if row["sure"] else "损失与零分不开，不谈占比"
        parts.append(f"{row['press']} {listed(map('{:.3f}'.format, nat))}（{shares}）")
    shares = listed([f"{words}的 {whole[f'tokens_{name}'].mean():.0%}" for name, words in SEEN.items()])
    text = (
        f"按“前一个词元加这个词元”这一对是否见过来分：在上下文里（最后 {NEAR} 个词元之前）{shares}。"
        f"三类每词元多付的 nat 依次是：{'；'.join(parts)}。"
    )
    most = (whole["nat_far_low"] > whole[["nat_near_high", "nat_new_high"]].max(axis=1)).sum()
    if most == len(whole):
        return text + "远处出现过、本可以照抄的词元付得最多。"
    return text + f"{len(whole)} 种方法里，远处出现过的词元付得明显最多的有 {most} 种。"


# ---- of several texts -----------------------------------------------------------------------------------------------


def of_one_protocol(texts: list[Records]) -> list[Records]:
    """Those of the model, and with the lengths, of the first, which has most records."""
    texts = found_in("heads", texts, "")

    def protocol(records: Records) -> list[str]:
        return [str(records.run().get(name)) for name in PROTOCOL]

    return [records for records in texts if protocol(records) == protocol(texts[0])]


def loss_by_text(texts: list[Records]) -> pd.DataFrame:
    """Of `of_one_protocol`, at the middle ratio: whose loss it is, and which tokens pay."""
    rows = []
    for records in of_one_protocol(texts):
        losses = records.table("losses")
        table = _at_middle(lost_by_heads(losses))
        for press, part in table.groupby("press", sort=False):
            by_heads, whole = part.set_index("heads"), part.set_index("heads").loc["all"]
            row = {"文本": records.run()["dataset"], "press": press, "压缩率": number(whole.compression_ratio, "g")}
            for name, words in ACTING.items():
                of = by_heads.loc[name]
                row[words] = f"{of.value:.4f} [{of.low:.4f}, {of.high:.4f}]"
            parts = {name: f"{whole[f'part_{name}']:.0%}" if whole.sure else "—" for name in PARTS}
            row |= {f"多付逾 {LOST:g} nat 的词元": f"{whole.tokens_lost:.1%}", "占损失": parts["lost"]}
            rows.append(row | {f"{words}的词元占损失": parts[name] for name, words in SEEN.items()})
    return pd.DataFrame(rows)
