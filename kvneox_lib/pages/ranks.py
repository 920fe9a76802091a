"""Whether two columns put runs in the same order."""

import numpy as np
import pandas as pd


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's, over the rows that have both, ties at their mean rank; NaN where one of them is the same in all."""
    both = pd.concat([one, other], axis=1, keys=["one", "other"]).apply(pd.to_numeric).dropna().rank()
    return both["one"].corr(both["other"]) if both.nunique().min() > 1 else float("nan")


def rank_correlation_ci95(one: pd.Series, other: pd.Series, n_resamples: int = 2000) -> tuple[float, float]:
    """Its 95 % interval over rows drawn with replacement, always the same draws, ranked anew in each."""
    both = pd.concat([one, other], axis=1, keys=["one", "other"]).apply(pd.to_numeric).dropna()
    if len(both) < 4:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(both), size=(n_resamples, len(both)))
    x, y = (_centred_ranks(values[drawn]) for values in both.to_numpy().T)
    spread = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found = (x * y).sum(1)[spread > 0] / spread[spread > 0]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (np.nan, np.nan)
    return float(low), float(high)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Of each row (rows, n), ties at their mean rank, less the mean."""
    return np.sign(values[:, :, None] - values[:, None, :]).sum(2) / 2


def kendall(one: pd.Series, other: pd.Series, n_resamples: int = 2000) -> tuple[float, float, float, int]:
    """Kendall's tau-b over the rows that have both, ties counted as such; its 95 % interval over rows drawn with
    replacement, always the same draws; and how many rows there are. NaN where one of them is the same in all."""
    both = pd.concat([one, other], axis=1, keys=["one", "other"]).apply(pd.to_numeric).dropna()
    n = len(both)
    if n < 2:
        return (float("nan"),) * 3 + (n,)
    signs = [np.sign(values[:, None] - values[None, :]) for values in both.to_numpy().T]
    drawn = np.random.default_rng(0).integers(n, size=(n_resamples, n))
    found = np.array([_tau(*(sign[np.ix_(rows, rows)] for sign in signs)) for rows in drawn])
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (np.nan, np.nan)
    return _tau(*signs), float(low), float(high), n


def _tau(one: np.ndarray, other: np.ndarray) -> float:
    """From the signs of all differences (n, n)."""
    untied = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / untied) if untied else float("nan")
