"""What pages say of recall, on runs and tables of which the answers are known by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.measures.intervals import comparison, holm
from kvneox_lib.pages import paired, retrieval
from kvneox_lib.pages.ranks import drawn_rank_correlations, rank_correlation, rank_correlation_ci95
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.studies.records import write_table


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


def test_up_to_which_ratio_half_of_the_keys_are_found(runs):
    assert retrieval.plain(runs).startswith(
        "不压缩时的准确率：问题在外 0.90 [0.80, 1.00]，问题在内 0.80 [0.70, 0.90]；"
    )
    said = retrieval.survivors(runs)
    assert said.startswith("不压缩时答对 0.90 [0.80, 1.00]。先压缩后提问，压缩率 0.75 时，2 种方法里")
    assert said.endswith("仍答对一半以上的有 1 种：knorm（0.60）。")
    harder = pd.concat([runs, pd.DataFrame([run("knorm", 0.9, False, 0.1)])])
    assert retrieval.survivors(harder).endswith("knorm（0.60）；压缩率 0.9 时一种也没有。")
    none = runs.assign(accuracy=runs["accuracy"].where(runs["press"] == "no_press", 0.1))
    assert retrieval.survivors(none).endswith("没有一种方法答对一半。")


# ---- on the same keys -----------------------------------------------------------------------------------------------

N_CONTEXTS = 20
SHARES = {  # press, ratio, whether the question is inside: of five keys in each context so many are found
    ("random", 0.25, False): 3,
    ("keydiff", 0.25, False): 5,
    ("snapkv", 0.25, False): 0,
    ("knorm", 0.25, False): 3,
    ("random", 0.5, False): 1,
    ("keydiff", 0.5, False): 5,
    ("snapkv", 0.5, False): 0,
    ("knorm", 0.5, False): 1,
    ("snapkv", 0.5, True): 2,
    ("keydiff", 0.5, True): 5,
}


def keys_of(found: int, press: str) -> pd.DataFrame:
    """Every other context one more or less, so that there is something to draw from."""
    rows = []
    for context in range(N_CONTEXTS):
        n_found = min(5, found + context % 2) if press != "snapkv" else found
        rows += [{"context": context, "name": f"{context} {i}", "correct": i < n_found} for i in range(5)]
    return pd.DataFrame(rows)


@pytest.fixture
def records(tmp_path) -> Records:
    rows = []
    for (press, ratio, aware), found in SHARES.items():
        name, keys = f"{press} {ratio} {aware}", keys_of(found, press)
        write_table(tmp_path, name, "keys", keys)
        row = run(press, ratio, aware, keys["correct"].mean())
        rows.append(row | {"run_id": name, "path": str(tmp_path / f"{name}.json")})
    return Records("recall", tmp_path, tmp_path, pd.DataFrame(rows))


def test_presses_are_judged_on_the_same_keys(records):
    """Against the differences taken by hand."""
    found = retrieval.against_random(records).set_index(["press", "compression_ratio"])
    p = []
    for press, ratio in found.index:
        one, two = (keys_of(SHARES[name, ratio, False], name) for name in (press, "random"))
        ahead = one["correct"].astype(float) - two["correct"]
        p.append(comparison(ahead.to_numpy(), one["context"].to_numpy()).p)
        assert found.loc[(press, ratio), "ahead"] == pytest.approx(ahead.mean())
    assert found["p"].tolist() == pytest.approx(holm(np.array(p)).tolist())
    assert set(found["documents"]) == {N_CONTEXTS}
    assert found["verdict"].to_dict() == {
        ("keydiff", 0.25): "better",
        ("snapkv", 0.25): "worse",
        ("knorm", 0.25): "",
        ("keydiff", 0.5): "better",
        ("snapkv", 0.5): "worse",
        ("knorm", 0.5): "",
    }
    assert retrieval.random_table(records).to_numpy().tolist() == [
        ["0.25", "0.70", "keydiff", "snapkv", "1 种"],
        ["0.5", "0.30", "keydiff", "snapkv", "1 种"],
    ]


def test_degenerate_runs_are_not_judged_and_runs_without_keys_are_left_out(records):
    records.frame["degenerate"] = np.where(records.frame["press"] == "snapkv", "tied 0.500", None)
    assert "snapkv" not in set(retrieval.against_random(records)["press"])
    with pytest.raises(Missing, match="random"):
        retrieval.against_random(replace(records, frame=records.frame.iloc[1:4]))
    for path in records.folder.glob("knorm*"):
        path.unlink()
    assert "knorm" not in set(retrieval.against_random(replace(records))["press"])


def test_choosing_worse_than_not_choosing_is_said_only_where_it_is_so(records):
    said = retrieval.beside_random(records)
    assert said.startswith("压缩率 0.25 时，随机淘汰还答对 0.70。") and "3 种方法里明确更好的有 1 种" in said
    assert "明确更差的有 1 种。更差的几种只答对 0.00 至 0.00" in said and said.endswith("而在丢了什么。")
    others = replace(records, frame=records.frame[records.frame["press"] != "snapkv"])
    assert retrieval.beside_random(others).endswith("明确更差的有 0 种。")


def test_what_it_is_worth_to_see_the_question(records):
    said = retrieval.gained(records)
    assert "压缩率 0.5 时，2 种方法里" in said and "明确答得更好的有 1 种，更差的有 0 种" in said
    assert said.endswith("获益最多的是 snapkv（由 0.00 到 0.40）；这 1 种里有 1 种仍答不出一半。")
    with pytest.raises(Missing, match="问题在内"):
        retrieval.gained(replace(records, frame=records.frame.iloc[:8]))


def test_verdicts_in_a_table():
    found = pd.DataFrame({"press": ["snapkv", "random", "tova"], "verdict": ["better", "better", ""]})
    assert paired.by_verdict(found) == {"明确更好": "random、snapkv", "明确更差": "—", "分不出": "1 种"}


def test_all_accuracies_are_those_around_the_middle_ratio(runs):
    marked = runs.assign(degenerate=[None] * 3 + ["tied 0.500"] + [None] * 4)
    table = retrieval.all_accuracies(marked)
    assert list(table) == ["press", "问题在外 0.5", "问题在外 0.75", "问题在内 0.75"]
    assert table.to_numpy().tolist() == [
        ["knorm", "—", "0.60 [0.50, 0.70]", "0.65 [0.55, 0.75]"],
        ["snapkv", "0.30 [0.20, 0.40]", "0.00 [-0.10, 0.10] *", "0.70 [0.60, 0.80]"],
    ]


# ---- on runs --------------------------------------------------------------------------------------------------------


def test_runs_in_bits_are_told_apart(runs):
    coarse = runs.assign(kv_bits=2, accuracy=0.0)
    both = pd.concat([coarse, runs.assign(kv_bits=None)], ignore_index=True)
    assert retrieval.accuracy_table(both)["存储"].tolist() == ["2 位"] * len(runs) + ["原样"] * len(runs)
    for said in (retrieval.plain, retrieval.survivors, retrieval.digits_in_words):
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
    assert said == (
        "问题在外，2 种方法的 3 次运行里，准确率与“数字的保留”的秩相关是 -0.50，与“关键处的保留”的秩相关是 1.00；"
        "方法太少，没有区间。"
    )
    with pytest.raises(Missing):
        retrieval.correlated(runs, "问题在内")  # one run has no order
    lines = retrieval.digits_in_words(runs)
    assert lines[0] == said and len(lines) == 4 and lines[-1].startswith("问题在内，压缩率 0.75，snapkv：")
    assert "留下数字的 25%，在关键处留下 10%。观察窗口里是正文" in retrieval.elsewhere(runs)


def test_which_of_two_correlations_is_higher_is_said_where_the_interval_of_their_difference_says_so():
    rng = np.random.default_rng(0)
    read, whole = rng.random(24), rng.random(24)
    found = pd.DataFrame([run(f"press {i // 2}", 0.5, False, read[i], whole[i], read[i]) for i in range(24)])
    said = retrieval.correlated(found, "问题在外")
    assert "12 种方法的 24 次运行里" in said and "“关键处的保留”的秩相关是 1.00 [1.00, 1.00]" in said
    assert said.endswith("准确率更跟着关键处留下多少走，而不是总共留下多少。")
    swapped = found.rename(columns={"digits_kept": "digits_kept_where_read", "digits_kept_where_read": "digits_kept"})
    assert retrieval.correlated(swapped, "问题在外").endswith("准确率更跟着总共留下多少走。")
    same = found.assign(digits_kept=found["digits_kept_where_read"])
    assert retrieval.correlated(same, "问题在外").endswith("这些方法定不下来。")


def test_rows_of_a_group_are_drawn_together():
    """As if each group were written out as often as it is drawn."""
    rng = np.random.default_rng(1)
    one, other, groups = pd.Series(rng.random(10)), pd.Series(rng.random(10)), pd.Series(list("aaabbccdde"))
    drawn = np.random.default_rng(0).integers(5, size=(50, 5))
    expected = []
    for names in drawn:
        rows = np.concatenate([np.flatnonzero(groups == "abcde"[name]) for name in names])
        expected.append(rank_correlation(*(x.iloc[rows].reset_index(drop=True) for x in (one, other))))
    assert drawn_rank_correlations(one, other, 50, groups) == pytest.approx(np.array(expected), nan_ok=True)
    assert np.isnan(rank_correlation_ci95(one[:7], other[:7], groups=groups[:7])).all()  # three groups


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
    said = f"4 个头里，只有 2 个在读数字（第 0 层 1 个、第 1 层 1 个）：它们{rule}，合占全部抄写注意力的 75%。"
    assert retrieval.copying(heads).startswith(said)
    little = heads.assign(copy_attention=heads["copy_attention"] / 100)  # half of the most is no measure then
    assert retrieval.copying_heads(little).empty
    assert "4 个头里没有抄写的头" in retrieval.copying(little) and "最高的也只有 0.01" in retrieval.copying(little)
    both = pd.concat([heads, heads.assign(press="knorm", compression_ratio=0.5, digits_kept=[0.0, 0.5, 1.0, None])])
    shares = retrieval.head_shares(both).groupby("press", sort=False)["share"].apply(list).to_dict()
    assert shares == {"注意力（不压缩）": [0.1, 0.4, 0.8, 0.3], "knorm 0.5": [0.0, 0.5, 1.0]}
    assert set(retrieval.head_shares(heads)["press"]) == {"注意力（不压缩）"}  # no press was measured


def test_whether_it_matters_how_deep_a_key_lies():
    rows = []
    for context in range(20):
        for i in range(10):
            known = {"compression_ratio": 0.5, "query_aware": False, "depth": i / 10 + 0.05, "context": context}
            rows += [
                {**known, "press": "snapkv", "correct": i >= 5},
                {**known, "press": "tova", "correct": i % 2 == 0},
                {**known, "press": "random", "correct": i % 2 == 0},
            ]
            rows.append({**known, "press": "streaming_llm", "correct": i >= 5})
    keys = pd.DataFrame(rows)
    assert retrieval.deeper(keys) == (
        "snapkv 更容易答对后半的口令；其余 1 种方法，口令藏在前半还是后半看不出差别（两半的区间不重叠才算有差别）。"
    )
    assert retrieval.deeper(keys, ["tova"]).startswith("图里别的 1 种方法")
    turned = keys.assign(depth=1 - keys["depth"])
    assert retrieval.deeper(turned, ["snapkv"]).startswith("snapkv 更容易答对前半的口令（")
    with pytest.raises(Missing):
        retrieval.deeper(keys, ["streaming_llm"])
