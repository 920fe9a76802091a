"""Whether two columns put runs in the same order."""

import numpy as np
import pandas as pd


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's, over the rows that have both, ties at their mean rank; NaN where one of them is the same in all."""
    both = pd.concat([one, other], axis=1, keys=["one", "other"]).apply(pd.to_numeric).dropna().rank()
    return both["one"].corr(both["other"]) if both.nunique().min() > 1 else float("nan")


def rank_correlation_ci95(
    one: pd.Series, other: pd.Series, n_resamples: int = 2000, groups: pd.Series | None = None
) -> tuple[float, float]:
    """Its 95 % interval, see `drawn_rank_correlations`."""
    return interval_of(drawn_rank_correlations(one, other, n_resamples, groups))


def interval_of(drawn: np.ndarray) -> tuple[float, float]:
    """Between which 95 % of the draws lie that have a value."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


def drawn_rank_correlations(
    one: pd.Series, other: pd.Series, n_resamples: int = 2000, groups: pd.Series | None = None
) -> np.ndarray:
    """Spearman's correlation over rows drawn with replacement, always the same draws, ranked anew in each. Rows of one
    of `groups`, where there are such, are drawn together. NaN where one column is the same in all, or of too few."""
    groups = pd.Series(range(len(one)), index=one.index) if groups is None else groups
    both = pd.concat([one, other, groups], axis=1, keys=["one", "other", "of"]).dropna()
    of = pd.factorize(both.pop("of"))[0]
    n = of.max() + 1 if len(of) else 0
    if n < 4:
        return np.full(n_resamples, np.nan)
    counts = _times_drawn(n, n_resamples)[:, of]  # (resamples, rows)
    x, y = (counts @ np.sign(values - values[:, None]) / 2 for values in both.to_numpy(dtype=float).T)
    spread = np.sqrt((counts * x**2).sum(1) * (counts * y**2).sum(1))  # x, y: ranks less their mean, ties at theirs
    return np.divide((counts * x * y).sum(1), spread, out=np.full(n_resamples, np.nan), where=spread > 0)


def kendall(one: pd.Series, other: pd.Series, n_resamples: int = 2000) -> tuple[float, float, float, int]:
    """Kendall's tau-b over the rows that have both, ties counted as such; its 95 % interval over rows drawn with
    replacement, always the same draws; and how many rows there are. NaN where one of them is the same in all."""
    both = pd.concat([one, other], axis=1, keys=["one", "other"]).apply(pd.to_numeric).dropna()
    n = len(both)
    if n < 2:
        return (float("nan"),) * 3 + (n,)
    first, second = (np.sign(values[:, None] - values) for values in both.to_numpy(dtype=float).T)  # of all differences
    counts = np.vstack([np.ones(n), _times_drawn(n, n_resamples)])  # the rows as they are, and what is drawn of them
    untied = np.sqrt(_of_pairs(counts, first**2) * _of_pairs(counts, second**2))
    taus = np.divide(_of_pairs(counts, first * second), untied, out=np.full(len(counts), np.nan), where=untied > 0)
    return float(taus[0]), *interval_of(taus[1:]), n


def _of_pairs(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each row of `counts` (…, n), the sum of `values` (n, n) over all pairs, each as often as both were drawn."""
    return (counts @ values * counts).sum(1)


def _times_drawn(n: int, n_resamples: int) -> np.ndarray:
    """How often each of n is drawn with replacement in each of the resamples (resamples, n); always the same draws."""
    drawn = np.random.default_rng(0).integers(n, size=(n_resamples, n))
    return (drawn[:, :, None] == np.arange(n)).sum(1).astype(float)
