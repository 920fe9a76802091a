"""What is said and shown of a long text read in four ways: the runs and tables of study `streaming`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.measures.intervals import holm, interval
from kvneox_lib.measures.sinks import EARLIEST
from kvneox_lib.pages import turns
from kvneox_lib.pages.figures import heat_maps, note, press_lines
from kvneox_lib.pages.ranks import rank_correlation, rank_correlation_ci95
from kvneox_lib.pages.report import SETTING, Missing
from kvneox_lib.pages.words import READINGS, listed, number, with_interval

BOUNDED = ("window", "sinks")
ALONG = {"ppl_so_far": "到此为止的困惑度", "ppl": "每 256 个词元的困惑度"}  # columns of `along`
WIDE = 10  # an interval whose ends differ by this factor says nothing
SLOW = 1.1  # times the median of all places
COST = {"milliseconds": "每个词元的时间（毫秒）", "megabytes": "KV 缓存（MB）"}  # columns of `costs`


# ---- which runs -----------------------------------------------------------------------------------------------------


def main(runs: pd.DataFrame, *readings: str) -> pd.DataFrame:
    """One timed run of each reading, in the order of READINGS; of several sizes of cache that with most readings, then
    the newest. `readings`: those that must be there, and no others."""
    timed = runs[runs["timed"].eq(True)] if "timed" in runs else runs.iloc[:0]
    size = timed["n_sink"] + timed["window"]
    sizes = timed.groupby(size).agg(methods=("press", "nunique"), newest=("started_at", "max"))
    chosen = sizes.sort_values(["methods", "newest"]).index[-1:]
    found = timed[size.isna() | size.isin(chosen)].sort_values("started_at").drop_duplicates("press", keep="last")
    for name in readings:
        if name not in set(found["press"]):
            raise Missing("streaming", READINGS[name])
    found = found[found["press"].isin(readings or READINGS)]
    return found.sort_values("press", key=lambda names: names.map(list(READINGS).index)).reset_index(drop=True)


def timed(records) -> pd.DataFrame:
    """The main runs of `records` (a `Records`), of all readings."""
    return main(records.runs(timed=True), *READINGS)


def read(records, name: str, *readings: str) -> pd.DataFrame:
    """That table of the main runs of `records` (a `Records`), with what tells the readings apart."""
    runs = main(records.runs(timed=True), *readings)
    tables = [
        records.table(name, run_id=row.run_id).assign(press=row.press, n_sink=row.n_sink, window=row.window)
        for row in runs.itertuples()
    ]
    return pd.concat(tables, ignore_index=True)


def blocks_of_bounded(records) -> pd.DataFrame:
    """Table `running` of the bounded readings of `records`, each number of sinks and size of cache once: `n_sink`, and
    `size`."""
    parts = [
        records.table("running", run_id=row.run_id).assign(n_sink=row.n_sink, size=row.seen)
        for row in sinks_and_sizes(records.runs()).rename(columns={"size": "seen"}).itertuples()
    ]
    return pd.concat(parts, ignore_index=True)


def of_main(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `Study`'s table that are of these runs."""
    return table.merge(runs[["press", "n_sink", "window"]])


def by_press(runs: pd.DataFrame) -> dict[str, pd.Series]:
    return {row["press"]: row for _, row in runs.iterrows()}


# ---- tables ---------------------------------------------------------------------------------------------------------


def reading_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run: what is kept, how well it predicts, and what it costs."""
    return pd.DataFrame(
        {
            "读法": READINGS[row["press"]],
            "汇聚点": number(row["n_sink"], ".0f"),
            "窗口": number(row["window"], ".0f"),
            "计分词元": number(row["n_tokens"], ".0f"),
            "训练长度之内的困惑度": _perplexity(row, "within_ppl"),
            "之外的困惑度": _perplexity(row, "beyond_ppl"),
            "KV 缓存（MB）": _megabytes(row["kv_bytes"]),
            "每步（毫秒）": "—" if pd.isna(row["step_s"]) else f"{1e3 * row['step_s']:.1f}",
        }
        for _, row in runs.iterrows()
    )


def _perplexity(row: pd.Series, column: str) -> str:
    """A dash where so few tokens were scored that the interval says nothing."""
    low, high = (row.get(f"{column}_ci95_{end}") for end in ("low", "high"))
    return "—" if pd.notna(low) and high > WIDE * low else with_interval(row, column, 1)


def _megabytes(kv_bytes: float) -> str:
    return "—" if pd.isna(kv_bytes) else f"{kv_bytes / 1e6:.2f}" if kv_bytes else "不留"


def named(table: pd.DataFrame) -> pd.DataFrame:
    """With the readings in words, for a figure."""
    return table.assign(press=table["press"].map(READINGS))


def in_stretches(running: pd.DataFrame, most: int = 50) -> pd.DataFrame:
    """Neighbouring blocks of table `running` together, so that a long text has some fifty points."""
    stretch = running["to_token"] // (-(-running["to_token"].max() // most // 256) * 256)
    merged = running.groupby(["press", stretch.rename("stretch")], sort=False)
    return merged.agg({"to_token": "max", "nll_mean": "mean"}).reset_index()


def along(running: pd.DataFrame) -> pd.DataFrame:
    """Table `running` with the columns of ALONG. A block of recomputation has but a few tokens, and no `ppl`."""
    single = np.exp(running["nll_mean"]).where(running["press"] != "recompute")
    return named(running).assign(ppl=single)


def costs(cost: pd.DataFrame) -> pd.DataFrame:
    """Table `cost` for figures: milliseconds and megabytes, by reading."""
    return named(cost).assign(milliseconds=1e3 * cost["step_s"], megabytes=cost["kv_bytes"] / 1e6)


def sinks_and_sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """The bounded readings, each number of sinks and size of cache once: `size`, and `press` is the number of sinks."""
    found = runs[runs["press"].isin(BOUNDED)].drop_duplicates(["n_sink", "window"])
    found = found.assign(size=found["n_sink"] + found["window"], press=found["n_sink"].map("{:.0f} 个汇聚点".format))
    intervals = [name for name in found if name.endswith(("_ci95_low", "_ci95_high"))]  # of a short text there is none
    return found.assign(**found[intervals].apply(pd.to_numeric)).sort_values(["n_sink", "size"])


def loss_by_sinks(runs: pd.DataFrame, column: str = "nll_mean") -> pd.DataFrame:
    """A row for each size of cache, a column for each number of sinks."""
    found = sinks_and_sizes(runs).astype({"size": int, "n_sink": int})
    return found.pivot_table(index="size", columns="n_sink", values=column)


def compare_at_samples(table: pd.DataFrame, beyond: int) -> pd.DataFrame:
    """Each reading against recomputation on the same tokens, those after the first `beyond`: `difference` in nat with
    its 95 % interval, `low` and `high`, and `p`, over `n` tokens. `table` is the study's table `samples`; it is of one
    text, and so are the intervals."""
    rows, table = [], table[table["position"] >= beyond]
    exact = table[table["press"] == "recompute"].set_index("position")["nll"]
    exact = exact[~exact.index.duplicated()]
    for (press, n_sink, window), part in table.groupby(["press", "n_sink", "window"], sort=False, dropna=False):
        difference = (part.set_index("position")["nll"] - exact).dropna().to_numpy()
        if press == "recompute" or not len(difference):
            continue
        found = interval(difference)
        row = {"press": press, "n_sink": n_sink, "window": window, "difference": difference.mean()}
        rows.append(row | {"low": found.low, "high": found.high, "p": found.p, "n": len(difference)})
    return pd.DataFrame(rows, columns=["press", "n_sink", "window", "difference", "low", "high", "p", "n"])


def block_differences(running: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """`difference` in nat between two readings on the same blocks of the text, in its order."""
    parts = [running[running["press"] == name] for name in (one, other)]
    both = parts[0].merge(parts[1], on=["from_token", "to_token"], suffixes=("", "_other")).sort_values("to_token")
    if both.empty:
        raise Missing("streaming", f"{READINGS[one]}与{READINGS[other]}都读过的一段")
    return both.assign(difference=both["nll_mean"] - both["nll_mean_other"])


def pieces(sample: pd.DataFrame) -> pd.DataFrame:
    """Table `sample` in words: by where a piece begins, how likely and how repetitive it is with each reading."""
    columns = {"nll_mean": "重读的 nll", "distinct_4grams": "不重复的四元组"}
    table = named(sample).pivot_table(index="from_token", columns="press", values=list(columns))
    return table.rename(columns=columns).rename_axis(index="从第几个词元", columns=[None, "读法"])


# ---- figures --------------------------------------------------------------------------------------------------------


def figure_along(running: pd.DataFrame, column: str, trained: int) -> Figure:
    """A column of ALONG over the text, with a mark at the trained length."""
    frame = along(running).dropna(subset=column)
    figure = press_lines(frame, "to_token", column, xlabel="已读的词元", ylabel=ALONG[column])
    (axes,) = figure.axes
    for line in axes.lines:
        line.set_marker("")
    axes.axvline(trained, color="0.4", linewidth=1, linestyle="--")
    axes.annotate("训练长度", (trained, axes.get_ylim()[1]), fontsize=8, ha="left", va="top")
    if frame[column].max() > 10 * frame[column].median():
        axes.set_yscale("log")
    return figure


def figure_of_cost(cost: pd.DataFrame, column: str) -> Figure:
    """A column of COST over the text; times that differ much on a logarithmic scale."""
    frame = costs(cost)
    wide = frame[column].max() > 10 * frame[column].min() > 0
    label = COST[column] + ("，对数刻度" if wide else "")
    figure = press_lines(frame, "tokens_read", column, xlabel="已读的词元", ylabel=label)
    (axes,) = figure.axes
    if column == "milliseconds":
        _shade_quartiles(axes, frame)
    axes.set_yscale("log" if wide else "linear")
    return figure


def _shade_quartiles(axes, frame: pd.DataFrame) -> None:
    """Of the steps that were timed at one place, behind the line of the medians."""
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    for name, rows in frame.groupby("press", sort=False):
        rows = rows.sort_values("tokens_read")
        low, high = (1e3 * rows[f"step_s_q{end}"] for end in (25, 75))
        axes.fill_between(rows["tokens_read"], low, high, color=colours.get(name, "0.5"), alpha=0.2, linewidth=0)


def sink_maps(table: pd.DataFrame) -> Figure:
    """Table `sinks`: the attention that the first token and the first few draw, by layer and head."""
    if table.empty:
        return note("没有“汇聚点加窗口”这种读法的记录，投向开头的注意力没有量")
    several = f"开头 {int(table['n_sink'].iloc[0])} 个词元"
    shown = {"第一个词元": table["first"], several: table["several"]}
    panels = pd.concat([table.assign(press=name, share=values) for name, values in shown.items()])
    return heat_maps(panels, "layer", "head", "share", ylabel="层", xlabel="头", label="所得的注意力")


# ---- sentences ------------------------------------------------------------------------------------------------------


def higher(difference: float) -> str:
    shown = f"{abs(difference):.3f}"
    return "几乎相同" if float(shown) == 0 else f"{'高' if difference > 0 else '低'} {shown} nat"


def _interval(low: float, high: float) -> str:
    return "太少，没有区间" if pd.isna(low) else f"差的 95 % 区间 [{low:+.3f}, {high:+.3f}]"


def _difference(mean: float, low: float, high: float) -> str:
    """Who has the higher loss only where the interval says so."""
    if low <= 0 <= high:
        return f"分不开（差 {round(mean, 3) + 0.0:+.3f} nat，95 % 区间 [{low:+.3f}, {high:+.3f}]）"
    return f"{higher(mean)}（{_interval(low, high)}）"


def _ends(differences: pd.Series) -> tuple[float, float]:
    return interval(differences.to_numpy()).ends


def compared(samples: pd.DataFrame, beyond: int) -> list[str]:
    """`compare_at_samples` in words, corrected for being several."""
    lines, found = [], compare_at_samples(samples, beyond)
    for row, p in zip(found.itertuples(), holm(found["p"])):
        told = "看不出差别" if not p < 0.05 else "变差" if row.difference > 0 else "变好"
        verdict = f"{_interval(row.low, row.high)}，{told}"
        label = READINGS[row.press] + ("" if row.press == "dense" else f"（{int(row.n_sink)} + {int(row.window)}）")
        lines.append(f"{label}：每词元差 {row.difference:+.3f} nat（{row.n} 个词元），{verdict}")
    if found["p"].notna().any():
        tests = found["p"].notna().sum()
        lines.append(f"好坏按 Holm 法对这 {tests} 次比较一起校正；相邻的词元成块抽取，文本只有一篇，只说这一篇文本")
    return lines


def not_all_alike(runs: pd.DataFrame) -> str:
    dense, sinks, again = (by_press(runs)[name] for name in ("dense", "sinks", "recompute"))
    short = f"{READINGS['dense']}只读到第 {dense.n_tokens:.0f} 个词元，" if dense.n_tokens < sinks.n_tokens else ""
    return (
        f"{short}{READINGS['recompute']}只在均匀散布的 {again.n_tokens:.0f} 个词元上计分（训练长度之内太少，不列），"
        "所以各行的困惑度不能都直接相比；下面只在同样的词元上比。"
    )


def dense_beyond(running: pd.DataFrame) -> str:
    """In the first and the last quarter of the blocks that both read."""
    blocks = block_differences(running, "dense", "sinks")
    n = max(1, len(blocks) // 4)
    first, last = blocks.iloc[:n], blocks.iloc[-n:]
    words = [_difference(part["difference"].mean(), *_ends(part["difference"])) for part in (first, last)]
    until, since = first["to_token"].iloc[-1], last["from_token"].iloc[0]
    return (
        f"与{READINGS['sinks']}在同样的词元上相比，{READINGS['dense']}的损失在开头（到第 {until:.0f} 个词元为止）"
        f"{words[0]}，在它读到的最后一段（第 {since:.0f} 个词元以后）{words[1]}。"
    )


def sinks_matter(runs: pd.DataFrame, running: pd.DataFrame) -> str:
    difference = block_differences(running, "window", "sinks")["difference"]
    low, high = _ends(difference)
    return (
        f"看见同样多的词元，去掉 {by_press(runs)['sinks'].n_sink:.0f} 个汇聚点，每个词元的损失与留着时相比"
        f"{_difference(difference.mean(), low, high)}。"
        + ("这个模型在这篇文本上看不出汇聚点的作用。" if low <= 0 <= high else "")
    )


def sinks_draw(runs: pd.DataFrame, table: pd.DataFrame) -> str:
    """How much attention the first tokens draw: `table` is the table `sinks`."""
    run = by_press(runs).get("sinks")
    if run is None or table.empty:
        raise Missing("streaming", "投向开头的注意力")
    n, most, half = int(run.n_sink), table.loc[table["several"].idxmax()], (table["several"] >= 0.5).sum()
    return (
        f"在 {run.sink_windows:.0f} 段各 {run.sink_window_tokens:.0f} 个词元里，第 {max(EARLIEST, n)} 个以后的查询平均"
        f"把 {run.attention_to_sinks:.2%} 的注意力给开头 {n} 个词元，若对看得见的词元一视同仁该有 "
        f"{run.even_to_sinks:.2%}；给得最多的头（第 {most['layer']:.0f} 层第 {most['head']:.0f} 头）是 "
        f"{most['several']:.2%}，{len(table)} 个头里"
        + (f"有 {half} 个把至少一半给了它们。" if half else "没有一个把一半给了它们。")
    )


def sinks_explain(runs: pd.DataFrame, table: pd.DataFrame, running: pd.DataFrame) -> str:
    """The attention that the first tokens draw beside what it costs to drop them."""
    run = by_press(runs)["sinks"]
    low, high = _ends(block_differences(running, "window", "sinks")["difference"])
    drawn = run.attention_to_sinks / run.even_to_sinks
    what = f"这个模型给开头 {run.n_sink:.0f} 个词元的注意力是一视同仁时的 {drawn:.2g} 倍"
    costs = "去掉它们的代价与零分不开" if low <= 0 <= high else f"去掉它们，每个词元的损失{'高' if low > 0 else '低'}"
    if pd.isna(low):
        return f"{what}。"
    agree = (drawn > 1) == (low > 0)
    return f"{what}，{costs}：{'两件事说的一样' if agree else '单看注意力的多少，说不出这个代价'}。"


def against_recompute(samples: pd.DataFrame) -> str:
    found = compare_at_samples(samples[samples["press"].isin(["sinks", "recompute"])], beyond=0)
    if found.empty:
        raise Missing("streaming", f"{READINGS['recompute']}也计分的词元")
    row = found.iloc[0]
    return (
        f"{READINGS['sinks']}的损失与{READINGS['recompute']}的相比（{row.n} 个词元）"
        f"{_difference(row.difference, row.low, row.high)}。"
    )


def without_rotation(runs: pd.DataFrame, settings: list) -> str:
    """`settings` (`Records`): among their runs perhaps one like that of `runs` but with keys as they were;
    where there is none, nothing."""
    turned, alike = by_press(runs)["sinks"], [*SETTING, "text_sha256", "max_tokens", "n_sink", "window"]
    everywhere = pd.concat([records.frame for records in settings])
    for _, still in everywhere[everywhere["press"] == "sinks"].iterrows():
        if not still.rerotate and turned.rerotate and still[alike].equals(turned[alike]):
            return (
                f"键不重新旋转、位置一直往前走：训练长度以外的困惑度是 {with_interval(still, 'beyond_ppl', 1)}，"
                f"重新旋转时是 {with_interval(turned, 'beyond_ppl', 1)}。"
            )
    return ""


def how_many(blocks: pd.DataFrame) -> str:
    """`blocks`: as `blocks_of_bounded` has them. Each number of sinks beside none, block by block, at each size."""
    parts = []
    for size, part in blocks.groupby("size"):
        by_sinks = part.pivot_table(index="to_token", columns="n_sink", values="nll_mean").dropna()
        parts += [(by_sinks[n] - by_sinks[0]).rename((size, n)) for n in by_sinks if n > 0 and 0 in by_sinks]
    if not parts:
        raise Missing("streaming", "不同的汇聚点数")
    p = holm(np.array([interval(part.to_numpy()).p for part in parts]))
    told = [part.mean() for part, one in zip(parts, p) if one < 0.05]
    less, more = [-mean for mean in told if mean < 0], [mean for mean in told if mean > 0]
    words = [
        f"损失确实{word}的有 {len(of)} 处（至多 {max(of):.3f} nat）" for word, of in (("小", less), ("大", more)) if of
    ]
    text = f"每种大小里各个汇聚点数与不留汇聚点相比，共 {len(parts)} 处，逐段相减、按 Holm 法一起校正："
    return text + "，".join([*words, "其余分不开" if told else "都分不开"]) + "。"


def how_large(blocks: pd.DataFrame) -> str:
    """What the largest size gains over the smallest, without sinks."""
    bare = blocks[blocks["n_sink"] == 0].pivot_table(index="to_token", columns="size", values="nll_mean").dropna()
    if bare.shape[1] < 2:
        raise Missing("streaming", "不同大小的窗口")
    difference = bare.iloc[:, 0] - bare.iloc[:, -1]
    return (
        f"窗口的大小更要紧：看见的词元由 {bare.columns[-1]:.0f} 减到 {bare.columns[0]:.0f}，损失"
        f"{_difference(difference.mean(), *_ends(difference))}。"
    )


def spikes(cost: pd.DataFrame) -> str:
    """Recomputation does the same work everywhere: where it is slow, the machine probably was, if what took turns with
    it was slow there too."""
    places = cost.pivot_table(index="tokens_read", columns="press", values="step_s")
    others = [name for name in BOUNDED if name in places]
    if "recompute" not in places or not others:
        raise Missing("streaming", READINGS["recompute"])
    again = 1e3 * places["recompute"]
    slow = again[again > SLOW * again.median()]
    span = f"从 {again.min():.0f} 到 {again.max():.0f} 毫秒"
    text = f"{READINGS['recompute']}每步做的事处处相同，{len(again)} 处的中位数却{span}"
    text += f"，慢一成以上的 {len(slow)} 处都在前 {slow.index[-1]:.0f} 个词元里。" if len(slow) else "。"
    ends = {name: rank_correlation_ci95(again, places[name]) for name in others}
    alike = [
        f"{READINGS[name]} {rank_correlation(again, places[name]):.2f} [{low:.2f}, {high:.2f}]"
        for name, (low, high) in ends.items()
    ]
    text += f"轮流计时的读法与它的用时的秩相关（95 % 区间）是：{listed(alike)}"
    if all(low > 0 for low, _ in ends.values()):
        return text + "：它们一同起落，曲线上的尖峰多半是机器一时变慢，不是读法变慢。"
    return text + "，不足以归于机器。"


def growth(cost: pd.DataFrame) -> str:
    """What is compared was timed at the same place in turns; the bounded readings, over all places."""
    dense, sinks = (cost[cost["press"] == name].set_index("tokens_read").sort_index() for name in ("dense", "sinks"))
    places = dense.index.intersection(sinks.index)
    if not len(places):
        raise Missing("streaming", f"{READINGS['dense']}与{READINGS['sinks']}都计时的地方")
    ratios = [f"读到 {at:.0f} 个词元时 {turns.ratio(dense.loc[at], sinks.loc[at]).in_words}" for at in places[[0, -1]]]
    bounded = [f"{READINGS[name]} {_over_places(cost[cost['press'] == name]['step_s'] * 1e3)}" for name in BOUNDED]
    return (
        f"{READINGS['dense']}的一步是{READINGS['sinks']}的几倍：{'；'.join(ratios)}。有界的缓存满了之后，每步做的事与已读多少"
        f"无关；各处的中位数（毫秒，括号里是四分位数）：{listed(bounded)}。"
    )


def _over_places(milliseconds: pd.Series) -> str:
    low, middle, high = milliseconds.quantile([0.25, 0.5, 0.75])
    return f"{middle:.1f}（{low:.1f}–{high:.1f}）"


def beside_recompute(cost: pd.DataFrame) -> str:
    """What a bounded step takes of recomputation's at the same place."""
    places = cost.pivot_table(index="tokens_read", columns="press", values="step_s").reindex(columns=READINGS)
    low, middle, high = (places["sinks"] / places["recompute"]).quantile([0.25, 0.5, 0.75])
    if pd.isna(middle):
        raise Missing("streaming", READINGS["recompute"])
    return f"{READINGS['sinks']}的一步是{READINGS['recompute']}的 {middle:.1%}（{low:.1%}–{high:.1%}）。"


def written(sample: pd.DataFrame) -> str:
    """How repetitive is what each reading wrote, from its first piece to its last."""
    least, names = sample["distinct_4grams"].min(), listed(READINGS[name] for name in sample["press"].unique())
    if least >= 0.9:
        return (
            f"让模型自己一直写下去，{names}都没有陷入重复：各段里不重复的四元组都不少于 {np.floor(100 * least):.0f} %。"
        )
    parts = []
    for name, part in sample.groupby("press", sort=False):
        first, last = part["distinct_4grams"].iloc[[0, -1]]
        parts.append(f"{READINGS[name]}时，末段里不重复的四元组占 {last:.0%}（首段 {first:.0%}）")
    return f"让模型自己一直写下去：{'；'.join(parts)}。"


def last_pieces(sample: pd.DataFrame, length: int = 400) -> list[str]:
    """The end of what each reading wrote, as quotations in Markdown."""
    quotes = []
    for name, part in sample.groupby("press", sort=False):
        last = part.iloc[-1]
        text = " ".join(str(last["text"]).split())[:length]
        for mark, escaped in (("\\", "\\\\"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`"), ("$", "\\$")):
            text = text.replace(mark, escaped)
        quotes.append(f"**{READINGS[name]}**，第 {last['from_token']} 个词元起：\n\n> {text}")
    return quotes
