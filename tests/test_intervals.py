"""Intervals against what they must be: closed forms, and how often they hold where the dependence is known."""

import math

import numpy as np
import pytest

from kvneox_lib.measures import intervals
from kvneox_lib.measures.intervals import (
    NORMAL,
    comparison,
    holm,
    interval,
    student_p,
    student_quantile,
)

REPEATS = 1000


def sample(rng, sizes, between: float, near: float) -> np.ndarray:
    """Windows whose mean is 0: each document is off by `between`, and a window is like the one before it by `near`."""
    parts = []
    for n, off in zip(sizes, rng.normal(0, between, len(sizes))):
        values = rng.normal(size=n)
        for i in range(1, n):
            values[i] = near * values[i - 1] + math.sqrt(1 - near**2) * values[i]
        parts.append(values + off)
    return np.concatenate(parts)


def coverage(sizes, between: float, near: float, beyond: bool = True) -> tuple[float, float]:
    """How often the truth is in the interval, and in that of a mean of independent windows."""
    rng, documents = np.random.default_rng(1), np.repeat(np.arange(len(sizes)), sizes)
    held = np.zeros(2)
    for _ in range(REPEATS):
        values = sample(rng, sizes, between, near)
        low, high = interval(values, None, documents, beyond=beyond).ends
        half = NORMAL * values.std(ddof=1) / math.sqrt(len(values))
        held += low <= 0 <= high, abs(values.mean()) <= half
    return tuple(held / REPEATS)


# ---- how often they hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "between", "near"),
    [((200,), 0, 0.23), ((25,) * 8, 0.3, 0.25), ((10,) * 20, 0.3, 0.5), ((5, 10, 20, 15) * 5, 0.5, 0.25)],
)
def test_they_hold_where_windows_depend_on_each_other(sizes, between, near):
    ours, independent = coverage(sizes, between, near)
    assert 0.93 <= ours <= 0.97 and independent < 0.9


@pytest.mark.parametrize("between", [0.1, 0.3, 1.0])
def test_three_documents_are_enough_for_an_interval_that_is_wide(between):
    """Where the three differ little, it holds more often than it must: they cannot show that others do as well."""
    ours, independent = coverage((52, 49, 87), between, 0.25)
    assert ours >= 0.94 and independent < 0.85


def test_of_these_documents_alone_they_hold_too():
    ours, independent = coverage((67, 67, 67), 0, 0.23, beyond=False)
    assert 0.93 <= ours <= 0.97 and independent < 0.9


# ---- closed forms ---------------------------------------------------------------------------------------------------


def test_one_window_a_document_is_the_ordinary_bootstrap_widened_for_its_number():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found, drawn = interval(values, None, np.arange(400)), np.random.default_rng(1).choice(values, (2000, 400))
    ordinary = tuple(np.percentile(drawn.mean(1), [2.5, 97.5]))
    assert found.n_documents == 400 and found.beyond
    assert found.ends == pytest.approx(ordinary, abs=0.03)
    half = student_quantile(399) * values.std(ddof=1) / 20
    assert found.ends == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_few_documents_have_students_interval_of_their_means():
    """Where windows of a document are all alike."""
    means = np.array([1.0, 2.0, 4.0])
    found = interval(np.repeat(means, 20), None, np.repeat(range(3), 20))
    half = 4.302653 * means.std(ddof=1) / math.sqrt(3)
    assert found.ends == pytest.approx((means.mean() - half, means.mean() + half), rel=0.03)  # of so many draws
    assert found.p == pytest.approx(student_p(means.mean() / (means.std(ddof=1) / math.sqrt(3)), 2), rel=0.06)


def test_windows_that_are_equal_leave_no_doubt():
    for documents in (None, np.arange(30) // 10):
        found = interval(np.full(30, 0.5), None, documents)
        assert found.ends == pytest.approx((0.5, 0.5)) and found.p == 0
        assert interval(np.zeros(30), None, documents).p == 1


def test_a_shift_shifts_and_a_factor_scales():
    values, documents = np.random.default_rng(0).normal(size=60), np.repeat([0, 1, 2], 20)
    for fixed in ({}, {"documents": documents}, {"documents": documents, "beyond": False}):
        found, moved = interval(values, **fixed), interval(3 * values + 7, **fixed)
        assert moved.ends == pytest.approx([3 * end + 7 for end in found.ends])
        assert interval(-values, **fixed).p == pytest.approx(found.p)


def test_documents_held_fixed_may_differ_as_they_like():
    values, documents = np.random.default_rng(0).normal(size=60), np.repeat([0, 1, 2], 20)
    apart = values + 100 * (documents - 1)
    of_these, of_all = (interval(apart, None, documents, beyond=beyond) for beyond in (False, True))
    assert not of_these.beyond and of_all.beyond
    assert of_these.high - of_these.low < 2 and of_all.high - of_all.low > 200
    assert comparison(apart, documents) == of_these
    many = np.arange(60) // 6
    assert comparison(apart, many) == interval(apart, None, many) != interval(apart, None, many, beyond=False)


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 20, 300)
    values = weights * rng.normal(2, 0.1, 300)
    low, high = interval(values, weights).ends
    assert low < values.sum() / weights.sum() < high and high - low < 0.05
    error = (values - weights * values.sum() / weights.sum()).std() * math.sqrt(300) / weights.sum()  # linearized
    assert high - low == pytest.approx(2 * NORMAL * error, rel=0.3)
    assert interval(values, weights).ends == pytest.approx(interval(2 * values, 2 * weights).ends)


def test_windows_of_a_document_are_put_together_wherever_they_stand():
    values, documents = np.random.default_rng(0).normal(size=60), np.repeat(["b", "a", "c"], 20)
    mixed = np.argsort(np.tile(range(20), 3), kind="stable")
    assert interval(values[mixed], None, documents[mixed]).ends == pytest.approx(interval(values, None, documents).ends)


def test_what_is_too_little_has_no_interval():
    for values in ([], [1.0] * 4, [1.0] * 9 + [math.nan]):
        found = interval(np.array(values))
        assert np.isnan([found.low, found.high, found.p]).all()
    assert interval(np.arange(5.0)).n_documents == 1 and not interval(np.arange(5.0)).beyond


def test_blocks_are_consecutive_windows_and_as_many_as_there_are():
    drawn = intervals._windows_drawn((40, 1, 12), 10).counts + 1
    assert drawn.shape == (intervals.RESAMPLES, 53)
    for start, end in ((0, 40), (40, 41), (41, 53)):
        assert (drawn[:, start:end].sum(1) == end - start).all()
    edges = (np.diff(drawn[:, :40], append=drawn[:, :1]) > 0).sum(1)  # where a block begins, round the circle
    assert edges.max() == 4 and drawn[:, 40].tolist() == [1] * intervals.RESAMPLES
    assert drawn[:, :40].mean(0) == pytest.approx(1, abs=0.1)


# ---- Student and Holm -----------------------------------------------------------------------------------------------


def test_students_distribution():
    assert student_p(1, 1) == pytest.approx(0.5)  # Cauchy's
    for t in (0.3, 2, 20):
        assert student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for freedom in (1, 1.8, 5.5, 30, 199, 5000):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)
        assert student_p(4, freedom) == pytest.approx(2 * stats.t.sf(4, freedom), rel=0.05 if freedom > 2000 else 1e-6)


def test_holm_is_what_rejecting_step_by_step_gives():
    assert holm([0.01, 0.04, 0.03, math.nan, 0.005])[[0, 1, 2, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(holm([math.nan, 0.5])[0]) and holm([]).size == 0 and holm([0.9, 0.8]).max() == 1
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, level = rng.random(8) ** 4, 0.05
        rejected, left = np.zeros(8, bool), 8
        for i in np.argsort(p):  # the definition
            if p[i] * left > level:
                break
            rejected[i], left = True, left - 1
        assert (holm(p) <= level).tolist() == rejected.tolist()
