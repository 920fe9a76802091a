"""The press `copying_heads` beside presses that divide a budget among heads, or spare rare keys, in their own ways.

What each loses in perplexity, in recall and in tasks when as much is kept, from the records of those studies.
"""

import contextlib
import math

import numpy as np
import pandas as pd

from kvneox_lib.measures.intervals import FEW_DOCUMENTS, comparison, holm
from kvneox_lib.pages import retrieval, tasks
from kvneox_lib.pages.degenerate import healthy, is_degenerate, said
from kvneox_lib.pages.report import Missing, Records, found_in
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.storage import KINDS
from kvneox_lib.pages.words import listed, machine_of, number, with_interval
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.presses.copying import DRAWS, REPEATED

OURS = "copying_heads"
BESIDE = (OURS, "kvzip", "adakv_snapkv", "keydiff", "snapkv", "duo_attention")  # the last has a strength of its own
DIGITS = {"delta_nll": 3, "accuracy": 2, "score": 2}
UNCALIBRATED = ("adakv_snapkv", "keydiff", "snapkv")  # of BESIDE, those that know nothing of a model beforehand


# ---- which runs -----------------------------------------------------------------------------------------------------


def measured(wiki: Records, books: Records, recall: Records, task_runs: Records) -> pd.DataFrame:
    """A row for each of BESIDE at each ratio and each thing that was measured of it (`measure`): `value` with its
    interval, and `kept_fraction`. Questions come after compression. Without degenerate runs."""
    return healthy(_all_measured(wiki, books, recall, task_runs))


def _all_measured(wiki: Records, books: Records, recall: Records, task_runs: Records) -> pd.DataFrame:
    parts = []
    for records in (wiki, books, recall, task_runs):
        with contextlib.suppress(Missing):  # a study that nobody has run says nothing
            parts += _measures_of(records)
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["press"])
    found_in(wiki.study, found[found["press"] == OURS], OURS)
    return found


def _measures_of(records: Records) -> list[pd.DataFrame]:
    runs = records.runs()
    runs = found_in(records.study, runs[runs["press"].isin(BESIDE)], OURS).assign(study=records.study)
    if records.study == "tasks":
        of_tasks = tasks.in_mode(runs, "outside").groupby("dataset", sort=False)
        return [_measure(part, tasks.named(task), "score") for task, part in of_tasks]
    if records.study == "recall":
        return [_measure(retrieval.in_mode(of_one_storage(runs), "问题在外"), tasks.RECALL, "accuracy")]
    return [_measure(of_one_storage(runs), tasks.LOSSES[records.study], "delta_nll")]


def _measure(runs: pd.DataFrame, name: str, column: str) -> pd.DataFrame:
    ends = {end: pd.to_numeric(runs[f"{column}{end}"]) for end in ("", "_ci95_low", "_ci95_high")}
    kept = ["press", "compression_ratio", "kept_fraction", "study", "run_id"]
    found = runs[[*kept, *(name for name in ("degenerate",) if name in runs)]].assign(measure=name)
    return found.assign(digits=DIGITS[column], **{f"value{end}": values for end, values in ends.items()})


def at_equal_ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Of `measured`: each other press beside OURS, wherever both were measured at one ratio."""
    found = found.dropna(subset="compression_ratio")
    ours, others = found[found["press"] == OURS], found[found["press"] != OURS]
    return ours.merge(others, on=["compression_ratio", "measure", "study"], suffixes=("", "_other"))


def compared(*records: Records) -> pd.DataFrame:
    """Each pair of `at_equal_ratios` on the windows, keys or documents that both were measured on: `ahead`, by how much
    OURS is better in the mean, `p` after Holm's correction for all pairs together, over how many `documents`, and
    `verdict`, "better" or "worse" where that p is below 0.05, else "". Pairs of too few units to tell are left
    out."""
    by_study, rows = {one.study: one for one in records}, []
    pairs = at_equal_ratios(measured(*records))
    for pair in pairs.itertuples():
        ahead, documents = _ahead(by_study[pair.study], pair.run_id, pair.run_id_other)
        p = comparison(ahead, documents).p
        rows.append({"ahead": ahead.mean() if len(ahead) else np.nan, "p": p, "documents": len(set(documents))})
    found = pd.concat([pairs, pd.DataFrame(rows, columns=["ahead", "p", "documents"])], axis=1).dropna(subset="p")
    found = found.assign(p=holm(found["p"].to_numpy(dtype=float)))
    sure = np.where(found["ahead"] > 0, "better", "worse")
    return found.assign(verdict=np.where(found["p"] < 0.05, sure, ""))


def _ahead(records: Records, ours: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit by unit, and the document that each is of."""
    kind = KINDS[records.study]
    try:
        one, two = (
            records.table(kind.table, run_id=run).set_index(list(kind.unit))[kind.value].astype(float)
            for run in (ours, other)
        )
    except Missing:
        return np.array([]), np.array([])
    ahead = ((two - one) if kind.less_is_better else (one - two)).dropna()
    of = np.arange(len(ahead)) if kind.of is None else ahead.index.get_level_values(kind.of).to_numpy()
    return ahead.to_numpy(), of


# ---- the table ------------------------------------------------------------------------------------------------------


def table(wiki: Records, books: Records, recall: Records, task_runs: Records) -> pd.DataFrame:
    """What most is kept by comes first; a degenerate run has a dash, and `not_ranked` says why."""
    found = _all_measured(wiki, books, recall, task_runs)
    found = found.assign(
        strength=found["compression_ratio"].map(lambda ratio: "自定" if pd.isna(ratio) else f"{ratio:g}")
    )
    rows = {}
    for (press, strength), part in found.groupby(["press", "strength"]):
        shown = {row["measure"]: with_interval(row, "value", row["digits"]) for _, row in healthy(part).iterrows()}
        kept = {"实际保留": _span(part["kept_fraction"])}
        rows[press, strength] = {"press": press, "压缩率": strength, **kept, **shown}, part["kept_fraction"].mean()
    ordered = sorted(rows.values(), key=lambda row: (-round(row[1], 2), BESIDE.index(row[0]["press"])))
    columns = ["press", "压缩率", "实际保留", *found["measure"].unique()]
    return pd.DataFrame([row for row, _ in ordered], columns=columns).fillna("—")


def _span(kept: pd.Series) -> str:
    """Of contexts of several lengths."""
    low, high = f"{kept.min():.2f}", f"{kept.max():.2f}"
    return low if low == high else f"{low}–{high}"


# ---- sentences ------------------------------------------------------------------------------------------------------


def not_ranked(*records: Records) -> str:
    """Why there are dashes; nothing where there are none."""
    parts = []
    for one in records:
        with contextlib.suppress(Missing):
            runs = of_one_storage(one.runs())
            parts.append(runs[runs["press"].isin(BESIDE) & is_degenerate(runs)])
    return "".join(said(pd.concat(parts))) if parts else ""


def same_heads(causes: Records) -> str:
    """How many of the heads that random tokens find are those that say the passkeys: table `heads` of study `heads`."""
    heads, threshold = causes.table("heads", press="no_press"), make_press(OURS).threshold
    if "repeated_tokens" not in heads:
        raise Missing(causes.study, "repeated_tokens")
    found, copying = heads["repeated_tokens"] >= threshold, heads["copies"].astype(bool)
    if not found.any():
        return f"{len(heads)} 个头里，按随机词元一个也没有找到；@sec-heads 按口令找到的有 {copying.sum()} 个。"
    return (
        f"按随机词元找到的 {found.sum()} 个头里，有 {(found & copying).sum()} 个就是 @sec-heads 的抄写的头"
        f"（按口令找到的共 {copying.sum()} 个）。"
    )


def criterion() -> str:
    """The settings of the press, as the row of the registry has them."""
    press = make_press(OURS)
    window = press.presses[1].window_size
    even = math.log(2) / REPEATED  # the mean of 1 / (number of keys seen), over the second reading
    return (
        f"词元有 {REPEATED} 个（训练长度不足 {2 * REPEATED} 的，取其一半），抽 {DRAWS} 次；"
        f"平均的注意力达到 {press.threshold:g} 的算抄写的头，"
        f"各处一样看的头只有 {even:.4f}。每个头至少留 {press.floor} 个条目（平分也不到它的两倍时，留平分的一半），"
        f"SnapKV 的观察窗口是 {window} 个词元；超出的预算按这份注意力的大小在抄写的头之间分，"
        "它们都留满了，余下的再由其余的头平分。"
    )


def beside_snapkv(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """What became of the loss and of recall, at each ratio."""
    parts = _beside_snapkv(wiki, books, recall, task_runs).values()
    return f"{OURS} 与单用 SnapKV，缓存一样大：{'；'.join(parts)}。"


def first_page(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """The same at the middle ratio."""
    parts = [*_beside_snapkv(wiki, books, recall, task_runs).values()]
    return f"由此得到的方法 {OURS} 先把预算给抄写的头，与单用 SnapKV 缓存一样大：{parts[len(parts) // 2]}。"


def _beside_snapkv(*records: Records) -> dict[float, str]:
    """By ratio."""
    pairs = at_equal_ratios(measured(*records))
    pairs = found_in(records[0].study, pairs[pairs["press_other"] == "snapkv"], f"{OURS} 与 snapkv 共有的压缩率")
    pairs = pairs[pairs["measure"].isin([tasks.RECALL, *tasks.LOSSES.values()])]
    parts = {}
    for ratio, part in pairs.groupby("compression_ratio"):
        said = [
            f"{row['measure']} {row['value']:.{row['digits']}f}（snapkv {row['value_other']:.{row['digits']}f}）"
            for _, row in part.iterrows()
        ]
        parts[ratio] = f"压缩率 {ratio:g}，{'，'.join(said)}"
    return parts


def verdicts(*records: Records) -> str:
    """How often it is ahead, and every place where it is not."""
    pairs = found_in(records[0].study, compared(*records), f"与 {OURS} 压缩率相同、可以配对的方法")
    worse = pairs[pairs["verdict"] == "worse"]
    where = listed(
        f"{row.press_other}（{row.measure}，压缩率 {row.compression_ratio:g}）" for row in worse.itertuples()
    )
    better, level = ((pairs["verdict"] == verdict).sum() for verdict in ("better", ""))
    few = pairs.loc[pairs["documents"] <= FEW_DOCUMENTS, "measure"].unique()
    return (
        f"与其余方法在同一压缩率下、同样的窗口（口令、文档）上逐项相比，共 {len(pairs)} 对，按 Holm 法一起校正"
        f"（p < 0.05）：{OURS} 更好的 {better} 对，分不出高下的 {level} 对，更差的 {len(worse)} 对"
        + (f"，即不如 {where}。" if len(worse) else "。")
        + (f"{listed(few)}的文本只有一篇或几篇，好坏只说这些文本。" if len(few) else "")
    )


def still_lost(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """What it costs all the same, beside a whole cache."""
    found = measured(wiki, books, recall, task_runs)
    losses = found[(found["press"] == OURS) & found["measure"].isin(tasks.LOSSES.values())]
    losses = losses.dropna(subset="value_ci95_low")
    harmed = found_in(wiki.study, losses, f"{OURS} 的区间")[losses["value_ci95_low"] > 0]
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
        return f"压缩率 {ratio:g} 时，各头留下的一样多，没有哪个头多分到预算。"
    return (
        f"压缩率 {ratio:g} 时，{len(heads)} 个头里 {len(rich)} 个各留上下文的 {rich.min():.0%} 到 {rich.max():.0%}，"
        f"占全部缓存的 {rich.sum() / heads['kept'].sum():.0%}；其余每个头只留 {others.mean():.1%}。"
    )


def calibrating(records: Records) -> str:
    """What is measured of a model once, before the first context."""
    runs = records.runs()
    runs = runs[runs["press"].isin(BESIDE)]
    times = pd.to_numeric(runs["calibration_s"]) if "calibration_s" in runs else pd.Series(float("nan"), runs.index)
    timed = runs.assign(calibration_s=times).dropna(subset="calibration_s").drop_duplicates("press")
    timed, there = (
        found_in(records.study, timed, "calibration_s"),
        [name for name in BESIDE if name in set(runs["press"])],
    )
    told = listed(f"{row.press} {number(row.calibration_s, '.1f')} 秒" for row in timed.itertuples())
    text = f"校准对每个模型只做一次：{told}（{machine_of(timed.iloc[0])}）。"
    untold = [name for name in there if name not in (*timed["press"], *UNCALIBRATED, "kvzip")]
    if untold:
        text += f"{listed(untold)} 也要校准，用时没有记下。"
    if "kvzip" in there:
        text += "kvzip 不校准，但每读一段上下文都要再复述一遍。"
    without = [name for name in there if name in UNCALIBRATED]
    return text + (f"{listed(without)} 不用校准。" if without else "")
