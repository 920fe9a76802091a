"""Fewer bits beside fewer entries: what a cache of so many bytes costs when entries are evicted, when each number gets
fewer bits, and when both are done. From the records of the studies of quality and of speed, those with `kv_bits` too.

A way is one of WAYS; a configuration is a press at a ratio, in so many bits a number.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from kvneox_lib.measures.intervals import FEW_DOCUMENTS, Interval, comparison, holm, interval
from kvneox_lib.neox.bits import BITS, GROUP, Form
from kvneox_lib.pages import figures, turns
from kvneox_lib.pages.degenerate import healthy
from kvneox_lib.pages.report import Missing, Records, sources
from kvneox_lib.pages.selecting import bits_of, of_ratios, pressed
from kvneox_lib.pages.tasks import LOSSES, RECALL, named
from kvneox_lib.pages.timings import at_largest, column, timed_runs
from kvneox_lib.pages.words import listed, with_interval
from kvneox_lib.studies.records import tables_of

WAYS = {"evict": "只淘汰", "bits": "只量化", "both": "淘汰并量化"}
SIZES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # shares of what the cache takes in float32
SLACK = 0.05  # heads that keep their own entries are stored in tiles, which are not all full
SMALLEST_SHOWN = 1 / 64
WITH_BITS = "kv_bits 为 8、4、2 的运行"


@dataclass(frozen=True)
class Kind:
    """Where a study has its quality."""

    shown: str  # of a record, with its interval
    table: str
    value: str  # in that table, a row for each of the units that are drawn anew for an interval
    unit: tuple[str, ...]  # in the order of the text
    less_is_better: bool
    label: str
    measured_in: str = ""
    of: str | None = None  # of the columns of a unit that which says what several of them belong to


_NLL = Kind("delta_nll", "windows", "nll_mean", ("document", "position"), True, "nll 之差（nat）", " nat", "document")
KINDS = {
    "wikitext_ppl": _NLL,
    "pg19_ppl": _NLL,
    "recall": Kind("accuracy", "keys", "correct", ("context", "name"), False, "准确率", of="context"),
    "tasks": Kind("score", "documents", "score", ("doc_id",), False, "得分"),
}


@dataclass(frozen=True)
class Quality:
    """One thing that the model can do, under every configuration."""

    name: str
    kind: Kind
    configurations: pd.DataFrame  # by run: press, compression_ratio, bits, way, share, loss, and what is shown
    losses: pd.DataFrame  # a row for each window, key or document, a column a run: what is lost against all of it kept

    @property
    def plain(self) -> float:
        """What is shown of the cache as it is."""
        found = self.configurations
        return float(found.loc[found["way"] == "", "shown"].iloc[0])

    @property
    def documents(self) -> np.ndarray:
        """What each unit belongs to; those that belong to nothing are each for itself."""
        of = self.kind.of
        return np.arange(len(self.losses)) if of is None else self.losses.index.get_level_values(of).to_numpy()

    def compressed(self) -> pd.DataFrame:
        return self.configurations[self.configurations["way"] != ""]


# ---- which runs -----------------------------------------------------------------------------------------------------


def as_it_is(records: Records) -> Records:
    """Without the runs in few bits, and at ratios that only presses beside them were measured at: pages about presses
    compare what is kept in full."""
    frame = records.frame[bits_of(records.frame).isna()]
    if "compression_ratio" in frame:
        presses = pressed(frame).groupby("compression_ratio")["press"].nunique()
        frame = frame[~frame["compression_ratio"].isin(presses.index[presses < presses.max() / 2])]
    return replace(records, frame=frame.reset_index(drop=True))


def qualities(*several: Records) -> list[Quality]:
    """Of those studies that were measured in few bits too."""
    found = []
    for records in several:
        with contextlib.suppress(Missing):
            found += qualities_of(records)
    if not found:
        raise Missing(several[0].study, WITH_BITS)
    return found


def lacking(*several: Records) -> str:
    """What the study of each has not got, in the words for the reader."""
    notes = []
    for records in several:
        try:
            qualities_of(records)
        except Missing as missing:
            notes.append(str(missing))
    return "".join(notes)


@lru_cache(maxsize=16)
def qualities_of(records: Records) -> list[Quality]:
    """One for a study, or one for each of its tasks; questions come after compression."""
    runs = records.runs()
    if records.study == "recall":
        runs = runs[~runs["query_aware"].astype(bool)]
    if records.study != "tasks":
        return [_quality(records, LOSSES.get(records.study, RECALL), runs)]
    outside = runs[runs["question"] == "outside"]
    with_bits = outside.loc[bits_of(outside).notna(), "dataset"].unique()
    if not len(with_bits):
        raise Missing("tasks", WITH_BITS)
    return [_quality(records, named(task), outside[outside["dataset"] == task]) for task in with_bits]


def _quality(records: Records, name: str, runs: pd.DataFrame) -> Quality:
    kind, found = KINDS[records.study], configurations(records.study, runs)
    values = _by_unit(records, kind, found.index)
    plain = found.index[found["way"] == ""][0]
    if plain not in values:
        raise Missing(records.study, f"表 {kind.table}")
    losses = values.sub(values[plain], axis=0) * (1 if kind.less_is_better else -1)
    found = found.loc[values.columns].assign(loss=losses.mean())
    for end in ("", "_ci95_low", "_ci95_high"):
        found[f"shown{end}"] = pd.to_numeric(found[f"{kind.shown}{end}"])
    return Quality(name, kind, found, losses)


def configurations(study: str, runs: pd.DataFrame) -> pd.DataFrame:
    """By run, the cache as it is and those under a press or in few bits, without degenerate ones: with `bits`, the
    `way` ("" of the cache as it is) and `share`, its bytes over those that the cache takes in float32."""
    runs = _with_ways(of_ratios(healthy(runs)).set_index("run_id"))
    plain, in_bits = runs[runs["way"] == ""], runs[runs["bits"].notna()]
    if plain.empty or in_bits.empty:
        raise Missing(study, "no_press" if plain.empty else WITH_BITS)
    in_float32 = plain["kv_bytes"].iloc[0] * torch.float32.itemsize / getattr(torch, plain["dtype"].iloc[0]).itemsize
    return runs.assign(share=pd.to_numeric(runs["kv_bytes"]) / in_float32)


def _with_ways(runs: pd.DataFrame) -> pd.DataFrame:
    bits, is_bare = bits_of(runs), runs["press"] == "no_press"
    ways = np.select([is_bare & bits.isna(), is_bare, bits.isna()], ["", "bits", "evict"], "both")
    return runs.assign(bits=bits, way=ways)


def _by_unit(records: Records, kind: Kind, runs: pd.Index) -> pd.DataFrame:
    """A row a unit, a column a run; without the runs that have no such table. The units of a study are the same for
    every run."""
    frame = records.frame[records.frame["run_id"].isin(runs)]
    table = tables_of(frame, kind.table)
    if table.empty:
        return table
    keys = dict(zip(_configuration(frame), frame["run_id"]))
    table = table.assign(run_id=list(map(keys.get, _configuration(table))), value=table[kind.value].astype(float))
    by_run = table.set_index([*kind.unit, "run_id"])["value"].unstack()
    return by_run[[run for run in runs if run in by_run]].dropna()


def _configuration(frame: pd.DataFrame) -> list[tuple]:
    """What tells the runs of one question apart, in a record and in its tables."""
    return list(zip(frame["press"], frame["compression_ratio"].fillna(-1), bits_of(frame).fillna(0)))


# ---- the best of each way -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How far the best way is ahead of the next, unit by unit."""

    first: str
    second: str | None = None  # where there is one
    ahead: float = np.nan
    interval: Interval | None = None
    p: float = np.nan  # that of the interval, or after correction for being one of many

    @property
    def is_clear(self) -> bool:
        return self.p < 0.05


def best_within(quality: Quality, size: float) -> pd.DataFrame:
    """Of each way the configuration that loses least in that share of float32's bytes, the smallest of equals; the best
    way first."""
    within = quality.compressed()[lambda found: found["share"] <= size * (1 + SLACK)]
    return within.sort_values(["loss", "share"], kind="stable").drop_duplicates("way")


def verdict(quality: Quality, size: float) -> Verdict | None:
    """None where no way leads so far down."""
    best = best_within(quality, size)
    if len(best) < 2:
        return Verdict(best["way"].iloc[0]) if len(best) else None
    (first, second), ways = best.index[:2], best["way"]
    ahead = quality.losses[second] - quality.losses[first]
    found = comparison(ahead.to_numpy(), quality.documents)
    return Verdict(*ways.iloc[:2], float(ahead.mean()), found, found.p)


def verdicts(qualities: list[Quality]) -> dict[tuple[str, float], Verdict | None]:
    """By quality and size, corrected for all of them together."""
    found = {(quality.name, size): verdict(quality, size) for quality in qualities for size in SIZES}
    corrected = holm(np.array([np.nan if one is None else one.p for one in found.values()]))
    return {key: one and replace(one, p=float(p)) for (key, one), p in zip(found.items(), corrected)}


def front(points: pd.DataFrame, x: str) -> pd.DataFrame:
    """Of each way, a line: the points that no other of the way surpasses with no more of `x`."""
    points = points.sort_values([x, "loss"], kind="stable")
    best_before = points.groupby("way")["loss"].transform(lambda losses: losses.cummin().shift(fill_value=np.inf))
    shown = points[points["loss"] <= best_before]
    parts = [shown[shown["way"] == way].assign(press=words) for way, words in WAYS.items()]
    return pd.concat(parts)[["press", x, "shown", "shown_ci95_low", "shown_ci95_high"]]


# ---- pictures and tables --------------------------------------------------------------------------------------------


def by_size(*several: Records) -> Figure:
    """Each quality against the cache's share of float32's bytes."""
    panels = {}
    for quality in qualities(*several):
        points = quality.compressed()[lambda found: found["share"] >= SMALLEST_SHOWN / (1 + SLACK)]
        panels[quality.name] = figures.Front(front(points, "share"), quality.kind.label, quality.plain)
    return figures.front_panels(panels, "share", "shown", xlabel="KV 缓存占 float32 的几分之几", halves=True)


def size_table(*several: Records) -> pd.DataFrame:
    """For each quality and size the best of each way, and how far the first is ahead of the next."""
    found = qualities(*several)
    won = verdicts(found)
    return pd.DataFrame([_row(quality, size, won[quality.name, size]) for quality in found for size in SIZES])


def winners(*several: Records) -> pd.DataFrame:
    """A row for each quality, a column for each size: the best way and how far it is ahead, where it can be told."""
    found = qualities(*several)
    won = verdicts_of_tables(found)
    return pd.DataFrame(
        {"衡量": quality.name} | {fraction(size): _won_in_short(won[quality.name, size]) for size in SIZES}
        for quality in found
    )


def _won_in_short(found: Verdict | None) -> str:
    if found is None:
        return "—"
    if found.second is None:
        return f"只有{WAYS[found.first]}"
    return f"{WAYS[found.first]}，{found.ahead:.3f}" if found.is_clear else "分不出"


def verdicts_of_tables(found: list[Quality]) -> dict[tuple[str, float], Verdict | None]:
    """Corrected as in the two tables of all configurations: losses apart from answers."""
    losses, answers = ([one for one in found if (one.kind == _NLL) == is_loss] for is_loss in (True, False))
    return verdicts(losses) | verdicts(answers)


def size_table_reach(*several: Records) -> str:
    """Over how many comparisons the winners of that table are corrected, and of what they speak."""
    found = qualities(*several)
    n = sum(one is not None and not np.isnan(one.p) for one in verdicts(found).values())
    few = [quality.name for quality in found if len(np.unique(quality.documents)) <= FEW_DOCUMENTS]
    text = f"表里共 {n} 次比较，胜者按 Holm 法一起校正（p < 0.05）。"
    return text + (f"{listed(few)}的文本只有一篇或几篇，胜者只说这些文本。" if few else "")


def _row(quality: Quality, size: float, won: Verdict | None) -> dict:
    best = best_within(quality, size)
    cells = {words: _cell(quality, best[best["way"] == way], way) for way, words in WAYS.items()}
    return {"衡量": quality.name, "大小": fraction(size), **cells, "胜者": _won(quality, won)}


def _cell(quality: Quality, best: pd.DataFrame, way: str) -> str:
    if len(best):
        return f"{in_words(best.iloc[0])}：{_loss(quality, best.index[0])}"
    shares, missing = _shares(quality, way), "装不下" if way == "bits" else "没有名副其实的设置"
    return f"{missing}，最少要 {shares.min():.3f}" if len(shares) else "—"


def _loss(quality: Quality, run: str) -> str:
    losses = quality.losses[run].to_numpy()
    low, high = interval(losses, None, quality.documents).ends
    row = pd.Series({"loss": losses.mean() + 0.0, "loss_ci95_low": low, "loss_ci95_high": high})  # no minus zero
    return with_interval(row, "loss")


def _won(quality: Quality, found: Verdict | None) -> str:
    if found is None:
        return "—"
    if found.second is None:
        return f"只有{WAYS[found.first]}做得到"
    return f"{WAYS[found.first]}，{_ahead(quality, found)}" if found.is_clear else f"分不出（{_ahead(quality, found)}）"


def _ahead(quality: Quality, found: Verdict) -> str:
    low, high = found.interval.ends
    row = pd.Series({"ahead": found.ahead, "ahead_ci95_low": low, "ahead_ci95_high": high})
    return with_interval(row, "ahead") + quality.kind.measured_in


def in_words(row: pd.Series) -> str:
    """A configuration: what its press evicts and in how many bits it keeps the rest."""
    ratio = "" if pd.isna(row["compression_ratio"]) else f" {row['compression_ratio']:g}"
    parts = [] if row["press"] == "no_press" else [row["press"] + ratio]
    return "、".join([*parts, *([] if pd.isna(row["bits"]) else [f"{row['bits']:.0f} 位"])]) or "不压缩"


def fraction(size: float) -> str:
    return f"1/{1 / size:.0f}"


# ---- against time ---------------------------------------------------------------------------------------------------


def settings_in_bits(settings: list[Records]) -> list[Records]:
    """Those of study `speed` with runs in few bits: of one model on one machine, in any precision."""
    found = [records for records in settings if len(records.frame)]
    found = [records for records in found if bits_of(timed_runs(records.frame)).notna().any()]
    if not found:
        raise Missing("speed", WITH_BITS)
    first, *_ = where = [tuple(records.frame.iloc[0][["device_name", "model"]]) for records in found]
    return [records for records, of in zip(found, where) if of == first]


def timed_in_bits(settings: list[Records]) -> pd.DataFrame:
    """This library's runs with the cache in few bits and as it is, at the longest context and the largest batch at
    which there are any in few bits; with `bits`, `way` and `step_ms`."""
    runs = pd.concat([timed_runs(records.frame) for records in settings_in_bits(settings)], ignore_index=True)
    runs = runs[(runs["engine"] == "ours") & column(runs, "prefill_chunk").isna() & runs["step_s"].notna()]
    in_bits = at_largest(at_largest(runs[bits_of(runs).notna()], "context_tokens"), "batch_size").iloc[0]
    runs = runs[(runs[["context_tokens", "batch_size"]] == in_bits[["context_tokens", "batch_size"]]).all(axis=1)]
    return _with_ways(runs).assign(step_ms=1e3 * pd.to_numeric(runs["step_s"]))


def by_time(settings: list[Records], *texts: Records) -> Figure:
    """The loss on each text against the milliseconds of a step, in each precision."""
    timed, panels = timed_in_bits(settings), {}
    for quality in qualities(*texts):
        for dtype, runs in timed.groupby("dtype", sort=False):
            points = with_losses(runs, quality)
            plain = runs.loc[runs["way"] == "", "step_ms"]
            panels[f"{quality.name}，{dtype}"] = figures.Front(
                front(points, "step_ms"), quality.kind.label, quality.plain, *plain.iloc[:1]
            )
    return figures.front_panels(panels, "step_ms", "shown", xlabel="解码一步（毫秒）")


def with_losses(timed: pd.DataFrame, quality: Quality) -> pd.DataFrame:
    """The timed configurations whose loss is known too. Bytes read, and so time, do not depend on a model's weights."""
    same = ["press", "compression_ratio", "bits"]
    lost = quality.compressed()[[*same, "loss", "shown", "shown_ci95_low", "shown_ci95_high"]]
    both = timed[[*same, "way", "step_ms"]].fillna({"bits": 0}).merge(lost.fillna({"bits": 0}), on=same)
    if both.empty:
        raise Missing("speed", "与困惑度同样的 press、压缩率与 kv_bits")
    return both


def steps_in_words(settings: list[Records]) -> str:
    """In each precision: a step with the cache as it is as a multiple of one in few bits alone, and of the fastest of
    each other way; whether the last bits saved save time."""
    timed = timed_in_bits(settings)
    first = timed.iloc[0]
    presses = sorted(timed.loc[timed["way"] == "evict", "press"].unique())
    parts = [f"{dtype}：{_steps(runs)}" for dtype, runs in timed.groupby("dtype", sort=False)]
    return (
        f"{first['model']} 的形状、上下文 {first['context_tokens']}、批 {first['batch_size']}（{first['device_name']}）"
        f"，{'；'.join(parts)}。" + (f"计过时的方法只有 {listed(presses)}。" if presses else "")
    )


def _steps(runs: pd.DataFrame) -> str:
    whole = runs[runs["way"] == ""]
    if whole.empty:
        raise Missing("speed", "no_press")
    whole = whole.iloc[0]
    bits = runs[runs["way"] == "bits"].sort_values("bits", ascending=False)
    fastest = {
        way: runs[runs["way"] == way].nsmallest(1, "step_ms").iloc[0]
        for way in ("evict", "both")
        if way in set(runs["way"])
    }
    shown = [f"{in_words(row)}的 {turns.ratio(whole, row).in_words}" for _, row in bits.iterrows()]
    shown += [f"{WAYS[way]}（{in_words(row)}）的 {turns.ratio(whole, row).in_words}" for way, row in fastest.items()]
    text = f"不压缩的一步是 {listed(shown)}"
    if len(bits) > 1:
        more, fewer = (row for _, row in bits.iloc[-2:].iterrows())
        text += f"；{in_words(more)}的一步是 {in_words(fewer)}的 {turns.ratio(more, fewer).in_words}"
    if len(fastest) > 1:
        text += f"；最快的两种做法里，只淘汰的一步是淘汰并量化的 {turns.ratio(*fastest.values()).in_words}"
    return text


# ---- sentences ------------------------------------------------------------------------------------------------------


def bits_told() -> str:
    """What a number takes, steps and least numbers included, in heads of 64 dimensions."""
    told = {bits: Form(bits, GROUP, False).n_words * 32 / (2 * GROUP * GROUP) for bits in BITS}
    return (
        f"连步长与最小值在内，{'、'.join(map(str, BITS))} 位每个数实占 {'、'.join(f'{of:g}' for of in told.values())} "
        f"位，即 float32 的 {'、'.join(f'{of / 32:.3f}' for of in told.values())}（每头 {GROUP} 维时）。"
    )


def who_wins(*several: Records) -> str:
    """Which way wins where a quarter, and where an eighth, of float32's bytes is allowed, and below what quantizing
    alone can do."""
    found = qualities(*several)
    won = verdicts_of_tables(found)
    told = who_wins_in_little(found, won)
    text = f"缓存的字节以 float32 为一，括号里是比次好的做法少损失多少：{told}。" if told else ""
    shares = pd.concat([_shares(quality, "bits") for quality in found])
    return text + (_below(won, shares.min()) if len(shares) else "")


def order(*several: Records) -> str:
    """Whether at each size one way wins all that can be told apart, and which."""
    found = qualities(*several)
    won = {key: one.first for key, one in verdicts_of_tables(found).items() if one and one.is_clear}
    by_size = {size: {way for (_, at), way in won.items() if at == size} for size in SIZES}
    text = "分得出的格子里，没有一种做法在同样的大小处处胜出。"
    if won and max(map(len, by_size.values())) == 1:
        sizes = {way: [fraction(size) for size in SIZES if by_size[size] == {way}] for way in WAYS}
        text = f"分得出的格子里，{'，'.join(f'{listed(of)} 时都是{WAYS[way]}胜出' for way, of in sizes.items() if of)}"
        text += "" if sizes["evict"] else "，没有一格是只淘汰"
        follows = sizes["bits"] and sizes["both"] and not sizes["evict"]
        text += "：先少记几位；还要小，就两样并用。" if follows else "。"
    level = [quality.name for quality in found if not any(name == quality.name for name, _ in won)]
    return text + (f"{listed(level)}在哪种大小都分不出。" if level else "")


def choice_of_each_way(*several: Records) -> str:
    """From how many presses each way's best is taken, and which of them were measured at no small size."""
    found = pd.concat([quality.compressed()[["press", "way", "share"]] for quality in qualities(*several)])
    evicted, both = (found[found["way"] == way] for way in ("evict", "both"))
    least, size = evicted.groupby("press")["share"].min(), SIZES[-2]
    large = sorted(least.index[least > size * (1 + SLACK)])
    in_bits = listed(sorted(both["press"].unique()))
    text = f"{WAYS['evict']}从测过的 {len(least)} 种方法里挑，存成几位的只有其中的 {in_bits}"
    return text + (f"；{listed(large)} 没有测到 {fraction(size)} 那样小，或在那里名不副实。" if large else "。")


def _below(won: dict, least: float) -> str:
    """Of the sizes in which no number of bits alone fits."""
    small = [one for (_, size), one in won.items() if size * (1 + SLACK) < least and one and one.second]
    both, alone = (sum(one.is_clear and one.first == way for one in small) for way in ("both", "evict"))
    text = f"单靠量化至少要占 {least:.1%}"
    if not small:
        return text + "。"
    beaten = f"，只淘汰胜出 {alone} 次" if alone else ""
    return text + f"；再小，{len(small)} 次比较里淘汰并量化胜过只淘汰 {both} 次{beaten}，其余分不出。"


def _shares(quality: Quality, way: str) -> pd.Series:
    return quality.configurations.loc[quality.configurations["way"] == way, "share"]


def who_wins_in_little(found: list[Quality], won: dict) -> str:
    """`won` is of `verdicts_of_tables`; at a quarter and an eighth."""
    return "；".join(told for size in (1 / 4, 1 / 8) if (told := _winners(found, won, size)))


def _winners(found: list[Quality], won: dict, size: float) -> str:
    two = [(quality.name, one) for quality in found if (one := won[quality.name, size]) and one.second]
    measured_in = {quality.name: quality.kind.measured_in for quality in found}
    names = {
        way: [f"{name}（{one.ahead:.3f}{measured_in[name]}）" for name, one in two if one.is_clear and one.first == way]
        for way in WAYS
    }
    parts = [f"{WAYS[way]}胜在{'、'.join(of)}" for way, of in names.items() if of]
    n_clear = sum(map(len, names.values()))
    parts += [("其余" if n_clear else "各种做法") + "分不出"] if n_clear < len(two) else []
    return f"只许占 {fraction(size)} 时，{'，'.join(parts)}" if parts else ""


def source(*several: Records) -> str:
    there = [records for records in several if len(records.frame)]
    if not there:
        raise Missing(several[0].study)
    return sources(there)
