"""What pages say of speed, on runs of which the answers are known by hand."""

import pandas as pd
import pytest

from kvneox_lib.pages import front, timings
from kvneox_lib.pages.ranks import rank_correlation
from kvneox_lib.pages.report import Missing


def run(engine, press, ratio, step_s, *, context=512, batch=4, failure=None, prefill_s=1.0, kv_bytes=8_000_000):
    figures = {"step_s": step_s, "step_s_q25": step_s * 0.9, "step_s_q75": step_s * 1.1, "floor_s": step_s / 2}
    figures |= {"prefill_s": prefill_s, "prefill_s_q25": prefill_s, "prefill_s_q75": prefill_s, "times_floor": 2.0}
    figures |= {"decode_tok_per_s": batch / step_s, "total_tok_per_s": 1.0, "kv_bytes": kv_bytes}
    figures |= {"kv_bytes_compressed": kv_bytes, "kv_bytes_full": 16_000_000, "peak_bytes": 1e8}
    where = {"context_tokens": context, "batch_size": batch, "failure": failure}
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
        ("no_press", "stock"),
        ("knorm", "ours"),
        ("snapkv", "kvpress"),
        ("snapkv", "ours"),
    ]
    assert len(timings.timed_runs(runs)) == 7
    assert timings.corner(runs.iloc[:0]).empty
    with pytest.raises(Missing, match="speed 的 计了时的运行"):
        timings.gains(runs[runs["failure"].notna()])


def test_a_variant_has_engine_press_and_ratio():
    frame = pd.DataFrame(
        [("ours", "no_press", 0.0), ("kvpress", "snapkv", 0.5), ("ours", "think", None), ("ours", "knorm", 0.875)],
        columns=["engine", "press", "compression_ratio"],
    )
    names = ["本库，不压缩", "kvpress 循环，snapkv 0.50", "本库，think", "本库，knorm 0.875"]
    assert timings.variants(frame).tolist() == names


def test_gains_by_hand(runs):
    """50 / 20 = 2.5; 20 / 10 = 2; 50 / 10 = 5; 40 / 10 = 4."""
    found = timings.engine_gains(runs)
    assert found[["context_tokens", "batch_size"]].to_numpy().tolist() == [[512, 4]]  # elsewhere no baseline
    assert found.iloc[0]["best"] == "snapkv，压缩率 0.75"
    said = timings.gains(runs)
    for words in (
        "transformers 的 2.5 倍",
        "不压缩时的 2.0 倍",
        "不压缩时的 5.0 倍",
        "下界的 2.0 倍",
        "本库的 4.00 倍",
    ):
        assert words in said
    (line,) = timings.gains_everywhere(runs)
    assert line == f"上下文 512、批 4：{said}"
    with pytest.raises(Missing, match="三种实现的对照"):
        timings.gains(runs[runs["engine"] == "ours"])
    plain = runs[runs["press"] == "no_press"]
    assert timings.gains_everywhere(plain)[0].endswith("2.5 倍，这与压缩无关。")


def test_strengths_of_their_own_are_compared_too(runs):
    own = runs.assign(press=runs["press"].replace("snapkv", "think"))
    own.loc[own["press"] == "think", "compression_ratio"] = None
    assert "压缩之后最快的（think）" in timings.gains(own) and "kvpress 的循环" not in timings.gains(own)


def test_the_middle_ratio_with_the_baseline(runs):
    shown = timings.at_middle_ratio(timings.corner(runs))
    assert set(zip(shown["press"], shown["engine"])) == {
        ("no_press", "ours"),
        ("no_press", "stock"),
        ("snapkv", "kvpress"),
        ("snapkv", "ours"),
    }
    assert {title: len(part) for title, part in timings.by_context(runs[runs["batch_size"] == 4]).items()} == {
        "本库": 2,
        "transformers（不压缩）与 kvpress 循环": 2,
    }


def test_tables_and_what_was_not_measured(runs):
    row = timings.times(runs).iloc[0]
    assert row.tolist() == ["1000 (1000–1000)", "40.0 (36.0–44.0)", "2.00", "100"]
    without = timings.times(runs.assign(prefill_s=None, prefill_s_q25=None, prefill_s_q75=None))
    assert set(without["首词元"]) == {"—"}
    assert timings.memory(runs).iloc[0].tolist() == ["4.0", "4.0", "100.0"]
    assert timings.results(runs).isna().to_numpy().sum() == 0
    assert timings.not_timed(runs) == ["本库，tova 0.75（上下文 512，批 4）没有计时：内存不够。"]
    assert timings.smallest_cache(runs).startswith("缓存实际分配的字节最少的是 snapkv 0.75：4.0 MB")
    assert "最慢的是 snapkv，用时为不压缩的 3.00 倍" in timings.slowest_prefill(runs)


def test_the_front(runs):
    losses = pd.DataFrame(
        [("no_press", 0.0, 0.0), ("snapkv", 0.75, 0.2), ("knorm", 0.5, 0.3), ("tova", 0.75, 0.1)],
        columns=["press", "compression_ratio", "delta_nll"],
    )
    both = front.front(runs, losses)
    assert both.set_index("press")["decode_tok_per_s"].to_dict() == {"no_press": 200, "knorm": 250, "snapkv": 400}
    assert front.undominated(both).startswith("3 个配置里，2 个没有被别的配置胜过")  # snapkv beats knorm in both
    assert "不压缩、snapkv 0.75" in front.undominated(both)
    assert "最多相差到 1.00 倍；吞吐最高的那个压缩率，中位数是不压缩的 2.00 倍" in front.spread(both)
    with pytest.raises(Missing, match="与困惑度同样的 press 与压缩率"):
        front.front(runs, losses.iloc[:1])


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
