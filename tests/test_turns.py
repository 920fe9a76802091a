"""Ratios of times and their intervals, on made-up turns of which the ratio is known."""

import json

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.measures.intervals import student_quantile
from kvneox_lib.pages import turns
from kvneox_lib.pages.turns import Ratio, basis, level_with, paired_ratio, ratio, took_turns


def row(steps, started="t0", context=512, name=0, **more) -> pd.Series:
    low, middle, high = np.percentile(steps, [25, 50, 75])
    quartiles = {"step_s": middle, "step_s_q25": low, "step_s_q75": high}
    where = {"started_at": started, "context_tokens": context, "batch_size": 1}
    return pd.Series({**where, **quartiles, "step_turns_s": json.dumps(list(steps)), **more}, name=name)


def drawn(random, n_turns: int, n_trials: int, true: float) -> tuple[np.ndarray, np.ndarray]:
    """Turns of a machine that is now fast and now slow, by a factor that both variants share."""
    shared = np.exp(0.3 * random.standard_normal((n_trials, n_turns)))
    own = np.exp(0.02 * random.standard_normal((2, n_trials, n_turns)))
    return true * shared * own[0], shared * own[1]


def test_students_t_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 9, 30):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    assert student_quantile(6, 0.5) == pytest.approx(stats.t.ppf(0.75, 6), rel=1e-9)


@pytest.mark.parametrize("n_turns", [3, 5])
def test_the_interval_holds_the_true_ratio_in_95_of_100(n_turns):
    """The machine drifts by tens of percents from turn to turn, and the interval is still a few percent wide; one that
    does not look within turns misses no ratio because it says nothing."""
    one, other = drawn(np.random.default_rng(0), n_turns, 4000, true=1.25)
    found = [paired_ratio(*both) for both in zip(one, other)]
    assert np.mean([of.low <= 1.25 <= of.high for of in found]) == pytest.approx(0.95, abs=0.02)
    widths = [of.high / of.low for of in found]
    apart = [paired_ratio(mine, np.roll(theirs, 1)) for mine, theirs in zip(one, other)]
    assert np.median(widths) < 1.15 and np.median([of.high / of.low for of in apart]) > 2


def test_a_ratio_by_hand():
    """Ratios 2, 2 and 4 of three turns: the logarithms 1, 1 and 2 (of base 2) have the mean 4/3 and the deviation
    1/sqrt(3); Student's t for two degrees is sqrt(2 * 0.95^2 / (1 - 0.95^2))."""
    found = paired_ratio(np.array([2.0, 4.0, 12.0]), np.array([1.0, 2.0, 3.0]))
    half = (2 * 0.95**2 / (1 - 0.95**2)) ** 0.5 / 3
    assert found.value == pytest.approx(2 ** (4 / 3))
    assert (found.low, found.high) == pytest.approx((2 ** (4 / 3 - half), 2 ** (4 / 3 + half)))
    assert found.is_interval and not found.is_clear


def test_turns_are_compared_only_with_those_they_were_taken_with():
    one, other = row([2.0, 4.2, 8.0]), row([1.0, 2.0, 4.0])
    assert took_turns(one, other) and ratio(one, other).is_interval and ratio(one, other).is_clear
    for apart in (
        row([1.0, 2.0, 4.0], started="t1"),
        row([1.0, 2.0, 4.0], context=256),
        row([1.0, 2.0]),
        other.drop("step_turns_s"),  # as of a record from before
        other.replace({other["step_turns_s"]: None}),
    ):
        assert not took_turns(one, apart) and not ratio(one, apart).is_interval
    assert not took_turns(row([1.0]), row([2.0]))


def test_of_medians_there_is_a_range():
    one, other = (row(steps).drop("step_turns_s") for steps in ([4, 6, 8], [1, 2, 3]))
    assert ratio(one, other) == Ratio(3.0, 5 / 2.5, 7 / 1.5, False)
    assert str(ratio(one, other)) == "3.00 倍（2.00–4.67）" and ratio(one, other).is_clear
    bare = ratio(pd.Series({"step_s": 3.0}), pd.Series({"step_s": 2.0}))
    assert str(bare) == "1.50 倍" and not bare.is_clear
    assert str(Ratio(1.5, 1.4, 1.6, True)) == "1.50 倍 [1.40, 1.60]"
    assert Ratio(1.5, 1.4, 1.6, True).in_table == "1.50 [1.40, 1.60]"
    assert ratio(one, other).in_table == "3.00（2.00–4.67）" and bare.in_table == "1.50"


def test_what_cannot_be_told_from_the_best():
    shared = np.array([1.0, 1.5, 0.8, 1.1])
    steps = {"best": shared, "same": shared * [1.02, 0.99, 1.01, 0.995], "slower": shared * [1.2, 1.21, 1.19, 1.2]}
    runs = pd.DataFrame([row(taken, name=name) for name, taken in steps.items()])
    assert list(level_with(runs.loc["best"], runs).index) == ["same"]
    medians = runs.drop(columns="step_turns_s")  # their quartiles overlap: the machine drifted more than that
    assert list(level_with(medians.loc["best"], medians).index) == ["same", "slower"]


def test_the_page_says_what_the_brackets_are():
    runs = pd.DataFrame([row([1.0, 2.0, 3.0]), row([1.0, 2.0, 3.0])])
    assert "95 % 区间（3 轮" in basis(runs) and "不是置信区间" not in basis(runs)
    before = runs.drop(columns=turns.COLUMN["step_s"])
    assert "95 %" not in basis(before) and "不是置信区间" in basis(before)
    both = basis(pd.concat([runs, before]))
    assert "95 % 区间（3 轮" in both and "不是置信区间" in both
