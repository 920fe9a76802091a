"""Which runs a page is about."""

import pandas as pd


def pressed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a ratio, without the baseline and the presses whose strength is their own."""
    return runs[(runs["press"] != "no_press") & runs["compression_ratio"].notna()]


def middle_ratio(runs: pd.DataFrame) -> float | None:
    """The middle one of the ratios measured, the upper of two; None where there is none."""
    ratios = sorted(pressed(runs)["compression_ratio"].unique())
    return ratios[len(ratios) // 2] if ratios else None


def with_strength(run) -> str:
    """Press and ratio; a press with a strength of its own has none."""
    return run.press + ("" if pd.isna(run.compression_ratio) else f"，压缩率 {run.compression_ratio:g}")
