"""What a press costs and when it has paid for itself: against times added up token by token, and tests at each."""

import json
from math import ceil, inf

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from kvneox_lib.measures.intervals import student_quantile
from kvneox_lib.pages import figures, payoff
from kvneox_lib.pages.payoff import Payoff, break_even
from kvneox_lib.pages.report import Missing, Records


def added_up(first: float, step: float, plain_first: float, plain_step: float, most: int = 10_000) -> float:
    """The first number of tokens at which the one is no later than the other, one token after the other."""
    pressed, plain = first, plain_first
    for tokens in range(1, most):
        if pressed <= plain:
            return tokens
        pressed, plain = pressed + step, plain + plain_step
    return inf


@pytest.mark.parametrize(
    "times",
    [
        (1.5, 0.25, 1.0, 0.5),  # the half second at a quarter a step: after two steps
        (1.3, 0.043, 1.0, 0.05),
        (0.9, 0.04, 1.0, 0.05),  # at once
        (1.0, 0.05, 1.0, 0.05),
        (0.9, 0.06, 1.0, 0.05),  # at the first token, and not for long
        (1.2, 0.06, 1.0, 0.05),  # never
    ],
)
def test_break_even_is_where_the_times_added_up_meet(times):
    first, step, plain_first, plain_step = times
    found = break_even(np.array([first - plain_first]), np.array([plain_step - step]))
    expected = added_up(*times)
    assert (ceil(found.tokens - 1e-9) if found.tokens < inf else inf) == expected
    assert np.isnan(found.low) and np.isnan(found.high)


def not_contradicted(extra, saved, tokens: np.ndarray) -> np.ndarray:
    """Student's test at each number of tokens: is extra - (tokens - 1) * saved zero on average?"""
    left = extra[None] - (tokens[:, None] - 1) * saved[None]
    return np.abs(left.mean(1)) <= student_quantile(len(extra) - 1) * left.std(1, ddof=1) / len(extra) ** 0.5


@pytest.mark.parametrize(("cost", "gain"), [(0.5, 0.02), (0.5, 0.004), (0.0, 0.02), (0.5, 0.0), (0.5, -0.004)])
def test_the_interval_is_of_all_numbers_that_the_turns_do_not_contradict(cost, gain):
    random, grid = np.random.default_rng(3), np.linspace(1, 3000, 60_000)
    for _ in range(20):
        extra, saved = cost + 0.05 * random.standard_normal(5), gain + 0.004 * random.standard_normal(5)
        found, held = break_even(extra, saved), grid[not_contradicted(extra, saved, grid)]
        if len(held) == 0:  # beyond the grid, or nowhere
            assert found.low > 3000 or found.high == 1 or found.low == inf
            continue
        assert found.low == pytest.approx(held[0], abs=0.06)
        assert min(found.high, 3000) == pytest.approx(held[-1], abs=0.06)
        assert found.low <= found.tokens <= found.high


def test_the_interval_holds_the_truth_in_95_of_100():
    """Extra and saved are of the same turns: what slows one down slows the other. The truth is 1 + 0.5 / 0.02."""
    random, held = np.random.default_rng(0), []
    for _ in range(3000):
        slow = random.standard_normal(5)
        extra = 0.5 + 0.1 * slow + 0.03 * random.standard_normal(5)
        found = break_even(extra, 0.02 + 0.004 * slow + 0.002 * random.standard_normal(5))
        held.append(found.low <= 26 <= found.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_what_is_sure_by_hand():
    """A cost that is sure and a saving that is not has no end; a saving that is surely none never pays."""
    sure = np.array([0.5, 0.51, 0.49, 0.5])
    assert break_even(sure, np.array([0.01, -0.01, 0.02, -0.01])).high == inf
    assert break_even(sure, np.array([0.01, -0.01, 0.02, -0.01])).low > 1
    assert break_even(sure, np.array([-0.02, -0.021, -0.019, -0.02])) == Payoff(inf, inf, inf)
    assert break_even(-sure, np.array([0.02, 0.021, 0.019, 0.02])) == Payoff(1, 1, 1)
    assert break_even(-sure, np.array([0.01, -0.01, 0.02, -0.01])) == Payoff(1, 1, inf)
    slower = np.array([-0.02, -0.021, -0.019, -0.02])
    assert break_even(-sure, slower) == Payoff(1, 1, 1)  # ahead at the first token, whatever comes
    assert break_even(np.array([-0.1, 0.1, -0.2, 0.1]), slower) == Payoff(1, 1, inf)  # or perhaps not
    nothing = break_even(np.array([0.1, -0.1, 0.1, -0.1]), np.array([0.01, -0.01, 0.02, -0.01]))
    assert (nothing.low, nothing.high) == (1, inf)
    words = [one.in_words for one in (Payoff(8.2, 1, 11.5), Payoff(8.2, 3.1, inf), Payoff(inf, inf, inf))]
    assert words == ["9 [1, 12]", "9 [4, 从不]", "从不"]
    assert [Payoff(8.2, np.nan, np.nan).in_words, Payoff(inf, np.nan, np.nan).in_words] == ["9", "从不"]


# ---- pages ----------------------------------------------------------------------------------------------------------

SHARED = np.array([1.0, 1.3, 0.9, 1.1])  # how slow the machine was


def run(
    press: str, first: float, step: float, *, context=512, batch=1, engine="ours", started="t0", ratio=0.75, noise=0
):
    wobble = 1 + noise * np.array([1, -1, -1, 1])
    turns = {"prefill": first * SHARED * wobble, "step": step * SHARED * wobble[::-1]}
    found = {"press": press, "compression_ratio": 0.0 if press == "no_press" else 0.75, "engine": engine}
    found |= {"context_tokens": context, "batch_size": batch, "dtype": "float32", "started_at": started}
    for name, seconds in turns.items():
        low, middle, high = np.percentile(seconds, [25, 50, 75])
        found |= {f"{name}_s": middle, f"{name}_s_q25": low, f"{name}_s_q75": high}
        found[f"{name}_turns_s"] = json.dumps(list(seconds))
    return found


@pytest.fixture
def runs():
    """knorm is paid for after one step, kvzip after a hundred; tova never; of random nobody can say."""
    cheap = [run("no_press", 1.0, 0.05), run("knorm", 1.02, 0.03), run("kvzip", 3.0, 0.03), run("tova", 1.1, 0.06)]
    other = [
        run("random", 1.0, 0.0499, noise=0.1),
        run("knorm", 1.0, 0.01, batch=4),
        run("no_press", 1.0, 0.1, batch=4),
    ]
    long = [run("no_press", 4.0, 0.1, context=1024), run("knorm", 4.2, 0.05, context=1024)]
    return pd.DataFrame([*cheap, *other, *long, run("no_press", 9.0, 0.4, engine="stock")])


def test_costs_are_against_no_compression_of_the_same_cell(runs):
    found = payoff.costs(runs).set_index(["press", "context_tokens", "batch_size"])
    assert len(found) == 6 and found.loc[("knorm", 512, 1), "name"] == "knorm 0.75"
    expected = {("knorm", 512, 1): (1.02, 2), ("kvzip", 512, 1): (3.0, 101), ("knorm", 512, 4): (1.0, 1)}
    expected[("knorm", 1024, 1)] = (1.05, 5)
    for at, (first, tokens) in expected.items():
        assert found.loc[[at], "first"].iloc[0].value == pytest.approx(first)
        assert found.loc[[at], "paid"].iloc[0].tokens == pytest.approx(tokens)
    assert found.loc[[("tova", 512, 1)], "paid"].iloc[0] == Payoff(inf, inf, inf)
    with pytest.raises(Missing, match="首词元用时的对照"):
        payoff.costs(runs[runs["press"] != "no_press"])


def test_the_baseline_of_the_same_turns_is_taken(runs):
    """A press that came later has a baseline of its own: the machine has become twice as slow."""
    later = pd.DataFrame([run("no_press", 2.0, 0.1, started="t1"), run("snapkv", 2.2, 0.05, started="t1")])
    for frame in (pd.concat([runs, later]), pd.concat([later, runs])):
        found = payoff.costs(frame.reset_index(drop=True)).set_index("press")
        assert found.loc["snapkv", "first"].value == pytest.approx(1.1) and found.loc["snapkv", "first"].is_interval
    alone = payoff.costs(pd.concat([runs, later[1:]], ignore_index=True)).set_index("press")
    assert alone.loc["snapkv", "first"].value == pytest.approx(2.2) and not alone.loc["snapkv", "first"].is_interval


def test_what_is_said(runs):
    found = payoff.shown(runs)
    assert set(found["batch_size"]) == {1}
    said = payoff.costs_in_words(found)
    assert said.startswith("除 kvzip（不压缩的 3.0 倍）之外，首词元至多是不压缩的 ")
    assert "（压缩率 0.75、批 1、上下文 512、1024）。4 种做法里 3 种在测过的每种长度上都让首词元晚到" in said
    assert said.endswith("：knorm、kvzip、tova；不打分的 random 在哪种长度上都看不出晚到。")
    sure, unknown, never, _ = payoff.payoff_in_words(found).split("。")
    assert sure == (
        "除 kvzip 要生成 101 个词元之外，确实回本的做法生成 5 个词元就不亏，按区间的上端算"
        "（上下文 512 时 2 个、上下文 1024 时 5 个）"
    )
    assert unknown == "每步省下的时间小于误差，不能断定回本：random（上下文 512）"
    assert never == "每步反而更慢，从不回本：tova（上下文 512）"
    table = payoff.table(found).set_index(["press", "上下文×批"])["回本（词元）"]
    assert table["kvzip 0.75", "512×1"] == "101 [101, 101]" and table["tova 0.75", "512×1"] == "从不"


def test_a_strength_of_its_own_has_no_ratio(runs):
    own = runs[runs["press"].isin(["no_press", "knorm"])].assign(compression_ratio=None)
    assert "（批 1、上下文 512、1024）。1 种做法里" in payoff.costs_in_words(payoff.shown(own))


def test_no_order_is_claimed_of_presses_whose_intervals_meet(runs):
    """Two pay after about as long; one is later at one length and not at the other."""
    level = [
        run("snapkv", 1.02, 0.0301, noise=0.02),
        run("lagkv", 1.05, 0.03, noise=0.01),
        run("lagkv", 4.0, 0.05, context=1024),
    ]
    more = pd.concat([runs[runs["press"] != "kvzip"], pd.DataFrame(level)], ignore_index=True)
    found = payoff.shown(more)
    assert payoff.payoff_in_words(found).startswith("确实回本的做法生成 ")
    said = payoff.costs_in_words(found)
    assert said.startswith("首词元至多是") and "都在一以上）：knorm、tova；" in said


def test_a_step_beside_none_by_context(runs):
    """knorm alone was measured at both lengths: 0.03 of 0.05, 0.05 of 0.1."""
    found = payoff.shown(runs)
    shown = payoff.by_context(found)
    assert shown["press"].tolist() == ["knorm", "knorm"] and shown["context_tokens"].tolist() == [512, 1024]
    assert shown["times"].tolist() == pytest.approx([0.6, 0.5]) and shown["times_ci95_low"].notna().all()
    assert "上下文 512 时是 0.60，上下文 1024 时是 0.50：上下文越长" in payoff.longer_in_words(found)
    wide = runs.assign(step_turns_s=[json.dumps(list(np.array([0.5, 1, 2, 1]) * 0.05))] * len(runs))
    jumping = wide.assign(step_turns_s=runs["step_turns_s"].where(runs["press"] == "no_press", wide["step_turns_s"]))
    assert "区间分得开的有没有" in payoff.longer_in_words(payoff.shown(jumping))
    before = payoff.by_context(payoff.shown(runs.drop(columns=["prefill_turns_s", "step_turns_s"])))
    assert before["times_ci95_low"].isna().all()
    with pytest.raises(Missing, match="几种长度的上下文"):
        payoff.longer_in_words(found[found["context_tokens"] == 512])


def test_what_is_ahead_at_first_and_behind_later_does_not_pay(runs):
    early = pd.concat([runs, pd.DataFrame([run("lagkv", 0.9, 0.06)])], ignore_index=True)
    said = payoff.payoff_in_words(payoff.shown(early))
    assert said.endswith("。首词元看不出比不压缩晚，但每步更慢，生成得多了就落后：lagkv（上下文 512）。")
    medians = payoff.payoff_in_words(payoff.shown(early.drop(columns=["prefill_turns_s", "step_turns_s"])))
    assert "lagkv 首词元看不出比不压缩晚，但每步更慢" in medians and "lagkv（" not in medians


def test_records_from_before_the_turns_have_no_intervals(runs):
    found = payoff.shown(runs.drop(columns=["prefill_turns_s", "step_turns_s"]))
    assert "（四分位数的范围都在一以上）" in payoff.costs_in_words(found)
    short = payoff.payoff_in_words(found).split("。")[0]
    assert short.startswith("上下文 512、批 1：按中位数回本所需的词元数：knorm（2）、kvzip（101）；从不回本：")
    assert "tova" in short.split("从不回本：")[1] and short.endswith("（没有区间）")
    assert figures.dots(payoff.panels(found))
    pyplot.close("all")


def test_the_setting_with_most_presses_is_shown(runs):
    few, many = (Records("speed", None, None, frame) for frame in (runs[runs["press"] != "tova"], runs))
    bare = Records("speed", None, None, runs[runs["engine"] == "stock"])
    assert payoff.of_most_presses([bare, few, many]) is many
    with pytest.raises(Missing, match="speed 的 首词元用时的对照"):
        payoff.of_most_presses([bare])
    other = Records("speed", None, None, runs[runs["press"].isin(["no_press", "kvzip"])].assign(model="demo"))
    said = payoff.elsewhere_in_words([bare, many, other], "kvzip")
    assert said.startswith("kvzip 0.75 在另一次运行里计时（demo 的形状，上下文 512、批 1）：首词元是不压缩的 3.00 倍 [")
    assert said.endswith("，101 [101, 101] 个词元之后回本。")
    assert payoff.elsewhere_in_words([bare, many, other], "lagkv") == ""


def test_the_picture_has_every_press_where_it_was_measured(runs):
    found = payoff.shown(runs)
    figure = figures.dots(payoff.panels(found))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    first, paid = ({bars.get_label(): bars.lines[0].get_xdata() for bars in axes.containers} for axes in figure.axes)
    assert names == ["random 0.75", "knorm 0.75", "kvzip 0.75", "tova 0.75"]
    assert first["上下文 512"] == pytest.approx([1.0, 1.02, 3.0, 1.1], abs=0.01) and len(first["上下文 1024"]) == 1
    edge = max(paid["上下文 512"])
    assert edge > 101 and list(paid["上下文 512"])[-1] == edge and paid["上下文 1024"] == pytest.approx([5])
    assert "从不" in [text.get_text() for text in figure.axes[1].texts]
    pyplot.close(figure)
