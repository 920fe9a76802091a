"""What is said of a machine, its two rates and the floor that follows from them, and of precisions: the runs of study
`speed` in sentences."""

import pandas as pd

from kvneox_lib.pages import turns
from kvneox_lib.pages.report import Missing
from kvneox_lib.pages.selecting import bits_of
from kvneox_lib.pages.timings import at_corner, column, timed_runs, timed_settings
from kvneox_lib.pages.words import ENGINES, WEIGHTS, listed
from kvneox_lib.studies.table import STUDIES


def in_all_precisions(settings: list) -> pd.DataFrame:
    """The runs of the first setting, and of those that differ from it in the precision alone."""
    first, *others = timed_settings(settings)
    keys = [name for name in STUDIES["speed"].parameters if name not in (*STUDIES["speed"].axes, "attn_implementation")]
    keys = [name for name in ("device_name", *keys) if name in first.frame]
    same = [records.frame for records in others if _protocol(records.frame, keys) == _protocol(first.frame, keys)]
    return pd.concat([first.frame, *same], ignore_index=True)


def _protocol(runs: pd.DataFrame, names: list[str]) -> dict[str, str]:
    return {name: str(runs[name].iloc[0]) for name in names}


def precisions(runs: pd.DataFrame) -> str:
    """What each other precision is worth beside float32 at the corner, without a press."""
    cell = at_corner(runs)
    bare = cell[(cell["press"] == "no_press") & bits_of(cell).isna()]
    plain = {(row["dtype"], row["engine"]): row for _, row in bare.iterrows()}
    others = sorted({dtype for dtype, _ in plain} - {"float32"})
    if not others or not any(dtype == "float32" for dtype, _ in plain):
        raise Missing("speed", "两种精度的对照")
    text = ""
    for dtype in others:
        both = [engine for of, engine in sorted(plain) if of == dtype and ("float32", engine) in plain]
        shares = {engine: turns.ratio(plain[dtype, engine], plain["float32", engine]) for engine in both}
        words = listed(f"{ENGINES[engine]}为 {share.in_words}" for engine, share in shares.items())
        text += f"不压缩时，{dtype} 与 float32 每步用时之比：{words}。"
        slower = [ENGINES[engine] for engine, share in shares.items() if share.low > 0.5]
        text += f"确实没有减半的：{listed(slower)}，其每步还有不随字节减少的部分。" if slower else ""
    return text


def cost_of_precision(runs: pd.DataFrame) -> str:
    """What rounding costs, measured on the bundled model."""
    known = runs[column(runs, "demo_nll_diff").notna()].drop_duplicates("dtype")
    if known.empty:
        raise Missing("speed", "半精度的代价")
    return "".join(
        f"{row['dtype']} 的代价（在随包附带的演示模型上，与 float32 相比）：logits 最多相差最大值的 "
        f"{row.demo_logits_rel_diff:.1%}，续文每个词元的 nll 相差 {row.demo_nll_diff:+.4f} nat。"
        for _, row in known.iterrows()
    )


def rates(runs: pd.DataFrame) -> str:
    """Of the machine, as measured in these runs; of a bandwidth that drifted, the range."""
    names = [f"bandwidth_{end}bytes_per_s" for end in ("low_", "", "high_")]
    low, middle, high = (column(runs, name) / 1e9 for name in names)
    low, high = low.min(), high.max()
    text = f"读带宽 {low:.0f}–{high:.0f} GB/s" if high > 1.1 * low else f"读带宽 {middle.median():.0f} GB/s"
    peaks = (column(runs, "peak_flop_per_s") / 1e9).groupby(runs["dtype"]).median().dropna()
    return "，".join([text, *(f"{dtype} 矩阵乘法的峰值 {peak:.0f} GFLOP/s" for dtype, peak in peaks.items())])


def machine(runs: pd.DataFrame) -> str:
    cell = at_corner(runs)
    run = cell.iloc[0]
    return (
        f"机器是 {run.device_name}（{run.device}，{run['dtype']}），测得{rates(runs)}；模型 {run.model}"
        f"（{WEIGHTS[run.weights]}），每步要读 {run.weight_bytes / 1e6:.0f} MB 权重；最长的上下文 "
        f"{run.context_tokens}、最大的批 {run.batch_size} 时，完整的缓存是 {run.kv_bytes_full / 1e6:.0f} MB。"
    )


def floor_in_words(runs: pd.DataFrame) -> str:
    """Which of the two terms makes the floor, at the corner without a press."""
    cell = at_corner(runs)
    run = cell[cell["engine"] == "ours"].iloc[0] if (cell["engine"] == "ours").any() else cell.iloc[0]
    if "floor_bytes_s" not in run or pd.isna(run.floor_bytes_s):
        raise Missing("speed", "屋顶线的两项")
    return (
        f"{run['dtype']}、上下文 {run.context_tokens}、批 {run.batch_size}、不压缩时，下界是每步 "
        f"{run.floor_s * 1e3:.1f} 毫秒：只计读取要 {run.floor_bytes_s * 1e3:.1f} 毫秒，只计运算要 "
        f"{run.floor_operations_s * 1e3:.1f} 毫秒，瓶颈是"
        + ("读内存。" if run.floor_bytes_s > run.floor_operations_s else "运算。")
    )


def above_floor(settings: list) -> str:
    """How many times its floor a step of this library takes, by batch."""
    runs = pd.concat([timed_runs(records.frame) for records in timed_settings(settings)], ignore_index=True)
    runs = runs[(runs["engine"] == "ours") & runs["times_floor"].notna()]
    if runs.empty:
        raise Missing("speed", "本库每步用时的下界")
    ends = runs.groupby("batch_size")["times_floor"].agg(["min", "max"])
    words = listed(f"批 {batch} 时 {row['min']:.2f}–{row['max']:.2f} 倍" for batch, row in ends.iterrows())
    return f"各种形状、精度与压缩率（{len(runs)} 个配置）下，本库的一步是下界的：{words}。"
