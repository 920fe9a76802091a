"""What the report says of perplexity, from the records of the two studies of it; `texts` are those records."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.pages import kinds, losses
from kvneox_lib.pages.degenerate import healthy, is_degenerate
from kvneox_lib.pages.report import Missing, Records, found_in, middle_ratio, named, settings, sources
from kvneox_lib.pages.report import pressed as pressed_in_all_bits
from kvneox_lib.pages.selecting import numeric, of_one_storage
from kvneox_lib.pages.tables import cited
from kvneox_lib.pages.words import STUDY_NAMES, listed, signed, tiny, with_interval

SHOWN_BESIDE_CONTROL = ("random", "snapkv", "streaming_llm", "pyramidkv", "knorm")
SHOWN_AS_MAPS = ("snapkv", "pyramidkv", "adakv_snapkv")
WINDOW_CONTROL = "random_recent"  # keeps SnapKV's window, and the others at random
HARDLY_FADES = 0.8  # of the loss near the cut
EVEN = 0.01  # shares that differ by less are the same


def pressed(records: Records) -> pd.DataFrame:
    return of_one_storage(pressed_in_all_bits(records))


def _these_or_all(table: pd.DataFrame, presses: tuple[str, ...]) -> pd.DataFrame:
    found = table[table["press"].isin(presses)]
    return found if len(found) else table


# ---- the control ----------------------------------------------------------------------------------------------------


def control_lines(records: Records) -> Figure:
    """What the continuation loses beside what teacher forcing shows of it."""
    runs = pressed(records)
    shown = _these_or_all(runs, SHOWN_BESIDE_CONTROL).drop(columns=[losses.LOW, losses.HIGH])
    return losses.loss_lines(shown, losses.moved(runs))


def furthest_moved(*texts: Records) -> float:
    return max(pressed(records)["control_delta_nll"].abs().max() for records in texts)


def unmoved(*texts: Records) -> str:
    moves = pd.concat([pressed(records)["control_delta_nll"].abs() for records in texts])
    same = "与不压缩逐位相同" if moves.max() == 0 else f"与不压缩至多相差{tiny(moves.max())}"
    return (
        f"{len(moves)} 次运行的对照{same}，不论哪种方法、压到多少。"
        "“压缩之后困惑度一字不差”因此不说明方法稳健，只说明没有测到：打分的词元没有一个读过压缩后的缓存。"
    )


def hardest(records: Records) -> tuple[pd.DataFrame, bool]:
    """The runs of methods that do what their names say at the highest ratio, and whether all their perplexities are
    finite."""
    last = kinds.methods(losses.at_highest(healthy(pressed(records))))
    if last["ppl_ratio"].isna().all():
        raise Missing(records.study, "有限的困惑度")
    return last, bool(np.isfinite(last["ppl_ratio"]).all())


def breaking(records: Records) -> str:
    last, finite = hardest(records)
    lowest, highest = last["ppl_ratio"].min(), last["ppl_ratio"].max()
    rise = f"困惑度乘以 {lowest:.2f} 到 {highest:.2f}" + ("" if finite else "，有的不是有限的数")
    verdict = "：press 确实起了作用，只是教师强制看不见" if lowest > 1 else "：有的 press 没有起作用"
    return (
        f"\n\n**破坏性检查。** 只留 {1 - last['compression_ratio'].iloc[0]:.0%} 时，{len(last)} 种方法让续文的{rise}"
        f"{verdict}。续文自己的词元始终留在缓存里，压得再狠也不该得到无穷大；测得无穷大，说明别处出了错。"
    )


# ---- loss by ratio --------------------------------------------------------------------------------------------------


def loss_lines(records: Records) -> Figure:
    return losses.loss_lines(pressed(records))


def loss_table(*texts: Records) -> pd.DataFrame:
    """All ratios, presses that work alike together; a cell that is compared nowhere is in brackets."""
    parts = []
    for records in texts:
        runs = pressed(records)
        means = runs.groupby("press", as_index=False)["delta_nll"].mean()
        shown = runs["delta_nll"].map(signed)
        shown = shown.where(~is_degenerate(runs), "（" + shown + "）")
        cells = runs.assign(shown=shown).pivot(index="press", columns="compression_ratio", values="shown")
        cells = cells.loc[kinds.in_groups(means, "delta_nll")["press"]]
        cells.columns = [f"{ratio:g}" for ratio in cells.columns]
        parts.append(cells.reset_index().assign(实验=STUDY_NAMES[records.study]))
    table = pd.concat(parts).fillna("—")
    table = table.assign(怎样取舍=table["press"].map(kinds.kind_of))
    named_columns = ["实验", "怎样取舍", "press"]
    return table[[*named_columns, *sorted(table.columns.difference(named_columns), key=float)]]


def baselines(*texts: Records) -> str:
    runs = [(named(records), of_one_storage(records.runs(press="no_press")).iloc[0]) for records in texts]
    parts = [f"{name} {with_interval(run, 'ppl', 1)}（每字节 {run.bits_per_byte:.3f} 比特）" for name, run in runs]
    return f"不压缩时的困惑度：{'；'.join(parts)}。"


def reach(*texts: Records) -> str:
    """Of what the intervals of each study speak."""
    parts = []
    for records in texts:
        if knows_dependence(records):
            told = losses.reach(records.table("windows", press="no_press")["document"].nunique())
        else:
            told = "区间只对窗口做自助法，没有考虑窗口来自哪篇文本、与哪些相邻。"
        parts.append(f"{STUDY_NAMES[records.study]}：{told}")
    return "".join(parts)


def knows_dependence(records: Records) -> bool:
    """Whether all intervals in these records draw documents and neighbours together; from before they did, nobody
    counted the documents."""
    runs = records.runs()
    return "n_documents" in runs and bool(runs["n_documents"].notna().all())


def shown_ratios(*texts: Records) -> tuple[float, float]:
    """A low and a high ratio for all texts: the lowest at which most presses do what their names say, and the highest
    at which three quarters as many do."""
    counts = [healthy(pressed(records)).groupby("compression_ratio")["press"].nunique() for records in texts]
    counts = pd.concat(counts, axis=1).dropna().min(axis=1).sort_index()
    if counts.empty:
        raise Missing(texts[-1].study, "两个实验共有的压缩率")
    return float(counts.idxmax()), float(counts.index[counts >= 0.75 * counts.max()][-1])


def example(records: Records) -> str:
    """What the best-known press loses at a low and a high ratio."""
    parts = []
    for ratio in dict.fromkeys(shown_ratios(records)):
        run = of_one_storage(records.runs(press="snapkv", compression_ratio=ratio)).iloc[0]
        parts.append(
            f"压缩率 {ratio:g} 时每个词元多损失 {with_interval(run, 'delta_nll')} nat（困惑度乘以 {run.ppl_ratio:.2f}）"
        )
    return f"以 SnapKV 为例，{named(records)}里{'，'.join(parts)}。"


def rising(*texts: Records) -> str:
    """How the loss grows with the ratio."""
    rises = pd.concat([losses.rising(healthy(pressed(records))) for records in texts])
    if rises.empty:
        raise Missing(texts[-1].study, "多个压缩率的区间")
    if rises.all():
        return "每一种方法都是压得越多、损失越大：最高压缩率的区间整个高于最低压缩率的区间。"
    flat = listed(dict.fromkeys(rises.index[~rises]))
    return f"{len(rises)} 条线里有 {rises.sum()} 条压得越多、损失越大；最高与最低压缩率的区间仍然相交的是 {flat}。"


def _with_ends(records: Records) -> pd.DataFrame:
    """The runs that are compared and have an interval."""
    runs = healthy(numeric(pressed(records))).dropna(subset=[losses.LOW, losses.HIGH])
    return found_in(records.study, runs, "区间")


def texts_apart(*texts: Records) -> str:
    """In which text the same press at the same ratio costs more."""
    tables = [kinds.methods(_with_ends(records)).set_index(["compression_ratio", "press"]) for records in texts]
    both = pd.concat(tables, axis=1, keys=map(named, texts), join="inner")
    low, high = shown_ratios(*texts)
    both = both[both.index.get_level_values("compression_ratio").isin([low, high])]
    found_in(texts[-1].study, both, "两个实验共有的区间")
    dearer, cheaper = sorted(map(named, texts), key=lambda name: -both[name]["delta_nll"].mean())
    apart = both[dearer][losses.LOW] > both[cheaper][losses.HIGH]
    against = (both[cheaper][losses.LOW] > both[dearer][losses.HIGH]).sum()
    if not apart.any() and not against:
        return "两篇文本里，同一方法在同一压缩率下的损失，区间都相交：分不出哪篇损失更大。"
    known = both[apart & (both[cheaper][losses.LOW] > 0)]
    times = known[dearer]["delta_nll"] / known[cheaper]["delta_nll"]
    return (
        f"同一方法、同一压缩率（{_ratios(low, high)}），{len(both)} 对里有 {apart.sum()} 对在{dearer}里的损失明显比在"
        f"{cheaper}里的大（区间不相交{f'；{times.min():.1f} 至 {times.max():.1f} 倍' if len(times) > 1 else ''}），"
        f"{f'有 {against} 对相反' if against else '没有一对相反'}。"
        "压缩的代价因此是方法与文本两者的事，一个不提文本的数字没有意义。"
    )


def _ratios(low: float, high: float) -> str:
    return listed(dict.fromkeys(f"{ratio:g}" for ratio in (low, high)))


def nearly_free(*texts: Records) -> str:
    """Which presses lose less than a tenth of what random eviction loses, in all texts at the low ratio."""
    low, _ = shown_ratios(*texts)
    found = []
    for records in texts:
        runs = healthy(of_one_storage(records.runs(compression_ratio=low))).set_index("press")["delta_nll"]
        if "random" not in runs:
            raise Missing(records.study, "random")
        found.append(runs[runs < runs["random"] / 10])
    names = [name for name in found[0].index if all(name in runs for runs in found)]
    if not names:
        return f"压缩率 {low:g} 时，没有一种方法的损失在各篇文本里都不到随机淘汰的十分之一。"
    parts = [f"{name}（{kinds.kind_of(name)}）" for name in names]
    loss = max(runs[names].max() for runs in found)
    return (
        f"压缩率 {low:g} 时，{listed(parts)}的损失在各篇文本里都不到随机淘汰的十分之一，至多 {loss:.3f} nat。"
        + "".join(EXPLAINED[kind] for kind in dict.fromkeys(map(kinds.kind_of, names)) if kind in EXPLAINED)
    )


EXPLAINED = {
    kinds.AT_EXIT: "重读上下文的方法压缩时让模型把上下文再读一遍，代价是预填充之外还要重放一遍上下文，预填充因此更慢。",
    kinds.BY_HEAD: "按头分工的方法事先在这个模型上量过哪些头抄写，把预算给它们：换一个模型要重新量。",
}


# ---- distance and heads ---------------------------------------------------------------------------------------------


def distance_lines(records: Records) -> Figure:
    """The mean of the core presses that work alike."""
    ratio = middle_ratio(records)
    table = _distances(records)
    means = table.assign(press=table["press"].map(kinds.kind_of)).groupby(["press", "from_token", "to_token"])
    means = means["delta_nll"].mean().reset_index().assign(compression_ratio=ratio)
    order = kinds.in_groups(table[table["to_token"] == table["to_token"].max()], "delta_nll")["kind"].unique()
    return losses.distance_lines(means.set_index("press").loc[order[::-1]].reset_index(), ratio)


def _near_and_far(*texts: Records) -> dict[str, pd.DataFrame]:
    """Of the core presses, by text, at the middle ratio of each."""
    found = {}
    for records in texts:
        found[STUDY_NAMES[records.study]] = losses.near_and_far(_distances(records))
    return found


def _distances(records: Records) -> pd.DataFrame:
    """Of the core presses that do what their names say, at the middle ratio."""
    table = healthy(of_one_storage(records.table("distance", compression_ratio=middle_ratio(records))))
    return found_in(records.study, table[table["press"].map(kinds.is_core)], "核心方法的表 distance")


def fading_table(*texts: Records) -> pd.DataFrame:
    """Loss near the cut and far from it, of presses that work alike: means, and the span of far over near."""
    columns, order = {}, None
    for name, found in _near_and_far(*texts).items():
        groups = found.groupby("kind", sort=False)
        means = groups[["near", "far"]].mean()
        order = means["near"].sort_values(ascending=False).index if order is None else order
        columns["几种"] = columns.get("几种", groups.size().map(str))
        columns[f"{name} 近处"] = means["near"].map("{:.3f}".format)
        columns[f"{name} 远处"] = means["far"].map("{:.3f}".format)
        columns[f"{name} 远比近"] = groups["share"].agg(losses.span)
    return pd.DataFrame(columns).loc[order].fillna("—").rename_axis("怎样取舍").reset_index()


def lasting(*texts: Records) -> str:
    """For whom the loss does not fade with distance, in each text and in all of them."""
    hardly, slower, kept = [], [], []
    for name, rows in _near_and_far(*texts).items():
        rows = rows.set_index("press")
        if "random" not in rows.index:
            raise Missing(texts[0].study, "random")
        names = listed(rows.index[rows["share"] > HARDLY_FADES], "没有一种")
        left = losses.span(rows.loc[["random"], "share"])
        hardly.append(f"{name}里，随机淘汰的损失到远处只剩 {left}，几乎不消退的：{names}")
        window = rows.loc[rows["kind"] == kinds.WINDOW, "share"]
        slower.append(len(window) > 0 and bool((window > rows.loc["random", "share"]).all()))
        if WINDOW_CONTROL in rows.index:
            pair = rows.loc[["random", WINDOW_CONTROL], ["near", "far"]].map("{:.3f}".format)
            kept.append(f"{name}近处由 {' 变为 '.join(pair['near'])}，远处由 {' 变为 '.join(pair['far'])}")
    text = f"{'；'.join(hardly)}（远处损失仍在近处的八成以上，算几乎不消退）。"
    if all(slower):
        text = (
            "**留住近处的方法，近处损失小，也消退得慢。**每一种看末尾窗口打分的方法，损失都比随机淘汰消退得慢，"
            f"各篇文本都如此：切口附近的文本总被留住，剩下的损失多半来自更远的信息，读得再远也补不回来。{text}"
        )
    if kept:
        text += f"给随机淘汰也留下近窗，其余不变，损失是：{'；'.join(kept)}。"
    return text


def hidden_by_means(*texts: Records) -> str:
    """What a mean over all presses would say of near and far, and what these figures do not."""
    found = _near_and_far(*texts)
    if any(rows["kind"].nunique() < 2 for rows in found.values()):
        raise Missing(texts[0].study, "取舍方式不同的几种方法")
    sums = {name: rows[["near", "far"]].sum() for name, rows in found.items()}
    means = listed(f"{name} {both['far'] / both['near']:.0%}" for name, both in sums.items())
    return (
        f"把所有方法平均成一个远比近（{means}）会盖住这件事：近处损失大的方法决定了这个平均。"
        "这里只描述大小，不下定论：多数分段没有区间。续文取多长会影响平均损失，比较两份结果先要看计分的范围是否一样。"
    )


def kept_maps(records: Records) -> Figure:
    """Each under its name and ratio."""
    table = _these_or_all(_kept_at_middle(records), SHOWN_AS_MAPS)
    return losses.kept_maps(table.assign(press=table["press"] + f" {middle_ratio(records):g}"))


def _kept_at_middle(records: Records) -> pd.DataFrame:
    return records.table("heads", compression_ratio=middle_ratio(records))


def spread(records: Records) -> str:
    """How far apart layers, and heads of a layer, are in what they keep."""
    table = _these_or_all(of_one_storage(_kept_at_middle(records)), SHOWN_AS_MAPS)
    lines = [f"{press} {_spread(part)}" for press, part in table.groupby("press", sort=False)]
    return f"压缩率 {middle_ratio(records):g}：{'；'.join(lines)}。"


def _spread(kept: pd.DataFrame) -> str:
    layers, apart = (kept.groupby("layer")["kept"].agg(each) for each in ("mean", np.ptp))
    said = []
    if np.ptp(layers) >= EVEN:
        said.append(f"各层平均从 {layers.min():.0%} 到 {layers.max():.0%}")
    if apart.max() >= EVEN:
        heads = kept.loc[kept["layer"] == apart.idxmax(), "kept"]
        said.append(f"同一层的头相差最多的从 {heads.min():.0%} 到 {heads.max():.0%}")
    return "，".join(said) or f"每层每头都留 {layers.mean():.0%}"


# ---- all presses ----------------------------------------------------------------------------------------------------


def widest(study: str) -> Records:
    """The setting of a study in which most presses were measured."""
    found = settings(study)
    if not found:
        raise Missing(study)
    return max(found, key=lambda records: records.frame["press"].nunique())


def every_press(*studies: str) -> pd.DataFrame:
    """Each press at 0.5 or its own strength: what it kept, what it lost in each study (in brackets where it is compared
    nowhere), and what else it takes."""
    tables, kept, means = [], [], []
    for study in studies:
        runs = of_one_storage(widest(study).runs())
        strength = (runs["compression_ratio"] == 0.5) | runs["compression_ratio"].isna()
        runs = runs[(runs["press"] != "no_press") & strength].set_index("press")
        lost = pd.Series([with_interval(row, "delta_nll") for _, row in runs.iterrows()], index=runs.index)
        lost = lost.where(~is_degenerate(runs), "（" + lost + "）")
        tables.append(lost.rename(f"{STUDY_NAMES[study]}的损失"))
        kept.append(runs["kept_fraction"])
        means.append(runs["delta_nll"])
    kept = pd.concat(kept).groupby(level=0, sort=False).first().map("{:.2f}".format).rename("实际保留")
    order = kinds.in_groups(pd.concat(means).groupby(level=0).mean().rename_axis("press").reset_index(), "delta_nll")
    table = pd.concat([kept, *tables], axis=1).fillna("—").loc[order["press"]].rename_axis("press").reset_index()
    table.insert(1, "怎样取舍", order["kind"].to_numpy())
    papers = table["press"].map(cited).replace("—", "")
    return table.assign(另外的代价=table["press"].map(kinds.cost_of), press=(table["press"] + " " + papers).str.strip())


def every_source(*studies: str) -> str:
    return sources([widest(study) for study in studies])


def every_windows(*studies: str) -> str:
    counts = [f"{STUDY_NAMES[study]} {widest(study).run().n_windows} 个窗口" for study in studies]
    return f"这张表的损失来自{'，'.join(counts)}；窗口少，区间就宽，相邻几行的先后不能当真。"
