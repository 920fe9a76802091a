"""What pages say of speed, on runs of which the answers are known by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import front, machines, timings
from kvneox_lib.pages.ranks import rank_correlation
from kvneox_lib.pages.report import Missing, Records


def run(engine, press, ratio, step_s, *, context=512, batch=4, failure=None, prefill_s=1.0, kv_bytes=8_000_000):
    figures = {"step_s": step_s, "step_s_q25": step_s * 0.9, "step_s_q75": step_s * 1.1, "floor_s": step_s / 2}
    figures |= {"prefill_s": prefill_s, "prefill_s_q25": prefill_s, "prefill_s_q75": prefill_s, "times_floor": 2.0}
    figures |= {"decode_tok_per_s": batch / step_s, "total_tok_per_s": 1.0, "kv_bytes": kv_bytes}
    figures |= {"kv_bytes_compressed": kv_bytes, "kv_bytes_full": 16_000_000, "peak_bytes": 1e8}
    figures |= {"bandwidth_bytes_per_s": 40e9, "peak_flop_per_s": 180e9, "weight_bytes": 160e6}
    figures |= {f"{phase}peak_above_bytes": context * 1e5 for phase in ("", "prefill_")}
    where = {"context_tokens": context, "batch_size": batch, "failure": failure, "dtype": "float32"}
    return {"engine": engine, "press": press, "compression_ratio": ratio, **where, **figures}


@pytest.fixture
def runs():
    return pd.DataFrame(
        [
            run("kvpress", "snapkv", 0.75, 0.04, kv_bytes=4_000_000),
            run("ours", "snapkv", 0.75, 0.010, prefill_s=3.0, kv_bytes=4_000_000),
            run("ours", "knorm", 0.5, 0.016, prefill_s=1.5),
            run("ours", "no_press", 0.0, 0.02),
            run("stock", "no_press", 0.0, 0.05),
            run("static", "no_press", 0.0, 0.03),
            run("ours", "tova", 0.75, float("nan"), failure="out of memory"),
            run("ours", "snapkv", 0.75, 0.001, batch=1),
            run("ours", "snapkv", 0.75, 0.001, context=256, batch=16),
        ]
    )


def test_the_corner_is_of_the_longest_context_and_then_the_largest_batch(runs):
    """The largest batch of all was at a shorter context; what failed was not timed."""
    cell = timings.corner(runs)
    assert list(zip(cell["press"], cell["engine"])) == [
        ("no_press", "ours"),
        ("no_press", "static"),
        ("no_press", "stock"),
        ("knorm", "ours"),
        ("snapkv", "kvpress"),
        ("snapkv", "ours"),
    ]
    assert len(timings.timed_runs(runs)) == 8
    assert timings.corner(runs.iloc[:0]).empty
    with pytest.raises(Missing, match="speed 的 计了时的运行"):
        timings.gains(runs[runs["failure"].notna()])


def test_the_corner_is_where_engines_were_compared(runs):
    alone = pd.DataFrame([run("ours", "snapkv", 0.75, 0.02, batch=16), run("ours", "no_press", 0.0, 0.03, batch=16)])
    more = pd.concat([runs, alone], ignore_index=True)
    assert timings.corner(more)["batch_size"].unique().tolist() == [4]
    assert timings.corner(alone)["batch_size"].unique().tolist() == [16]


def test_bits_are_variants_and_the_baseline_is_as_it_is(runs):
    coarse = [run("ours", "no_press", 0.0, 0.001), run("ours", "snapkv", 0.75, 0.002, prefill_s=4.0, kv_bytes=10)]
    more = pd.concat([pd.DataFrame(coarse).assign(kv_bits=[2, 4]), runs], ignore_index=True)
    cell = timings.corner(more)
    assert timings.variants(cell).tolist()[:2] == ["本库，不压缩", "本库，不压缩，2 位"]
    assert timings.variants(cell).tolist()[-2:] == ["本库，snapkv 0.75", "本库，snapkv 0.75，4 位"]
    gain, before = timings.engine_gains(more)[0], timings.engine_gains(runs)[0]
    assert gain.plain["step_s"] == before.plain["step_s"] == 0.02 and gain.best["kv_bits"] == 4
    assert before.best["step_s"] == 0.010 and gain.kvpress["step_s"] == before.kvpress["step_s"] == 0.04
    assert "压缩后（snapkv 0.75，4 位）的" in timings.gains(more)
    assert "snapkv 0.75，4 位 的缓存由 8.0 MB 降到 0.0 MB" in timings.saved(more)
    same = ["press", "compression_ratio"]
    losses = pd.DataFrame(
        [("snapkv", 0.75, 0.3, None), ("snapkv", 0.75, 9.0, 4)], columns=[*same, "delta_nll", "kv_bits"]
    )
    assert front.front(more, losses)[["delta_nll", "decode_tok_per_s"]].to_numpy().tolist() == [[0.3, 4 / 0.010]]


def test_a_variant_has_engine_press_and_ratio():
    frame = pd.DataFrame(
        [("ours", "no_press", 0.0), ("kvpress", "snapkv", 0.5), ("ours", "think", None), ("ours", "knorm", 0.875)],
        columns=["engine", "press", "compression_ratio"],
    )
    names = ["本库，不压缩", "kvpress 循环，snapkv 0.50", "本库，think", "本库，knorm 0.875"]
    assert timings.variants(frame.assign(dtype="float32")).tolist() == names
    several = frame.assign(dtype=["float32", "bfloat16", "float32", "float32"], evict_while_reading=[False, True] * 2)
    read = several.assign(prefill_chunk=[None, 512, None, 1024.0], evict_while_reading=[False, False, False, True])
    assert timings.variants(read).tolist() == [
        "本库，不压缩，float32",
        "kvpress 循环，snapkv 0.50，每块 512 词元，bfloat16",
        "本库，think，float32",
        "本库，knorm 0.875，每块 1024 词元，边读边淘汰，float32",
    ]


def test_gains_by_hand(runs):
    """50 / 20 = 2.5; 30 / 20 = 1.5; 20 / 10 = 2; 30 / 10 = 3 and not 50 / 10; 40 / 10 = 4; quartiles are a tenth away:
    2.5 is from 45 / 22 to 55 / 18."""
    (found,) = timings.engine_gains(runs)  # elsewhere no baseline
    assert found.where == "上下文 512、批 4" and found.best["press"] == "snapkv" and found.level.empty
    said = timings.gains(runs)
    compression, implementation, both, _ = said.split("。")
    assert "不压缩的一步是压缩后（snapkv 0.75）的 2.00 倍（" in compression
    assert "：DynamicCache 2.50 倍（2.05–3.06）、StaticCache 1.50 倍（1.23–1.83）；" in implementation
    assert "kvpress 的循环里，一步是本库的 4.00 倍（" in implementation
    assert "DynamicCache 5.00 倍（" in both and "StaticCache 3.00 倍（" in both
    assert "分不出" not in said
    (line,) = timings.gains_everywhere(runs)
    assert line == f"上下文 512、批 4：{said}"
    with pytest.raises(Missing, match="几种实现的对照"):
        timings.gains(runs[runs["engine"] == "ours"])
    plain = runs[runs["press"] == "no_press"]
    assert timings.gains_everywhere(plain)[0].endswith("StaticCache 1.50 倍（1.23–1.83）。")
    without = timings.gains(runs[runs["engine"] != "static"])  # as of a record from before there was this engine
    assert "DynamicCache 5.00 倍" in without and "StaticCache" not in without
    assert timings.fastest_transformers(timings.corner(runs))["engine"] == "static"


def in_turns(runs: pd.DataFrame, **factors) -> pd.DataFrame:
    """The same in four turns of a machine that drifts. factors: of a press, what its turns have beside that."""
    drift, told = np.array([1.0, 1.4, 0.8, 1.1]), []
    for row in runs.to_dict("records"):
        steps = row["step_s"] * drift * factors.get(row["press"], 1.0)
        told.append({"started_at": "t0", "step_turns_s": json.dumps(list(steps))})
    return runs.assign(**pd.DataFrame(told, runs.index))


def test_ratios_are_of_turns_and_who_is_fastest_is_said_only_of_who_is(runs):
    """knorm's turns jump about snapkv's, though its median is 1.6 times as long."""
    said = timings.gains(in_turns(runs))
    assert "Cache 2.50 倍 [2.50, 2.50]、" in said and "本库的 4.00 倍 [4.00, 4.00]" in said and "分不出" not in said
    level = timings.gains(in_turns(runs, knorm=np.array([0.3, 1.2, 0.6, 0.5])))
    assert "压缩后（snapkv 0.75；knorm 0.50 与它分不出快慢）的" in level
    assert "本库之比：StaticCache 1.50 倍 [1.50, 1.50]；" in timings.gains(in_turns(runs[runs["engine"] != "stock"]))
    jumping = in_turns(runs, no_press=np.array([0.4, 2.5, 1.9, 0.5]))
    assert "的 2.00 倍" not in timings.gains(jumping) and "，分不出快慢" in timings.gains(jumping)


def test_what_is_compressions_and_what_the_implementations(runs):
    """Compression gains 2; the implementation 2.5, 1.5 and 4; together 5 and 3. In the other setting the static cache
    is ahead of this library."""
    behind = runs.assign(dtype="bfloat16")
    behind.loc[behind["engine"] == "static", ["step_s", "step_s_q25", "step_s_q75"]] = 0.015
    settings = [records_of(in_turns(runs)), records_of(in_turns(behind))]
    table = timings.gains_apart(settings).set_index("每步用时之比")
    assert list(table) == ["m，float32，512×4", "m，bfloat16，512×4"]
    assert table["m，float32，512×4"].to_dict() == {
        "压缩：本库，不压缩 ÷ 压缩后": "2.00 [2.00, 2.00]",
        "实现：DynamicCache ÷ 本库，都不压缩": "2.50 [2.50, 2.50]",
        "实现：StaticCache ÷ 本库，都不压缩": "1.50 [1.50, 1.50]",
        "实现：kvpress 循环 ÷ 本库，同样压缩": "4.00 [4.00, 4.00]",
        "合计：DynamicCache，不压缩 ÷ 本库，压缩后": "5.00 [5.00, 5.00]",
        "合计：StaticCache，不压缩 ÷ 本库，压缩后": "3.00 [3.00, 3.00]",
        "压缩后每步最短的": "snapkv 0.75",
    }
    said = timings.gains_in_all(settings)
    assert "共 2 种" in said and "从 2.00 到 2.00" in said and "从 0.75 到 1.50" in said
    assert "实现不占便宜的：m，bfloat16，上下文 512、批 4（transformers（StaticCache）的一步是本库的 0.75 倍 [" in said
    assert "不占便宜" not in timings.gains_in_all(settings[:1])
    for missing in (timings.gains_apart, timings.gains_in_all):
        with pytest.raises(Missing, match="几种实现的对照"):
            missing([records_of(runs[runs["engine"] == "ours"])])


def test_the_short_table_has_five_rows_and_the_picture_all(runs):
    """The press that is fastest at the middle ratio, in both loops, and all that is without a press."""
    several = pd.concat([runs, pd.DataFrame([run("ours", "keydiff", 0.75, 0.015)])], ignore_index=True)
    table = timings.in_short(in_turns(several)).set_index("变体")
    assert table[timings.STEP].to_dict() == {
        "本库，不压缩": "—",
        "transformers（StaticCache），不压缩": "1.50 倍 [1.50, 1.50]",
        "transformers（DynamicCache），不压缩": "2.50 倍 [2.50, 2.50]",
        "kvpress 循环，snapkv 0.75": "2.00 倍 [2.00, 2.00]",
        "本库，snapkv 0.75": "0.50 倍 [0.50, 0.50]",
    }
    half = several.assign(dtype="bfloat16", step_s=several["step_s"] / 2)
    shown = timings.against_plain([records_of(several), records_of(in_turns(half))])
    both = shown.pivot(index="name", columns="of", values="value")
    assert len(both) == 5 and both["float32"].to_numpy() == pytest.approx(both["bfloat16"].to_numpy())
    assert both.loc["本库，keydiff 0.75", "bfloat16"] == pytest.approx(0.75)
    (panel,) = timings.step_dots(shown)
    assert panel.title == "m，上下文 512，批 4" and len(panel.rows) == 10
    with pytest.raises(Missing, match="与本库不压缩的对照"):
        timings.against_plain([records_of(runs[runs["press"] != "no_press"])])


def test_strengths_of_their_own_are_compared_too(runs):
    own = runs.assign(press=runs["press"].replace("snapkv", "think"))
    own.loc[own["press"] == "think", "compression_ratio"] = None
    assert "压缩后（think）的" in timings.gains(own) and "kvpress 的循环" not in timings.gains(own)


def test_the_middle_ratio_with_the_baseline(runs):
    shown = timings.at_middle_ratio(timings.corner(runs))
    assert set(zip(shown["press"], shown["engine"])) == {
        ("no_press", "ours"),
        ("no_press", "stock"),
        ("no_press", "static"),
        ("snapkv", "kvpress"),
        ("snapkv", "ours"),
    }


def test_tables_and_what_was_not_measured(runs):
    row = timings.times(runs).iloc[0]
    assert row.tolist() == ["1000 (1000–1000)", "40.0 (36.0–44.0)", "2.00", "100"]
    without = timings.times(runs.assign(prefill_s=None, prefill_s_q25=None, prefill_s_q75=None))
    assert set(without["首词元"]) == {"—"}
    assert timings.memory(runs).iloc[0].tolist() == ["4.0", "4.0", "51.2", "51.2"]
    assert timings.memory(runs.drop(columns="peak_above_bytes"))["解码峰值"].tolist() == ["—"] * len(runs)
    assert timings.results(runs).isna().to_numpy().sum() == 0
    assert timings.not_timed(runs) == ["本库，tova 0.75（上下文 512，批 4）没有计时：内存不够。"]
    less = runs.assign(peak_above_bytes=runs["peak_above_bytes"].mask(runs["press"] == "snapkv", 1e7))
    said = timings.saved(less)
    assert "snapkv 0.75 的缓存由 8.0 MB 降到 4.0 MB，是原来的 50%" in said
    assert "峰值由 51.2 MB 降到 10.0 MB（不压缩的 transformers（DynamicCache）是 51.2 MB）" in said


def test_peaks_by_context():
    """A line for each way of reading; the largest batch alone."""
    ways = [("no_press", None, False, 2e5), ("keydiff", None, False, 1e5)]
    ways += [("keydiff", 1024.0, False, 2e4), ("keydiff", 1024.0, True, 1e4)]
    found = []
    for press, chunk, evicting, slope in ways:
        for context, batch in ((4096, 1), (16384, 1), (4096, 2)):
            ratio = 0.0 if press == "no_press" else 0.75
            one = run("ours", press, ratio, 0.01, context=context, batch=batch)
            peaks = {"prefill_peak_above_bytes": slope * context, "peak_above_bytes": 5e6}
            found.append({**one, **peaks, "prefill_chunk": chunk, "evict_while_reading": evicting})
    runs = pd.DataFrame(found)
    with pytest.raises(Missing, match="内存峰值"):
        timings.peaks(runs.drop(columns="prefill_peak_above_bytes"))
    shown = timings.peaks(runs[runs["batch_size"] == 1])["预填充峰值"].pivot(
        index="press", columns="context_tokens", values="peak_mb"
    )
    assert shown.round(2).to_dict("index") == {
        "keydiff 0.75": {4096: 409.6, 16384: 1638.4},
        "keydiff 0.75，每块 1024 词元": {4096: 81.92, 16384: 327.68},
        "keydiff 0.75，每块 1024 词元，边读边淘汰": {4096: 40.96, 16384: 163.84},
        "不压缩": {4096: 819.2, 16384: 3276.8},
    }
    assert set(timings.peaks(runs)["解码峰值"]["batch_size"]) == {2}
    said = timings.peaks_in_words(runs[runs["batch_size"] == 1])
    assert said.startswith("上下文 16384 时，完整的缓存占 16 MB，预填充的峰值是 3277 MB；")
    assert "随即压缩（keydiff 0.75）是 1638 MB；边读边淘汰是 164 MB，为不压缩的 5%" in said
    with pytest.raises(Missing, match="三种读法的内存峰值"):
        timings.peaks_in_words(runs[runs["press"] != "no_press"])


def records_of(frame: pd.DataFrame) -> Records:
    where = {"model": "m", "device_name": "A", "max_new_tokens": 96, "repeats": 3}
    return Records("speed", Path("results/speed"), Path(), frame.assign(**where))


def test_tables_are_of_settings_in_which_engines_are_compared(runs):
    """Not of those that were made to see how memory grows; unless there are no others."""
    chunks = runs[runs["engine"] == "ours"].assign(prefill_chunk=[1024.0, *[None] * 5])
    peaks, compared = records_of(chunks), records_of(runs)
    assert timings.timed_settings([peaks, compared]) == [compared] and timings.timed_settings([peaks]) == [peaks]
    assert timings.read_in_chunks([compared, peaks]) is peaks
    with pytest.raises(Missing, match="分块读上下文的运行"):
        timings.read_in_chunks([compared])


def test_precisions_beside_each_other(runs):
    half = runs.assign(dtype="bfloat16")
    for end, by in (("", 1), ("_q25", 0.9), ("_q75", 1.1)):
        half[f"step_s{end}"] = (runs["step_s"] * 0.5).mask(runs["engine"] == "stock", 0.06) * by
    half["demo_nll_diff"] = half["demo_logits_rel_diff"] = None
    half.loc[3, ["demo_logits_rel_diff", "demo_nll_diff"]] = 0.0123, -0.0005
    other = records_of(half)
    slower = Records(other.study, other.folder, other.root, other.frame.assign(device_name="B"))
    both = machines.in_all_precisions([records_of(runs), slower, other])
    assert len(both) == 2 * len(runs)
    drift = json.dumps([0.5, 0.7, 0.4])
    turns = {"started_at": "t0", "step_turns_s": drift}
    shares = machines.precisions(pd.concat([runs.assign(**turns), half.assign(**turns)], ignore_index=True))
    assert shares.startswith("不压缩时，bfloat16 与 float32 每步用时之比：本库为 1.00 倍 [1.00, 1.00]，分不出快慢、")
    assert machines.precisions(both) == (
        "不压缩时，bfloat16 与 float32 每步用时之比：本库为 0.50 倍（0.41–0.61）、transformers（StaticCache）为 0.50 倍"
        "（0.41–0.61）、transformers（DynamicCache）为 1.20 倍（0.98–1.47），分不出快慢。"
        "确实没有减半的：transformers（DynamicCache），其每步还有不随字节减少的部分。"
    )
    said = machines.cost_of_precision(both)
    assert said.startswith("bfloat16 的代价") and "最大值的 1.2%" in said and "-0.0005 nat" in said
    assert timings.gains_everywhere(both)[0].startswith("上下文 512、批 4、bfloat16：")
    for missing in (machines.precisions, machines.cost_of_precision):
        with pytest.raises(Missing):
            missing(runs)


def test_a_bandwidth_that_drifts_is_a_range(runs):
    steady = runs.assign(bandwidth_low_bytes_per_s=39e9, bandwidth_high_bytes_per_s=41e9)
    assert machines.rates(steady) == "读带宽 40 GB/s，float32 矩阵乘法的峰值 180 GFLOP/s"
    assert machines.rates(steady.assign(bandwidth_low_bytes_per_s=27e9)).startswith("读带宽 27–41 GB/s")
    before = runs.drop(columns="peak_flop_per_s")  # a record from before
    assert machines.rates(before) == "读带宽 40 GB/s"
    parts = runs.assign(floor_bytes_s=0.008, floor_operations_s=0.004)
    assert machines.floor_in_words(parts).endswith(
        "每步 10.0 毫秒：只计读取要 8.0 毫秒，只计运算要 4.0 毫秒，瓶颈是读内存。"
    )
    assert machines.floor_in_words(parts.assign(floor_operations_s=0.009)).endswith("瓶颈是运算。")
    with pytest.raises(Missing, match="屋顶线的两项"):
        machines.floor_in_words(before)


def test_how_far_above_the_floor(runs):
    """At batch 4 between 2 and 3, at batch 1 always 2; those of others and those that failed don't count."""
    far = runs.assign(times_floor=runs["times_floor"].mask(runs["press"] == "knorm", 3.0))
    far.loc[far["engine"] != "ours", "times_floor"] = 9.0
    said = machines.above_floor([records_of(far[far["context_tokens"] == 512])])
    assert "（4 个配置）" in said and said.endswith("批 1 时 2.00–2.00 倍、批 4 时 2.00–3.00 倍。")
    with pytest.raises(Missing, match="每步用时的下界"):
        machines.above_floor([records_of(runs[runs["engine"] != "ours"])])


def test_the_front(runs):
    losses = pd.DataFrame(
        [("no_press", 0.0, 0.0), ("snapkv", 0.75, 0.2), ("knorm", 0.5, 0.3), ("tova", 0.75, 0.1)],
        columns=["press", "compression_ratio", "delta_nll"],
    )
    both = front.front(runs, losses)
    assert both.set_index("press")["decode_tok_per_s"].to_dict() == {"no_press": 200, "knorm": 250, "snapkv": 400}
    spread = front.spread(both)
    assert "最慢的至多是最快的 1.00 倍（" in spread
    assert "0.75 时是 2.00 倍（" in spread and "0.5 时是 1.25 倍（" in spread
    assert "损失从 0.300 到 0.300 nat；0.75" in spread
    with pytest.raises(Missing, match="no_press"):
        front.spread(both[both["press"] != "no_press"])
    with pytest.raises(Missing, match="与困惑度同样的 press 与压缩率"):
        front.front(runs, losses.iloc[:1])


def test_the_middle_gain_is_that_of_the_ratios_that_are_printed():
    """Not of the median times, which lie otherwise where a machine is slow in some turns."""
    together = {"started_at": "t0", "context_tokens": 512, "batch_size": 1}
    found = {"fast": ([1.0, 1.0], 0.5), "middle": ([1.5, 1.5], 0.9), "slow": ([2.0, 2.0], 0.1)}
    rows = [together | {"step_turns_s": json.dumps(turns), "step_s": step} for turns, step in found.values()]
    plain = pd.Series(together | {"step_turns_s": "[3.0, 3.0]", "step_s": 3.0})
    assert front._middle(plain, pd.DataFrame(rows)).value == pytest.approx(2.0)


def test_losses_of_a_model_are_of_one_set_and_not_of_random_weights():
    frame = pd.DataFrame({"press": "knorm", "compression_ratio": 0.5, "delta_nll": [1.0, 2.0, 3.0, 4.0]})
    frame = frame.assign(model=["demo", "demo", "demo", "other"], weights=["bundled", "bundled", "random", "bundled"])
    frame = frame.assign(n_tokens=[10, 20, 90, 90])
    assert front.of_model(frame, "demo")["delta_nll"].tolist() == [2.0]
    for empty, model in ((frame, "pythia-70m"), (pd.DataFrame(), "demo")):
        with pytest.raises(Missing, match="wikitext_ppl"):
            front.of_model(empty, model)


def test_rank_correlation_by_hand():
    """Ranks 1 2 3 4 and 2 1 3 4: 1 - 6 * 2 / (4 * 15) = 0.8. Ties share their mean rank; a missing pair is left out."""
    one, other = pd.Series([1, 10, 100, 1000]), pd.Series([0.2, 0.1, 0.3, 0.4])
    assert rank_correlation(one, other) == pytest.approx(0.8)
    assert rank_correlation(pd.concat([one, pd.Series([0.0], index=[9])]), other.astype(object)) == pytest.approx(0.8)
    assert rank_correlation(pd.Series([1, 1, 2]), pd.Series([1, 2, 3])) == pytest.approx(3**0.5 / 2)
    assert pd.isna(rank_correlation(one, one * 0))
