"""How sure a mean, a ratio or a share is.

Windows of a book are not independent of each other: neighbours are alike, and all of them are by one author. `interval`
says what follows from that.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
BLOCK = 10  # consecutive windows that are drawn together; fewer where that leaves less than
BLOCKS = 4  # of them in a document
FEWEST = 5  # windows of which an interval can be had
FEW_DOCUMENTS = 5  # up to so many, the percentiles of what is drawn say nothing: three can be drawn in ten ways
NORMAL = 1.959963984540054  # 97.5 % of a normal distribution lie below


@dataclass(frozen=True)
class Interval:
    """A 95 % interval. NaN where there are too few windows."""

    low: float
    high: float
    p: float  # two-sided: how often as far from zero if the truth were zero
    n_documents: int
    beyond: bool  # it speaks of other documents like these; if not, of these alone

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


# ---- windows of documents -------------------------------------------------------------------------------------------


def interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    documents: np.ndarray | None = None,
    *,
    beyond: bool = True,
    block: int = BLOCK,
) -> Interval:
    """The interval of sum(values) / sum(weights) over windows: of a mean (without weights), a ratio of sums (nll and
    bytes), or a paired difference (values are differences). Windows come in the order of the text; `documents` tells
    which document each is of (without it, all are of one).

    Documents are drawn with replacement, in each of them circular blocks of consecutive windows, `RESAMPLES` times,
    always the same draws. How far apart the documents lie contains how uncertain each of them is, so that their draws
    are shrunk to what windows within documents do not explain: otherwise that would count twice. A bootstrap of few
    things is too narrow, and is widened twice: by the share of variance that it is known to miss, and by Student's
    quantile over the normal one, with as many degrees of freedom as there are documents (of unequal size fewer) but
    one. From 2 to `FEW_DOCUMENTS` documents that quantile makes the interval (4.3 standard errors for three equal
    ones), not the percentiles of the draws.

    Where it fails: Student's quantile holds if documents differ about normally, and two or three cannot show that
    they do not. It is too wide where documents do not differ at all, as two or three cannot show that either. Blocks
    hold dependence that has ended within their length, and are widened by what those of half the length miss against
    them; where windows are alike farther off, the interval of a single document is too narrow.

    beyond=False: documents are held fixed, and the interval speaks of them alone, as it must where there is but one.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    sizes, order = _layout(len(values), documents)
    n_documents = len(sizes)
    beyond = beyond and n_documents > 1
    if not beyond and 1 in sizes:  # documents of a single window cannot be drawn from: they are drawn as one
        sizes, order = _layout(len(values), _singles_together(documents))
    total, share = weights.sum(), values.sum() / weights.sum() if len(values) else math.nan
    if len(values) < FEWEST or not (math.isfinite(share) and np.isfinite(values).all()):
        return Interval(math.nan, math.nan, math.nan, n_documents, beyond)
    residuals, weights = (values - share * weights)[order], weights[order]  # their sum is zero
    drawn, half = (_windows_drawn(sizes, length) for length in (block, max(1, block // 2)))
    within, shorter = (one.counts @ (residuals * one.widened) / total for one in (drawn, half))
    if within.any():  # what blocks of half the length miss, those of twice the length would add
        within = within * math.sqrt(np.clip(2 - shorter.var() / within.var(), 1, 2))
    noise, freedom = float(within.var()), max(1.0, 3 / 4 * drawn.freedom)  # as of such a kernel of lags
    moved, drawn_weight = within, drawn.counts @ weights / total + 1
    if beyond:
        starts = np.cumsum([0, *sizes[:-1]])
        by_document = np.add.reduceat(residuals, starts), np.add.reduceat(weights, starts)
        shares = by_document[1] / total
        counts, effective = _documents_drawn(len(sizes)), 1 / (shares**2).sum()
        missed = 1 + 1 / effective - 2 * effective * (shares**3).sum()  # of the variance between documents
        between = (counts - 1) @ by_document[0] / total / math.sqrt(missed)
        seen = float(between.var())
        shrunk = math.sqrt(max(0.0, 1 - noise / seen)) if seen > 0 else 0.0
        moved = within + shrunk * between
        drawn_weight, freedom = drawn_weight * (counts @ shares), max(1.0, effective - 1)
    error, quantile = float(moved.std()), student_quantile(freedom)
    if beyond and len(sizes) <= FEW_DOCUMENTS:
        low, high = share - quantile * error, share + quantile * error
    else:
        low, high = share + np.percentile(moved / drawn_weight, [2.5, 97.5]) * (quantile / NORMAL)
    p = student_p(abs(share) / error, freedom) if error > 0 else float(share == 0)
    return Interval(float(low), float(high), p, n_documents, beyond)


def comparison(values: np.ndarray, documents: np.ndarray | None = None) -> Interval:
    """The interval from which a verdict on paired differences is made: of documents like these where there are more
    than `FEW_DOCUMENTS`, and of these alone where there are fewer. Of other books three say next to nothing, however
    alike they are, the less if many questions are asked of them."""
    several = documents is not None and len(np.unique(documents)) > FEW_DOCUMENTS
    return interval(values, None, documents, beyond=several)


def _layout(n: int, documents: np.ndarray | None) -> tuple[tuple[int, ...], np.ndarray]:
    """How many windows each document has, and the windows document by document, in the order of each."""
    if documents is None:
        return (n,) if n else (), np.arange(n)
    _, numbers, sizes = np.unique(np.asarray(documents), return_inverse=True, return_counts=True)
    return tuple(sizes.tolist()), np.argsort(numbers, kind="stable")


def _singles_together(documents: np.ndarray) -> np.ndarray:
    _, numbers, sizes = np.unique(np.asarray(documents), return_inverse=True, return_counts=True)
    return np.where(sizes[numbers] == 1, len(sizes), numbers)


@dataclass(frozen=True)
class _Drawn:
    counts: np.ndarray  # (resamples, windows) how often more than once each window is drawn
    widened: np.ndarray  # (windows,) for the variance that few blocks miss
    freedom: int  # blocks, less one for each document


@lru_cache(maxsize=8)  # pages ask hundreds of times for the same windows
def _windows_drawn(sizes: tuple[int, ...], block: int) -> _Drawn:
    """Of each document as many windows as it has, in circular blocks. A document of a single window has no choice."""
    rng, counts, widened, freedom = np.random.default_rng(0), [], [], 0
    for n in sizes:
        n_blocks = min(n, max(BLOCKS, math.ceil(n / block)))
        lengths = np.full(n_blocks, n // n_blocks) + (np.arange(n_blocks) < n % n_blocks)
        counts.append(_circular(rng.integers(n, size=(RESAMPLES, n_blocks)), lengths, n) - 1 if n > 1 else 0)
        counts[-1] = np.broadcast_to(counts[-1], (RESAMPLES, n))
        widened.append(np.full(n, math.sqrt(n_blocks / max(1, n_blocks - 1))))
        freedom += n_blocks - 1
    return _Drawn(np.concatenate(counts, axis=1, dtype=float), np.concatenate(widened), freedom)


def _circular(starts: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """(resamples, n) in how many of the blocks each window lies; what goes over the end goes on at the beginning."""
    rows, edges = np.arange(len(starts))[:, None], np.zeros((len(starts), 2 * n + 1), dtype=np.int32)
    np.add.at(edges, (rows, starts), 1)
    np.add.at(edges, (rows, starts + lengths), -1)
    counts = edges.cumsum(axis=1)
    return counts[:, :n] + counts[:, n : 2 * n]


@lru_cache(maxsize=8)
def _documents_drawn(n: int) -> np.ndarray:
    """(resamples, n) how often each is drawn."""
    return np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


# ---- Student's distribution -----------------------------------------------------------------------------------------


def student_p(t: float, freedom: float) -> float:
    """How often |t| or more comes up. With t = sqrt(freedom) / tan(u), this is the integral of sin(u)^(freedom - 1)
    from 0, over that up to a right angle."""
    if freedom > 2000:
        return math.erfc(t / math.sqrt(2))
    nodes, parts = _gauss_legendre()
    up_to_t, whole = (
        end * (parts * np.sin(end * (nodes + 1) / 2) ** (freedom - 1)).sum()
        for end in (math.atan2(math.sqrt(freedom), t), math.pi / 2)
    )
    return float(up_to_t / whole)


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


@lru_cache(maxsize=256)
def student_quantile(freedom: float, share: float = 0.95) -> float:
    """Between minus and plus how much that share lies: by halving."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 1 - share else (low, middle)
    return high


# ---- many verdicts --------------------------------------------------------------------------------------------------


def holm(p_values: np.ndarray) -> np.ndarray:
    """Each p as it must be read if one wrong verdict among all of them is to be as rare as in one alone (Holm 1979):
    the smallest of m is multiplied by m, the next by m - 1, and none falls below a smaller one's. NaN stays NaN, and
    is no test."""
    p_values = np.asarray(p_values, dtype=float)
    adjusted, tests = np.full(p_values.shape, math.nan), np.flatnonzero(np.isfinite(p_values))
    order = tests[np.argsort(p_values[tests], kind="stable")]
    grown = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(grown)) if len(order) else grown
    return adjusted


# ---- what is independent --------------------------------------------------------------------------------------------


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
