"""Finding the harness' tasks, loading their data from a hub on 127.0.0.1 and from the cache, RULER at Pythia's length,
and what EleutherAI published. No address but this machine's own is ever asked."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import DEMO, REPOSITORY
from hub_server import HOTPOT, LAMBADA, TASK_DATA, HubServer, publish_task_data

datasets = pytest.importorskip("datasets")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402

from kvneox_lib.inputs import harness  # noqa: E402
from kvneox_lib.inputs.harness import cache_first, check_task_names, load_tasks, members_of, task_manager  # noqa: E402
from kvneox_lib.inputs.published import far_from_published, published  # noqa: E402
from kvneox_lib.studies.tasks import measure_tasks  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
LAMBADA_YAML = str(TASKS / "lambada" / "lambada_openai.yaml")
HOTPOT_YAML = str(TASKS / "longbench" / "hotpotqa_e.yaml")
PUBLISHED = REPOSITORY / "kvneox_lib" / "inputs" / "published.csv"
AS_HANDED_OUT = REPOSITORY.parent / "shared" / "data" / "pythia-published" / "evals.csv"


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """All tasks of the harness, and a group with two of RULER's."""
    folder = tmp_path_factory.mktemp("tasks")
    group = {
        "group": "two_needles",
        "task": ["niah_single_1", "niah_multikey_2"],
        "aggregate_metric_list": [{"metric": "4096", "weight_by_size": False}],
    }
    (folder / "two_needles.yaml").write_text(json.dumps(group))
    return task_manager(tokenizer=DEMO, include_path=folder)


@pytest.fixture(scope="module")
def few():
    """Without the harness' index: its tasks are given as the paths of their files."""
    return task_manager(tokenizer=DEMO, bundled_only=True)


@pytest.fixture
def data_cache(cache, tmp_path, monkeypatch):
    """An empty cache for `datasets`, online."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


# ---- finding --------------------------------------------------------------------------------------------------------


def test_the_extra_is_what_the_messages_tell_to_install():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert harness.PACKAGES in project["optional-dependencies"]["tasks"]


def test_names_are_those_of_the_harness_its_groups_and_tags_and_ours(manager, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("a data set was touched"))
    assert "lambada" in manager.all_tags and "ruler" in manager.all_groups
    check_task_names(["lambada_openai", "lambada", "ruler", "two_needles", LAMBADA_YAML], manager)
    for typo, near in {"lambada_opnai": "lambada_openai", "niah_singel_1": "niah_single_1"}.items():
        with pytest.raises(ValueError, match=f"tasks='{typo}': did you mean {near}"):
            check_task_names(["piqa", typo], manager)
    with pytest.raises(ValueError, match="tasks='lambada_opnai': did you mean lambada_openai"):
        load_tasks(["lambada_opnai"], manager)
    for wrong in ("piqa", [], [3]):
        with pytest.raises(ValueError, match="must be a list of at least one name"):
            check_task_names(wrong, manager)


def test_without_a_manager_the_harness_is_read_only_for_a_name_that_is_not_in_the_box(monkeypatch, manager):
    asked = []
    boxed = {"kvneox_one"}

    def with_names(bundled_only):
        asked.append(bundled_only)
        return SimpleNamespace(all_tasks=boxed if bundled_only else boxed | set(manager.all_tasks))

    monkeypatch.setattr(harness, "_manager", with_names)
    check_task_names(["kvneox_one"])
    assert asked == [True]
    check_task_names(["kvneox_one", "piqa"])
    assert asked == [True, True, False]
    with pytest.raises(ValueError, match="tasks='kvneox_oen': did you mean kvneox_one"):
        check_task_names(["kvneox_oen"])


def test_what_a_manager_is_told(tmp_path, few):
    assert few.metadata == {"tokenizer": str(DEMO), "max_seq_lengths": [2048]}
    assert few.all_tasks == [name for name in few.all_tasks if name.startswith("kvneox")]
    other = task_manager(max_length=512, bundled_only=True, seeds=3)
    assert other.metadata == {"max_seq_lengths": [512], "seeds": 3}
    assert task_manager(bundled_only=True, max_seq_lengths=[1, 2]).metadata == {"max_seq_lengths": [1, 2]}
    for parameter in ("tokenizer", "include_path"):
        with pytest.raises(ValueError, match=f"{parameter}='.*nowhere': no such folder"):
            task_manager(bundled_only=True, **{parameter: tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="max_length=0: must be a whole number of at least 1"):
        task_manager(max_length=0)
    with pytest.raises(ValueError, match="max_seq_lengths='long'"):
        task_manager(max_seq_lengths=["long"])


def test_a_missing_package_is_named_with_its_command(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    with pytest.raises(ImportError, match=r"hotpotqa_e.*jieba(.|\n)*pip install 'lm-eval\[longbench,ruler\]=="):
        load_tasks([HOTPOT_YAML], few)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'lm-eval\["):
        task_manager()


# ---- data sets ------------------------------------------------------------------------------------------------------

READ_TASKS = f"""
    import json
    from kvneox_lib.inputs.harness import load_tasks, task_manager
    for task in load_tasks([{LAMBADA_YAML!r}, {HOTPOT_YAML!r}], task_manager(bundled_only=True)):
        docs = list(task.eval_docs)
        print(json.dumps([docs, task.doc_to_text(docs[0]), task.doc_to_target(docs[0])]))
"""


# The superuser writes where nobody may, unless that is taken from the process.
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.getuid() == 0 else []


def read_tasks(home: Path, *prefix: str, **environment: str) -> list:
    """What lm-eval's own tasks make of their data, in a fresh process whose cache is `home`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**inherited, "HF_HOME": str(home), "NO_PROXY": "*", "PYTHONPATH": str(REPOSITORY), **environment}
    command = [*prefix, sys.executable, "-c", textwrap.dedent(READ_TASKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]


def test_tasks_read_the_mirror_once_then_the_cache_alone_even_one_that_is_read_only(tmp_path):
    home = tmp_path / "home"
    with HubServer() as hub:
        publish_task_data(hub)
        lambada, hotpot = read_tasks(home, HF_ENDPOINT=hub.url)
        names = [f"{configuration}/test-00000-of-00001.parquet" for _, configuration in TASK_DATA]
        assert sorted(hub.downloads()) == sorted(["README.md", "README.md", *names])
        assert lambada[0] == TASK_DATA[LAMBADA] and hotpot[0] == TASK_DATA[HOTPOT]
        words = lambada[0][0]["text"].split(" ")
        assert lambada[1:] == [" ".join(words[:-1]), f" {words[-1]}"]
        assert hotpot[0][0]["context"] in hotpot[1] and hotpot[1].endswith("through Aldbury?\nAnswer:")
        assert hotpot[2] == ["Bulbourne", "the Bulbourne"]

        if WITHOUT_PRIVILEGE and not shutil.which(WITHOUT_PRIVILEGE[0]):
            pytest.skip("there is no setpriv with which the superuser could be kept from writing")
        hub.requests.clear()
        folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
        before = sorted(home.rglob("*"))
        for path in [home, *before]:  # lock files too: who owns one may open it in any folder
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert read_tasks(home, *WITHOUT_PRIVILEGE, HF_ENDPOINT=hub.url) == [lambada, hotpot]
        assert hub.requests == [] and sorted(home.rglob("*")) == before
        for folder in folders:
            folder.chmod(0o755)


def names_three_ways_out(message: str) -> bool:
    return all(way in message for way in ("HF_ENDPOINT", "HF_HOME", "kvneox_*"))


def test_an_endpoint_set_in_a_running_process_is_used_and_a_missing_data_set_is_named(few, data_cache, hub):
    with pytest.raises(ConnectionError, match=r"EleutherAI/lambada_openai \(default\).* did not deliver") as raised:
        load_tasks([LAMBADA_YAML], few)
    assert "DatasetNotFoundError" in str(raised.value) and names_three_ways_out(str(raised.value))
    publish_task_data(hub)
    [task] = load_tasks([LAMBADA_YAML], few)
    assert list(task.eval_docs) == TASK_DATA[LAMBADA]
    hub.stop()
    with pytest.raises(ConnectionError, match=r"Xnhyacinth/LongBench \(hotpotqa_e\) is not in the cache"):
        load_tasks([HOTPOT_YAML], few)
    with cache_first():
        assert datasets.load_dataset(*LAMBADA)["test"].to_list() == TASK_DATA[LAMBADA]
    assert datasets.load_dataset.__module__.startswith("datasets")  # and is itself again


def test_tasks_of_the_hub_are_scored_under_a_press(data_cache, hub, tmp_path):
    """As a user asks for them, with the weights in the box."""
    publish_task_data(hub)
    asked = {"model": "demo", "press": "knorm", "compression_ratio": 0.5, "num_fewshot": 2, "limit": 2}
    names = ["lambada_openai", "longbench_hotpotqa_e"]
    runs = measure_tasks(**asked, tasks=names, output_dir=str(tmp_path / "out")).records
    assert (
        len(runs) == 4 and (runs["n_documents"] == 2).all() and runs["metric"].tolist() == ["acc"] * 2 + ["score"] * 2
    )
    rules = runs[runs["press"] == "knorm"].set_index("dataset")[["context_rule", "kept_fraction", "n_cut"]]
    assert rules["context_rule"].tolist() == ["fewshot=2", "context=2"] and (rules["n_cut"] == 0).all()
    assert (rules["kept_fraction"] - 0.5).abs().max() < 0.02


def test_what_is_named_in_a_line_is_a_task_of_the_index(manager):
    found = harness._named_in_a_line()
    assert len(found) > 10_000 and found <= set(manager.all_subtasks) and {"lambada_openai", "kvneox_copy"} <= found


def test_groups_and_tags_are_told_from_tasks(manager):
    assert members_of("lambada_openai", manager) == []
    assert "lambada_openai" in members_of("lambada", manager) and "niah_single_1" in members_of("ruler", manager)
    assert {"kvneox_passkey", "kvneox_copy"} <= set(members_of("kvneox", manager))


def test_without_a_connection_the_answer_comes_at_once(few, data_cache, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for endpoint in (f"http://127.0.0.1:{port}", "https://huggingface.co"):  # nobody listens; no such host
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        start = time.perf_counter()
        with pytest.raises(ConnectionError, match=f"lambada_openai.*{endpoint} cannot be reached") as raised:
            load_tasks([LAMBADA_YAML], few)
        assert time.perf_counter() - start < 5 and names_three_ways_out(str(raised.value))


def test_offline_is_honoured(few, data_cache, hub, monkeypatch):
    publish_task_data(hub)
    for owner, name in ((harness.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE")):
        with monkeypatch.context() as forbidden:
            forbidden.setattr(owner, "HF_HUB_OFFLINE", True)
            with pytest.raises(ConnectionError, match=f"{name} forbids"):
                load_tasks([LAMBADA_YAML], few)
    assert hub.requests == []


def test_a_fixed_address_is_named_when_it_cannot_be_reached(manager, data_cache):
    for task, address in {"ruler_qa_squad": "https://rajpurkar.github.io", "ruler_qa_hotpot": "/hotpot_dev_"}.items():
        with pytest.raises(ConnectionError, match=f"tasks='{task}'.*{address}.* from there alone.*kvneox_"):
            load_tasks([task], manager)


def test_essays_without_what_cuts_them_into_sentences_say_so(manager, data_cache, hub, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ConnectionError, match="baber/paul_graham_essays is not in the cache"):
        load_tasks(["niah_single_2"], manager)
    essays = b'{"text": "' + b"One does what one can. " * 400 + b'"}\n'
    hub.add("baber/paul_graham_essays", {"train.jsonl": essays}, kind="datasets")
    with pytest.raises(ConnectionError, match="tasks='niah_single_2': .*nltk's punkt_tab"):
        load_tasks(["niah_single_2"], manager)


def test_nltk_is_let_download_only_from_where_it_can_be_reached(cache, hub, monkeypatch):
    import nltk

    asked = []
    monkeypatch.setattr(nltk, "download", lambda *what: asked.append(what) or True)
    with harness._nltk_if_reachable("niah_single_1"):
        assert nltk.download("punkt_tab") is False and asked == []
        monkeypatch.setattr(nltk.downloader.Downloader, "DEFAULT_URL", hub.url)
        assert nltk.download("punkt_tab") is True and asked == [("punkt_tab",)]
        monkeypatch.setattr(harness.constants, "HF_HUB_OFFLINE", True)
        assert nltk.download("punkt_tab") is False and asked == [("punkt_tab",)]
    with harness._nltk_if_reachable("lambada_openai"):
        assert nltk.download("all") is True  # none of this task's business


# ---- RULER ----------------------------------------------------------------------------------------------------------


class KnowsSome(LM):
    """Answers every `each`-th of RULER's questions with the number in the sentence that has the key."""

    def __init__(self, each: int):
        super().__init__()
        self.each = each

    def generate_until(self, requests):
        answers = []
        for request in requests:
            prompt = request.args[0]
            key = prompt.rsplit(" for ", 1)[1].split(" mentioned")[0]
            number = prompt.split(f"for {key} is: ")[1].split(".")[0]
            answers.append(f" {number}." if request.doc_id % self.each == 0 else " 1234.")
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def test_ruler_fits_2048_positions_and_is_scored_at_that_length(manager, tokenizer):
    built = load_tasks(["two_needles"], manager)
    for task in built[0].get_all_tasks():
        docs = task.eval_docs.select(range(0, len(task.eval_docs), 10))
        lengths = [len(tokenizer(f"{doc['input']} {doc['gen_prefix']}").input_ids) for doc in docs]
        assert max(lengths) + task.config.generation_kwargs["max_gen_toks"] <= 2048 + 32 and min(lengths) > 1600
    found = lm_eval.simple_evaluate(KnowsSome(each=4), tasks=built, limit=20, task_manager=manager, bootstrap_iters=1)
    share, n = 5 / 20, 20
    for name in ("niah_single_1", "niah_multikey_2"):
        scores = found["results"][name]
        assert scores["2048,none"] == share
        assert scores["2048_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
        assert not any(key.startswith("4096") for key in scores) and found["higher_is_better"][name] == {"2048": True}
    assert found["groups"]["two_needles"]["2048,none"] == share


def test_several_lengths_are_scored_each_on_its_own_prompts():
    folder = TASKS / "ruler"
    manager = task_manager(tokenizer=DEMO, bundled_only=True, max_seq_lengths=[512, 1024])
    [task] = load_tasks([str(folder / "niah_single_1.yaml")], manager)
    assert {doc["max_length"] for doc in task.eval_docs} == {512, 1024} == {int(name) for name in task.aggregation()}
    for doc in (task.eval_docs[0], task.eval_docs[-1]):
        assert task.process_results(doc, [doc["outputs"][0]]) == {str(doc["max_length"]): 1.0}
        assert task.process_results(doc, ["no"]) == {str(doc["max_length"]): 0.0}


@pytest.mark.parametrize("name", ["ruler_vt", "ruler_cwe", "ruler"])
def test_lengths_at_which_ruler_would_never_end_are_refused(manager, name, monkeypatch):
    monkeypatch.setattr(manager, "metadata", {"max_seq_lengths": [2048, 512]})
    monkeypatch.setattr(manager, "load", lambda *_: pytest.fail("was begun"))
    with pytest.raises(ValueError, match=rf"max_seq_lengths=\[2048, 512\]: tasks='{name}' wants 1024 or more"):
        load_tasks([name], manager)


def test_prompts_are_drawn_the_same_every_time_and_as_the_harness_draws_them():
    few = task_manager(tokenizer=DEMO, bundled_only=True, max_length=1024)
    names = [str(TASKS / "ruler" / f"{name}.yaml") for name in ("niah_single_1", "cwe")]
    random.seed(5)
    np.random.seed(5)
    first = [task.dataset["test"].to_list() for task in load_tasks(names, few)]
    drawn = random.random(), np.random.random()
    assert [task.dataset["test"].to_list() for task in load_tasks(names, few)] == first
    random.seed(5)
    np.random.seed(5)
    assert drawn == (random.random(), np.random.random())  # the caller's draws are as if nothing had been loaded
    random.seed(0)  # the first thing that simple_evaluate does
    assert few.load(names[:1])["tasks"]["niah_single_1"].dataset["test"].to_list() == first[0]


# ---- what was published ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PUBLISHED, AS_HANDED_OUT], ids=["bundled", "as handed out"])
def test_every_row_of_the_table_is_found_under_todays_name(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    table = pd.read_csv(path)
    for row in table.itertuples():
        metric = "perplexity" if row.metric == "ppl" else row.metric
        assert published(row.model, row.task, row.num_fewshot)[metric] == (row.value, row.stderr)
    rows = table[(table.model == "pythia-70m") & (table.task == "piqa") & (table.num_fewshot == 5)]
    assert len(published("EleutherAI/pythia-70m", "piqa", 5)) == len(rows) == 2


def test_metrics_are_named_as_the_harness_names_them(manager):
    """In the tasks' own files; wsc has no list of its own but for `acc`."""
    table = pd.read_csv(PUBLISHED)
    for task in table.task.unique():
        listed = {metric["metric"] for metric in manager.task_index[task].cfg["metric_list"]}
        assert set(published("pythia-70m", task, 0)) == listed, task


def test_what_was_not_published_is_empty_and_nothing_is_far_from_it():
    assert published("pythia-70m", "hellaswag", 0) == published("pythia-70m", "piqa", 3) == {}
    assert published("pythia-1b", "piqa", 0) == {} != published("pythia-1b-bf16", "piqa", 0)
    assert published("pythia-70m-deduped", "piqa", 0) != published("pythia-70m", "piqa", 0)
    assert not far_from_published("pythia-70m", "hellaswag", 0, "acc", 0.9, 0.0)
    published("pythia-70m", "piqa", 0).clear()
    assert published("pythia-70m", "piqa", 0)


def test_far_is_beyond_three_standard_errors_of_the_difference():
    row = pd.read_csv(PUBLISHED).query("model == 'pythia-410m' and task == 'piqa' and metric == 'acc'").iloc[0]
    asked = (row.model, row.task, int(row.num_fewshot), "acc")
    stderr = 2 * row.stderr
    three = 3 * math.sqrt(row.stderr**2 + stderr**2)
    for sign in (1, -1):
        assert not far_from_published(*asked, row.value + sign * 0.999 * three, stderr)
        assert far_from_published(*asked, row.value + sign * 1.001 * three, stderr)
    with pytest.raises(ValueError, match="stderr='N/A'"):
        far_from_published(*asked, row.value, "N/A")
    with pytest.raises(ValueError, match="value=nan"):
        far_from_published(*asked, math.nan, 0.1)
