"""What pages say of streaming, on runs and tables of which the answers are known by hand."""

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import streams
from kvneox_lib.pages.report import Missing


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


def running(press, losses):
    ends = 256 * np.arange(1, len(losses) + 1)
    return pd.DataFrame({"press": press, "from_token": ends - 255, "to_token": ends, "nll_mean": losses})


def test_differences_are_of_the_same_blocks(runs):
    table = pd.concat([running("sinks", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), running("dense", [1.5, 2.0, 2.75])])
    assert streams.block_differences(table, "dense", "sinks")["difference"].tolist() == [0.5, 0.0, -0.25]
    said = streams.dense_beyond(table)
    assert "（第 1–256 个词元）高 0.500 nat" in said and "（第 513–768 个词元）低 0.250 nat" in said
    table = pd.concat([table, running("window", [1.1, 2.1, 3.1, 4.1, 5.1, 6.1])])
    said = streams.sinks_matter(streams.main(runs), table)
    assert "去掉 4 个汇聚点" in said and "平均高 0.100 nat" in said and "6 段里有 6 段更高" in said
    assert "看不出" not in said
    few = pd.concat([running("window", [1.0, 2.0]), running("sinks", [1.0, 2.0])])
    said = streams.sinks_matter(streams.main(runs), few)
    assert "平均几乎相同（太少，没有区间），2 段里有 0 段更高" in said
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
    said = streams.against_recompute(streams.main(runs), samples)
    assert "高 0.250 nat（6 个词元" in said and "后者的 10.0%" in said
    first, second, reach = streams.compared(samples, beyond=1)
    assert "这 2 次比较" in reach and "只说这一篇文本" in reach
    assert first == "汇聚点加窗口（4 + 60）：每词元差 +0.250 nat（5 个词元），差的 95 % 区间 [+0.250, +0.250]，变差"
    assert second.startswith("全部保留：每词元差 -0.500 nat") and second.endswith("变好")
    assert streams.compared(samples, beyond=6) == []


def test_keys_that_are_not_rotated_are_compared_in_the_same_setting(runs):
    setting = dict.fromkeys([*streams.SETTING, "text_sha256", "max_tokens"], "x")
    turned = streams.main(runs).assign(**setting, rerotate=True, beyond_ppl=30.0)
    still = turned.assign(rerotate=False, beyond_ppl=90.0)
    assert "困惑度是 90.0，重新旋转时是 30.0" in streams.without_rotation(turned, pd.concat([turned, still]))
    assert "没有记录" in streams.without_rotation(turned, pd.concat([turned, still.assign(device="y")]))


def test_how_many_sinks():
    losses = {(0, 64): 3.0, (4, 60): 2.5, (0, 256): 2.0, (4, 252): 2.1}
    runs = pd.DataFrame([reading("sinks" if k else "window", k, n, nll_mean=x) for (k, n), x in losses.items()])
    runs = runs.assign(ppl_ci95_low=None)
    said = streams.how_many(runs)
    assert "看见 64 个词元时，损失最低的是 4 个汇聚点（2.500），最高的是 0 个（3.000）" in said
    assert "看见 256 个词元时，损失最低的是 0 个汇聚点" in said
    level = runs.assign(nll_mean=runs["nll_mean"].where(runs["n_sink"] + runs["window"] != 256, 2.0001))
    assert "看见 256 个词元时，2 种汇聚点数的损失都是 2.000。" in streams.how_many(level)
    shown = streams.sinks_and_sizes(runs)
    assert list(zip(shown["press"], shown["size"]))[:2] == [("0 个汇聚点", 64), ("0 个汇聚点", 256)]
    assert shown["ppl_ci95_low"].dtype == float  # a figure subtracts it
    with pytest.raises(Missing, match="不同的汇聚点数"):
        streams.how_many(runs[runs["n_sink"] == 0])


def test_costs_and_samples_in_words():
    cost = pd.DataFrame({"press": "dense", "tokens_read": [512, 256], "step_s": [0.004, 0.001], "kv_bytes": [2e6, 1e6]})
    assert streams.growth(cost) == "全部保留从 256 到 512 个词元，每步由 1.00 变为 4.00 毫秒。"
    assert streams.costs(cost)["megabytes"].tolist() == [2.0, 1.0]
    sample = pd.DataFrame({"press": "sinks", "from_token": [251, 501], "distinct_4grams": [0.9, 0.25]})
    sample = sample.assign(nll_mean=3.0, text=["a", "*b*\n<script>_`$"])
    assert streams.written(sample) == "让模型自己一直写下去：汇聚点加窗口时，末段里不重复的四元组占 25%（首段 90%）。"
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
    assert "4 段各 2048 个词元" in said and "20.00% 的注意力给第一个词元、30.00% 给开头 4 个" in said
    assert "0.25% 与 1.00%" in said and "第 0 层第 1 头（60.00%）；4 个头里有 2 个" in said
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
