"""The press `copying_heads` beside presses that divide a budget among heads, or spare rare keys, in their own ways.

What each loses in perplexity, in recall and in tasks when as much is kept, from the records of those studies.
"""

import contextlib
import math

import pandas as pd

from kvneox_lib.measures.intervals import FEW_DOCUMENTS
from kvneox_lib.pages import paired, retrieval, tasks
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing, Records, found_in
from kvneox_lib.pages.selecting import of_one_storage
from kvneox_lib.pages.words import listed, machine_of, number, with_interval
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.presses.copying import DRAWS, REPEATED

OURS = "copying_heads"
BESIDE = (OURS, "kvzip", "adakv_snapkv", "keydiff", "snapkv", "duo_attention")  # the last has a strength of its own
SHOWN = (OURS, "kvzip", "keydiff", "snapkv")  # in the table of the text
ARROWS = {paired.BETTER: " ↓", paired.WORSE: " ↑", paired.LEVEL: ""}  # OURS is better: the other is worse
DIGITS = {"delta_nll": 3, "accuracy": 2, "score": 2}
UNCALIBRATED = ("adakv_snapkv", "keydiff", "snapkv")  # of BESIDE, those that know nothing of a model beforehand


# ---- which runs -----------------------------------------------------------------------------------------------------


def measured(*records: Records) -> pd.DataFrame:
    """A row for each of BESIDE at each ratio and each thing that was measured of it (`measure`): `value` with its
    interval, and `kept_fraction`. Questions come after compression. Without degenerate runs."""
    return healthy(_all_measured(*records))


def _all_measured(*records: Records) -> pd.DataFrame:
    parts = []
    for one in records:
        with contextlib.suppress(Missing):  # a study that nobody has run says nothing
            parts += _measures_of(one)
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["press"])
    found_in(records[0].study, found[found["press"] == OURS], OURS)
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
    """Each pair of `at_equal_ratios` as `paired.judged` tells it, all together."""
    return paired.judged(at_equal_ratios(measured(*records)), [*records])


# ---- the table ------------------------------------------------------------------------------------------------------


def table(*records: Records) -> pd.DataFrame:
    """What most is kept by comes first; a degenerate run has a dash."""
    found = _all_measured(*records)
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


def short_table(*records: Records) -> pd.DataFrame:
    """SHOWN at the two highest ratios of OURS, without intervals; an arrow where a press is clearly better or worse
    than OURS."""
    found, pairs = measured(*records), compared(*records)
    verdicts = dict(zip(zip(pairs["run_id_other"], pairs["measure"]), pairs["verdict"]))
    ratios = sorted(found.loc[found["press"] == OURS, "compression_ratio"].dropna().unique())[-2:]
    rows = []
    for (ratio, press), part in found.groupby(["compression_ratio", "press"]):
        if ratio in ratios and press in SHOWN:
            cells = {
                row.measure: f"{row.value:.{row.digits}f}{ARROWS[verdicts.get((row.run_id, row.measure), '')]}"
                for row in part.itertuples()
            }
            rows.append({"压缩率": f"{ratio:g}", "press": press, **cells})
    rows.sort(key=lambda row: (row["压缩率"], SHOWN.index(row["press"])))
    return pd.DataFrame(rows, columns=["压缩率", "press", *found["measure"].unique()]).fillna("—")


def _span(kept: pd.Series) -> str:
    """Of contexts of several lengths."""
    low, high = f"{kept.min():.2f}", f"{kept.max():.2f}"
    return low if low == high else f"{low}–{high}"


# ---- sentences ------------------------------------------------------------------------------------------------------


def same_heads(causes: Records) -> str:
    """How many of the heads that random tokens find are those that say the passkeys: table `heads` of study `heads`."""
    heads, threshold = causes.table("heads", press="no_press"), make_press(OURS).threshold
    if "repeated_tokens" not in heads:
        raise Missing(causes.study, "repeated_tokens")
    found, copying = heads["repeated_tokens"] >= threshold, heads["copies"].astype(bool)
    if (found == copying).all() and found.any():
        return f"按随机词元找到的 {found.sum()} 个头，正是 @sec-trial 按口令找到的那 {copying.sum()} 个。"
    return (
        f"{len(heads)} 个头里，按随机词元找到的有 {found.sum()} 个，其中 {(found & copying).sum()} 个也在 @sec-trial "
        f"按口令找到的 {copying.sum()} 个之中。"
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


def verdicts(*records: Records) -> str:
    """How often it is ahead of each of the others, and every place where it is not."""
    pairs = found_in(records[0].study, compared(*records), f"与 {OURS} 压缩率相同、可以配对的方法")
    parts = [
        f"对 {press} {len(part)} 项里 {(part['verdict'] == paired.BETTER).sum()} 项"
        for press, part in pairs.groupby("press_other")
    ]
    worse = pairs[pairs["verdict"] == paired.WORSE]
    where = listed(
        f"{row.press_other}（{row.measure}，压缩率 {row.compression_ratio:g}）" for row in worse.itertuples()
    )
    few = pairs.loc[pairs["documents"] <= FEW_DOCUMENTS, "measure"].unique()
    return (
        f"在同一压缩率下、同样的窗口（口令、文档）上与其余方法逐项相比，按 Holm 法一起校正，{OURS} 明确更好的，"
        f"{'，'.join(parts)}；明确更差的共 {len(worse)} 项"
        + (f"，即不如 {where}" if len(worse) else "")
        + "，其余分不出。"
        + (f"{listed(few)}的文本只有一篇或几篇，好坏只说这些文本。" if len(few) else "")
    )


def still_lost(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """What it costs all the same, beside a whole cache: by text over all ratios, and which tasks it harms."""
    found = measured(wiki, books, recall, task_runs)
    losses = found[(found["press"] == OURS) & found["measure"].isin(tasks.LOSSES.values())]
    losses = found_in(wiki.study, losses.dropna(subset="value_ci95_low"), f"{OURS} 的区间")
    harmed = losses[losses["value_ci95_low"] > 0].sort_values("compression_ratio")
    parts = [
        f"{measure}在压缩率 {part['compression_ratio'].iloc[-1]:g} 时是 {with_interval(part.iloc[-1], 'value', 3)} nat"
        for measure, part in harmed.groupby("measure", sort=False)
    ]
    with contextlib.suppress(Missing):
        runs = tasks.harmed(task_runs.runs())
        runs = runs[(runs["press"] == OURS) & (runs["question"] == "outside")]
        parts += [
            f"{tasks.named(run.dataset)}在压缩率 {run.compression_ratio:g} 时少 {-run.delta_score:.2f} 分"
            for run in runs.itertuples()
        ]
    if not parts:
        return f"与不压缩相比，看不出 {OURS} 损失了什么。"
    return f"它并非没有代价，与不压缩相比（差的区间不含零的）：{'，'.join(parts)}。"


def at_own_strength(wiki: Records, books: Records, recall: Records, task_runs: Records) -> str:
    """DuoAttention cannot be set to a ratio; beside it stands the run of OURS that keeps most, but not more."""
    found = measured(wiki, books, recall, task_runs)
    duo = found_in(wiki.study, found[found["press"] == "duo_attention"], "duo_attention")
    ours = found[found["press"] == OURS].sort_values("kept_fraction")
    pairs = duo.merge(ours, on=["measure", "study"], suffixes=("", "_other"))
    pairs = pairs[pairs["kept_fraction_other"] <= pairs["kept_fraction"]].drop_duplicates("measure", keep="last")
    found_in(wiki.study, pairs, f"保留得不多于 duo_attention 的 {OURS}")
    told = found_in(wiki.study, paired.judged(pairs, [wiki, books, recall, task_runs]), "成对的窗口、口令或文档")
    apart = told[told["verdict"] != paired.LEVEL]
    text = (
        "DuoAttention 的强度是流式头的比例，不能调到任意大小；它按平均的查询看得多远来分头，不问头抄不抄写。"
        f"它留下缓存的 {_percent(pairs['kept_fraction'])}时，"
        f"与只留 {_percent(pairs['kept_fraction_other'])}的 {OURS} 相比，"
    )
    if apart.empty:
        return f"{text}{len(told)} 项都分不出。"
    parts = [
        f"{row.measure} {row.value:.{row.digits + 1}f} 对 {row.value_other:.{row.digits + 1}f}"
        for row in apart.itertuples()
    ]
    return f"{text}同样的窗口、口令与文档{paired.HOW}，分得出的是：{'，'.join(parts)}；其余分不出。"


def _percent(shares: pd.Series) -> str:
    low, high = f"{shares.min():.0%}", f"{shares.max():.0%}"
    return f"{low} " if low == high else f"{low} 至 {high} "


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
