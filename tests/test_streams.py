"""What pages say of streaming, on runs and tables of which the answers are known by hand."""

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import streams
from kvneox_lib.pages.report import Missing, Records


def reading(press, n_sink, window, started_at="2026-01-01", timed=True, **more):
    figures = {"n_tokens": 1000, "nll_mean": 2.0, "ppl": 7.0, "step_s": 0.004, "kv_bytes": 2.5e6}
    return (
        {"press": press, "n_sink": n_sink, "window": window, "timed": timed, "started_at": started_at} | figures | more
    )


@pytest.fixture
def runs():
    return pd.DataFrame(
        [
            reading("recompute", 0, 64, step_s=0.04),
            reading("sinks", 4, 60),
            reading("dense", 0, None, within_ppl=20.54, within_ppl_ci95_low=None, kv_bytes=None),
            reading("sinks", 4, 124, "2026-02-01"),  # newer, but alone
            reading("sinks", 8, 56, timed=np.nan),
            reading("window", 0, 64),
            reading("sinks", 4, 60, "2025-01-01"),
        ]
    )


def test_the_main_runs_are_of_one_size_and_the_newest(runs):
    main = streams.main(runs)
    assert main["press"].tolist() == ["dense", "window", "sinks", "recompute"]
    assert main.iloc[2][["window", "started_at"]].tolist() == [60, "2026-01-01"]
    assert streams.main(runs, "sinks", "dense")["press"].tolist() == ["dense", "sinks"]
    for lacking in (runs[runs["press"] != "recompute"], runs[runs["timed"].isna()], runs.drop(columns="timed")):
        with pytest.raises(Missing, match="streaming 的 窗口重算"):
            streams.main(lacking, "recompute")


def test_the_table_of_readings(runs):
    table = streams.reading_table(streams.main(runs))
    assert table.iloc[0].tolist() == ["全部保留", "0", "—", "1000", "20.5", "—", "—", "4.0"]
    assert table.iloc[2].tolist()[:4] == ["汇聚点加窗口", "4", "60", "1000"] and table.iloc[2, 6] == "2.50"
    ends = {"within_ppl": 130.0, "within_ppl_ci95_low": 12.0, "within_ppl_ci95_high": 3800.0, "kv_bytes": 0.0}
    few = streams.reading_table(streams.main(pd.DataFrame([reading("recompute", 0, 64, **ends)])))
    assert few.iloc[0, 4] == "—" and few.iloc[0, 6] == "不留"  # so wide an interval is of too few tokens


def running(press, losses):
    ends = 256 * np.arange(1, len(losses) + 1)
    return pd.DataFrame({"press": press, "from_token": ends - 255, "to_token": ends, "nll_mean": losses})


def test_differences_are_of_the_same_blocks(runs):
    table = pd.concat([running("sinks", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), running("dense", [1.5, 2.0, 2.75])])
    assert streams.block_differences(table, "dense", "sinks")["difference"].tolist() == [0.5, 0.0, -0.25]
    said = streams.dense_beyond(table)
    assert "（到第 256 个词元为止）高 0.500 nat（太少" in said and "（第 513 个词元以后）低 0.250 nat（太少" in said
    long = pd.concat([running("sinks", [1.0] * 24), running("dense", [1.1, 0.9] * 6 + [2.0, 2.1] * 6)])
    said = streams.dense_beyond(long)
    assert (
        "（到第 1536 个词元为止）分不开（差 +0.000 nat" in said and "（第 4609 个词元以后）高 1.050 nat（差的" in said
    )
    table = pd.concat([table, running("window", [1.1, 2.1, 3.1, 4.1, 5.1, 6.1])])
    said = streams.sinks_matter(streams.main(runs), table)
    assert "去掉 4 个汇聚点" in said and "与留着时相比高 0.100 nat" in said and "看不出" not in said
    few = pd.concat([running("window", [1.0, 2.0]), running("sinks", [1.0, 2.0])])
    said = streams.sinks_matter(streams.main(runs), few)
    assert "相比几乎相同（太少，没有区间）" in said and "看不出" not in said
    with pytest.raises(Missing, match="streaming 的 只留窗口与汇聚点加窗口都读过的一段"):
        streams.sinks_matter(streams.main(runs), few[few["press"] == "sinks"])


def test_stretches_hold_the_mean_of_their_blocks():
    merged = streams.in_stretches(running("sinks", np.arange(8.0)), most=4)
    assert merged["to_token"].max() == 2048 and merged["nll_mean"].is_monotonic_increasing and len(merged) <= 5
    short = streams.in_stretches(running("sinks", [1.0, 2.0]))
    assert short["nll_mean"].tolist() == [1.0, 2.0]


def test_against_recomputation(runs):
    samples = pd.concat(
        [
            pd.DataFrame({"press": press, "n_sink": n_sink, "window": window, "position": range(6), "nll": nll})
            for press, n_sink, window, nll in (
                ("recompute", 0, 64, 2.0),
                ("sinks", 4, 60, 2.25),
                ("dense", 0, None, 1.5),
            )
        ]
    )
    said = streams.against_recompute(samples)
    assert said == "汇聚点加窗口的损失与窗口重算的相比（6 个词元）高 0.250 nat（差的 95 % 区间 [+0.250, +0.250]）。"
    level = samples.assign(nll=samples["nll"].mask(samples["press"] == "sinks", 2 + 0.1 * (-1) ** samples["position"]))
    assert "（6 个词元）分不开（差 +0.000 nat" in streams.against_recompute(level)
    first, second, reach = streams.compared(samples, beyond=1)
    assert "这 2 次比较" in reach and "只说这一篇文本" in reach
    assert first == "汇聚点加窗口（4 + 60）：每词元差 +0.250 nat（5 个词元），差的 95 % 区间 [+0.250, +0.250]，变差"
    assert second.startswith("全部保留：每词元差 -0.500 nat") and second.endswith("变好")
    assert streams.compared(samples, beyond=6) == []


def test_keys_that_are_not_rotated_are_compared_in_the_same_setting(runs):
    setting = dict.fromkeys([*streams.SETTING, "text_sha256", "max_tokens"], "x")
    turned = streams.main(runs).assign(**setting, rerotate=True, beyond_ppl=30.0)
    still = turned.assign(rerotate=False, beyond_ppl=90.0)
    here, elsewhere = (
        [Records("streaming", None, None, frame)] for frame in (pd.concat([turned, still]), still.assign(device="y"))
    )
    assert "困惑度是 90.0，重新旋转时是 30.0" in streams.without_rotation(turned, here)
    assert streams.without_rotation(turned, elsewhere) == ""


def test_how_many_sinks():
    """Block by block: 4 sinks are better at the small size, 8 worse, and at the large nobody can say."""
    wobble = 0.2 * np.array([1, -1] * 6)
    losses = {(0, 64): 3.0, (4, 64): 2.5, (8, 64): 3.25, (0, 256): 2.0, (4, 256): 2.0 + wobble, (8, 256): 2.0 - wobble}
    blocks = pd.concat(
        [running("sinks", np.full(12, loss)).assign(n_sink=n, size=size) for (n, size), loss in losses.items()]
    )
    said = streams.how_many(blocks)
    assert said.startswith("每种大小里各个汇聚点数与不留汇聚点相比，共 4 处，")
    assert said.endswith("：损失确实小的有 1 处（至多 0.500 nat），损失确实大的有 1 处（至多 0.250 nat），其余分不开。")
    assert streams.how_many(blocks[blocks["size"] == 256]).endswith("：都分不开。")
    assert "看见的词元由 256 减到 64，损失高 1.000 nat" in streams.how_large(blocks)
    with pytest.raises(Missing, match="不同的汇聚点数"):
        streams.how_many(blocks[blocks["n_sink"] == 0])
    with pytest.raises(Missing, match="不同大小的窗口"):
        streams.how_large(blocks[blocks["size"] == 64])


def test_sizes_and_sinks_are_drawn_once():
    losses = {(0, 64): 3.0, (4, 60): 2.5, (0, 256): 2.0, (4, 252): 2.1}
    runs = pd.DataFrame([reading("sinks" if k else "window", k, n, nll_mean=x) for (k, n), x in losses.items()])
    shown = streams.sinks_and_sizes(runs.assign(ppl_ci95_low=None))
    assert list(zip(shown["press"], shown["size"]))[:2] == [("0 个汇聚点", 64), ("0 个汇聚点", 256)]
    assert shown["ppl_ci95_low"].dtype == float  # a figure subtracts it
    assert streams.loss_by_sinks(runs).loc[64].tolist() == [3.0, 2.5]


def costs(**readings) -> pd.DataFrame:
    """Milliseconds at four places, with quartiles a tenth away."""
    parts = [
        pd.DataFrame({"press": press, "tokens_read": [256, 512, 768, 1024], "step_s": np.array(steps) / 1e3})
        for press, steps in readings.items()
    ]
    cost = pd.concat(parts, ignore_index=True)
    return cost.assign(step_s_q25=0.9 * cost["step_s"], step_s_q75=1.1 * cost["step_s"], kv_bytes=2e6)


def test_what_a_step_takes_is_compared_at_the_same_place():
    """The machine is slow at the first places: what is bounded has not become faster."""
    cost = costs(dense=[20, 9, 8, 16], window=[20, 9, 4, 4.1], sinks=[20, 9, 4, 4], recompute=[500, 225, 100, 101])
    said = streams.growth(cost)
    assert "读到 256 个词元时 1.00 倍（0.82–1.22），分不出快慢；读到 1024 个词元时 4.00 倍（3.27–4.89）" in said
    assert "汇聚点加窗口 6.5（4.0–11.8）" in said
    assert "4 处的中位数却从 100 到 500 毫秒，慢一成以上的 2 处都在前 512 个词元里。" in streams.spikes(cost)
    assert "汇聚点加窗口 0.95 [" in streams.spikes(cost) and "多半是机器一时变慢" in streams.spikes(cost)
    level = streams.spikes(costs(sinks=[1, 2, 3, 4], recompute=[100, 101, 102, 103]))
    assert "从 100 到 103 毫秒。轮流" in level
    apart = costs(sinks=[1, 2, 3, 4], window=[1, 2, 3, 4], recompute=[400, 300, 200, 100])
    assert streams.spikes(apart).endswith("不足以归于机器。")
    assert streams.beside_recompute(cost) == "汇聚点加窗口的一步是窗口重算的 4.0%（4.0%–4.0%）。"
    for missing in (streams.spikes, streams.beside_recompute):
        with pytest.raises(Missing, match="窗口重算"):
            missing(cost[cost["press"] != "recompute"])
    with pytest.raises(Missing, match="都计时的地方"):
        streams.growth(cost[cost["press"] == "sinks"])
    assert streams.costs(cost)["megabytes"].unique().tolist() == [2.0]


def test_quartiles_are_shaded_behind_the_lines():
    (axes,) = streams.figure_of_cost(costs(dense=[1, 2, 3, 4], sinks=[1, 1, 1, 1]), "milliseconds").axes
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert len(axes.collections) == 2 and (low, high) == pytest.approx((0.9, 4.4))


def test_samples_in_words():
    sample = pd.DataFrame({"press": "sinks", "from_token": [251, 501], "distinct_4grams": [0.9, 0.25]})
    sample = sample.assign(nll_mean=3.0, text=["a", "*b*\n<script>_`$"])
    assert streams.written(sample) == "让模型自己一直写下去：汇聚点加窗口时，末段里不重复的四元组占 25%（首段 90%）。"
    fresh = streams.written(sample.assign(distinct_4grams=[0.999, 0.97]))
    assert fresh.endswith("汇聚点加窗口都没有陷入重复：各段里不重复的四元组都不少于 97 %。")
    (quote,) = streams.last_pieces(sample)
    assert quote == "**汇聚点加窗口**，第 501 个词元起：\n\n> \\*b\\* &lt;script>\\_\\`\\$"


def sunk(**changes):
    figures = {"attention_to_first": 0.2, "attention_to_sinks": 0.3, "even_to_first": 0.0025, "even_to_sinks": 0.01}
    return figures | {"sink_windows": 4, "sink_window_tokens": 2048} | changes


SINKS = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "several": [0.01, 0.6, 0.5, 0.09], "n_sink": 4})
SINKS["first"] = SINKS["several"] / 2


def test_what_the_first_tokens_draw_and_what_dropping_them_costs():
    runs = streams.main(pd.DataFrame([reading("sinks", 4, 60, **sunk()), reading("window", 0, 64)]))
    said = streams.sinks_draw(runs, SINKS)
    assert "4 段各 2048 个词元" in said and "把 30.00% 的注意力给开头 4 个词元" in said and "该有 1.00%" in said
    assert "（第 0 层第 1 头）是 60.00%，4 个头里有 2 个把至少一半给了它们" in said
    assert "没有一个把一半给了它们" in streams.sinks_draw(runs, SINKS.assign(several=0.1))
    worse = pd.concat([running("sinks", [1.0] * 6), running("window", [1.5, 1.6, 1.4, 1.5, 1.5, 1.5])])
    said = streams.sinks_explain(runs, SINKS, worse)
    assert "一视同仁时的 30 倍，去掉它们，每个词元的损失高：两件事说的一样" in said
    same = pd.concat([running("sinks", [1.0] * 6), running("window", [1.1, 0.9, 1.1, 0.9, 1.1, 0.9])])
    assert "代价与零分不开：单看注意力的多少，说不出这个代价" in streams.sinks_explain(runs, SINKS, same)
    little = streams.main(
        pd.DataFrame([reading("sinks", 4, 60, **sunk(attention_to_sinks=0.002)), *runs.to_dict("records")[:1]])
    )
    assert "0.2 倍，去掉它们的代价与零分不开：两件事说的一样" in streams.sinks_explain(little, SINKS, same)
    few = pd.concat([running("sinks", [1.0]), running("window", [2.0])])
    assert streams.sinks_explain(runs, SINKS, few).endswith("30 倍。")


def test_without_a_run_with_sinks_nothing_is_said_of_them():
    runs = streams.main(pd.DataFrame([reading("window", 0, 64)]))
    with pytest.raises(Missing, match="投向开头的注意力"):
        streams.sinks_draw(runs, SINKS.iloc[:0])
    (axes,) = streams.sink_maps(SINKS.iloc[:0]).axes
    assert "没有量" in axes.texts[0].get_text()
    panels = streams.sink_maps(SINKS).axes[:2]
    assert [panel.get_title() for panel in panels] == ["第一个词元", "开头 4 个词元"]
    assert panels[1].images[0].get_array().tolist() == [[0.01, 0.6], [0.5, 0.09]]
