"""What pages say of recall, on runs and tables of which the answers are known by hand."""

import pandas as pd
import pytest

from kvneox_lib.pages import retrieval
from kvneox_lib.pages.report import Missing


def run(press, ratio, aware, accuracy, kept=None, read=None):
    ends = {"accuracy_ci95_low": accuracy - 0.1, "accuracy_ci95_high": accuracy + 0.1}
    row = {"press": press, "compression_ratio": ratio, "query_aware": aware, "accuracy": accuracy, **ends}
    return row | {"digits_kept": kept, "digits_kept_where_read": read, "nll_mean": 1 - accuracy, "kept_fraction": 0.25}


@pytest.fixture
def runs():
    return pd.DataFrame(
        [
            run("no_press", 0.0, False, 0.9),
            run("no_press", 0.0, True, 0.8),
            run("snapkv", 0.5, False, 0.3, 0.5, 0.4),
            run("snapkv", 0.75, False, 0.0, 0.25, 0.1),
            run("knorm", 0.75, False, 0.6, 0.2, 0.7),
            run("snapkv", 0.75, True, 0.7, 0.5, 0.8),
            run("knorm", 0.75, True, 0.65),
            run("think", None, True, 0.5),
        ]
    )


def test_what_survives_at_the_middle_ratio(runs):
    assert retrieval.plain(runs).startswith(
        "不压缩时的准确率：问题在外 0.90 [0.80, 1.00]，问题在内 0.80 [0.70, 0.90]；"
    )
    said = retrieval.survivors(runs)
    assert said.startswith("压缩率 0.75 时：问题在外，答对一半以上的：knorm（0.60），答对不到二十分之一的：snapkv；")
    assert said.endswith("问题在内，答对一半以上的：snapkv（0.70）、knorm（0.65），答对不到二十分之一的：无。")
    assert retrieval.gained(runs) == "看得到问题，获益最多的是 snapkv（0.00 → 0.70）。"
    worse = runs.assign(accuracy=runs["accuracy"].where(~runs["query_aware"], 0.0))
    assert "2 种方法的准确率都没有因此更高" in retrieval.gained(worse)
    with pytest.raises(Missing, match="recall 的 问题在内"):
        retrieval.gained(runs[~runs["query_aware"]])


def test_runs_in_bits_are_told_apart(runs):
    coarse = runs.assign(kv_bits=2, accuracy=0.0)
    both = pd.concat([coarse, runs.assign(kv_bits=None)], ignore_index=True)
    assert retrieval.accuracy_table(both)["存储"].tolist() == ["2 位"] * len(runs) + ["原样"] * len(runs)
    for said in (retrieval.plain, retrieval.survivors, retrieval.gained, retrieval.digits_in_words):
        assert said(both) == said(runs)
    assert {mode: len(part) for mode, part in retrieval.by_mode(both).items()} == {
        mode: len(part) for mode, part in retrieval.by_mode(runs).items()
    }


def test_modes_and_the_table(runs):
    assert {mode: len(part) for mode, part in retrieval.by_mode(runs).items()} == {"问题在外": 3, "问题在内": 2}
    assert retrieval.by_mode(runs[runs["press"] == "no_press"]) == {}
    row = retrieval.accuracy_table(runs).iloc[7].tolist()
    assert row == ["问题在内", "think", "0.50 [0.40, 0.60]", "—", "0.50", "0.25", "—", "—"]


def test_the_digits_that_matter(runs):
    """Of three runs accuracy and what was kept where it is read have the same order; the whole share has not."""
    said = retrieval.correlated(runs, "问题在外")
    assert said == "问题在外的 3 次运行里，准确率与“数字的保留”的秩相关是 -0.50，与“关键处的保留”的秩相关是 1.00。"
    with pytest.raises(Missing):
        retrieval.correlated(runs, "问题在内")  # one run has no order
    lines = retrieval.digits_in_words(runs)
    assert lines[0] == said and len(lines) == 4 and lines[-1].startswith("问题在内，压缩率 0.75，snapkv：")
    assert "留下数字的 25%，在关键处留下 10%。观察窗口里是正文" in retrieval.elsewhere(runs)


def test_degenerate_runs_are_not_compared_with_what_was_kept(runs):
    marked = runs.assign(degenerate=None)
    compressed = (marked["press"] != "no_press") & ~marked["query_aware"]
    marked.loc[marked[compressed].index[0], "degenerate"] = "tied 0.500"
    assert len(retrieval.with_digits(marked, "问题在外")) == len(retrieval.with_digits(runs, "问题在外")) - 1


def test_tables_of_keys_and_heads():
    keys = pd.DataFrame({"press": ["no_press", "streaming_llm", "streaming_llm"], "compression_ratio": [0.0, 0.5, 0.5]})
    keys = keys.assign(query_aware=False, depth=0.1499, correct=[True, True, False], digits_kept=[1.0, 1.0, 0.0])
    located = retrieval.by_depth(keys, "问题在外", ["random"])  # which is not there
    assert located["correct"].tolist() == [1.0, 0.0] and set(located["depth"]) == {0.15}
    assert "留下的 1 次提问答对 100%，全部淘汰的 1 次答对 0%" in retrieval.edge(keys)
    heads = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "copy_attention": [0.1, 0.4, 0.8, 0.3]})
    heads = heads.assign(press="no_press", compression_ratio=0.0, digits_kept=1.0)
    rule = "说出数字时投给该数字的注意力不低于 0.1，也不低于最高者的 50%"
    said = f"4 个头里抄写的（{rule}）有 2 个：第 1 层第 0 头（0.80）、第 0 层第 1 头（0.40），"
    assert retrieval.copying(heads) == f"{said}合占全部抄写注意力的 75%。"
    little = heads.assign(copy_attention=heads["copy_attention"] / 100)  # half of the most is no measure then
    assert retrieval.copying_heads(little).empty
    assert "4 个头里没有抄写的头" in retrieval.copying(little) and "最高的也只有 0.01" in retrieval.copying(little)
    both = pd.concat([heads, heads.assign(press="knorm", compression_ratio=0.5, digits_kept=[0.0, 0.5, 1.0, None])])
    shares = retrieval.head_shares(both).groupby("press", sort=False)["share"].apply(list).to_dict()
    assert shares == {"注意力": [0.1, 0.4, 0.8, 0.3], "knorm": [0.0, 0.5, 1.0]}
    assert set(retrieval.head_shares(heads)["press"]) == {"注意力"}  # no press was measured
