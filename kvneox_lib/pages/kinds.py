"""How a press chooses what goes, and what it asks for besides: in words, from the classes of its row."""

import kvpress as K
import pandas as pd

from kvneox_lib.presses.calibration import CalibratedDuoAttention, CalibratedExpectedAttention, CalibratedQFilter
from kvneox_lib.presses.copying import CopyingHeadsPress
from kvneox_lib.presses.facts import ACTS_AT_EXIT, ACTS_WHILE_DECODING, NEEDS_EAGER
from kvneox_lib.presses.registry import REGISTRY, PressRow, RandomRecentPress

WINDOW = "看末尾窗口的注意力"
AT_EXIT, BY_HEAD, OTHER = "重读上下文", "按头的分工", "其他"
KINDS = {  # the first whose classes are in the row
    "解码中压缩": ACTS_WHILE_DECODING,
    AT_EXIT: ACTS_AT_EXIT,
    BY_HEAD: (K.DuoAttentionPress, CopyingHeadsPress),
    WINDOW: (K.SnapKVPress,),
    "看别的注意力": (
        K.TOVAPress,
        K.ExpectedAttentionPress,
        K.ObservedAttentionPress,
        K.NonCausalAttnPress,
        K.CompactorPress,
        K.FinchPress,
    ),
    "看键和值": (
        K.KnormPress,
        K.KeyDiffPress,
        K.LagKVPress,
        K.LeverageScorePress,
        K.CURPress,
        K.CapPress,
        K.QFilterPress,
    ),
    "只看位置": (K.StreamingLLMPress, K.SimLayerKVPress),
    "随机，留近窗": (RandomRecentPress,),
    "随机": (K.RandomPress,),
    "裁剪键的通道": (K.ThinKPress,),
}
COSTS = {
    "续文也被压缩": ACTS_WHILE_DECODING,
    "压缩时再读一遍上下文": ACTS_AT_EXIT,
    "先量一次模型": (CalibratedQFilter, CalibratedExpectedAttention, CalibratedDuoAttention, CopyingHeadsPress),
    "只能用 eager 注意力": NEEDS_EAGER,
    "键的部分通道置零（不省内存）": (K.ThinKPress,),
}


def _has(row: PressRow | None, classes: tuple[type, ...]) -> bool:
    return row is not None and any(issubclass(part, classes) for part in row.parts)


def kind_of(press: str) -> str:
    return next((kind for kind, classes in KINDS.items() if _has(REGISTRY.get(press), classes)), OTHER)


def is_core(press: str) -> bool:
    """Whether it is among those that are measured everywhere, or a control."""
    return press in REGISTRY and (REGISTRY[press].core or is_control(press))


def is_control(press: str) -> bool:
    """Whether it chooses at random: where methods are counted, it is none."""
    return _has(REGISTRY.get(press), (K.RandomPress,))


def methods(runs: pd.DataFrame) -> pd.DataFrame:
    """Without the controls."""
    return runs[~runs["press"].map(is_control).astype(bool)]


def cost_of(press: str) -> str:
    """What it takes besides a pass over the context; a dash where nothing."""
    return "，".join(cost for cost, classes in COSTS.items() if _has(REGISTRY.get(press), classes)) or "—"


def in_groups(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """With `kind`; kinds by the mean of `by` in them, in each the presses by their own."""
    table = table.assign(kind=table["press"].map(kind_of))
    means = table.groupby("kind")[by].transform("mean")
    return table.assign(mean=means).sort_values(["mean", "kind", by]).drop(columns="mean")
