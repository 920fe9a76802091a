"""What still holds of an earlier result on pythia-2.8b, set against the records; `earlier` is its table."""

import pandas as pd

from kvneox_lib.inputs.weights import PYTHIA
from kvneox_lib.pages.quality import furthest_moved, hardest
from kvneox_lib.pages.report import Records, middle_ratio, models, named, settings
from kvneox_lib.pages.shapes import bytes_read
from kvneox_lib.pages.words import listed, tiny, with_interval

MODEL = "pythia-2.8b"


def quoted(earlier: pd.DataFrame) -> pd.DataFrame:
    names = {"method": "方法", "batch_size": "批", "tok_per_s": "词元/秒"}
    names |= {"ppl_wikitext": "困惑度（WikiText）", "ppl_pg19": "困惑度（PG-19）"}
    return earlier.drop(columns="context_tokens").rename(columns=names).fillna("—")


def _of(earlier: pd.DataFrame, batch: int) -> pd.DataFrame:
    return earlier[earlier["batch_size"] == batch].set_index("method")


def _step(earlier: pd.DataFrame, batch: int) -> tuple[int, int, float]:
    """Bytes of weights and of cache that a step read, and by how much half a cache can make it faster."""
    weights, cache = bytes_read(PYTHIA[MODEL], int(earlier["context_tokens"].iloc[0]), batch)
    return weights, cache, (weights + cache) / (weights + cache / 2)


def same_perplexity(earlier: pd.DataFrame, wiki: Records, books: Records) -> str:
    then, ratio = _of(earlier, 1), middle_ratio(wiki)
    row = wiki.run(press="snapkv", compression_ratio=ratio)
    return (
        f"**各方法的困惑度相同：现象成立，解释不成立。** {len(then)} 行的困惑度都是 {then['ppl_wikitext'].iloc[0]} 与 "
        f"{then['ppl_pg19'].iloc[0]}，当时归因于方法稳健。教师强制的困惑度与 press 无关（@sec-artefact），"
        f"本文的对照{_moved(furthest_moved(wiki, books))}；读压缩后的缓存去测，SnapKV 在压缩率 {ratio:.2f} 时的"
        f"困惑度是不压缩的 {with_interval(row, 'ppl_ratio')} 倍（{named(wiki)}，{models(wiki)}）。"
        "那份工作为 press 取查询时一度切错了 QKV（@sec-qkv），困惑度却没有变，也是同一个原因："
        "那个数根本不读压缩后的缓存。\n\n"
    )


def _moved(difference: float) -> str:
    return "分毫不变" if difference == 0 else f"最多变动 {tiny(difference)}"


def breaking_then(wiki: Records) -> str:
    last, finite = hardest(wiki)
    return (
        "**破坏性实验：不成立。** 当时把压缩率设为百分之一，说是只留百分之一，困惑度变成无穷大，以此证明钩子生效。"
        "压缩率是淘汰的比例，百分之一是几乎全留；本文测到的最高压缩率只留 "
        f"{1 - last['compression_ratio'].iloc[0]:.0%}，{len(last)} 种方法的困惑度最多乘以 "
        f"{last['ppl_ratio'].max():.2f}，{'没有无穷大' if finite else '有的没有得到有限的数'}。"
        "那个无穷大的来历已无从查考，不能当作任何一方的证据。\n\n"
    )


def bytes_allow(earlier: pd.DataFrame) -> str:
    weights, cache, most = _step(earlier, 1)
    speed = _of(earlier, 1)["tok_per_s"]
    return (
        f"**批为一时压缩反而稍慢：合理。** 按尺寸计算（半精度、{earlier['context_tokens'].iloc[0]:.0f} 个词元），"
        f"每步读权重 {weights / 1e9:.2f} GB、缓存 {cache / 1e9:.2f} GB；缓存减半，最多快到 {most:.2f} 倍。当时测得 "
        f"{speed['SnapKV'] / speed['不压缩']:.2f} 倍，打分与补丁的开销很可能超过了能省的（@fig-share）。\n\n"
    )


def batch_of_four(earlier: pd.DataFrame) -> str:
    alone, four = (_of(earlier, batch)["tok_per_s"] for batch in (1, 4))
    fastest = four.idxmax()
    return (
        f"**批为四时快到 {four[fastest] / four['不压缩']:.1f} 倍（{fastest}）：不能归于压缩。** 同样的算法，"
        f"缓存减半最多快到 {_step(earlier, 4)[2]:.2f} 倍。"
        f"不压缩的吞吐从批为一的 {alone['不压缩']} 降到批为四的 {four['不压缩']} 词元/秒，"
        "像是显存不够、数据被换到主存（原文也这样猜测）："
        "若是这样，那里的加速是“放得下”与“放不下”之别，内存够的机器上不会有。"
        f"PyramidKV 名义上留下的总量与 SnapKV 相同，吞吐却只有它的 {four['PyramidKV'] / four['SnapKV']:.0%}，"
        "也提示那一列主要不是由读缓存的时间决定的。\n\n"
    )


def baseline_then(earlier: pd.DataFrame, *studies: str) -> str:
    then = "、".join(f"{_of(earlier, 1)[name].iloc[0]}" for name in ("ppl_wikitext", "ppl_pg19"))
    found = [records for study in studies for records in settings(study)]
    same = [records for records in found if tuple(records.run()[["model", "weights"]]) == (MODEL, "pretrained")]
    if not same:
        return (
            f"**基线的困惑度（{then}）：未能核对。** 它由原版代码路径算出，不受补丁影响，"
            "数值也在情理之中；但本文的记录里没有这个模型的预训练权重，不能重测。"
        )
    runs = [records.run(press="no_press") for records in same]
    ours = listed(f"{run.dataset} {with_interval(run, 'ppl', 1)}" for run in runs)
    return (
        f"**基线的困惑度（{then}）。** 本文用同一模型的预训练权重测得 {ours}；"
        "窗口的取法与计分的范围未必与当时相同，只能比较大小是否相近。"
    )
