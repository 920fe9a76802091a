"""Recall in several wordings: the study, and what pages say of it on runs of which the answers are known by hand."""

from dataclasses import replace

import pandas as pd
import pytest

from kvneox_lib.inputs.templates import TEMPLATES
from kvneox_lib.inputs.text import load_text
from kvneox_lib.measures.intervals import share_ci95
from kvneox_lib.measures.recall import recall_accuracy
from kvneox_lib.pages import figures, wordings
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.pages.selecting import of_one_wording, wordings_left_out
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.studies.plan import declared
from kvneox_lib.studies.recall import measure_recall, plan
from kvneox_lib.studies.records import find_record, write_record, write_table
from kvneox_lib.studies.table import STUDIES

SMALL = {"n_keys": 5, "keys_per_context": 3, "context_length": 300, "depths": None}
ASKED = {"model": "demo", "dataset": "python-docs", "press": "streaming_llm", "compression_ratio": 0.5, **SMALL}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("wordings"))
    return measure_recall(**ASKED, template=["passkey", "house"], n_distractors=2, output_dir=folder)


def test_each_wording_is_measured_as_recall_accuracy_measures_it(study, demo, tokenizer):
    rows = study.records
    assert rows["template"].tolist() == ["passkey"] * 2 + ["house"] * 2 and set(rows["n_distractors"]) == {2}
    filler = "\n\n".join(load_text("python-docs").documents)
    for _, row in rows.iterrows():
        press = make_press(row["press"], 0.5)
        asked = {"press": press, "filler": filler, "template": row["template"], "n_distractors": 2, **SMALL}
        alone = recall_accuracy(demo, tokenizer, **asked)
        assert row["nll_mean"] == pytest.approx(alone.nll, abs=1e-5) and row["accuracy"] == alone.accuracy
    assert rows["nll_mean"].nunique() == 4


def test_keys_say_in_which_context_they_stand_and_the_interval_is_of_these(study):
    keys = study.table("keys")
    assert keys["context"].tolist() == [0, 0, 0, 1, 1] * 4 and set(study.records["n_contexts"]) == {2}
    for _, row in study.records.iterrows():
        own = keys[(keys["template"] == row["template"]) & (keys["press"] == row["press"])]
        ends = share_ci95(own["correct"].to_numpy(), own["context"].to_numpy())
        assert (row["accuracy_ci95_low"], row["accuracy_ci95_high"]) == pytest.approx(ends)
    of_each = [group["name"].tolist() for _, group in keys.groupby(["template", "press"])]
    assert all(names == of_each[0] for names in of_each)  # the same keys in every wording
    looking = (
        study.table("heads")
        .query("press == 'no_press'")
        .pivot(index=["layer", "head"], columns="template", values="copy_attention")
    )
    assert (looking["house"] != looking["passkey"]).any()


def test_records_are_named_by_what_differs_and_found_again(study, monkeypatch):
    asked = {**ASKED, "weights": "pretrained", "n_distractors": 2}
    names = [
        declared(measure_recall, plan, _all_of(asked | {"template": t})) for t in ("passkey", ["passkey", "house"])
    ]
    assert names[1] == study.records["run_id"].tolist() and names[0] == names[1][:2]
    assert [("template=house" in name, "n_distractors=2" in name) for name in names[1]] == [(False, True)] * 2 + [
        (True, True)
    ] * 2
    assert len(declared(measure_recall, plan, _all_of(asked | {"template": "all"}))) == 2 * len(TEMPLATES)
    monkeypatch.setattr("kvneox_lib.studies.recall.ask_each", None)  # nothing is asked again
    again = measure_recall(**ASKED, template="house", n_distractors=2, output_dir=str(study.folder))
    assert again.records["run_id"].tolist() == names[1][2:]


def _all_of(asked):
    from kvneox_lib.studies.arguments import defaults_of

    return {**defaults_of(measure_recall), **asked}


def test_a_record_from_before_there_were_wordings_is_of_the_first(study, tmp_path):
    row = {name: value for name, value in study.records.iloc[0].items() if name not in ("study", "path", "run_id")}
    row = {name: None if pd.isna(value) else value for name, value in row.items()}
    known = {name: row[name] for name in STUDIES["recall"].parameters if name in row}
    old = {name: value for name, value in row.items() if name not in ("template", "n_distractors")}
    write_record(tmp_path, "old", old)
    assert find_record(tmp_path, "old", {**known, "n_distractors": 0}) is not None
    assert find_record(tmp_path, "old", known) is None  # it had no distractors
    assert find_record(tmp_path, "old", {**known, "n_distractors": 0, "template": "house"}) is None


def test_what_is_no_wording_is_refused_before_any_work():
    for asked, message in (
        ({"template": "hous"}, "template='hous': did you mean house"),
        ({"template": ["passkey", 3]}, "template=3"),
        ({"template": []}, "template=.*must not be empty"),
        ({"n_distractors": -1}, "n_distractors=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_recall(**ASKED, **asked)


# ---- pages ----------------------------------------------------------------------------------------------------------


def run(press, ratio, accuracy, template="passkey", keys=5, distractors=0, **more):
    ends = {"accuracy_ci95_low": accuracy - 0.1, "accuracy_ci95_high": accuracy + 0.1, "query_aware": False}
    row = {"press": press, "compression_ratio": ratio, "accuracy": accuracy, "model": "demo-wordings", **ends}
    return {**row, "template": template, "keys_per_context": keys, "n_distractors": distractors, **more}


@pytest.fixture
def runs():
    """passkey and account were trained, telephone was not."""
    plain = {"passkey": 1.0, "account": 0.8, "telephone": 0.6}
    keydiff, snapkv = (
        {"passkey": 0.9, "account": 0.5, "telephone": 0.1},
        {"passkey": 0.1, "account": 0.6, "telephone": 0.0},
    )
    rows = [run("knorm", 0.75, 0.3), run("keydiff", 0.25, 0.95), run("keydiff", 0.75, 0.9, query_aware=True)]
    for name in plain:
        rows += [run("no_press", 0.0, plain[name], name)]
        rows += [run("keydiff", 0.75, keydiff[name], name), run("snapkv", 0.75, snapkv[name], name)]
    rows += [run("no_press", 0.0, 0.7, keys=25), run("keydiff", 0.75, 0.2, keys=25)]
    rows += [run("no_press", 0.0, 0.95, distractors=8), run("keydiff", 0.75, 0.85, distractors=8)]
    return pd.DataFrame(rows)


def test_other_pages_take_the_first_wording_with_nothing_beside_it(runs):
    usual = of_one_wording(runs)
    assert set(usual["template"]) == {"passkey"} and set(usual["n_distractors"]) == {0}
    assert set(usual["keys_per_context"]) == {5} and len(usual) == 6
    assert not usual.duplicated(["press", "compression_ratio", "query_aware"]).any()
    assert of_one_wording(runs[runs["template"] == "telephone"])["accuracy"].tolist() == [0.6, 0.1, 0.0]
    before = usual.drop(columns=["template", "n_distractors"])
    assert of_one_wording(before).equals(before) and of_one_wording(pd.DataFrame()).empty
    assert wordings_left_out(usual) == wordings_left_out(before) == []
    assert "只用说法 passkey" in wordings_left_out(runs)[0]


def test_tables_by_wording(runs):
    (grid,) = wordings.grids(runs).values()  # 0.25 was asked in one wording only, as knorm was
    assert list(grid) == ["不压缩", "keydiff", "snapkv"]
    assert grid.index.tolist() == ["passkey（训练过）", "account（训练过）", "telephone（未训练）"]
    assert grid.loc["telephone（未训练）"].tolist() == [0.6, 0.1, 0.0]
    assert wordings.wording_intervals(runs).iloc[1].tolist() == [
        *("demo-wordings", "account（训练过）", "0.80 [0.70, 0.90]", "0.50 [0.40, 0.60]", "0.60 [0.50, 0.70]"),
    ]
    figure = figures.share_grids(wordings.grids(runs), ylabel="说法", label="准确率")
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["100", "90", "10", "80", "50", "60", "60", "10", "0"]


def test_wordings_are_compared_with_as_many_keys_beside_each_other(runs):
    """As many runs of the first wording have 25 keys in a context, or more; all of the others have 5."""
    crowd = runs[(runs["template"] == "passkey") & (runs["keys_per_context"] == 5) & (runs["n_distractors"] == 0)]
    crowd = crowd.assign(keys_per_context=25, accuracy=0.0)
    (grid,) = wordings.grids(pd.concat([crowd, crowd, runs])).values()
    assert grid.loc["passkey（训练过）"].tolist() == [1.0, 0.9, 0.1]
    tied = pd.concat([crowd, crowd.assign(keys_per_context=5)])
    assert set(of_one_wording(tied)["keys_per_context"]) == {5}


def test_without_a_press_or_without_the_baseline_there_is_something_to_say(runs):
    bare, compressed = (runs[(runs["press"] == "no_press") == is_bare] for is_bare in (True, False))
    assert {name: list(grid) for name, grid in wordings.grids(bare).items()} == {"demo-wordings，不压缩": ["不压缩"]}
    assert wordings.by_training(bare).endswith("训练过的 2 种平均 0.90（0.80 至 1.00），未训练的 1 种是 0.60。")
    assert [list(grid) for grid in wordings.grids(compressed).values()] == [["keydiff", "snapkv"]]
    for sentence in (wordings.by_training, wordings.of_the_best):
        with pytest.raises(Missing, match="no_press"):
            sentence(compressed)
    once = runs[(runs["press"] != "no_press") | (runs["template"] == "passkey")]  # and not in the other wordings
    assert wordings.grids(once)["demo-wordings，压缩率 0.75"]["不压缩"].tolist()[0] == 1.0
    assert wordings.by_training(once) == "demo-wordings 不压缩时各种说法的准确率，训练过的 1 种是 1.00。"
    with pytest.raises(Missing, match="有压缩率的 press"):
        wordings.crowded(bare)


def records(model: str, runs: pd.DataFrame, tmp_path) -> Records:
    return Records("recall", tmp_path, tmp_path, runs.assign(model=model).reset_index(drop=True))


def test_every_model_that_was_asked_in_several_wordings_is_shown(runs, tmp_path, monkeypatch):
    two = runs[runs["template"] != "telephone"]
    most = records("demo", pd.concat([of_one_wording(runs)] * 9), tmp_path)  # in one wording, and the most runs of all
    several = [records("demo", two, tmp_path), records("demo-wordings", runs, tmp_path)]
    again = records("demo", of_one_wording(runs), tmp_path)
    monkeypatch.setattr(wordings, "settings", lambda study, root: [most, *several, again])
    assert wordings.of_each_model() == several
    assert len(wordings.read_as_usual().frame) == len(most.frame)  # not those in several wordings
    said = wordings.told_of_each(several, wordings.of_the_best)
    assert said.count("最好的是 keydiff（0.90）") == 2 and said.index("demo 在") < said.index("demo-wordings 在")
    frames = [one.frame for one in several]
    assert wordings.wording_intervals(*frames)["模型"].tolist() == ["demo"] * 2 + ["demo-wordings"] * 3
    told = wordings.wording_table(*frames).set_index("说法")
    assert told.loc["account"].tolist()[-2:] == ["未训练", "训练过"] and len(told) == 3
    figure = figures.share_grids(*map(wordings.grids, frames), ylabel="说法", label="准确率")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["demo，压缩率 0.75", "demo-wordings，压缩率 0.75"]
    assert [len(axes.get_yticklabels()) for axes in figure.axes[:2]] == [2, 3]
    alone = records("demo", of_one_wording(runs[runs["keys_per_context"] == 5]), tmp_path)
    assert wordings.with_crowds([alone, several[1]]) is several[1]
    monkeypatch.setattr(wordings, "settings", lambda study, root: [])
    (none,) = wordings.of_each_model(tmp_path)
    assert "缺少记录" in wordings.told_of_each([none], wordings.by_training)


def test_a_degenerate_run_is_never_the_best(runs):
    runs = runs.assign(degenerate=None)
    runs.loc[runs["press"] == "keydiff", "degenerate"] = "tied 0.500"
    with pytest.raises(Missing):  # one press is left: there is no best
        wordings.of_the_best(runs)


def test_sentences_by_wording(runs):
    assert wordings.by_training(runs) == (
        "demo-wordings 不压缩时各种说法的准确率，训练过的 2 种平均 0.90（0.80 至 1.00），未训练的 1 种是 0.60。"
    )
    said = wordings.of_the_best(runs)  # in account snapkv is ahead, in telephone the intervals of both meet
    assert said.startswith(
        "demo-wordings 在 passkey 上，压缩率 0.75 时最好的是 keydiff（0.90）。"
        "其余不压缩时答对一半以上的 2 种说法里，它在 0 种上也是最好的"
    )
    hard = runs.assign(accuracy=runs["accuracy"].where(runs["template"] == "passkey", 0.1))
    assert "其余的说法，模型不压缩也答不对一半" in wordings.of_the_best(hard)
    other = wordings.by_training(runs.assign(model="pythia-70m"))
    assert "训练" not in other and "准确率，3 种平均 0.80（0.60 至 1.00）" in other


def changed(runs: pd.DataFrame, press: str, template: str, accuracy: float) -> pd.DataFrame:
    """With another accuracy of that press in that wording."""
    those = (runs["press"] == press) & (runs["template"] == template) & (runs["compression_ratio"] != 0.25)
    ends = {"accuracy": accuracy, "accuracy_ci95_low": accuracy - 0.1, "accuracy_ci95_high": accuracy + 0.1}
    return runs.assign(**{name: runs[name].mask(those, value) for name, value in ends.items()})


def test_the_best_in_another_wording_is_said_where_intervals_part(runs):
    better = changed(runs, "keydiff", "account", 0.85)
    assert "的 2 种说法里，它在 1 种上也是最好的" in wordings.of_the_best(better)


def test_what_the_best_loses_in_another_wording_is_said(runs):
    said = wordings.of_the_best(runs)
    assert said.endswith(
        "但 account、telephone 不压缩时答对 0.60 至 0.80，它只答对 0.10 至 0.50，别的方法也没有处处留得住的。"
    )
    kept = changed(changed(runs, "snapkv", "account", 0.75), "snapkv", "telephone", 0.65)
    assert wordings.of_the_best(kept).endswith("而 snapkv 与不压缩分不出。")
    whole = changed(changed(runs, "keydiff", "account", 0.7), "keydiff", "telephone", 0.5)
    assert "但 " not in wordings.of_the_best(whole)


def test_whether_the_same_heads_read_in_every_wording(runs, tmp_path):
    runs = runs.assign(digits_kept_where_read=runs["accuracy"])
    frame, named = runs.reset_index(drop=True), []
    attention = {"passkey": [0.9, 0.8, 0.0], "account": [0.6, 0.2, 0.0], "telephone": [0.5, 0.4, 0.0]}
    for place, row in frame.iterrows():
        named.append({"run_id": str(place), "path": str(tmp_path / f"{place}.json"), "dataset": "a text"})
        if row["press"] == "no_press":
            heads = pd.DataFrame({"layer": 0, "head": range(3), "copy_attention": attention[row["template"]]})
            write_table(tmp_path, str(place), "heads", heads)
    frame = pd.concat([frame, pd.DataFrame(named)], axis=1)
    frame = frame[(frame["keys_per_context"] == 5) & (frame["n_distractors"] == 0)]
    several = Records("recall", tmp_path, tmp_path, frame.reset_index(drop=True))
    said = wordings.same_readers([several])
    assert said.startswith("demo-wordings 的 3 种说法里，读数字的都在那 2 个头之内。")
    assert said.endswith("keydiff，压缩率 0.75 时在关键处留下数字的 90%，在其余说法上留下 10% 至 50%。")
    other = pd.DataFrame({"layer": 0, "head": range(3), "copy_attention": [0.0, 0.1, 0.7]})
    place = frame.query("press == 'no_press' and template == 'account'")["run_id"].iloc[0]
    write_table(tmp_path, place, "heads", other)
    assert "除那 2 个头外另有 1 个" in wordings.same_readers([replace(several)])


def test_which_wording_was_trained_is_said_of_models_of_ours_alone(runs):
    one = runs[runs["template"] == "telephone"]
    assert wordings.known(one) == (
        "口令的说法是 telephone（“The telephone of Belmora is 48213. Remember it.”）；"
        "对模型 demo-wordings，它是训练时没有读过的。"
    )
    assert "它是训练时读过的" in wordings.known(of_one_wording(runs).drop(columns="template"))
    several = wordings.known(runs)
    assert "3 种说法" in several and "passkey、account 是训练时读过的，telephone 是训练时没有读过的" in several
    assert "对随包附带的模型，passkey 是训练时读过的，account、telephone 是训练时没有读过的" in wordings.known(
        runs.assign(model="demo")
    )
    assert "无从知道" in wordings.known(one.assign(model="pythia-70m"))
    assert wordings.wording_table(runs)["demo-wordings"].tolist() == ["训练过", "训练过", "未训练"]
    assert "demo-wordings" not in wordings.wording_table(runs.assign(model="pythia-70m"))


def test_more_to_tell_apart(runs):
    panels = wordings.crowd_lines(runs)
    assert {words: part["accuracy"].tolist() for words, part in panels.items()} == {
        "每段 5 句": [0.9],
        "每段 5 句，另有 8 句不问": [0.85],
        "每段 25 句": [0.2],
    }
    assert wordings.crowded(runs) == (
        "压缩率 0.75 时，每段 5 句，答对一半以上的有 keydiff。要分清的数字多了，明确变差的（区间不重叠）："
        "每段 25 句，keydiff 由 0.90 降到 0.20（不压缩 0.70）。"
    )
    assert wordings.crowded(runs[runs["keys_per_context"] == 5]).endswith("也看不出它们变差。")
    marked = runs.assign(degenerate=(runs["press"] == "keydiff").map({True: "tied 1.00", False: None}))
    with pytest.raises(Missing):
        wordings.crowded(marked)


def test_records_of_one_wording_leave_the_comparison_out(runs):
    usual = of_one_wording(runs)
    for asked in (wordings.grids, wordings.wording_intervals, wordings.by_training, wordings.of_the_best):
        for found in (usual, usual.drop(columns=["template", "n_distractors"])):
            with pytest.raises(Missing, match="几种说法的运行"):
                asked(found)
    with pytest.raises(Missing, match="数字多少不同"):
        wordings.crowded(usual)
    with pytest.raises(Missing):
        wordings.crowded(usual.drop(columns=["template", "n_distractors", "keys_per_context"]))
