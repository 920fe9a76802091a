"""The press `copying_heads` beside presses that divide a budget among heads, or spare rare keys, in their own ways.

What each loses in perplexity, in recall and in tasks when as much is kept, from the records of those studies.
"""

import contextlib
import math

import pandas as pd

from kvneox_lib.pages import retrieval, tasks
from kvneox_lib.pages.report import Missing, Records, found_in
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.words import listed, machine_of, number, with_interval
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.presses.copying import DRAWS, REPEATED

OURS = "copying_heads"
BESIDE = (OURS, "kvzip", "adakv_snapkv", "keydiff", "snapkv", "duo_attention")  # the last has a strength of its own
DIGITS = {"delta_nll": 3, "accuracy": 2, "score": 2}


# ---- which runs -----------------------------------------------------------------------------------------------------


def measured(wiki: Records, books: Records, recall: Records, task_runs: Records) -> pd.DataFrame:
    """A row for each of BESIDE at each ratio and each thing that was measured of it (`measure`): `value` with its
    interval, `gain`, its sign turned where less is better, and `kept_fraction`. Questions come after compression."""
    parts = []
    for records in (wiki, books, recall, task_runs):
        with contextlib.suppress(Missing):  # a study that nobody has run says nothing
            parts += _measures_of(records)
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["press"])
    found_in(wiki.study, found[found["press"] == OURS], OURS)
    return found


def _measures_of(records: Records) -> list[pd.DataFrame]:
    runs = records.runs()
    runs = found_in(records.study, runs[runs["press"].isin(BESIDE)], OURS)
    if records.study == "tasks":
        of_tasks = tasks.in_mode(runs, "outside").groupby("dataset", sort=False)
        return [_measure(part, tasks.named(task), "score") for task, part in of_tasks]
    if records.study == "recall":
        return [_measure(retrieval.in_mode(of_one_storage(runs), "问题在外"), tasks.RECALL, "accuracy")]
    return [_measure(of_one_storage(runs), tasks.LOSSES[records.study], "delta_nll")]


def _measure(runs: pd.DataFrame, name: str, column: str) -> pd.DataFrame:
    ends = {end: pd.to_numeric(runs[f"{column}{end}"]) for end in ("", "_ci95_low", "_ci95_high")}
    found = runs[["press", "compression_ratio", "kept_fraction"]].assign(measure=name, digits=DIGITS[column])
    sign = -1 if column == "delta_nll" else 1
    found = found.assign(**{f"value{end}": values for end, values in ends.items()}, gain=sign * ends[""])
    low, high = (sign * ends[end] for end in ("_ci95_low", "_ci95_high"))
    return found.assign(least=low.where(low <= high, high), most=high.where(low <= high, low))


def at_equal_ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Each other press beside OURS, wherever both were measured at one ratio: `verdict` is "better" or "worse" where
    the interval of OURS lies on one side of the other's, else ""."""
    found = found.dropna(subset="compression_ratio")
    ours, others = found[found["press"] == OURS], found[found["press"] != OURS]
    both = ours.merge(others, on=["compression_ratio", "measure"], suffixes=("", "_other"))
    better, worse = both["least"] > both["most_other"], both["most"] < both["least_other"]
    return both.assign(verdict=better.map({True: "better", False: ""}).where(~worse, "worse"))


# ---- the table ------------------------------------------------------------------------------------------------------


def table(wiki: Records, books: Records, recall: Records, task_runs: Records) -> pd.DataFrame:
    """What most is kept by comes first."""
    found = measured(wiki, books, recall, task_runs)
    found = found.assign(
        strength=found["compression_ratio"].map(lambda ratio: "自定" if pd.isna(ratio) else f"{ratio:g}")
    )
    rows = {}
    for (press, strength), part in found.groupby(["press", "strength"]):
        said = {row["measure"]: with_interval(row, "value", row["digits"]) for _, row in part.iterrows()}
        kept = {"实际保留": _span(part["kept_fraction"])}
        rows[press, strength] = {"press": press, "压缩率": strength, **kept, **said}, part["kept_fraction"].mean()
    ordered = sorted(rows.values(), key=lambda row: (-round(row[1], 2), BESIDE.index(row[0]["press"])))
    columns = ["press", "压缩率", "实际保留", *found["measure"].unique()]
    return pd.DataFrame([row for row, _ in ordered], columns=columns).fillna("—")


def _span(kept: pd.Series) -> str:
    """Of contexts of several lengths."""
    low, high = f"{kept.min():.2f}", f"{kept.max():.2f}"
    return low if low == high else f"{low}–{high}"


# ---- sentences ------------------------------------------------------------------------------------------------------


def criterion() -> str:
    """The settings of the press, as the row of the registry has them."""
    press = make_press(OURS)
    window = press.presses[1].window_size
    even = math.log(2) / REPEATED  # the mean of 1 / (number of keys seen), over the second reading
    return (
        f"词元有 {REPEATED} 个（短的模型按其训练长度），抽 {DRAWS} 次；"
        f"平均的注意力达到 {press.threshold:g} 的算抄写的头，"
        f"各处一样看的头只有 {even:.4f}。每个头至少留 {press.floor} 个条目（平分也不到它的两倍时，留平分的一半），"
        f"SnapKV 的观察窗口是 {window} 个词元；超出的预算按这份注意力的大小在抄写的头之间分，"
        "它们都留满了，余下的再由其余的头平分。"
    )


def beside_snapkv(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """What became of the loss and of recall, at each ratio."""
    pairs = at_equal_ratios(measured(wiki, books, recall, task_runs))
    pairs = found_in(wiki.study, pairs[pairs["press_other"] == "snapkv"], f"{OURS} 与 snapkv 共有的压缩率")
    pairs = pairs[pairs["measure"].isin([tasks.RECALL, *tasks.LOSSES.values()])]
    parts = []
    for ratio, part in pairs.groupby("compression_ratio"):
        said = [
            f"{row['measure']} {row['value']:.{row['digits']}f}（snapkv {row['value_other']:.{row['digits']}f}）"
            for _, row in part.iterrows()
        ]
        parts.append(f"压缩率 {ratio:g}，{'，'.join(said)}")
    return f"{OURS} 与单用 SnapKV，缓存一样大：{'；'.join(parts)}。"


def verdicts(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """How often it is ahead, and every place where it is not."""
    pairs = at_equal_ratios(measured(wiki, books, recall, task_runs))
    pairs = found_in(wiki.study, pairs, f"与 {OURS} 压缩率相同的方法")
    worse = pairs[pairs["verdict"] == "worse"]
    where = listed(
        f"{row.press_other}（{row.measure}，压缩率 {row.compression_ratio:g}）" for row in worse.itertuples()
    )
    better, level = ((pairs["verdict"] == verdict).sum() for verdict in ("better", ""))
    return (
        f"与其余方法在同一压缩率下逐项相比，共 {len(pairs)} 对：{OURS} 的区间整个在更好一边的 {better} 对，区间相交、"
        f"分不出高下的 {level} 对，整个在更差一边的 {len(worse)} 对" + (f"，即不如 {where}。" if len(worse) else "。")
    )


def still_lost(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """What it costs all the same, beside a whole cache."""
    found = measured(wiki, books, recall, task_runs)
    losses = found[(found["press"] == OURS) & found["measure"].isin(tasks.LOSSES.values())].dropna(subset="most")
    harmed = found_in(wiki.study, losses, f"{OURS} 的区间")[losses["most"] < 0]
    if harmed.empty:
        return f"与不压缩相比，{OURS} 测过的 {len(losses)} 处损失里没有区间全在零以上的。"
    where = listed(
        f"{row['measure']}压缩率 {row['compression_ratio']:g}（{with_interval(row, 'value', row['digits'])} nat）"
        for _, row in harmed.sort_values(["measure", "compression_ratio"]).iterrows()
    )
    return f"它并非没有代价。与不压缩相比，损失的区间全在零以上的：{where}。"


def at_own_strength(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """DuoAttention cannot be set to a ratio; beside it stands the run of OURS that keeps most, but not more."""
    found = measured(wiki, books, recall, task_runs)
    duo = found_in(wiki.study, found[found["press"] == "duo_attention"], "duo_attention")
    parts = []
    for _, row in duo.iterrows():
        ours = found[(found["press"] == OURS) & (found["measure"] == row["measure"])]
        ours = ours[ours["kept_fraction"] <= row["kept_fraction"]].sort_values("kept_fraction")
        if len(ours):
            best, digits = ours.iloc[-1], row["digits"]
            parts.append(
                f"{row['measure']} {row['value']:.{digits}f}（留下 {row['kept_fraction']:.0%}；{OURS} 只留 "
                f"{best['kept_fraction']:.0%}，{best['value']:.{digits}f}）"
            )
    found_in(wiki.study, parts, f"保留得不多于 duo_attention 的 {OURS}")
    return (
        "DuoAttention 的强度是流式头的比例，流式头又总要留下汇聚点和近窗，不能调到任意大小；"
        "它按平均的查询看得多远来分，"
        f"不问头抄不抄写：{'，'.join(parts)}。"
    )


def uneven(records: Records) -> str:
    """Who got the budget at the highest ratio: the heads above the mean, and the others."""
    ratio = records.runs(press=OURS)["compression_ratio"].max()
    heads = of_one_storage(records.table("heads", press=OURS, compression_ratio=ratio))
    above = heads["kept"] > heads["kept"].mean() + 1e-9
    rich, others = heads.loc[above, "kept"], heads.loc[~above, "kept"]
    if rich.empty:
        return f"压缩率 {ratio:g}：各头留下的一样多，这个模型没有找到抄写的头，{OURS} 就是 SnapKV。"
    return (
        f"压缩率 {ratio:g} 时，{len(heads)} 个头里 {len(rich)} 个各留上下文的 {rich.min():.0%} 到 {rich.max():.0%}，"
        f"占全部缓存的 {rich.sum() / heads['kept'].sum():.0%}；其余每个头只留 {others.mean():.1%}。"
    )


def calibrating(records: Records) -> str:
    """What is measured of a model once, before the first context."""
    frame = records.runs()
    times = pd.to_numeric(frame["calibration_s"]) if "calibration_s" in frame else pd.Series(float("nan"), frame.index)
    runs = frame.assign(calibration_s=times).dropna(subset="calibration_s")
    runs = found_in(records.study, runs[runs["press"].isin(BESIDE)], "calibration_s").drop_duplicates("press")
    said = listed(f"{row.press} {number(row.calibration_s, '.1f')} 秒" for row in runs.itertuples())
    return (
        f"校准对每个模型只做一次：{said}（{machine_of(runs.iloc[0])}）。kvzip 不校准，但每读一段上下文都要再复述一遍；"
        "其余几种什么也不用先量。"
    )
