"""What is said and shown of speed and memory: the runs of study `speed`, as tables and sentences."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.pages import turns
from kvneox_lib.pages.figures import Dots, bars
from kvneox_lib.pages.report import Missing
from kvneox_lib.pages.selecting import (
    and_budget,
    and_storage,
    bits_of,
    budget_of,
    middle_ratio,
    of_ratios,
    pressed,
)
from kvneox_lib.pages.words import ENGINES, listed, numbers

STEP = "每步用时，本库不压缩的几倍"
CACHES = {"stock": "DynamicCache", "static": "StaticCache"}  # of transformers, where a table has no room
FAILURES = {"out of memory": "内存不够", "mixes the rows of a batch": "不能整批运行"}


# ---- which runs -----------------------------------------------------------------------------------------------------


def timed_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs without failure."""
    return runs[runs["failure"].isna()] if "failure" in runs else runs


def corner(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the runs that `compared` gives those at the longest context, and of these at the largest batch; the baseline
    first, and what is kept as it is before what is rounded."""
    largest = at_largest(at_largest(compared(runs), "context_tokens"), "batch_size")
    ordered = largest.assign(pressed=largest["press"] != "no_press", coarse=-bits_of(largest).fillna(np.inf))
    ordered = ordered.sort_values(["pressed", "press", "compression_ratio", "engine", "coarse"])
    return ordered.drop(columns=["pressed", "coarse"])


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """The timed runs at those contexts and batches at which engines were compared; where there are none, all."""
    timed = timed_runs(runs)
    several = timed.groupby(["context_tokens", "batch_size"])["engine"].transform("nunique") > 1
    return timed[several] if several.any() else timed


def at_largest(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    return runs[runs[column] == runs[column].max()]


def at_middle_ratio(runs: pd.DataFrame) -> pd.DataFrame:
    """Without the runs at other ratios; the baseline and presses with a strength of their own stay."""
    others = pressed(of_ratios(runs))
    return runs.drop(others[others["compression_ratio"] != middle_ratio(others)].index)


def at_corner(runs: pd.DataFrame) -> pd.DataFrame:
    cell = corner(runs)
    if cell.empty:
        raise Missing("speed", "计了时的运行")
    return cell


def timed_settings(settings: list) -> list:
    """Those of a study's settings (`Records`) in which engines were compared; where there are none, those in which
    anything was timed."""
    found = [records for records in settings if len(timed_runs(records.frame))]
    if not found:
        raise Missing("speed", "计了时的运行" if settings else "")
    return [records for records in found if timed_runs(records.frame)["engine"].nunique() > 1] or found


def read_in_chunks(settings: list):
    """The setting in which the context was read in several ways, at most lengths."""
    found = [records for records in settings if _ways_of_reading(timed_runs(records.frame)) > 1]
    if not found:
        raise Missing("speed", "分块读上下文的运行")
    return max(found, key=lambda records: records.frame["context_tokens"].nunique())


def _ways_of_reading(runs: pd.DataFrame) -> int:
    return column(runs, "prefill_chunk").nunique(dropna=False)


def fastest_transformers(runs: pd.DataFrame) -> pd.Series | None:
    """Of transformers' own without a press the one with the shortest step: to be faster than the others is no merit."""
    plain = runs[runs["engine"].isin(["stock", "static"])].dropna(subset="step_s")
    return plain.loc[plain["step_s"].idxmin()] if len(plain) else None


# ---- columns --------------------------------------------------------------------------------------------------------


def variants(runs: pd.DataFrame) -> pd.Series:
    """Engine, press and ratio in words, how the context was read and what is left of it kept; the precision where there
    are several."""
    named = runs["engine"].map(ENGINES) + "，" + press_and_strength(runs) + _readings(runs)
    return named + "，" + runs["dtype"] if several_precisions(runs) else named


def several_precisions(runs: pd.DataFrame) -> bool:
    return runs["dtype"].nunique() > 1


def _readings(runs: pd.DataFrame) -> list[str]:
    chunks, evicting = column(runs, "prefill_chunk"), column(runs, "evict_while_reading").eq(1)
    return [
        "" if pd.isna(chunk) else f"，每块 {chunk:.0f} 词元" + ("，边读边淘汰" if evicts else "")
        for chunk, evicts in zip(chunks, evicting)
    ]


def column(runs: pd.DataFrame, name: str) -> pd.Series:
    """As numbers; of records from before there was that column, none."""
    return pd.to_numeric(runs[name]) if name in runs else pd.Series(float("nan"), runs.index)


def press_and_strength(runs: pd.DataFrame) -> pd.Series:
    """In words, with the bits in which what is left is kept."""
    strength = runs["compression_ratio"].map(lambda ratio: f" {_ratio(ratio)}" if ratio and ratio == ratio else "")
    budgets = budget_of(runs)
    strength = strength.where(budgets.isna(), budgets.map(and_budget))
    return runs["press"].replace("no_press", "不压缩") + strength + bits_of(runs).map(and_storage)


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if round(ratio, 2) == ratio else f"{ratio:g}"


def milliseconds(runs: pd.DataFrame, name: str, digits: int = 1) -> list[str]:
    """`12.3 (11.9–12.5)`: the median of the rounds and the quartiles, from seconds."""
    values = [pd.to_numeric(runs[f"{name}{end}"]) * 1e3 for end in ("", "_q25", "_q75")]
    return [
        "—" if pd.isna(middle) else f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
        for middle, low, high in zip(*values)
    ]


def _written(values: pd.Series, digits: int) -> pd.Series:
    return pd.Series(numbers(values, f".{digits}f"), values.index)


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Which run each row of a table is of."""
    size = runs["context_tokens"].astype(str) + "×" + runs["batch_size"].astype(str)
    return pd.DataFrame({"上下文×批": size, "变体": variants(runs)})


def times(runs: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds to the first token and of a step, the step as a multiple of its floor, and the throughput."""
    return pd.DataFrame(
        {
            "首词元": milliseconds(runs, "prefill_s", 0),
            "每步": milliseconds(runs, "step_s"),
            "倍数": _written(runs["times_floor"], 2),
            "词元/秒": _written(runs["decode_tok_per_s"], 0),
        },
        index=runs.index,
    )


PEAKS = {
    "预填充峰值": "prefill_peak_above_bytes",
    "解码峰值": "peak_above_bytes",
}  # above what was there before the run


def memory(runs: pd.DataFrame) -> pd.DataFrame:
    """Megabytes: of the compressed cache, allocated for it at the end, and the peaks of both phases."""
    columns = {"压缩后": "kv_bytes_compressed", "分配": "kv_bytes", **PEAKS}
    return pd.DataFrame({name: _written(column(runs, of) / 1e6, 1) for name, of in columns.items()})


def peaks(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A panel for each phase: megabytes by context length, a line for each variant; the largest batch, the middle
    ratio."""
    shown = at_middle_ratio(at_largest(timed_runs(runs), "batch_size"))
    alike = shown["engine"].nunique() == 1 and not several_precisions(shown)
    shown = shown.assign(press=press_and_strength(shown) + _readings(shown) if alike else variants(shown))
    panels = {
        name: shown.assign(peak_mb=column(shown, of) / 1e6).dropna(subset="peak_mb") for name, of in PEAKS.items()
    }
    if not all(map(len, panels.values())):
        raise Missing("speed", "内存峰值")
    return panels


def results(runs: pd.DataFrame) -> pd.DataFrame:
    """All that was timed, as notebook 03 shows it."""
    timed = timed_runs(runs)
    total = _written(timed["total_tok_per_s"], 0).rename("连首词元，词元/秒")
    return pd.concat([cells(timed), times(timed), total, memory(timed)], axis=1)


def times_at_corner(runs: pd.DataFrame) -> pd.DataFrame:
    """At the middle ratio, beside a step of this library without a press."""
    cell = at_middle_ratio(at_corner(runs))
    return pd.concat([cells(cell), times(cell), against_plain_in_words(cell)], axis=1)


def memory_at_corner(runs: pd.DataFrame) -> pd.DataFrame:
    cell = at_middle_ratio(at_corner(runs))
    return pd.concat([cells(cell), memory(cell)], axis=1)


def in_short(runs: pd.DataFrame) -> pd.DataFrame:
    """Of `times_at_corner` the rows without a press, and in both loops the press whose step is the shortest in ours."""
    cell = at_middle_ratio(at_corner(runs))
    ours = cell[(cell["engine"] == "ours") & (cell["press"] != "no_press")]
    best = ours["press"][ours["step_s"].idxmin()] if len(ours) else None
    return times_at_corner(runs).loc[cell["press"].isin(["no_press", best])]


def against_plain_in_words(cell: pd.DataFrame) -> pd.Series:
    """Of runs in one precision that took turns: a step of each as a multiple of this library's without a press."""
    plain = _plain_of_ours(cell)
    found = [
        "—" if plain is None or name == plain.name else str(turns.ratio(row, plain)) for name, row in cell.iterrows()
    ]
    return pd.Series(found, cell.index, name=STEP)


def _plain_of_ours(cell: pd.DataFrame) -> pd.Series | None:
    plain = cell[(cell["engine"] == "ours") & (cell["press"] == "no_press") & bits_of(cell).isna()]
    return plain.iloc[0] if len(plain) else None


@dataclass(frozen=True)
class Gain:
    """At one context, batch and precision: this library without a press and transformers' own, as rows of records; of
    compressed runs the one with the shortest step, those that nobody can tell from it, and it in the loop of kvpress.
    """

    plain: pd.Series
    stock: dict[str, pd.Series]  # by engine, where timed
    best: pd.Series | None
    level: pd.DataFrame | None
    kvpress: pd.Series | None

    @property
    def where(self) -> str:
        return f"上下文 {self.plain.context_tokens}、批 {self.plain.batch_size}"

    @property
    def fastest_stock(self) -> pd.Series:
        return min(self.stock.values(), key=lambda row: row.step_s)

    @property
    def by_compression(self) -> turns.Ratio:
        """A step without a press as a multiple of one with it, both of this library."""
        return turns.ratio(self.plain, self.best)


def engine_gains(runs: pd.DataFrame) -> list[Gain]:
    """For each context, batch and precision at which this library and transformers were timed without a press."""
    found = []
    for _, cell in timed_runs(runs).groupby(["context_tokens", "batch_size", "dtype"]):
        bare = cell[(cell["press"] == "no_press") & bits_of(cell).isna()].drop_duplicates("engine")
        plain = {row["engine"]: row for _, row in bare.iterrows()}
        stock = {engine: plain[engine] for engine in ("stock", "static") if engine in plain}
        if "ours" in plain and stock:
            found.append(Gain(plain["ours"], stock, *_best_compressed(cell)))
    return found


def _best_compressed(cell: pd.DataFrame) -> tuple[pd.Series | None, pd.DataFrame | None, pd.Series | None]:
    ours = cell[(cell["engine"] == "ours") & (cell["press"] != "no_press")].dropna(subset="step_s")
    if ours.empty:
        return None, None, None
    best = ours.loc[ours["step_s"].idxmin()]
    theirs = cell[(cell["engine"] == "kvpress") & (cell["press"] == best.press)]
    theirs = theirs[theirs["compression_ratio"] == best.compression_ratio]
    return best, turns.level_with(best, ours), theirs.iloc[0] if len(theirs) else None


def against_plain(settings: list) -> pd.DataFrame:
    """The corner of each setting at its middle ratio: the step of each variant as a multiple of this library's without
    a press in the same turns, which is left out."""
    rows = []
    for records in timed_settings(settings):
        cell = at_middle_ratio(corner(records.frame))
        plain = _plain_of_ours(cell)
        if plain is None:
            continue
        others = cell.drop(index=plain.name)
        size = f"{plain.model}，上下文 {plain.context_tokens}，批 {plain.batch_size}"
        for name, (_, row) in zip(variants(others), others.iterrows()):
            found = turns.ratio(row, plain)
            told = row[["press", "compression_ratio", "device_name"]].to_dict()
            times = {"value": found.value, "low": found.low, "high": found.high}
            rows.append({"panel": size, "name": name, "of": row["dtype"], **told, **times})
    if not rows:
        raise Missing("speed", "与本库不压缩的对照")
    return pd.DataFrame(rows)


def floors(runs: pd.DataFrame) -> Figure:
    """A step of each at the corner and the middle ratio, and its floor."""
    cell = at_middle_ratio(at_corner(runs))
    where = f"上下文 {cell['context_tokens'].iloc[0]}、批 {cell['batch_size'].iloc[0]}"
    return bars(variants(cell), 1e3 * cell["step_s"], xlabel=f"每步用时（毫秒），{where}", marks=1e3 * cell["floor_s"])


def step_dots(found: pd.DataFrame) -> list[Dots]:
    """Of `against_plain`: a panel for each model and size, a mark for each precision."""
    several = found["device_name"].nunique() > 1
    marks = found["of"] + "，" + found["device_name"] if several else found["of"]
    return [
        Dots(part, STEP, even=1.0, title=panel) for panel, part in found.assign(of=marks).groupby("panel", sort=False)
    ]


# ---- sentences ------------------------------------------------------------------------------------------------------


def gain_in_words(gain: Gain) -> str:
    """Compression first, beside this library's own steps without it; then what is the implementation's; then both. Who
    compares with the slower of transformers' caches alone flatters himself."""
    implementation = f"都不压缩时，transformers 的一步与本库之比：{_beside(gain.stock, gain.plain)}"
    if gain.best is None:
        return f"{implementation}。"
    if gain.kvpress is not None:
        implementation += (
            f"；同样的压缩放在 kvpress 的循环里，一步是本库的 {turns.ratio(gain.kvpress, gain.best).in_words}"
        )
    return (
        f"只看压缩：同在本库里，不压缩的一步是压缩后（{_named(gain.best)}{_and_level(gain.level)}）的 "
        f"{gain.by_compression.in_words}。只看实现：{implementation}。两样合在一起，不压缩的 transformers 与压缩后的"
        f"本库之比：{_beside(gain.stock, gain.best)}。"
    )


def _beside(stock: dict[str, pd.Series], ours: pd.Series) -> str:
    return listed(f"{CACHES[engine]} {turns.ratio(row, ours).in_words}" for engine, row in stock.items())


def _and_level(level: pd.DataFrame) -> str:
    return f"；{listed(press_and_strength(level))} 与它分不出快慢" if len(level) else ""


def _named(run: pd.Series) -> str:
    return press_and_strength(run.to_frame().T).iloc[0]


def gains(runs: pd.DataFrame) -> str:
    """At the corner."""
    found = engine_gains(at_corner(runs))
    if not found or found[0].best is None:
        raise Missing("speed", "几种实现的对照")
    return gain_in_words(found[0])


def gains_in_all(settings: list) -> str:
    """From what to what both gains go over all that was compared, and where the implementation gains nothing."""
    found = _all_gains(settings)
    pressed = [gain.by_compression.value for gain in found]
    engines = [turns.ratio(gain.fastest_stock, gain.plain) for gain in found]
    values = [one.value for one in engines]
    lost = [
        f"{gain.plain.model}，{gain.plain['dtype']}，{gain.where}（{ENGINES[gain.fastest_stock.engine]}的一步是本库的 "
        f"{one.in_words}）"
        for gain, one in zip(found, engines)
        if not one.low > 1
    ]
    return (
        f"比过几种实现的条件（形状、精度、批）共 {len(found)} 种：压缩使一步缩短的倍数从 {min(pressed):.2f} 到 "
        f"{max(pressed):.2f}；实现的倍数，与 transformers 的两种缓存里较快的一种相比，从 {min(values):.2f} 到 "
        f"{max(values):.2f}。" + (f"实现不占便宜的：{listed(lost)}。" if lost else "")
    )


def _all_gains(settings: list) -> list[Gain]:
    found = [gain for records in timed_settings(settings) for gain in engine_gains(records.frame)]
    found = [gain for gain in found if gain.best is not None]
    if not found:
        raise Missing("speed", "几种实现的对照")
    return found


def gains_apart(settings: list) -> pd.DataFrame:
    """What is compression's and what the implementation's, in multiples of a step: a column for each setting, at its
    corner."""
    corners = [engine_gains(corner(records.frame)) for records in timed_settings(settings)]
    columns = {_headed(gain): _apart(gain) for gains in corners for gain in gains if gain.best is not None}
    if not columns:
        raise Missing("speed", "几种实现的对照")
    return pd.DataFrame(columns).fillna("—").rename_axis("每步用时之比").reset_index()


def _headed(gain: Gain) -> str:
    return f"{gain.plain.model}，{gain.plain['dtype']}，{gain.plain.context_tokens}×{gain.plain.batch_size}"


def _apart(gain: Gain) -> dict[str, str]:
    rows = {"压缩：本库，不压缩 ÷ 压缩后": gain.by_compression.in_table}
    for engine, row in gain.stock.items():
        rows[f"实现：{CACHES[engine]} ÷ 本库，都不压缩"] = turns.ratio(row, gain.plain).in_table
    if gain.kvpress is not None:
        rows["实现：kvpress 循环 ÷ 本库，同样压缩"] = turns.ratio(gain.kvpress, gain.best).in_table
    for engine, row in gain.stock.items():
        rows[f"合计：{CACHES[engine]}，不压缩 ÷ 本库，压缩后"] = turns.ratio(row, gain.best).in_table
    return rows | {"压缩后每步最短的": _named(gain.best)}


def gains_everywhere(runs: pd.DataFrame) -> list[str]:
    several = several_precisions(runs)
    found = [(gain, f"、{gain.plain['dtype']}" if several else "") for gain in engine_gains(runs)]
    return [f"{gain.where}{precision}：{gain_in_words(gain)}" for gain, precision in found]


def peaks_in_words(runs: pd.DataFrame) -> str:
    """Of the prefill, at the longest context."""
    shown = at_largest(peaks(runs)["预填充峰值"], "context_tokens")
    chunked, evicts = column(shown, "prefill_chunk").notna(), column(shown, "evict_while_reading").eq(1)
    is_plain = shown["press"].str.contains("不压缩")
    plain, after, while_reading = (
        shown[of] for of in (is_plain & ~chunked, ~is_plain & ~chunked & ~evicts, ~is_plain & evicts)
    )
    if not (len(plain) and len(after) and len(while_reading)):
        raise Missing("speed", "三种读法的内存峰值")
    plain, after, while_reading = (rows.iloc[0] for rows in (plain, after, while_reading))
    return (
        f"上下文 {plain.context_tokens} 时，完整的缓存占 {plain.kv_bytes_full / 1e6:.0f} MB，预填充的峰值是 "
        f"{plain.peak_mb:.0f} MB；一次读完、随即压缩（{after.press}）是 {after.peak_mb:.0f} MB；边读边淘汰是 "
        f"{while_reading.peak_mb:.0f} MB，为不压缩的 {while_reading.peak_mb / plain.peak_mb:.0%}。"
    )


def not_timed(runs: pd.DataFrame) -> list[str]:
    """The runs that failed, and why."""
    failed = runs[runs["failure"].notna()]
    failed = failed.assign(variant=variants(failed))
    return [
        f"{row.variant}（上下文 {row.context_tokens}，批 {row.batch_size}）没有计时："
        f"{FAILURES.get(row.failure, row.failure)}。"
        for row in failed.itertuples()
    ]


def saved(runs: pd.DataFrame) -> str:
    """In bytes, at the corner: the cache, and what the process takes above what it took before the run."""
    found = engine_gains(at_corner(runs))
    if not found or found[0].best is None:
        raise Missing("speed", "本库压缩后的运行")
    plain, best = found[0].plain, found[0].best
    peaks = f"{plain.peak_above_bytes / 1e6:.1f} MB 降到 {best.peak_above_bytes / 1e6:.1f} MB"
    stock = found[0].stock.get("stock")
    beside = "" if stock is None else f"（不压缩的 {ENGINES['stock']}是 {stock.peak_above_bytes / 1e6:.1f} MB）"
    return (
        f"省多少：{_named(best)} 的缓存由 {plain.kv_bytes / 1e6:.1f} MB 降到 {best.kv_bytes / 1e6:.1f} MB，是原来的 "
        f"{best.kv_bytes / plain.kv_bytes:.0%}；解码时整个进程比运行之前多用的内存，峰值由 {peaks}{beside}。"
    )
