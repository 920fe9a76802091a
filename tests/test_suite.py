"""Pages on sizes and on training: which records they compare, and what they say of figures known by hand."""

import json
import re

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from kvneox_lib.inputs.weights import PYTHIA, _pythia_config
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.pages import report as reporting
from kvneox_lib.pages import suite
from kvneox_lib.pages.report import Missing
from kvneox_lib.studies.records import all_records, tables_of, write_table

REFERENCE = REPOSITORY / "results" / "reference"
AT_STEP = {"step100": 0.02, "step1000": 0.3, "step4000": 0.9}  # attention of the head that copies in the end
ACCURACY = {"no_press": 0.9, "snapkv": 0.1, "keydiff": 0.6}


def put(root, revision=None, model="demo", accuracy=1.0, attention=0.9, **changes):
    """Records of recall without a press, with snapkv and with keydiff, and their heads; `accuracy` scales what they
    have, the first head copies with that attention."""
    originals = {}
    for name, record in all_records(REFERENCE / "recall").items():
        usual = record["model"] == "demo" and record["device"] == "cpu" and record.get("kv_bits") is None
        if usual and record["compression_ratio"] in (0.0, 0.5) and not record["query_aware"]:
            originals.setdefault(record["press"], (name, record))
    folder = root / "results" / "recall"
    folder.mkdir(parents=True, exist_ok=True)
    for press, share in ACCURACY.items():
        name, record = originals[press]
        heads = tables_of(pd.DataFrame([record]), "heads")[["layer", "head", "digits_kept", "copy_attention"]]
        heads["copy_attention"] = [attention, attention / 4] + [0.01] * (len(heads) - 2)
        figures = {"accuracy": accuracy * share, "table_rows": f"heads={len(heads)}"}
        figures |= {"accuracy_ci95_low": accuracy * share - 0.05, "accuracy_ci95_high": accuracy * share + 0.05}
        kept = {key: value for key, value in record.items() if key not in ("study", "path")}
        kept |= figures | {"model": model, "revision": revision, "weights": "pretrained"} | changes
        kept["run_id"] = re.sub(r"[^\w.=-]", "-", f"{model}__{press}__{revision}__{changes}")
        (folder / f"{kept['run_id']}.json").write_text(json.dumps(kept))
        write_table(folder, kept["run_id"], "heads", heads)


@pytest.fixture
def states(tmp_path):
    for revision, attention in AT_STEP.items():
        put(tmp_path, revision, accuracy=attention, attention=attention)
    return tmp_path


def test_other_pages_leave_states_of_training_alone(states):
    assert reporting.settings("recall", states) == []
    put(states, None)
    (finished,) = reporting.settings("recall", states)
    assert len(finished.frame) == 3 and "step" not in finished.source
    assert len(reporting.settings("recall", states, revisions=True)) == 3


def test_states_are_in_the_order_of_training_and_measured_alike(states):
    put(states, "step2000", n_keys=7)  # another protocol
    put(states, "step500", text_sha256="0")
    put(states, "abcdef12")  # a commit is no step
    found = suite.of_training("recall", states)
    assert [records.run()["revision"] for records in found] == list(AT_STEP)
    runs = suite.runs_of(found, suite.step)
    assert runs.groupby("at")["value"].max().to_dict() == pytest.approx({100: 0.018, 1000: 0.27, 4000: 0.81})
    assert not {"accuracy", "accuracy_ci95_low"} & set(runs) and "value_ci95_low" in runs


def test_when_the_heads_appear(states):
    found = suite.of_training("recall", states)
    heads = suite.heads_of(found, suite.step)
    assert suite.chosen_heads(heads) == [(0, 0)]  # the second has a quarter of it
    assert suite.heads_appear(heads).endswith("在同一个状态，第 4000 步。")  # 0.3 is less than half of 0.9
    put(states, "step2000", attention=0.46, accuracy=0.9)
    heads = suite.heads_of(suite.of_training("recall", states), suite.step)
    assert "最后抄写的 1 个头，" in suite.heads_appear(heads) and suite.heads_appear(heads).endswith("第 2000 步。")
    second = (heads["layer"] == 0) & (heads["head"] == 1)
    both = suite.heads_appear(heads.assign(copy_attention=heads["copy_attention"].mask(second, 0.8)))
    assert "最后抄写的 2 个头" in both and both.endswith("第 100 步（1 个）、第 2000 步（1 个）。")
    lines = suite.head_lines(heads).axes[0].lines
    assert [line.get_label() for line in lines] == ["0-0", "其余"]
    assert lines[0].get_ydata().tolist() == [0.02, 0.3, 0.46, 0.9]
    ticks = [label.get_text() for label in suite.head_lines(heads).axes[0].get_xticklabels()]
    assert ticks == ["100", "1000", "2000", "4000"]


def test_from_when_on_presses_differ(states):
    runs = suite.runs_of(suite.of_training("recall", states), suite.step)
    said = suite.differing(runs, "准确率", "第 {} 步")  # 0.5 apart at full accuracy, intervals of ± 0.05
    assert "压缩率 0.50 时" in said and said.endswith("demo 在第 1000 步、第 4000 步。")
    assert suite.recall_appears(runs) == "不压缩时的准确率，demo 到第 4000 步过半，最后一个状态是 0.81。"
    assert "demo 始终没有过半" in suite.recall_appears(runs.assign(value=0.4))
    with pytest.raises(Missing, match="no_press"):
        suite.recall_appears(runs[runs["press"] != "no_press"])
    better = runs.assign(value_ci95_high=runs["value_ci95_high"].where(runs["press"] != "keydiff", -0.1))
    assert suite.gaining(runs) == "" and "demo 第 100 步的 keydiff；demo 第 1000 步的 keydiff" in suite.gaining(better)
    figure = suite.lines("训练步数", runs, by_model=True)
    assert [axes.get_title() for axes in figure.axes] == ["demo 压缩率 0.5 时，口令准确率"]


def test_a_model_in_which_no_head_copies_is_not_said_to_have_some(tmp_path):
    """The head that looks most looks far too little: half of that is no measure."""
    for revision, attention in {"step1": 0.001, "step2": 0.004}.items():
        put(tmp_path, revision, attention=attention)
    heads = suite.heads_of(suite.of_training("recall", tmp_path), suite.step).assign(model="demo")
    assert suite.chosen_heads(heads) == []
    assert suite.heads_appear(heads).endswith("最后没有抄写的头。")
    assert "demo 没有抄写的头（最大 0.01）" in suite.head_shares(heads[heads["at"] == 2])  # those of `put` look at 0.01
    assert [line.get_label() for line in suite.head_lines(heads).axes[0].lines] == ["其余"]
    runs = suite.runs_of(suite.of_training("recall", tmp_path), suite.step)
    assert suite.overview("训练步数", runs, runs, heads)["抄写的头"].str.startswith("0/").all()


def test_degenerate_runs_are_neither_drawn_nor_ranked(states):
    runs = suite.runs_of(suite.of_training("recall", states), suite.step).assign(degenerate=None)
    runs.loc[runs["press"] == "keydiff", "degenerate"] = "tied 0.500"
    assert set(suite.pressed(runs)["press"]) == {"snapkv"}
    assert "demo 没有一处" in suite.differing(runs, "准确率", "第 {} 步")
    with pytest.raises(Missing):
        suite.same_order(runs, "准确率")
    assert set(suite.lines("步", runs).axes[0].get_legend_handles_labels()[1]) == {"no_press", "snapkv"}
    with pytest.raises(Missing, match="有压缩率的 press"):
        suite.differing(runs[runs["press"] == "no_press"], "准确率", "第 {} 步")


def test_the_source_of_many_states_is_one_sentence(states):
    found = suite.of_training("recall", states)
    text = suite.source(lambda study: found, "recall")
    assert text.count("来源：") == 1 and "，9 份记录；模型 demo（预训练的权重），训练途中的 3 个状态；" in text
    assert suite.source(lambda study: suite.of_sizes(study, states), "recall") == "检索：还没有记录。"


def test_sizes_of_pythia_smallest_first(tmp_path):
    for model, accuracy in (("pythia-410m", 1.0), ("pythia-70m", 0.5), ("pythia-1b", 0.8)):
        put(tmp_path, model=model, accuracy=accuracy)
    put(tmp_path, model="demo")
    put(tmp_path, model="pythia-70m", revision="step512")
    found = suite.of_sizes("recall", tmp_path)
    runs, heads = suite.runs_of(found, suite.millions), suite.heads_of(found, suite.millions)
    assert list(dict.fromkeys(runs["model"])) == ["pythia-70m", "pythia-410m", "pythia-1b"]
    assert "测了 3 个大小：pythia-70m、pythia-410m、pythia-1b" in suite.measured(found, "大小")
    assert "秩相关是 1.00（2 种方法）" in suite.same_order(runs, "准确率")
    table = suite.overview("参数（百万）", runs, runs, heads)
    assert table["不压缩的准确率"].tolist() == ["0.45", "0.90", "0.72"]
    assert table["压缩率 0.5 时的准确率"].tolist() == ["0.05 至 0.30", "0.10 至 0.60", "0.08 至 0.48"]
    nothing = suite.overview("参数（百万）", runs.assign(value=0.0), runs.iloc[:0], heads)
    assert set(nothing["压缩率 0.5 时的准确率"]) == {"0.00"} and set(nothing["压缩后的损失"]) == {"—"}
    assert table["抄写的头"].str.startswith("1/").all()


def test_what_nobody_has_run_of_pythia_is_said_in_a_clause(tmp_path):
    assert suite.of_pythia(tmp_path) == "两者都还没有测过。"
    for revision in ("step1", "step2"):
        put(tmp_path, revision, model="pythia-70m")
    assert suite.of_pythia(tmp_path) == "前者还没有测过。"


def test_millions_are_those_of_the_models():
    for name in ("pythia-14m", "pythia-1b"):
        with torch.device("meta"):
            model = KVNeoXForCausalLM(_pythia_config(name))
        n = sum(parameter.numel() for parameter in model.parameters())
        assert suite.millions(pd.Series({"model": f"EleutherAI/{name}"})) == pytest.approx(n / 1e6, rel=1e-6)
    assert suite.millions(pd.Series({"model": "demo"})) is None and len(PYTHIA) == 10


@pytest.mark.parametrize(("choose", "params"), [(suite.of_sizes, "pythia-suite"), (suite.of_training, "pythia-checkp")])
def test_without_records_the_page_says_how_to_make_them(choose, params, tmp_path):
    with pytest.raises(Missing, match=f"snakemake .*params/{params}"):
        choose("recall", tmp_path)
    put(tmp_path, "step1", model="pythia-70m")
    put(tmp_path, model="pythia-70m")  # one is no comparison
    assert "yaml" in reporting.say(lambda: suite.measured(choose("recall", tmp_path), "状态"))


def test_the_command_names_a_file_that_is_there():
    named = re.findall(r"params/[\w.-]+\.yaml", str(suite.NotRun("", "pythia-suite")))
    section = (REPOSITORY / "report" / "sections" / "_training.qmd").read_text(encoding="utf-8")
    named += re.findall(r"params/[\w.-]+\.yaml", section)
    assert len(named) >= 4 and all((REPOSITORY / name).is_file() for name in named)
