"""Whose loss a loss in perplexity is, by heads and by tokens: table `losses` of study `heads`."""

import math

import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.measures.causes import NEAR
from kvneox_lib.measures.intervals import comparison, holm
from kvneox_lib.pages import figures
from kvneox_lib.pages.report import Records, found_in
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
    table = _at_middle(lost_by_heads(losses)).pivot(index="press", columns="heads", values="value")
    parts = [f"{words}压缩，{_range(table[name], '.4f')} nat" for name, words in ACTING.items()]
    return f"{of_text(losses)}，{at_which_ratio(losses)}，每词元多付：{'；'.join(parts)}。{whose(losses)}"


def _range(values: pd.Series, spec: str) -> str:
    low, high = format(values.min(), spec), format(values.max(), spec)
    return low if low == high else f"{low} 至 {high}"


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
    so would have a share in a loss that is none; those that gain as much are set against them."""
    whole = _whole(losses)
    text = (
        f"比不压缩多付 {LOST:g} nat 以上的词元占 {_range(whole['tokens_lost'], '.1%')}，"
        f"少付这么多的占 {_range(whole['tokens_gained'], '.1%')}。"
    )
    sure = whole[whole["sure"]]
    if sure.empty:
        return text + "损失与零分不开，不谈它们占多少。"
    net = (sure["part_lost"] + sure["part_gained"]).set_axis(sure["press"])
    few, many = net[net >= 0.5], net[net < 0.5]
    parts = [f"{listed(few.index)} 的损失有 {_range(few, '.0%')} 在这少数词元上"] if len(few) else []
    parts += (
        [f"{listed(many.index)} 的损失只有 {_range(many, '.0%')} 在其上，大半是许多词元分摊的"] if len(many) else []
    )
    return f"{text}两相抵之后，{'；'.join(parts)}。"


def dilution(whole: pd.DataFrame) -> pd.DataFrame:
    """Of rows of `lost_by_heads` with a loss: the mean loss as `p` of the tokens, those that lose much, times `c`, and
    the others times `rest`."""
    whole = whole[whole["sure"] & (whole["tokens_lost"] > 0)]
    p, much = whole["tokens_lost"], whole["part_lost"] * whole["value"]
    return whole.assign(p=p, c=much / p, much=much, rest=(whole["value"] - much) / (1 - p))


def dilution_table(texts: list[Records]) -> pd.DataFrame:
    """Of `of_one_protocol`, at the middle ratio."""
    parts = []
    for records in of_one_protocol(texts):
        found = dilution(_whole(records.table("losses")))
        shown = {
            "文本": records.run()["dataset"],
            "press": found["press"],
            "$p$": found["p"].map("{:.2%}".format),
            "$c$": found["c"].map("{:.2f}".format),
            "$p c$": found["much"].map("{:.4f}".format),
            "$\\epsilon$": found["rest"].map("{:.4f}".format),
            "$\\Delta$": found["value"].map("{:.4f}".format),
            "困惑度变为": found["value"].map(lambda nat: f"{math.exp(nat):.3f} 倍"),
        }
        parts.append(pd.DataFrame(shown))
    return found_in("heads", pd.concat(parts, ignore_index=True), f"损失不是零、又有词元多付 {LOST:g} nat 以上的运行")


def diluted(runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """What a mean makes of tokens that lose much, at the middle ratio, of the press that recalls least."""
    recalled = _at_middle(runs).drop_duplicates("press").set_index("press")["accuracy"].astype(float)
    found = found_in("heads", dilution(_whole(losses)), f"损失不是零、又有词元多付 {LOST:g} nat 以上的运行")
    found = found_in("heads", found.assign(recalled=found["press"].map(recalled)).dropna(subset="recalled"), "accuracy")
    worst = found.loc[found["recalled"].idxmin()]
    return (
        f"{at_which_ratio(losses)}，{worst.press} 之下口令答对 {worst.recalled:.2f}；{of_text(losses)}，续文里 "
        f"{worst.p:.2%} 的词元多付逾 {LOST:g} nat，每个平均 {worst.c:.2f} nat；摊到全部词元上只是 "
        f"{worst.value:.3f} nat，困惑度不过变为 {math.exp(worst.value):.3f} 倍。"
    )


def by_seen(losses: pd.DataFrame) -> str:
    """Which tokens pay, at the middle ratio."""
    whole = _whole(losses)
    shares = listed([f"{words}的 {whole[f'tokens_{name}'].mean():.0%}" for name, words in SEEN.items()])
    text = f"按“前一个词元加这个词元”这一对是否见过来分：在上下文里（最后 {NEAR} 个词元之前）{shares}。"
    most = whole["press"].isin(_paying_most_far_away(losses))
    if not most.any():
        return text + "没有哪种方法，远处出现过的词元付得明显最多。"
    these, others = whole[most], whole[~most]
    text += f"{listed(these['press'])} 的损失，本可以照抄的词元（远处出现过的）付得最多，{_per_token(these)}。"
    return text + (f"{listed(others['press'])} 则分不出谁付得最多：{_per_token(others)}。" if len(others) else "")


def _paying_most_far_away(losses: pd.DataFrame) -> list[str]:
    """The presses under which a token seen far away pays more than one of either other class, on the same windows;
    corrected for all of these comparisons together."""
    chosen = _at_middle(losses)
    parts = chosen[chosen["heads"] == "all"].groupby("press", sort=False)
    found = [(press, *_ahead_of(part, other)) for press, part in parts for other in ("near", "new")]
    table = pd.DataFrame(found, columns=["press", "ahead", "p"])
    sure = (table["ahead"] > 0) & (holm(table["p"].to_numpy(dtype=float)) < 0.05)
    return [press for press, is_sure in sure.groupby(table["press"], sort=False) if is_sure.all()]


def _ahead_of(part: pd.DataFrame, other: str) -> tuple[float, float]:
    """By how much a token seen far away pays more, and p. A quotient of sums of which each window has a part: what a
    window adds to it is linear in what it deviates by."""

    def per_token(which: str) -> tuple[float, pd.Series]:
        loss, n = part[f"loss_{which}"], part[f"n_tokens_{which}"]
        mean = loss.sum() / n.sum() if n.sum() else float("nan")
        return mean, mean + (loss - mean * n) / n.mean()

    (far, of_windows), (less, of_others) = per_token("far"), per_token(other)
    return far - less, comparison((of_windows - of_others).to_numpy(), part["document"].to_numpy()).p


def _per_token(rows: pd.DataFrame) -> str:
    far, new = (_range(rows[f"nat_{name}"], ".3f") for name in ("far", "new"))
    return f"每个 {far} nat，没有出现过的每个 {new} nat"


# ---- of several texts -----------------------------------------------------------------------------------------------


def of_one_protocol(texts: list[Records]) -> list[Records]:
    """Those of the model, and with the lengths, of the first, which has most records."""
    texts = found_in("heads", texts, "")

    def protocol(records: Records) -> list[str]:
        return [str(records.run().get(name)) for name in PROTOCOL]

    return [records for records in texts if protocol(records) == protocol(texts[0])]


def loss_by_text(texts: list[Records]) -> pd.DataFrame:
    """Of `of_one_protocol`, at the middle ratio: whose loss it is."""
    rows = []
    for records in of_one_protocol(texts):
        table = _at_middle(lost_by_heads(records.table("losses")))
        for press, part in table.groupby("press", sort=False):
            row = {
                "文本": records.run()["dataset"],
                "press": press,
                "压缩率": number(part["compression_ratio"].iloc[0], "g"),
            }
            for name, words in ACTING.items():
                of = part.set_index("heads").loc[name]
                row[words] = f"{of.value:.4f} [{of.low:.4f}, {of.high:.4f}]"
            rows.append(row)
    return pd.DataFrame(rows)


def tokens_by_text(texts: list[Records]) -> pd.DataFrame:
    """Of the same: which tokens pay, where the press acts in all heads."""
    rows = []
    for records in of_one_protocol(texts):
        for _, whole in _whole(records.table("losses")).iterrows():
            parts = {name: f"{whole[f'part_{name}']:.0%}" if whole["sure"] else "—" for name in PARTS}
            row = {"文本": records.run()["dataset"], "press": whole["press"]}
            row |= {f"多付逾 {LOST:g} nat 的词元": f"{whole['tokens_lost']:.1%}", "占损失": parts["lost"]}
            row |= {f"少付逾 {LOST:g} nat 的词元": f"{whole['tokens_gained']:.1%}"}
            row |= {"抵去": parts["gained"].removeprefix("-")}
            rows.append(row | {f"{words}的词元占": parts[name] for name, words in SEEN.items()})
    return pd.DataFrame(rows)
