"""What the report says of perplexity, from the records of the two studies of it; `texts` are those records."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.pages import losses
from kvneox_lib.pages.degenerate import healthy, said
from kvneox_lib.pages.report import Missing, Records, middle_ratio, named, settings, sources
from kvneox_lib.pages.report import pressed as pressed_in_all_bits
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.words import STUDY_NAMES, listed, tiny, with_interval

SHOWN_BESIDE_CONTROL = ("random", "snapkv", "streaming_llm", "pyramidkv", "knorm")
SHOWN_AS_MAPS = ("snapkv", "pyramidkv", "adakv_snapkv")
VERDICTS = {"better": " 好", "worse": " 差", "": ""}


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
    return (
        f"{len(moves)} 次运行的对照里，{(moves == 0).sum()} 次的差恰好是零，最大的变动是{tiny(moves.max())}。"
        "“压缩之后困惑度一字不差”不是方法稳健，而是没有测到。"
    )


def hardest(records: Records) -> tuple[pd.DataFrame, bool]:
    """The runs at the highest ratio, and whether all their perplexities are finite."""
    last = losses.at_highest(pressed(records))
    if last["ppl_ratio"].isna().all():
        raise Missing(records.study, "有限的困惑度")
    return last, bool(np.isfinite(last["ppl_ratio"]).all())


def breaking(records: Records) -> str:
    last, finite = hardest(records)
    worst, best = last.loc[last["ppl_ratio"].idxmax()], last.loc[last["ppl_ratio"].idxmin()]
    return (
        f"\n\n**破坏性检查。** 压缩率 {best.compression_ratio:.2f}，即只留 {1 - best.compression_ratio:.0%}："
        f"困惑度乘以 {best.ppl_ratio:.3f}（{best.press}）到 {worst.ppl_ratio:.3f}（{worst.press}），"
        f"{'都是有限的数' if finite else '有的不是有限的数'}；同样这些运行的对照，变动至多是"
        f"{tiny(last['control_delta_nll'].abs().max())}。"
        + ("press 确实起了作用，只是教师强制看不见。" if best.ppl_ratio > 1 else "")
        + "续文自己的词元始终留在缓存里，压得再狠也不该得到无穷大；测得无穷大，说明别处出了错。"
    )


# ---- loss by ratio --------------------------------------------------------------------------------------------------


def summary(books: Records, wiki: Records) -> str:
    ratio = middle_ratio(books)
    row = of_one_storage(books.runs(press="snapkv", compression_ratio=ratio)).iloc[0]
    return (
        f"质量：在一次前向的教师强制之下，{len(pressed(books)) + len(pressed(wiki))} 次运行里负对数似然的最大变动是"
        f"{tiny(furthest_moved(wiki, books))}，这样的困惑度什么也没有测到；让续文去读压缩后的缓存，SnapKV 在压缩率 "
        f"{ratio:.2f} 时每个词元多出 {with_interval(row, 'delta_nll')} nat（{named(books)}）。"
    )


def loss_lines(records: Records) -> Figure:
    return losses.loss_lines(pressed(records))


def loss_table(*texts: Records) -> pd.DataFrame:
    parts = []
    for records in texts:
        table = pressed(records).pivot_table(index="press", columns="compression_ratio", values="delta_nll")
        table = table.sort_values(table.columns[len(table.columns) // 2]).map("{:+.3f}".format, na_action="ignore")
        table.columns = [f"{ratio:g}" for ratio in table.columns]
        parts.append(table.reset_index().assign(实验=STUDY_NAMES[records.study]))
    table = pd.concat(parts).fillna("—")
    return table[["实验", "press", *sorted(table.columns.difference(["实验", "press"]), key=float)]]


def baselines(*texts: Records) -> str:
    runs = [(named(records), of_one_storage(records.runs(press="no_press")).iloc[0]) for records in texts]
    parts = [f"{name} {with_interval(run, 'ppl', 1)}（每字节 {run.bits_per_byte:.3f} 比特）" for name, run in runs]
    return f"不压缩时的困惑度：{'；'.join(parts)}。"


def extremes(*texts: Records) -> str:
    parts = []
    for records in texts:
        ratio = middle_ratio(records)
        runs = healthy(of_one_storage(records.runs(compression_ratio=ratio))).sort_values("delta_nll")
        best, worst = runs.iloc[0], runs.iloc[-1]
        parts.append(
            f"{named(records)}压缩率 {ratio:.2f} 时，损失最小的是 {best.press}（{with_interval(best, 'delta_nll')}），"
            f"最大的是 {worst.press}（{with_interval(worst, 'delta_nll')}）"
        )
    return f"{'；'.join(parts)}。"


def not_ranked(*texts: Records) -> str:
    """Which runs are ranked nowhere, and which keep mostly a window."""
    return "".join(dict.fromkeys(line for records in texts for line in said(pressed(records))))


def rising(*texts: Records) -> str:
    rises = pd.concat([losses.rising(pressed(records)) for records in texts])
    if rises.empty:
        raise Missing(texts[-1].study, "多个压缩率的区间")
    return f"测了多个压缩率的 {len(rises)} 条线里，{rises.sum()} 条在最高压缩率的区间高于最低压缩率的区间，两者不重叠。"


def same_cost(*texts: Records) -> str:
    """The mean loss of the presses that all texts have, at the middle of the ratios that all have."""
    tables = [healthy(pressed(records)).set_index(["compression_ratio", "press"])["delta_nll"] for records in texts]
    both = pd.concat(tables, axis=1, keys=map(named, texts)).dropna()
    if both.empty:
        raise Missing(texts[-1].study, "两个实验共有的压缩率与 press")
    ratios = both.index.get_level_values(0).unique().sort_values()
    ratio = ratios[len(ratios) // 2]
    means = both.loc[ratio].mean().sort_values(ascending=False)
    words = [f"在{name}里是 {mean:.3f} nat" for name, mean in means.items()]
    return f"压缩率同为 {ratio:.2f}，两个实验都测了的 {len(both.loc[ratio])} 种方法，平均损失{'，'.join(words)}。"


# ---- against random eviction ----------------------------------------------------------------------------------------


def against_random(*texts: Records) -> pd.DataFrame:
    """`losses.against` random, of one text after the other, which `实验` names; judged together."""
    parts = []
    for records in texts:
        names = pressed(records)["press"].unique()
        if "random" not in names:
            raise Missing(records.study, "random")
        windows = pd.concat([records.table("windows", press=name) for name in names])
        found = losses.against(windows, "random")
        if found.empty:
            raise Missing(records.study, "与 random 压缩率相同的 press")
        parts.append(found.assign(实验=STUDY_NAMES[records.study]))
    return losses.judged(pd.concat(parts, ignore_index=True))


def reach_of_verdicts(*texts: Records) -> str:
    return losses.reach_of_verdicts(against_random(*texts))


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


def verdict_table(*texts: Records) -> pd.DataFrame:
    found = against_random(*texts)
    said = found["nll_difference"].map("{:+.3f}".format) + found["verdict"].map(VERDICTS)
    found = found.assign(said=said, compression_ratio=found["compression_ratio"].map("{:g}".format))
    table = found.pivot(index=["实验", "press"], columns="compression_ratio", values="said")
    means = found.groupby(["实验", "press"])["nll_difference"].mean().sort_values()
    order = [row for name in found["实验"].unique() for row in means.index if row[0] == name]  # the best first
    return table.loc[order].fillna("—").rename_axis(columns=None).reset_index()


def snapkv_against_random(*texts: Records) -> str:
    found = against_random(*texts)
    if "snapkv" not in set(found["press"]):
        raise Missing(texts[0].study, "snapkv")
    better = found[(found["press"] == "snapkv") & (found["verdict"] == "better")]
    where = []
    for name in found["实验"].unique():
        ratios = better.loc[better["实验"] == name, "compression_ratio"].map("{:g}".format)
        where.append(f"{name}，{'压缩率 ' + listed(ratios) if len(ratios) else '没有'}")
    loss = []
    for records in texts:
        random = of_one_storage(records.runs(press="random")).sort_values("compression_ratio").iloc[0]
        loss.append(f"{named(records)} {with_interval(random, 'delta_nll')} nat（压缩率 {random.compression_ratio:g}）")
    return (
        f"SnapKV 明确好于随机淘汰的地方：{'；'.join(where)}。"
        f"压缩率最低时，随机淘汰的损失是：{'，'.join(loss)}；若压缩不能让模型比读完整的缓存更好，可改进的余地以此为限。"
    )


# ---- distance and heads ---------------------------------------------------------------------------------------------


def distance_lines(records: Records) -> Figure:
    ratio = middle_ratio(records)
    return losses.distance_lines(records.table("distance", compression_ratio=ratio), ratio)


def lasting(records: Records) -> str:
    ratio = middle_ratio(records)
    return losses.lasting(records.table("distance", compression_ratio=ratio), ratio)


def kept_maps(records: Records) -> Figure:
    table = records.table("heads", compression_ratio=middle_ratio(records))
    return losses.kept_maps(_these_or_all(table, SHOWN_AS_MAPS))


# ---- all presses ----------------------------------------------------------------------------------------------------


def widest(study: str) -> Records:
    """The setting of a study in which most presses were measured."""
    found = settings(study)
    if not found:
        raise Missing(study)
    return max(found, key=lambda records: records.frame["press"].nunique())


def every_press(*studies: str) -> pd.DataFrame:
    """Each press at 0.5 or its own strength: what it kept and what it lost in each study."""
    tables, kept = [], []
    for study in studies:
        runs = of_one_storage(widest(study).runs())
        strength = (runs["compression_ratio"] == 0.5) | runs["compression_ratio"].isna()
        runs = runs[(runs["press"] != "no_press") & strength].set_index("press")
        lost = [with_interval(row, "delta_nll") for _, row in runs.iterrows()]
        tables.append(pd.Series(lost, index=runs.index, name=f"{STUDY_NAMES[study]}的损失"))
        kept.append(runs["kept_fraction"])
    kept = pd.concat(kept).groupby(level=0, sort=False).first().map("{:.2f}".format).rename("实际保留")
    return pd.concat([kept, *tables], axis=1).fillna("—").rename_axis("press").reset_index()


def every_source(*studies: str) -> str:
    return sources([widest(study) for study in studies])


def every_windows(*studies: str) -> str:
    counts = [f"{STUDY_NAMES[study]} {widest(study).run().n_windows} 个窗口" for study in studies]
    return f"这张表的损失来自{'，'.join(counts)}；窗口少，区间就宽。"
