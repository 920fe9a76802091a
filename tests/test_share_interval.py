"""The interval of a share of hits that were drawn in groups."""

import numpy as np
import pytest

from kvneox_lib.measures.intervals import _t_97_5, share_ci95, wilson_ci95


def drawn(rng, share: float, dependence: float, n_groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits whose correlation within a group is `dependence`: each group has a share of its own, of a beta
    distribution with that mean."""
    strength = 1 / dependence - 1 if dependence else None
    shares = rng.beta(share * strength, (1 - share) * strength, n_groups) if strength else np.full(n_groups, share)
    return (rng.random((n_groups, size)) < shares[:, None]).ravel(), np.repeat(np.arange(n_groups), size)


def coverage(interval, share, dependence, n_groups, size, n_trials=400) -> float:
    rng, hit = np.random.default_rng(5), 0
    for _ in range(n_trials):
        low, high = interval(*drawn(rng, share, dependence, n_groups, size))
        hit += low <= share <= high
    return hit / n_trials


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5, 0.9])
def test_it_covers_where_keys_of_a_context_go_together_and_the_old_one_does_not(share):
    assert coverage(share_ci95, share, 0.4, n_groups=40, size=5) >= 0.93
    assert coverage(lambda hits, groups: wilson_ci95(hits.sum(), len(hits)), share, 0.4, 40, 5) <= 0.86


@pytest.mark.parametrize(("n_groups", "size"), [(40, 5), (8, 25)])
def test_it_covers_few_groups_and_independent_keys(n_groups, size):
    for share in (0.02, 0.5, 0.9):
        assert coverage(share_ci95, share, 0.2, n_groups, size) >= 0.93
        assert coverage(share_ci95, share, 0.0, n_groups, size) >= 0.93
    width = [np.diff(f) for f in (share_ci95(*drawn(np.random.default_rng(0), 0.5, 0.0, 40, 5)), wilson_ci95(100, 200))]
    assert width[0] < 1.35 * width[1]  # what safety costs where it was not needed


def test_groups_of_one_are_wilsons_and_so_are_groups_that_all_agree():
    hits = np.arange(50) < 20
    assert share_ci95(hits, np.arange(50)) == pytest.approx(wilson_ci95(20, 50))
    together = np.repeat(hits, 4)
    low, high = share_ci95(together, np.repeat(np.arange(50), 4))
    assert (low, high) == pytest.approx(wilson_ci95(20, 50), abs=0.02)  # four times the same says no more than once


def test_all_or_none_is_told_from_the_number_of_groups():
    """And near it the interval is not suddenly much smaller."""
    groups = np.repeat(np.arange(40), 5)
    none, one = np.zeros(200), np.arange(200) == 7
    assert share_ci95(none, groups) == pytest.approx(wilson_ci95(0, 40))
    assert share_ci95(1 - none, groups) == pytest.approx(wilson_ci95(40, 40))
    assert share_ci95(one, groups)[1] > 2 / 3 * share_ci95(none, groups)[1] > 2 * wilson_ci95(0, 200)[1]
    assert share_ci95(np.ones(5), np.zeros(5)) == pytest.approx(wilson_ci95(1, 1))  # one context
    assert share_ci95(np.arange(10) < 5, np.repeat((0, 1), 5)) == pytest.approx(wilson_ci95(1, 2))  # nor two
    sizes = np.repeat(np.arange(3), (8, 1, 1))  # hardly more than one
    assert share_ci95(np.zeros(10), sizes) == pytest.approx(wilson_ci95(0, 100 / 66))


def test_names_of_groups_and_the_order_of_hits_do_not_matter():
    rng = np.random.default_rng(3)
    hits, groups = drawn(rng, 0.6, 0.3, 12, 4)
    order = rng.permutation(48)
    names = np.array([f"context {group % 5} {group}" for group in groups])
    assert share_ci95(hits[order], names[order]) == pytest.approx(share_ci95(hits, groups))
    low, high = share_ci95(~hits, groups)
    assert (1 - high, 1 - low) == pytest.approx(share_ci95(hits, groups))


def test_the_quantile_is_students():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 5, 9, 39, 199):
        assert _t_97_5(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="groups of shape"):
        share_ci95(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="one at least"):
        share_ci95(np.ones(0), np.ones(0))
