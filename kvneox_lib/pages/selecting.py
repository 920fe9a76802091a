"""Which runs a page is about."""

import pandas as pd


def pressed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a ratio, without the baseline and the presses whose strength is their own."""
    return runs[(runs["press"] != "no_press") & runs["compression_ratio"].notna()]


def middle_ratio(runs: pd.DataFrame) -> float | None:
    """The middle one of the ratios measured, the upper of two; None where there is none."""
    ratios = sorted(pressed(runs)["compression_ratio"].unique())
    return ratios[len(ratios) // 2] if ratios else None


def numeric(runs: pd.DataFrame) -> pd.DataFrame:
    """With the ends of intervals as floats: a record from a few windows has None."""
    ends = [name for name in runs if name.endswith(("_ci95_low", "_ci95_high"))]
    return runs.assign(**{name: pd.to_numeric(runs[name]) for name in ends})


def at_ratio(runs: pd.DataFrame, ratio: float | None) -> pd.DataFrame:
    """What belongs to a press at this ratio, and to those whose strength is their own."""
    chosen = runs["compression_ratio"].isna() | (runs["compression_ratio"] == ratio)
    return runs[chosen & (runs["press"] != "no_press")]


def with_strength(run) -> str:
    """Press and ratio; a press with a strength of its own has none."""
    return run.press + ("" if pd.isna(run.compression_ratio) else f"，压缩率 {run.compression_ratio:g}")
