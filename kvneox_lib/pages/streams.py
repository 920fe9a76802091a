"""What is said and shown of a long text read in four ways: the runs and tables of study `streaming`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.measures.intervals import holm, interval
from kvneox_lib.measures.sinks import EARLIEST
from kvneox_lib.pages.figures import heat_maps, note, press_lines
from kvneox_lib.pages.report import SETTING, Missing
from kvneox_lib.pages.words import READINGS, number, with_interval

BOUNDED = ("window", "sinks")
ALONG = {"ppl_so_far": "到此为止的困惑度", "ppl": "每 256 个词元的困惑度"}  # columns of `along`
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


def read(records, name: str, *readings: str) -> pd.DataFrame:
    """That table of the main runs of `records` (a `Records`), with what tells the readings apart."""
    runs = main(records.runs(timed=True), *readings)
    tables = [
        records.table(name, run_id=row.run_id).assign(press=row.press, n_sink=row.n_sink, window=row.window)
        for row in runs.itertuples()
    ]
    return pd.concat(tables, ignore_index=True)


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
            "训练长度之内的困惑度": with_interval(row, "within_ppl", 1),
            "之外的困惑度": with_interval(row, "beyond_ppl", 1),
            "KV 缓存（MB）": "—" if pd.isna(row["kv_bytes"]) else f"{row['kv_bytes'] / 1e6:.2f}",
            "每步（毫秒）": "—" if pd.isna(row["step_s"]) else f"{1e3 * row['step_s']:.1f}",
        }
        for _, row in runs.iterrows()
    )


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
    figure.axes[0].set_yscale("log" if wide else "linear")
    return figure


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
    short = f"{READINGS['dense']}只读到第 {dense.n_tokens:.0f} 个，" if dense.n_tokens < sinks.n_tokens else ""
    return (
        f"各行计分的词元不尽相同：{short}{READINGS['recompute']}只在均匀散布的 {again.n_tokens:.0f} 个词元上计分，"
        "因此困惑度不能都直接相比，下面在同样的词元上比。"
    )


def dense_beyond(running: pd.DataFrame) -> str:
    blocks = block_differences(running, "dense", "sinks")
    first, last = blocks.iloc[0], blocks.iloc[-1]
    return (
        f"与{READINGS['sinks']}在同样的词元上相比，{READINGS['dense']}在第一段"
        f"（第 {first.from_token:.0f}–{first.to_token:.0f} 个词元）{higher(first.difference)}，在它读到的最后一段"
        f"（第 {last.from_token:.0f}–{last.to_token:.0f} 个词元）{higher(last.difference)}。"
    )


def sinks_matter(runs: pd.DataFrame, running: pd.DataFrame) -> str:
    difference = block_differences(running, "window", "sinks")["difference"]
    low, high = _ends(difference)
    return (
        f"看见同样多的词元，去掉 {by_press(runs)['sinks'].n_sink:.0f} 个汇聚点，每个词元的负对数似然平均"
        f"{higher(difference.mean())}（{_interval(low, high)}），{len(difference)} 段里有 "
        f"{(difference > 0).sum()} 段更高。" + ("这个模型在这篇文本上看不出汇聚点的作用。" if low <= 0 <= high else "")
    )


def sinks_draw(runs: pd.DataFrame, table: pd.DataFrame) -> str:
    """How much attention the first tokens draw: `table` is the table `sinks`."""
    run = by_press(runs).get("sinks")
    if run is None or table.empty:
        raise Missing("streaming", "投向开头的注意力")
    n, most = int(run.n_sink), table.loc[table["several"].idxmax()]
    return (
        f"在 {run.sink_windows:.0f} 段各 {run.sink_window_tokens:.0f} 个词元里，第 {max(EARLIEST, n)} 个以后的查询平均"
        f"把 {run.attention_to_first:.2%} 的注意力给第一个词元、{run.attention_to_sinks:.2%} 给开头 {n} 个；"
        f"若对看得见的词元一视同仁，是 {run.even_to_first:.2%} 与 {run.even_to_sinks:.2%}。给开头 {n} 个最多的是第 "
        f"{most['layer']:.0f} 层第 {most['head']:.0f} 头（{most['several']:.2%}）；{len(table)} 个头里有 "
        f"{(table['several'] >= 0.5).sum()} 个把至少一半给了它们。"
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


def against_recompute(runs: pd.DataFrame, samples: pd.DataFrame) -> str:
    step = {name: row.step_s for name, row in by_press(runs).items()}
    found = compare_at_samples(samples[samples["press"].isin(["sinks", "recompute"])], beyond=0)
    if found.empty:
        raise Missing("streaming", f"{READINGS['recompute']}也计分的词元")
    row = found.iloc[0]
    return (
        f"{READINGS['sinks']}比每步重算窗口{higher(row.difference)}（{row.n} 个词元，"
        f"{_interval(row.low, row.high)}），而每步用时是后者的 {step['sinks'] / step['recompute']:.1%}。"
    )


def without_rotation(runs: pd.DataFrame, everywhere: pd.DataFrame) -> str:
    """`everywhere`: the runs of all settings, among them perhaps one like that of `runs` but with keys as they were."""
    turned, alike = by_press(runs)["sinks"], [*SETTING, "text_sha256", "max_tokens", "n_sink", "window"]
    for _, still in everywhere[everywhere["press"] == "sinks"].iterrows():
        if not still.rerotate and turned.rerotate and still[alike].equals(turned[alike]):
            return (
                f"键不重新旋转、位置一直往前走：训练长度以外的困惑度是 {with_interval(still, 'beyond_ppl', 1)}，"
                f"重新旋转时是 {with_interval(turned, 'beyond_ppl', 1)}。"
            )
    return "键不重新旋转、位置一直往前走的写法，在同样的设置下没有记录。"


def how_many(runs: pd.DataFrame) -> str:
    table = loss_by_sinks(runs).dropna()
    if table.shape[1] < 2 or table.empty:
        raise Missing("streaming", "不同的汇聚点数")
    parts = [
        f"看见 {size:.0f} 个词元时，{_best_and_worst(row)}"
        for size, row in (table.iloc[[0, -1]] if len(table) > 1 else table).iterrows()
    ]
    return f"{'；'.join(parts)}。"


def _best_and_worst(row: pd.Series) -> str:
    """By the number of sinks."""
    low, high = f"{row.min():.3f}", f"{row.max():.3f}"
    if low == high:
        return f"{len(row)} 种汇聚点数的损失都是 {low}"
    return f"损失最低的是 {row.idxmin():.0f} 个汇聚点（{low}），最高的是 {row.idxmax():.0f} 个（{high}）"


def growth(cost: pd.DataFrame) -> str:
    parts = []
    for name, part in cost.groupby("press", sort=False):
        ends = part.sort_values("tokens_read").iloc[[0, -1]]
        (first, last), (before, after) = ends["tokens_read"], 1e3 * ends["step_s"]
        parts.append(f"{READINGS[name]}从 {first:.0f} 到 {last:.0f} 个词元，每步由 {before:.2f} 变为 {after:.2f} 毫秒")
    return "；".join(parts) + "。"


def written(sample: pd.DataFrame) -> str:
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
