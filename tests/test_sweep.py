"""Params files: what they expand to, what is refused and where, and a sweep of which one run fails."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY

from kvneox_lib.inputs.weights import demo_folder, load_model
from kvneox_lib.presses.by_name import expand_presses, press_names
from kvneox_lib.studies import digest, records
from kvneox_lib.studies.explore import record_exploration
from kvneox_lib.studies.perplexity import measure_perplexity
from kvneox_lib.studies.plan import declared
from kvneox_lib.studies.recall import measure_recall
from kvneox_lib.studies.speed import measure_speed
from kvneox_lib.studies.streaming import measure_streaming
from kvneox_lib.studies.sweep import Run, notebook_defaults, read_sweep, summary
from kvneox_lib.studies.table import BY_NOTEBOOK

NOTEBOOKS = REPOSITORY / "notebooks"
PARAMS = sorted((REPOSITORY / "params").glob("*.yaml"))


@pytest.fixture
def sweep(tmp_path):
    def read(text: str):
        path = tmp_path / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        return read_sweep([path], NOTEBOOKS)

    return read


@pytest.fixture
def texts(tmp_path, monkeypatch):
    for name in ("wikitext-2-v1", "gutenberg-pre1919"):
        (tmp_path / "texts" / name).mkdir(parents=True)
    monkeypatch.setenv("KVNEOX_TEXTS", str(tmp_path / "texts"))
    wanted = (REPOSITORY / "params" / "demo-wordings.yaml").read_text(encoding="utf-8")
    for step in set(re.findall(r"\bstep\d+\b", wanted)):
        (tmp_path / "demo" / step).mkdir(parents=True)
        shutil.copy(demo_folder() / "config.json", tmp_path / "demo" / step)
    shutil.copy(demo_folder() / "config.json", tmp_path / "demo")
    monkeypatch.setenv("KVNEOX_CHECKPOINTS", str(tmp_path / "demo"))


# ---- what a file expands to -----------------------------------------------------------------------------------------

SMALL = """\
studies:
  - notebook: 01_wikitext_ppl
    fixed: {model: demo, weights: pretrained, dataset: python-docs, compression_ratio: [0.5, 0.9], output_dir: out/ppl}
    grid:
      press: [snapkv, think]
      seed: [0, 1]
    resources: {gpus: 1, mem_mb: 4000}
  - notebook: 03_speed
    fixed: {model: pythia-70m, weights: random, context_lengths: [64], batch_sizes: [1, 4], output_dir: out/speed}
"""


def test_a_file_expands_to_these_runs(sweep):
    found = sweep(SMALL)
    at = "out/ppl/python-docs__demo__"
    assert [(run.study, run.outputs, run.needs) for run in found[:6]] == [
        ("01_wikitext_ppl", (f"{at}no_press__0.00.json",), ()),
        ("01_wikitext_ppl", (f"{at}no_press__0.00__seed=1.json",), ()),
        ("01_wikitext_ppl", (f"{at}snapkv__0.50.json", f"{at}snapkv__0.90.json"), (f"{at}no_press__0.00.json",)),
        (
            "01_wikitext_ppl",
            (f"{at}snapkv__0.50__seed=1.json", f"{at}snapkv__0.90__seed=1.json"),
            (f"{at}no_press__0.00__seed=1.json",),
        ),
        ("01_wikitext_ppl", (f"{at}think__own.json",), (f"{at}no_press__0.00.json",)),
        ("01_wikitext_ppl", (f"{at}think__own__seed=1.json",), (f"{at}no_press__0.00__seed=1.json",)),
    ]
    assert [(run.parameters["press"], run.parameters["seed"]) for run in found[:3]] == [
        ("no_press", 0),
        ("no_press", 1),
        ("snapkv", 0),
    ]
    assert {(run.gpus, run.mem_mb, run.cores) for run in found[:6]} == {(1, 4000, 1)}
    at, end = "out/speed/random-tokens__pythia-70m__", "weights=random.json"
    assert found[6].outputs == tuple(
        f"{at}{variant}__batch_size={batch}__context_length=64__engine={engine}__{end}"
        for batch in (1, 4)
        for variant, engine in (
            ("no_press__0.00", "ours"),
            ("snapkv__0.75", "ours"),
            ("no_press__0.00", "stock"),
            ("no_press__0.00", "static"),
            ("snapkv__0.75", "kvpress"),
        )
    )
    assert (
        len(found) == 7 and found[6].cores is None and found[6].executed.startswith("results/notebooks/sweep/03_speed/")
    )


def test_a_mapping_is_merged_and_a_context_cut_as_the_notebooks_do_it(sweep):
    found = sweep(
        """\
studies:
  - notebook: 05_recall
    fixed: &all {model: demo, weights: pretrained, dataset: python-docs, press: knorm, compression_ratio: 0.5}
  - notebook: 05_recall
    fixed: {<<: *all, context_length: 4000, query_aware: [false, true]}
"""
    )
    assert [run.study for run in found] == ["05_recall", "05_recall_2"]
    assert found[1].parameters["press"] == "knorm" and found[1].parameters["context_length"] == 4000
    at, length = "results/recall/python-docs__demo__", "__context_length=1984"  # 2048 less the room for an answer
    assert found[1].outputs == tuple(
        f"{at}{press}{length}{mode}.json"
        for mode in ("", "__query_aware=True")
        for press in ("no_press__0.00", "knorm__0.50")
    )


WINDOWS = {"continuation_length": 8, "max_windows": 1, "control_windows": 1}
KEYS = {"n_keys": 2, "keys_per_context": 2, "depths": None}
TURNS = {"max_new_tokens": 2, "repeats": 1}
STREAM = {"recompute_samples": 2, "ablation_sinks": [0, 2], "ablation_sizes": [16], "sample_tokens": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "measure", "asked"),
    [
        # presses with ratios and with a strength of their own; a context that is cut
        ("01_wikitext_ppl", measure_perplexity, {"press": ["snapkv", "think", "per_layer_knorm"], **WINDOWS}),
        ("02_pg19_ppl", measure_perplexity, {"context_length": 100, "context_limit": 90, "sample_idx": 0, **WINDOWS}),
        ("03_speed", measure_speed, {"model": "pythia-14m", "weights": "random", "context_lengths": [40], **TURNS}),
        ("04_streaming", measure_streaming, {"window": 30, "max_tokens": 600, **STREAM}),
        ("05_recall", measure_recall, {"press": "knorm", "query_aware": [True, False], "context_length": 200, **KEYS}),
        ("06_explore", record_exploration, {"press": "think", "context_length": 100, "continuation_length": 4}),
    ],
)
def test_records_are_called_as_declared(notebook, measure, asked, tmp_path):
    defaults = notebook_defaults(NOTEBOOKS / f"{notebook}.ipynb")
    found = {"model": "demo", "weights": "pretrained", "dataset": "python-docs", "output_dir": str(tmp_path)}
    asked = {**defaults, **{name: value for name, value in found.items() if name in defaults}, **asked}
    measure(**asked)
    written = sorted(str(path) for path in tmp_path.glob("*.json"))
    names = declared(measure, BY_NOTEBOOK[notebook].plan, asked)
    assert written == sorted(f"{tmp_path}/{name}.json" for name in names)


def test_a_record_is_called_the_same_for_weights_that_turn_out_the_same(tmp_path):
    small = {"context_length": 64, "continuation_length": 8, "max_windows": 1, "control_windows": 1}
    asked = {"model": "demo", "dataset": "python-docs", "press": "no_press", **small, "output_dir": str(tmp_path)}
    names = [
        measure_perplexity(**asked, weights=weights).records["run_id"].tolist() for weights in ("auto", "pretrained")
    ]
    assert names[0] == names[1] and len(list(tmp_path.glob("*.json"))) == 1


def test_reference_declares_the_committed_records(monkeypatch):
    texts = REPOSITORY.parent / "shared" / "data"
    if not texts.is_dir():
        pytest.skip(f"the texts of the reference are not in {texts}")
    monkeypatch.setenv("KVNEOX_TEXTS", str(texts))
    found = read_sweep([REPOSITORY / "params" / "reference.yaml"], NOTEBOOKS)
    wanted = {path for run in found for path in run.outputs}
    folder = Path("results/reference")
    studies = {path.name.partition(".")[0] for path in (REPOSITORY / folder).glob("*.csv")}
    committed = {
        (folder / study / f"{name}.json").as_posix()
        for study in studies
        for name, record in records.all_records(REPOSITORY / folder / study).items()
        if record["model"] != "demo-wordings"  # which a file of its own declares where its weights are at hand
    }
    assert len(committed) > 400
    assert committed <= wanted
    for study in ("wikitext_ppl", "pg19_ppl", "recall"):
        assert {path for path in wanted - committed if f"/{study}/" in path} == set(), study
    others = {run.parameters["press"] for run in found if run.study == "02_pg19_ppl_2"} - {"no_press"}
    assert others == set(press_names()) - set(expand_presses("all"))


def test_demo_runs_every_notebook():
    found = read_sweep([REPOSITORY / "params" / "demo.yaml"], NOTEBOOKS)
    assert {run.notebook for run in found} == set(NOTEBOOKS.glob("*.ipynb"))
    for run in found:
        assert run.parameters["model"] == "demo" and run.parameters.get("dataset", "python-docs") == "python-docs"


# ---- what is refused ------------------------------------------------------------------------------------------------

STUDY = """\
studies:
  - notebook: 01_wikitext_ppl
    fixed:
      model: demo
      weights: pretrained
      dataset: python-docs
      {fixed}
    grid:
      {grid}
"""


@pytest.mark.parametrize(
    ("fixed", "line", "message"),
    [
        ("contxt_length: 64", 7, "parameter 'contxt_length' is unknown; did you mean context_length"),
        ("press: snapk", 7, "press 'snapk' is unknown; did you mean snapkv"),
        ("press: kvzap", 7, "press 'kvzap' needs trained surrogate weights"),
        ("press: []", 7, "press=[]: a list must not be empty"),
        ("compression_ratio: 1.0", 7, "compression_ratio=1.0: allowed is a number from 0 to below 1"),
        ("compression_ratio: [0.5, -0.1]", 7, "compression_ratio=-0.1: allowed"),
        ("compression_ratio: '0.5'", 7, "compression_ratio='0.5': allowed"),
        ("max_windows: 2.5", 7, "max_windows=2.5: must be a whole number of at least 1"),
        ("context_length: 0", 7, "context_length=0: must be a whole number of at least 1"),
        ("context_length: null", 7, "context_length=None: must be a whole number"),
        ("batch_size: true", 7, "batch_size=True: must be a whole number"),
        ("split: tset", 7, "split='tset': did you mean test?"),
        ("dtype: float8", 7, "dtype='float8': did you mean"),
        ("device: gpu", 7, "device='gpu': allowed is auto, all, cpu, cuda"),
        ("attn_implementation: flash", 7, "attn_implementation='flash': allowed is one of auto, sdpa"),
        ("overwrite: true", 7, "overwrite=True is not for a params file: what is done again"),
        ("output_dir: ''", 7, "output_dir='': allowed is the path of a folder"),
        ("output_dir: 'out/{x}'", 7, "braces mean something else to Snakemake"),
        ("data_dir: /tmp", 7, "data_dir='/tmp': allowed is None beside dataset='python-docs'"),
        ("output_dir: 3", 7, "output_dir=3: allowed is the path of a folder"),
        ("data_dir: /no/such/folder", 7, "data_dir='/no/such/folder': allowed is a folder that exists"),
        ("data_dir: $NO_SUCH_VARIABLE", 7, "data_dir: the variable NO_SUCH_VARIABLE is not set"),
        ("model: demo", 7, "'model' is given twice, here and in line 4"),
        ("seed: 1", 9, "seed is in fixed (line 7) and in grid"),
    ],
)
def test_mistakes_are_told_with_file_line_and_what_is_allowed(fixed, line, message, sweep, tmp_path):
    with pytest.raises(ValueError) as refusal:
        sweep(STUDY.format(fixed=fixed, grid="seed: [0, 1]"))
    (told,) = str(refusal.value).splitlines()
    assert told.startswith(f"{tmp_path / 'sweep.yaml'}:{line}: ") and message in told


PLAIN = STUDY.format(fixed="max_windows: 2", grid="seed: [0, 1]")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (PLAIN.replace("01_wikitext_ppl", "01_wikitext"), 2, "notebook '01_wikitext' is unknown; did you mean 01_wiki"),
        (PLAIN.replace("model: demo", "model: pythia-71m"), 4, "did you mean pythia-70m"),
        (PLAIN.replace("pretrained", "auto"), 5, "weights='auto' is not for a params file: it may load another model"),
        (PLAIN.replace("weights: pretrained", "split: test"), 2, "wants weights: what is measured"),
        (PLAIN.replace("dataset: python-docs", "split: test"), 2, "wants dataset: what is measured"),
        (
            PLAIN.replace("python-docs", "/no/such/text"),
            6,
            "dataset='/no/such/text': allowed is wikitext, pg19, python",
        ),
        (PLAIN.replace("    grid", "    grids"), 8, "key 'grids' is unknown; did you mean grid"),
        (PLAIN.replace("seed: [0, 1]", "seed: 1"), 9, "seed: 1; in grid stands a list of values"),
        (PLAIN.replace("seed: [0, 1]", "press: [snapkv, tofa]"), 9, "press 'tofa' is unknown; did you mean tova"),
        (PLAIN + "    resources: {gpu: 1}\n", 10, "resource 'gpu' is unknown; did you mean gpus"),
        (PLAIN + "    resources: {cores: 0}\n", 10, "cores: 0; allowed is a whole number, 1 or above"),
        (PLAIN + "    resources: {mem_mb: {demo: 0}}\n", 10, "mem_mb: 0; allowed is a whole number, 1 or above"),
        (PLAIN + "    resources: {mem_mb: {pythia-70m: 8000}}\n", 10, "mem_mb: lacks demo"),
        (PLAIN + "name: x\n", 10, "key 'name' is unknown; Allowed: studies"),
        (PLAIN.replace("seed: [0, 1]", "seed: [0, 0]"), 2, "is already made by sweep: 01_wikitext_ppl"),
        (PLAIN.replace("seed: [0, 1]", "seed: [0, 1"), 10, "not YAML: "),
        ("", 1, "`studies:` must be a list"),
        ("studies: {}", 1, "`studies:` must be a list"),
        ("studies:\n- {}", 2, "notebook None is unknown; Allowed: 00_adapter"),
        ("studies:\n- {[a]: b}", 2, "not YAML: a key must be a word"),
        (PLAIN.replace("seed: [0, 1]", "seed: []"), 9, "seed: []; in grid stands a list of values"),
        (PLAIN.replace("01_wikitext_ppl", "06_explore").replace("max_windows: 2", "press: all"), 7, "'all' is unknown"),
        ("- a", 1, "`studies:` must be a list"),
        (
            PLAIN.replace("01_wikitext_ppl", "05_recall").replace("max_windows: 2", "press: decoding_knorm"),
            7,
            "decoding",
        ),
        (
            "studies:\n  - notebook: 00_adapter\n    fixed: {model: demo}",
            2,
            "device='auto' is not for a params file: 00_adapter names its",
        ),
        (
            "studies:\n  - notebook: 03_speed\n    fixed: {model: demo, weights: random}\n    grid: {press: [knorm]}",
            4,
            "press: what is timed takes turns in one run",
        ),
        (
            "studies:\n  - notebook: 00_adapter\n    fixed:\n      model: demo\n      device: all",
            5,
            "device='all' is not for a params file: 00_adapter names its record after the one device",
        ),
    ],
)
def test_so_are_mistakes_elsewhere(text, line, message, sweep, tmp_path):
    with pytest.raises(ValueError) as refusal:
        sweep(text)
    (told,) = str(refusal.value).splitlines()
    assert told.startswith(f"{tmp_path / 'sweep.yaml'}:{line}: ") and message in told


@pytest.mark.parametrize(
    ("notebook", "line", "message"),
    [
        ("06_explore", "press: [snapkv]", "press ['snapkv'] is unknown"),
        ("06_explore", "compression_ratio: [0.5, 0.9]", "compression_ratio=[0.5, 0.9]: allowed is a number"),
        ("01_wikitext_ppl", "continuation_length: 4000", "the 4000 tokens after the context leave no room for it"),
        ("02_pg19_ppl", "continuation_length: 2048", "leave no room for it in a window of 2048"),
        ("05_recall", "context_limit: 64", "the 64 tokens after the context leave no room for it in a window of 64"),
        ("06_explore", "continuation_length: 4000", "leave no room for it in a window of 2048"),
    ],
)
def test_what_a_notebook_cannot_do_is_told_at_the_line_of_its_key(notebook, line, message, sweep, tmp_path):
    text = STUDY.format(fixed=line, grid="seed: [0, 1]").replace("01_wikitext_ppl", notebook)
    with pytest.raises(ValueError) as refusal:
        sweep(text)
    (told,) = str(refusal.value).splitlines()
    assert told.startswith(f"{tmp_path / 'sweep.yaml'}:7: {line.partition(':')[0]}") and message in told


def test_so_is_what_only_a_value_of_the_grid_asks_for(sweep):
    with pytest.raises(ValueError, match="yaml:9: continuation_length=2048: the 2048 tokens after the context leave"):
        sweep(STUDY.format(fixed="seed: 1", grid="continuation_length: [2047, 2048]"))


def test_a_context_of_one_token_is_the_shortest(sweep):
    (run,) = sweep(STUDY.format(fixed="press: no_press", grid="continuation_length: [2047]"))
    assert "__context_length=1__" in run.outputs[0]


@pytest.mark.parametrize("notebook", ["01_wikitext_ppl", "02_pg19_ppl", "04_streaming", "05_recall", "06_explore"])
def test_random_weights_are_for_what_measures_no_quality(notebook, sweep):
    plain = STUDY.format(fixed="dtype: auto", grid="seed: [0, 1]").replace("01_wikitext_ppl", notebook)
    assert sweep(plain)
    with pytest.raises(ValueError, match="yaml:5: weights='random': quality is measured"):
        sweep(plain.replace("pretrained", "random"))
    in_grid = plain.replace("      weights: pretrained\n", "").replace("seed: [0, 1]", "weights: [pretrained, random]")
    with pytest.raises(ValueError, match="yaml:8: weights='random'"):
        sweep(in_grid)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("studies: &again\n  - *again\n", r"yaml:1: not YAML: an alias must not stand inside what it names"),
        (f"{BOMB}studies: *a9\n", r"yaml:\d+: not YAML: with all aliases written out there are more than 20000 values"),
    ],
)
def test_a_small_file_cannot_be_an_endless_one(text, told, sweep):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=told):
        sweep(text)
    assert time.perf_counter() - began < 2


def test_all_mistakes_are_told_at_once(sweep):
    with pytest.raises(ValueError) as refusal:
        sweep(STUDY.format(fixed="split: tset", grid="press: [snapk]").replace("pretrained", "auto"))
    assert [told.split(":")[1] for told in str(refusal.value).splitlines()] == ["5", "7", "9"]


def test_reference_says_which_folder_it_wants(monkeypatch):
    monkeypatch.delenv("KVNEOX_TEXTS", raising=False)
    with pytest.raises(ValueError, match=r"reference\.yaml:\d+: .*KVNEOX_TEXTS is not set"):
        read_sweep([REPOSITORY / "params" / "reference.yaml"], NOTEBOOKS)


def test_text_and_weights_stand_in_only_where_weights_are_auto(cache, tmp_path):
    with pytest.raises(ConnectionError):
        load_model("pythia-70m", weights="pretrained")
    small = {"press": "no_press", "context_length": 64, "continuation_length": 8, "max_windows": 1}
    asked = {"model": "demo", "dataset": "wikitext", **small, "output_dir": str(tmp_path)}
    with pytest.raises(ConnectionError, match="Three ways out: set HF_ENDPOINT .* data_dir .* dataset='python-docs'"):
        measure_perplexity(**asked, weights="pretrained")
    assert not list(tmp_path.rglob("*.json"))
    with pytest.warns(UserWarning, match="python-docs .* STANDS IN for wikitext"):
        measure_perplexity(**asked, weights="auto")


# ---- what counts as another program ---------------------------------------------------------------------------------


def test_the_digest_follows_the_code_that_makes_figures_and_nothing_else(tmp_path, monkeypatch):
    library = tmp_path / "kvneox_lib"
    shutil.copytree(digest.LIBRARY, library, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    monkeypatch.setattr(digest, "LIBRARY", library)

    def digest_after(name: str, old: str, new: str) -> str:
        path = library / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        digest.code_digest.cache_clear()
        return digest.code_digest(measure_perplexity, False)

    before = digest.code_digest(measure_perplexity, False)
    windows, definition = "inputs/windows.py", "def windows("
    assert digest_after(windows, definition, f"# a remark\n{definition}") == before
    for docstring in ('"""Text cut', '"""A text in tokens'):
        assert digest_after(windows, docstring, docstring.replace('"""', '"""Reworded: ')) == before
    described = '"""Where this library keeps'
    assert digest_after("inputs/files.py", described, f"said = {described}") != before  # a text, but no docstring
    assert digest_after("inputs/files.py", f"said = {described}", described) == before

    # what shows figures, and how a record is kept, moves and is reworded without anything being measured again
    for name in ("pages/figures.py", "pages/words.py", "studies/records.py", "studies/sweep.py", "studies/recall.py"):
        assert digest_after(name, "import ", "import os\nimport ") == before, name
    assert digest_after("presses/registry.py", "随机淘汰", "任意淘汰") == before

    for name in ("studies/perplexity.py", windows, "measures/perplexity.py", "presses/registry.py", "neox/cache.py"):
        assert digest_after(name, "import ", "import os\nimport ") != before, name
        assert digest_after(name, "import os\nimport ", "import ") == before, name
    assert digest.code_digest(measure_perplexity, True) != digest.code_digest(measure_perplexity, False)


# ---- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def execute(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("execute", REPOSITORY / "workflow" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return module


def test_every_run_gets_gpus_of_its_own(execute, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    with execute.own_gpus(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")  # another process, started with the machine's
        with execute.own_gpus(2):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    with execute.own_gpus(3):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6,7"
    with pytest.raises(SystemExit, match="gpus: 4, but this machine shows 3: 4, 6, 7"), execute.own_gpus(4):
        pass


def test_runs_wait_for_a_gpu_that_is_taken(execute, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    taken, waits = execute.own_gpus(1), []
    taken.__enter__()
    monkeypatch.setattr(
        execute.time, "sleep", lambda seconds: (waits.append(seconds), taken.__exit__(None, None, None))
    )
    with execute.own_gpus(1):
        assert len(waits) == 1


def test_slurm_has_chosen_the_gpus(execute, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with execute.own_gpus(8):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_picture_that_fails_costs_no_measurement(execute, tmp_path, monkeypatch):
    """As long as every record is there; the executed notebook keeps the error."""
    monkeypatch.setattr(execute.threading.Thread, "start", lambda thread: None)
    record, executed = tmp_path / "record.json", tmp_path / "executed.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata=kernel)
    nbformat.write(notebook, tmp_path / "fails.ipynb")
    run = (str(tmp_path / "fails.ipynb"), str(executed), "{}", "0", str(record))
    assert execute.main(*run) == 1
    record.touch()
    assert execute.main(*run) == 0 and "ZeroDivisionError" in executed.read_text()
    made = Run("study", Path("x"), {}, (str(record),), (), str(executed), "", 0, None, 1)
    assert "1 of 1 runs are done." in summary([made])
    assert "measured, but then it FAILED with ZeroDivisionError" in summary([made])


# ---- Snakemake ------------------------------------------------------------------------------------------------------


def snakemake(*arguments, folder=REPOSITORY) -> subprocess.CompletedProcess:
    library = folder if (folder / "kvneox_lib").is_dir() else REPOSITORY
    environment = {**os.environ, "PYTHONPATH": str(library)}
    command = [sys.executable, "-m", "snakemake", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_params_files_pass_a_dry_run_and_have_a_rule_graph(texts, tmp_path):
    """All at once, in another folder: what was done here before must not matter, and nothing is left here."""
    here = ("--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path))
    here += ("--configfile", *map(str, PARAMS))
    jobs = len(read_sweep(PARAMS, NOTEBOOKS)) + 1  # and `all`
    dry = snakemake("-n", "--quiet", "rules", *here)
    assert dry.returncode == 0, dry.stderr
    assert re.search(rf"^total +{jobs}$", dry.stdout, re.M), dry.stdout
    graph = snakemake("--rulegraph", *here)
    assert graph.returncode == 0 and graph.stdout.count("label = ") == jobs, graph.stderr


@pytest.mark.slow
def test_what_is_timed_takes_all_cores_here_and_one_in_a_job_of_a_cluster(tmp_path):
    """There Snakemake plans a run once more, within the job, and must come to the cores that the job was given."""
    path = tmp_path / "timed.yaml"
    path.write_text("studies: [{notebook: 03_speed, fixed: {model: demo, weights: pretrained}}]", encoding="utf-8")
    plan = ("-n", "-c", "2", "--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path))
    plan += ("--configfile", str(path))
    local, job = snakemake(*plan), snakemake(*plan, "--mode", "remote")
    assert "threads: 2" in local.stdout, local.stderr
    assert "rule 03_speed_run0:" in job.stdout and "threads:" not in job.stdout, job.stderr


TINY = """\
studies:
  - notebook: 01_wikitext_ppl
    fixed:
      model: demo
      weights: pretrained
      dataset: python-docs
      press: knorm
      compression_ratio: 0.5
      context_length: 64
      continuation_length: 16
      max_windows: 2
      control_windows: 1
      output_dir: results/ppl
    grid:
      sample_idx: [1, 0] # there is one document
"""


@pytest.mark.slow
def test_a_run_fails_the_others_go_on_and_only_what_is_new_is_done_again(tmp_path):
    for name in ("workflow", "notebooks", "kvneox_lib"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "Snakefile", tmp_path)
    (tmp_path / "profiles").symlink_to("workflow/profiles")
    path = tmp_path / "params" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(TINY, encoding="utf-8")
    sweep = ("-c", "1", "--configfile", "params/tiny.yaml")

    first = snakemake(*sweep, folder=tmp_path)
    assert first.returncode != 0
    assert "1 of 2 runs are done, these are not:" in first.stderr
    assert "FAILED with ValueError: sample_idx=1: pydoc_data.topics has 1 document(s)" in first.stderr
    (failed,) = (tmp_path / "results/notebooks/tiny").rglob("*sample_idx=1.ipynb")
    outputs = [output for cell in nbformat.read(failed, 4).cells for output in cell.get("outputs", [])]
    (traceback,) = (output.traceback for output in outputs if output.output_type == "error")
    assert "measure_perplexity" in "\n".join(traceback)
    done = records.load_records(tmp_path / "results/ppl")
    assert set(done["press"]) == {"no_press", "knorm"} and set(done["sample_idx"]) == {0}

    two = TINY.replace("      max_windows: 2\n", "").replace("[1, 0]", "[0]") + "      max_windows: [2, 3]\n"
    path.write_text(two, encoding="utf-8")
    planned = snakemake("-n", *sweep, folder=tmp_path).stdout
    (made,) = re.findall(r"^ +output: (.+)$", planned, re.M)
    assert "max_windows=3" in made and "max_windows=2" not in made

    path.write_text(TINY.replace("[1, 0]", "[0]"), encoding="utf-8")
    module = tmp_path / "kvneox_lib" / "measures" / "perplexity.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nANOTHER = 1\n", encoding="utf-8")
    time.sleep(1)  # started_at counts seconds
    again = snakemake(*sweep, folder=tmp_path)
    assert again.returncode == 0 and "1 of 1 runs are done." in again.stderr, again.stderr
    anew = records.load_records(tmp_path / "results/ppl")
    assert (anew["started_at"] > done["started_at"].max()).all()
    assert anew["nll_mean"].tolist() == done["nll_mean"].tolist()
