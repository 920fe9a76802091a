"""How sure a mean or a share is."""

import math

import numpy as np


def bootstrap_ci95(numerator: np.ndarray, denominator: np.ndarray, n_resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of sum(numerator) / sum(denominator) over windows drawn with replacement, always the same draws.
    Of fewer than 5 windows no interval can be had: NaN."""
    n = len(numerator)
    if n < 5:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_resamples)  # (resamples, windows) counts
    low, high = np.percentile((drawn @ numerator) / (drawn @ denominator), [2.5, 97.5])
    return float(low), float(high)


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided, exact: how often as uneven a split of the pairs that differ would come up if either way were as
    likely."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def wilson_ci95(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, honest near 0 and 1 too."""
    z, share = 1.959964, hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
