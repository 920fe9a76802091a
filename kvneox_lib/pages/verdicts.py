"""Which presses are clearly better or worse than a control, window by window, in the two studies of perplexity; `texts`
are their records."""

from functools import lru_cache

import pandas as pd

from kvneox_lib.pages import kinds, losses
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.quality import WINDOW_CONTROL, pressed, shown_ratios
from kvneox_lib.pages.report import Missing, Records, found_in, named
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.words import STUDY_NAMES, listed, signed, with_interval
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.presses.registry import RandomRecentPress

FEW = 5  # names that a sentence can list
VERDICTS = {"better": " 好", "worse": " 差", "": ""}


@lru_cache(maxsize=8)  # several sentences and tables ask for the same
def against(other: str, *texts: Records) -> pd.DataFrame:
    """`losses.against` that press, of one text after the other, which `实验` names; judged together."""
    parts = []
    for records in texts:
        names = pressed(records)["press"].unique()
        if other not in names:
            raise Missing(records.study, other)
        windows = pd.concat([records.table("windows", press=name) for name in names])
        found = losses.against(windows, other)
        if found.empty:
            raise Missing(records.study, f"与 {other} 压缩率相同的 press")
        parts.append(found.assign(实验=STUDY_NAMES[records.study]))
    return losses.judged(pd.concat(parts, ignore_index=True))


def reach_of_verdicts(*texts: Records) -> str:
    return losses.reach_of_verdicts(against("random", *texts))


def verdict_table(*texts: Records) -> pd.DataFrame:
    """All ratios, presses that work alike together."""
    found = against("random", *texts)
    said = found["nll_difference"].map(signed) + found["verdict"].map(VERDICTS)
    found = found.assign(said=said, compression_ratio=found["compression_ratio"].map("{:g}".format))
    table = found.pivot(index=["实验", "press"], columns="compression_ratio", values="said")
    means = found.groupby(["实验", "press"], as_index=False)["nll_difference"].mean()
    order = [
        (name, press)
        for name in found["实验"].unique()
        for press in kinds.in_groups(means[means["实验"] == name], "nll_difference")["press"]
    ]
    table = table.loc[order].fillna("—").rename_axis(columns=None).reset_index()
    table.insert(1, "怎样取舍", table["press"].map(kinds.kind_of))
    return table


def short_table(*texts: Records) -> pd.DataFrame:
    """The core presses at a low and a high ratio in all texts: their losses, and the verdict against random."""
    verdicts = against("random", *texts).set_index(["实验", "compression_ratio", "press"])["verdict"]
    ratios, columns = dict.fromkeys(shown_ratios(*texts)), {}
    for records in texts:
        runs = pressed(records)
        runs = runs[runs["press"].map(kinds.is_core)]
        for ratio in ratios:
            name = STUDY_NAMES[records.study]
            part = healthy(runs[runs["compression_ratio"] == ratio]).set_index("press")["delta_nll"]
            told = [VERDICTS[verdicts.get((name, ratio, press), "")] for press in part.index]
            columns[f"{name} {ratio:g}"] = part.map("{:.3f}".format) + told
    table = pd.DataFrame(columns)
    first = pressed(texts[0])[lambda runs: runs["compression_ratio"] == next(iter(ratios))]
    order = kinds.in_groups(first[first["press"].isin(table.index)], "delta_nll")
    table = table.loc[order["press"]].fillna("—").rename_axis("press").reset_index()
    table.insert(0, "怎样取舍", order["kind"].to_numpy())
    return table


def beside_random(*texts: Records) -> str:
    """Who is clearly better than random eviction, who clearly worse, at the low and the high ratio of each text."""
    found = _at_shown_ratios("random", *texts)
    found = kinds.methods(found)
    lines, counts = [], {}
    for ratio in sorted(found["compression_ratio"].unique()):
        parts = []
        for name, part in found[found["compression_ratio"] == ratio].groupby("实验", sort=False):
            better, worse = (_few(part.loc[part["verdict"] == sure, "press"]) for sure in ("better", "worse"))
            unclear = (part["verdict"] == "").sum()
            parts.append(f"{name}里明确更好的：{better}；明确更差的：{worse}；分不出的：{unclear} 种")
            counts[ratio, name] = part["verdict"].value_counts()
        lines.append(f"- 压缩率 {ratio:g}：{'。'.join(parts)}。")
    low = found["compression_ratio"].min()
    losing = [name for (ratio, name), verdicts in counts.items() if ratio == low and _beaten(verdicts)]
    said = (
        f"**压缩率 {low:g} 时，在{listed(losing)}里明确不如随机淘汰的方法，多于明确胜过它的。**"
        if losing
        else f"压缩率 {low:g} 时，明确胜过随机淘汰的方法不少于明确不如它的。"
    )
    return said + "逐窗口配对、一起校正之后：\n\n" + "\n".join(lines) + "\n\n"


def _few(names: pd.Series) -> str:
    return listed(names, "无") if len(names) <= FEW else f"{len(names)} 种"


def _beaten(verdicts: pd.Series) -> bool:
    return verdicts.get("worse", 0) > verdicts.get("better", 0)


def converging(*texts: Records) -> str:
    """How far apart methods are in the first text, at the ends of the ratios and where they are furthest apart; and
    whether windows tell them from random eviction at the highest."""
    runs = kinds.methods(healthy(pressed(texts[0])))
    spans = runs.groupby("compression_ratio")["delta_nll"].agg(["min", "max", "count"]).query("count > 1")
    if len(spans) < 2:
        raise Missing(texts[0].study, "几种方法在几个压缩率的损失")
    widest = (spans["max"] - spans["min"]).idxmax()
    shown = sorted({spans.index[0], widest, spans.index[-1]})
    parts = [f"压缩率 {ratio:g} 时是 {spans['min'][ratio]:.3f} 与 {spans['max'][ratio]:.3f} nat" for ratio in shown]
    text = f"{named(texts[0])}里损失最小与最大的方法，{'，'.join(parts)}：差别在压缩率 {widest:g} 时最大"
    if widest < spans.index[-1]:
        then, last = spans["count"][[widest, spans.index[-1]]]
        text += f"，再往上变小（在比的方法由 {then} 种到 {last} 种）"
    return f"{text}。{_told_at_highest(*texts)}"


def _told_at_highest(*texts: Records) -> str:
    found = against("random", *texts)
    found = kinds.methods(found[found["compression_ratio"] == found["compression_ratio"].max()])
    found_in(texts[0].study, found, "最高压缩率的方法")
    parts = []
    for name, part in found.groupby("实验", sort=False):
        told = {words: part[part["verdict"] == sure] for sure, words in (("better", "更好"), ("worse", "更差"))}
        said = [
            f"明确{words}的 {len(rows)} 种（{listed(rows['press'])}，相差 {_size(rows)} nat）"
            for words, rows in told.items()
            if len(rows)
        ]
        parts.append(f"{name}里{'，'.join(said)}" if said else f"{name}里一种也分不出")
    ratio = found["compression_ratio"].iloc[0]
    still = "成对比较仍分得出" if (found["verdict"] != "").any() else "成对比较也分不出"
    return f"压缩率 {ratio:g} 时{still}：逐窗口与随机淘汰相比，{'；'.join(parts)}。"


def _size(rows: pd.DataFrame) -> str:
    sizes = rows["nll_difference"].abs()
    return " 到 ".join(dict.fromkeys(f"{size:.3f}" for size in (sizes.min(), sizes.max())))


def room(*texts: Records) -> str:
    """How much there is to gain over random eviction."""
    low = texts[0].runs(press="random")["compression_ratio"].min()
    runs = [of_one_storage(records.runs(press="random", compression_ratio=low)).iloc[0] for records in texts]
    loss = [f"{named(records)} {with_interval(run, 'delta_nll')} nat" for records, run in zip(texts, runs)]
    return (
        f"轻压缩时能赢多少有个上限：压缩率 {low:g}，随机淘汰自己的损失是{'，'.join(loss)}，"
        "若压缩不能让模型比读完整的缓存更好，可改进的余地以此为限。"
    )


def window_table(*texts: Records) -> pd.DataFrame:
    """The core presses beside the control that keeps SnapKV's window, at a low and a high ratio in all texts."""
    found = _at_shown_ratios(WINDOW_CONTROL, *texts)
    found = found[found["press"].map(kinds.is_core)]
    cells = found.assign(
        said=found["nll_difference"].map(signed) + found["verdict"].map(VERDICTS),
        where=found["实验"] + " " + found["compression_ratio"].map("{:g}".format),
    )
    table = cells.pivot(index="press", columns="where", values="said").fillna("—")
    table = table[sorted(table.columns, key=list(dict.fromkeys(_places(found))).index)]
    order = kinds.in_groups(found.groupby("press", as_index=False)["nll_difference"].mean(), "nll_difference")
    table = table.loc[order["press"]].rename_axis("press").rename_axis(columns=None).reset_index()
    table.insert(0, "怎样取舍", order["kind"].to_numpy())
    return table


def _at_shown_ratios(other: str, *texts: Records) -> pd.DataFrame:
    found = against(other, *texts)
    found = found[found["compression_ratio"].isin(shown_ratios(*texts))]
    return found_in(texts[0].study, found, f"与 {other} 压缩率相同的 press")


def _places(found: pd.DataFrame) -> list[str]:
    """Text and ratio, one text after the other."""
    rows = found.assign(place=found["实验"].map(list(found["实验"].unique()).index))
    rows = rows.sort_values(["place", "compression_ratio"], kind="stable")
    return [f"{row.实验} {row.compression_ratio:g}" for row in rows.itertuples()]


def beside_window(*texts: Records) -> str:
    """Whether what presses with SnapKV's window gain over random eviction is more than the window itself gives."""
    place = ["实验", "compression_ratio"]
    over_random, over_window = (_at_shown_ratios(other, *texts) for other in ("random", WINDOW_CONTROL))
    window = over_random[over_random["press"] == WINDOW_CONTROL]
    scored = over_window[over_window["press"].map(kinds.kind_of) == kinds.WINDOW]
    if window.empty or scored.empty:
        raise Missing(texts[0].study, WINDOW_CONTROL)
    won = (window["verdict"] == "better").sum()
    often = [f"{press} {(part == 'better').sum()}/{len(part)}" for press, part in scored.groupby("press")["verdict"]]
    better = over_random.loc[over_random["verdict"] == "better", [*place, "press"]]
    gained = scored.merge(better, on=[*place, "press"])
    text = (
        f"{WINDOW_CONTROL} 与 SnapKV 一样留下最近 {RandomRecentPress.window_size} 个词元，其余随机：它不打分，"
        f"却有同样的近窗。各篇文本、高低两个压缩率共 {len(window)} 处，它有 {won} 处明确好于纯随机。"
        f"看末尾窗口打分的方法明确好于它的次数是：{listed(often)}（@tbl-window）。"
    )
    lost = (gained["verdict"] != "better").sum()
    if len(gained):
        text += f"这些方法对纯随机有 {len(gained)} 处明确的优势，其中 {lost} 处没有明确超出近窗自己给的。"
    if lost:
        text += "所以只与纯随机相比，可能把近窗的功劳算给打分。"
    return text


def sharing(*texts: Records) -> str:
    """What it gains to divide SnapKV's budget among heads."""
    rows = _at_shown_ratios("snapkv", *texts)
    rows = rows[rows["press"] == "adakv_snapkv"]
    if rows.empty:
        raise Missing(texts[0].study, "adakv_snapkv")
    words = {"better": "明确更小", "worse": "明确更大", "": "分不出大小"}
    parts = [
        f"{row.实验} {row.compression_ratio:g} {words[row.verdict]}（{signed(row.nll_difference)} nat）"
        for row in rows.sort_values("实验", kind="stable").itertuples()
    ]
    return (
        "adakv_snapkv 与 snapkv 的打分相同，差别只在各头怎样分预算，所以损失之差就是分法的作用："
        f"{'，'.join(parts)}。pyramidkv 还把观察窗口缩到 {make_press('pyramidkv').window_size} 个词元"
        f"（snapkv 是 {make_press('snapkv').window_size} 个），它与 snapkv 之差不能都算在逐层分配上。"
    )
