"""What the report says of all studies together, on records of which the answers are known by hand."""

import pandas as pd
import pytest

from kvneox_lib.pages import earlier, overview, setup, shapes
from kvneox_lib.pages import report as reporting
from kvneox_lib.pages.report import Records
from kvneox_lib.pages.words import weights_in_words


def records(study: str, model: str, weights: str, tmp_path, **columns) -> Records:
    row = {"model": model, "weights": weights, "dataset": "a text", "device": "cpu", "device_name": "a processor"}
    row |= {"dtype": "float32", "git_commit": "abcdef0", "git_dirty": False, "revision": None, "n_tokens": 50.0}
    row |= {f"{name}_version": "1" for name in ("python", "torch", "transformers", "kvpress")}
    frame = pd.DataFrame([row | {"context_tokens": 100.0} | columns])
    return Records(study, tmp_path / study, tmp_path, frame)


@pytest.mark.parametrize(
    ("study", "model", "weights", "is_of_pythia"),
    [
        ("recall", "demo-wordings", "pretrained", False),  # ours, loaded like any other
        ("recall", "demo", "bundled", False),
        ("speed", "pythia-70m", "pretrained", False),  # no figure of quality
        ("recall", "pythia-70m", "pretrained", True),
        ("wikitext_ppl", "EleutherAI/pythia-70m", "pretrained", True),
    ],
)
def test_real_weights_of_pythia_are_those_of_pythia(study, model, weights, is_of_pythia, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "every_setting", lambda: [records(study, model, weights, tmp_path)])
    assert ("没有真实 Pythia 权重的记录" not in overview.devices()) == is_of_pythia


def test_weights_of_ours_are_said_to_be_ours(tmp_path):
    assert weights_in_words("pythia-70m", "pretrained") == "预训练的权重"
    ours = records("recall", "demo-wordings", "pretrained", tmp_path)
    for said in (ours.source, reporting.models(ours)):
        assert "demo-wordings（本项目训练、未随包附带的权重）" in said and "预训练" not in said


def test_a_source_names_all_models_and_counts_states(tmp_path):
    first, other = (records("recall", model, "pretrained", tmp_path) for model in ("pythia-14m", "pythia-70m"))
    states = pd.concat([other.frame.assign(revision=f"step{n}") for n in (1, 2)])
    both = Records("recall", first.folder, tmp_path, pd.concat([first.frame, states]))
    assert "模型 pythia-14m（预训练的权重）、pythia-70m（预训练的权重），训练途中的 2 个状态；文本" in both.source


def test_what_only_heads_show_is_not_said_without_their_records(tmp_path):
    recall = records("recall", "demo", "bundled", tmp_path)
    with_heads = overview.can_say(records("heads", "demo", "bundled", tmp_path), recall)
    without = overview.can_say(Records("heads", tmp_path, tmp_path, pd.DataFrame()), recall)
    assert "@sec-heads" in with_heads and "@sec-blind" in with_heads
    assert (
        "@sec-heads" not in without
        and "@sec-blind" not in without
        and without.endswith("（@sec-distance 的近处与远处）。")
    )


def test_settings_and_versions_name_what_was_measured(tmp_path, monkeypatch):
    asked = [
        records("recall", "demo-wordings", "pretrained", tmp_path, template=name, n_keys=n, context_length=64)
        for name, n in (("passkey", 10), ("house", 20))
    ]
    several = Records("recall", tmp_path, tmp_path, pd.concat([one.frame for one in asked]))
    parts = [
        records("tasks", "demo", "bundled", tmp_path, n_documents=7, dataset=f"task {n}", context_tokens=n)
        for n in range(1, 6)
    ]
    tasks = Records("tasks", tmp_path, tmp_path, pd.concat([one.frame for one in parts]))
    none = Records("heads", tmp_path, tmp_path, pd.DataFrame())
    table = setup.setup_table(asked[0], several, tasks, none)
    assert table["实验"].tolist() == ["检索", "检索", "任务", "抄写的头"]
    assert table["多少"].tolist()[:3] == [
        "10 个口令，上下文 64",
        "2 种说法，10、20 个口令，上下文 64",
        "每项 7 题，上下文约 1 至 5",
    ]
    assert "缺少记录：heads" in table["多少"][3] and table["模型；文本"][3] == "—"
    assert table["模型；文本"][2].startswith("demo；task 1、task 2") and "未随包附带" in table["模型；文本"][0]


def test_all_records_are_counted(tmp_path, monkeypatch):
    state = records("recall", "demo-wordings", "pretrained", tmp_path, revision="step125")
    timed = [records("speed", "pythia-70m", "random", tmp_path, dtype=dtype) for dtype in ("float32", "bfloat16")]
    monkeypatch.setattr(overview, "every_setting", lambda: [state, *timed])
    table = setup.records_table()
    models = table["模型；文本"].str.split("；").str[0].tolist()
    assert models == ["demo-wordings，训练途中的 1 个状态", "pythia-70m"]
    assert table["记录（设置）"].tolist() == ["1（1）", "2（2）"]
    assert table["设备与精度"][1] == "a processor（float32、bfloat16）" and table["提交"][1] == "abcdef0"
    assert setup.version_table()["实验"].tolist() == ["检索、速度"] and setup.version_table()["记录"].tolist() == ["3"]


def test_the_largest_factor_of_the_earlier_table_is_named():
    speeds = {("不压缩", 1): 10.0, ("不压缩", 4): 4.0, ("SnapKV", 4): 20.0, ("PyramidKV", 4): 10.0}
    for streaming, said in ((30.0, "快到 7.5 倍（StreamingLLM）"), (15.0, "快到 5.0 倍（SnapKV）")):
        rows = [(*of, 1800, speed) for of, speed in (speeds | {("StreamingLLM", 4): streaming}).items()]
        table = pd.DataFrame(rows, columns=["method", "batch_size", "context_tokens", "tok_per_s"])
        assert said in earlier.batch_of_four(table)


def test_where_it_hardly_pays_is_said_of_the_model_of_which_it_is_true():
    alone = shapes.cache_shares(1).query("tokens == 2048").set_index("press")["share"]
    said = shapes.where_it_pays(1, 16)
    assert f"{alone.idxmax()} 每步最多省 {0.75 * alone.max():.0%}" in said
    assert f"{alone.idxmin()} 这样的模型为了速度不值得压缩" in said
