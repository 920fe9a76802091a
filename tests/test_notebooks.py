"""Every notebook runs under papermill, with reduced parameters, from the folder that a user would be in."""

import ast
import inspect

import nbformat
import pandas as pd
import papermill
import pytest
from conftest import REPOSITORY

from kvneox_lib.pages.retrieval import RULE
from kvneox_lib.studies import records
from kvneox_lib.studies.table import STUDIES

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
COMMON = {"model", "attn_implementation", "dtype", "device", "output_dir"}


def parameters_of(path) -> set[str]:
    return set(papermill.inspect_notebook(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_bare_and_take_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    assert COMMON <= parameters_of(path)


def run(name: str, tmp_path, **parameters):
    executed = tmp_path / f"{name}.ipynb"
    papermill.execute_notebook(
        REPOSITORY / "notebooks" / f"{name}.ipynb", executed, parameters=parameters, cwd=tmp_path, progress_bar=False
    )
    return nbformat.read(executed, as_version=4)


def said(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs)


@pytest.mark.slow
def test_adapter_notebook(tmp_path):
    names = ["snapkv", "adakv_snapkv", "observed_attention", "decoding_knorm"]
    notebook = run("00_adapter", tmp_path, context_length=192, presses=names, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "16 / 16 项通过" in text and "全部检查通过" in text
    (record,) = records.load_records(tmp_path / "out").to_dict("records")
    assert (record["weights"], record["n_checks"], record["n_checks_failed"], record["n_cells"]) == (
        "bundled",
        16,
        0,
        24,
    )
    matrix = records.table_path(tmp_path / "out", record["run_id"], "matrix")
    assert list(pd.read_csv(matrix).press) == names
    assert "4 种 press，24 格" in text


@pytest.mark.parametrize(
    ("name", "measure", "own"),
    [
        (row.notebook, row.measure, {"output_dir", "dataset", "sample_idx"} if row.name == "pg19_ppl" else set())
        for row in STUDIES.values()
    ],
)
def test_notebooks_have_the_defaults_after_which_runs_are_named(name, measure, own):
    defaults = {key: parameter.default for key, parameter in inspect.signature(measure).parameters.items()}
    found = papermill.inspect_notebook(REPOSITORY / "notebooks" / f"{name}.ipynb")
    written = {key: ast.literal_eval(parameter["default"]) for key, parameter in found.items()}
    assert set(written) == set(defaults)
    for key in set(defaults) - own:
        expected = list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key]
        assert written[key] == expected, key


TEXT = {"model": "demo", "dataset": "python-docs", "context_length": 192}


@pytest.mark.slow
def test_wikitext_notebook(tmp_path):
    windows = {"continuation_length": 48, "max_windows": 6, "control_windows": 2}
    ratios = {"press": ["random", "adakv_snapkv", "think"], "compression_ratio": [0.25, 0.9]}
    notebook = run("01_wikitext_ppl", tmp_path, **TEXT, **windows, **ratios, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "模型 **demo**（权重：bundled），文本 **python-docs 3." in text
    assert "对照的最大变动是 0.0e+00 nat" in text and "与随机淘汰逐窗口相比" in text
    assert len(records.load_records(tmp_path / "out")) == 1 + 2 + 2 + 1 and "6 份记录" in text


@pytest.mark.slow
def test_long_book_notebook(tmp_path):
    """As README says it, in the folder of a user without network."""
    windows = {"continuation_length": 48, "max_windows": 6, "control_windows": 2, "press": "knorm", "sample_idx": 0}
    notebook = run("02_pg19_ppl", tmp_path, **{**TEXT, **windows}, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "The Python Language Reference" in text and "knorm（压缩率 0.90）：每词元多" in text
    assert len(records.load_records(tmp_path / "out")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_wikitext_ppl", "02_pg19_ppl"])
def test_notebooks_without_a_press_that_takes_the_ratio(name, tmp_path):
    windows = {"continuation_length": 32, "max_windows": 2, "control_windows": 1, "press": "think"}
    run(name, tmp_path, **{**TEXT, **windows}, output_dir=str(tmp_path / "out"))
    assert set(records.load_records(tmp_path / "out")["press"]) == {"no_press", "think"}


@pytest.mark.slow
def test_recall_notebook(tmp_path):
    asked = {"press": ["streaming_llm", "keydiff"], "compression_ratio": [0.5, 0.9], "query_aware": [False, True]}
    notebook = run("05_recall", tmp_path, **{**TEXT, "context_length": 400}, **asked, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "不压缩时的准确率：问题在外" in text and "秩相关" in text and RULE in text
    measured = records.load_records(tmp_path / "out").set_index(["press", "compression_ratio", "query_aware"])[
        "accuracy"
    ]
    assert len(measured) == 10 and measured["no_press", 0.0, False] >= 0.9
    assert measured["streaming_llm", 0.9, False] <= 0.2


@pytest.mark.slow
def test_speed_notebook(tmp_path):
    cells = {"context_lengths": [200, 300], "batch_sizes": 2, "max_new_tokens": 6}
    presses = {"press": ["snapkv", "chunkkv_snapkv"], "dtype": ["float32", "bfloat16"]}
    notebook = run("03_speed", tmp_path, model="demo", **cells, **presses, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "模型 **demo**（权重：bundled），随机词元" in text
    assert "kvpress 循环，chunkkv_snapkv 0.75，float32（上下文 200，批 2）没有计时：不能整批运行" in text
    assert "上下文 300、批 2、bfloat16：只看压缩：" in text and "都不压缩时，transformers 的一步与本库之比：" in text
    assert "bfloat16 与 float32 每步用时之比：本库为" in text and "bfloat16 的代价" in text
    runs = records.load_records(tmp_path / "out")
    assert len(runs) == 2 * 2 * (3 + 1 + 1 + 2)


@pytest.mark.slow
def test_streaming_notebook(tmp_path):
    small = {"n_sink": 4, "window": 60, "max_tokens": 3000, "dense_limit": 2600, "recompute_samples": 12}
    grid = {"ablation_sinks": [0, 4], "ablation_sizes": [64], "sample_tokens": 300}
    where = {"model": "demo", "dataset": "python-docs", "output_dir": str(tmp_path / "out")}
    notebook = run("04_streaming", tmp_path, **where, **small, **grid)
    text = said(notebook)
    assert "The Python Language Reference" in text and "读 3000 个词元" in text
    assert "汇聚点加窗口（4 + 60）：每词元差" in text and "**只留窗口**，第 501 个词元起" in text
    found = records.load_records(tmp_path / "out").set_index("press")
    assert sorted(found.index) == ["dense", "recompute", "sinks", "window"] and "4 份记录" in text
    assert found["n_tokens"].to_dict() == {"dense": 2599, "recompute": 12, "sinks": 2999, "window": 2999}


@pytest.mark.slow
def test_tasks_notebook(tmp_path):
    asked = {"tasks": ["kvneox_passkey", "kvneox_copy"], "press": ["streaming_llm", "keydiff"], "limit": 8}
    asked |= {"question": ["outside", "inside"], "compression_ratio": [0.5, 0.9]}
    notebook = run("07_tasks", tmp_path, model="demo", **asked, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert (
        "模型 **demo**（权重：bundled）" in text and "不压缩时的得分：口令" in text and "看得到问题，得分的变化" in text
    )
    measured = records.load_records(tmp_path / "out").set_index(["dataset", "press", "compression_ratio", "question"])
    assert len(measured) == 2 * 2 * 5 and "20 份记录" in text
    assert measured["score"]["kvneox_passkey", "no_press", 0.0, "outside"] >= 0.85
    assert measured["score"]["kvneox_passkey", "streaming_llm", 0.9, "outside"] <= 0.3


@pytest.mark.slow
def test_heads_notebook(tmp_path):
    asked = {**TEXT, "context_length": 400, "n_keys": 10, "window_context": 192, "continuation_length": 48}
    asked |= {"keys_per_context": 1}  # of few contexts intervals are too wide for a verdict
    notebook = run("08_heads", tmp_path, **asked, max_windows=6, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "模型 **demo**（权重：bundled）" in text and "个头里抄写的有" in text
    assert "抄写的头是必要的" in text and "在抄写的头里留住数字是充分的" in text
    assert "压缩率 0.90，每词元多付：" in text and "这一对是否见过来分" in text
    assert len(records.load_records(tmp_path / "out")) == 1 + 2 * 2 and "5 份记录" in text
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(pictures) == 3


@pytest.mark.slow
def test_explore_notebook(tmp_path):
    asked = {**TEXT, "continuation_length": 8, "press": "adakv_snapkv"}
    notebook = run("06_explore", tmp_path, **asked, output_dir=str(tmp_path / "out"))
    assert "python-docs__demo__adakv_snapkv__0.75" in said(notebook)
    pages = [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("press <b>adakv_snapkv</b>" in page.get("text/html", "") for page in pages)
    assert sum("个头中" in page.get("text/html", "") for page in pages) == 1
    boxes = [page for page in pages if "application/vnd.jupyter.widget-view+json" in page]
    assert sum(page["text/plain"].startswith("VBox(") for page in boxes) == 1
    assert records.load_records(tmp_path / "out")["kept_fraction"].tolist() == pytest.approx([0.25], abs=0.01)
