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


def wilson_ci95(hits: float, n: float) -> tuple[float, float]:
    """95 % interval of a share, honest near 0 and 1 too."""
    z, share = 1.959964, hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def share_ci95(hits: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share of `hits` (0 or 1 each) that were drawn in `groups`, such as keys that stand in the same
    context: Wilson's, for as many hits as would tell as much if each had been drawn for itself.

    That number is n over the design effect (the variance of the share between groups over that of single draws, at
    least 1), less what is not known of a variance from few groups (Korn and Graubard 1998). All hits or none show no
    variance, dependent or not: then there are as many as groups, which is the worst that can be, and the fewer hits or
    misses there are, the more of this worst stays. Where each hit is a group of its own it is Wilson's.
    """
    hits, groups = np.asarray(hits, dtype=float), np.asarray(groups)
    if hits.shape != groups.shape or hits.ndim != 1 or not len(hits):
        raise ValueError(f"groups of shape {groups.shape}: must be as many as hits {hits.shape}, one at least")
    n, share = len(hits), float(hits.mean())
    of_group = np.unique(groups, return_inverse=True)[1]
    sizes, sums = np.bincount(of_group), np.bincount(of_group, hits)
    least, rarer = n**2 / float((sizes**2).sum()), min(float(hits.sum()), n - float(hits.sum()))
    if len(sizes) < 2 or not rarer:
        return wilson_ci95(share * least, least)
    between = len(sizes) / (len(sizes) - 1) * float(((sums - sizes * share) ** 2).sum()) / n**2
    design = max(1.0, between / (share * (1 - share) / (n - 1)))
    seen = max(least, n / design * (_t_97_5(n - 1) / _t_97_5(len(sizes) - 1)) ** 2)
    unseen = 1 / (1 + rarer)
    n_alone = 1 / ((1 - unseen) / seen + unseen / least)
    return wilson_ci95(share * n_alone, n_alone)


def _t_97_5(freedom: int) -> float:
    """The quantile of Student's t: exact for 1 and 2 degrees of freedom, else Fisher's series, within 1 %."""
    if freedom < 3:
        return math.tan(0.475 * math.pi) if freedom == 1 else 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = 1.959964, freedom
    first, second = (z**3 + z) / (4 * v), (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return z + first + second + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
