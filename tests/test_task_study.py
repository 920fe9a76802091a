"""The study of tasks: what the harness says, each run once, compared with no press on the same documents."""

import json
import re
import sys
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from kvneox_lib import load_model
from kvneox_lib.inputs.published import published
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.intervals import interval, mcnemar_p, wilson_ci95
from kvneox_lib.measures.scores import Scores, beside_published
from kvneox_lib.pages import tasks as pages
from kvneox_lib.pages.ranks import kendall
from kvneox_lib.studies import tasks as studies
from kvneox_lib.studies.plan import declared
from kvneox_lib.studies.tasks import measure_tasks

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

METRICS = ["metric", "filter", "value", "stderr", "higher_is_better"]
ASKED = {"model": "demo", "tasks": ["kvneox_passkey", "kvneox_copy"], "limit": 6}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    asked = {"press": ["random", "keydiff"], "compression_ratio": 0.5, "question": ["outside", "inside"]}
    return measure_tasks(**ASKED, **asked, output_dir=str(tmp_path_factory.mktemp("out")))


def test_what_is_declared_is_written(study):
    defaults = {name: value for name, value in studies.measure_tasks.__kwdefaults__.items()}
    asked = {**defaults, **ASKED, "press": ["random", "keydiff"], "compression_ratio": 0.5}
    asked |= {"question": ["outside", "inside"], "output_dir": str(study.folder)}
    assert study.records["run_id"].tolist() == declared(measure_tasks, studies.plan, asked)
    assert study.records["run_id"].iloc[1] == "kvneox_passkey__demo__random__0.50__limit=6"
    assert len(study.records) == 2 * 2 * 3 and set(study.records["weights"]) == {"bundled"}


def test_without_a_press_the_scores_are_those_of_the_harness_own_model(study, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from kvneox_lib.inputs.harness import task_manager

    folder = load_model("demo").source
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock = HFLM(stock, tokenizer=tokenizer, max_length=2048, device="cpu")
    manager = task_manager(bundled_only=True, seed=0)
    theirs = simple_evaluate(stock, tasks=ASKED["tasks"], task_manager=manager, limit=6, bootstrap_iters=0)["results"]
    scores = study.table("scores")
    plain = scores[scores["press"] == "no_press"].set_index(["dataset", "question", "metric"])["value"]
    for (task, _, metric), value in plain.items():
        assert value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4), (task, metric)
    assert len(plain) == 2 * (1 + 2)


def test_figures_are_of_the_documents_and_differences_are_paired(study):
    documents = study.table("documents")
    assert len(documents) == 12 * 6
    for _, run in study.records.iterrows():
        mine = documents[
            (documents[["dataset", "question", "press"]] == run[["dataset", "question", "press"]]).all(axis=1)
        ]
        difference = (mine["score"] - mine["baseline_score"]).to_numpy()
        assert run["score"] == pytest.approx(mine["score"].mean())
        assert run["delta_score"] == pytest.approx(difference.mean())
        ends = run["delta_score_ci95_low"], run["delta_score_ci95_high"]
        assert ends == pytest.approx(interval(difference, documents=np.arange(6)).ends)
        assert run["mcnemar_p"] == mcnemar_p(int((difference > 0).sum()), int((difference < 0).sum()))
        assert run["context_tokens"] == pytest.approx(mine["context_tokens"].mean(), abs=0.5)
        assert run["kept_fraction"] == pytest.approx(1.0 if run["press"] == "no_press" else 0.5, abs=0.01)


def test_a_prompt_is_compressed_as_the_mode_says(study):
    """Outside, the passages alone; inside, all but the last token."""
    pressed = study.table("documents").query("press == 'keydiff'")
    left = pressed["prompt_tokens"] - pressed["context_tokens"]
    assert (left[pressed["question"] == "inside"] == 1).all() and (left[pressed["question"] == "outside"] > 5).all()
    rules = study.records[study.records["press"] == "keydiff"].set_index(["dataset", "question"])["context_rule"]
    assert set(rules.loc[:, "outside"]) == {"context=6"} and set(rules.loc[:, "inside"]) == {"inside=6"}


def test_runs_are_not_done_again_unless_something_else_is_asked(study, monkeypatch):
    from kvneox_lib.measures import evaluation

    def nobody(*_):
        raise InterruptedError

    monkeypatch.setattr(evaluation, "evaluate_each", nobody)
    asked = {**ASKED, "press": "keydiff", "compression_ratio": 0.5, "output_dir": str(study.folder)}
    again = measure_tasks(**asked, question="inside")
    assert (
        again.records["score"].tolist()
        == study.records.set_index("run_id").loc[again.records["run_id"]]["score"].tolist()
    )
    for changed in ({"limit": 5}, {"seed": 1}, {"num_fewshot": 0}, {"cut": "middle"}, {"overwrite": True}):
        with pytest.raises(InterruptedError):
            measure_tasks(**{**asked, **changed})


def test_bits_are_what_the_harness_says_of_our_model_in_bits_alone(tmp_path):
    from lm_eval import simple_evaluate

    from kvneox_lib.inputs.harness import task_manager
    from kvneox_lib.measures.tasks import KVNeoXLM

    task = {**ASKED, "tasks": "kvneox_copy"}
    asked = {"press": ["keydiff", "snapkv"], "compression_ratio": 0.5, "kv_bits": [None, 2]}
    study = measure_tasks(**task, **asked, output_dir=str(tmp_path))
    found, scores = study.records, study.table("scores")
    assert found["kv_bits"].isna().tolist() == [True, False] * 3
    assert found["run_id"].iloc[3] == "kvneox_copy__demo__keydiff__0.50__kv_bits=2__limit=6"
    manager = task_manager(bundled_only=True, seed=0)
    for (name, bits), row in found.groupby(["press", "kv_bits"], dropna=False):
        press, kv_bits = None if name == "no_press" else name, None if pd.isna(bits) else int(bits)
        lm = KVNeoXLM("demo", press=press, kv_bits=kv_bits)
        told = simple_evaluate(lm, tasks=["kvneox_copy"], task_manager=manager, limit=6, bootstrap_iters=0)
        mine = scores[
            (scores["press"] == name) & (scores["kv_bits"].eq(bits) | scores["kv_bits"].isna() & pd.isna(bits))
        ]
        for metric, value in mine.set_index("metric")["value"].items():
            assert value == pytest.approx(told["results"]["kvneox_copy"][f"{metric},none"], rel=1e-6), (name, bits)
        assert row["kv_bytes"].iloc[0] == pytest.approx(lm.get_model_info()["kv_bytes"])
    by_bits = found.set_index(["press", found["kv_bits"].fillna(16)])["kv_bytes"]
    assert by_bits["no_press", 2] < 0.2 * by_bits["no_press", 16] and by_bits["keydiff", 2] < by_bits["no_press", 2]
    shown = pages.score_table(found)
    assert shown["存储"].tolist() == ["原样", "2 位"] * 3 and shown["与不压缩之差"].tolist().count("—") == 1
    assert [*pages.at_middle_ratio(found, "outside").index.sort_values()] == ["keydiff", "no_press", "snapkv"]
    panel = pages.by_task(found, "outside")["抄写"]
    assert len(panel) == 3 and panel["kv_bits"].isna().all()


def test_runs_of_one_press_are_never_parted(monkeypatch):
    from kvneox_lib.studies.runs import Runs

    asked = {"press": ["keydiff", "snapkv", "knorm"], "compression_ratio": [0.5, 0.9], "kv_bits": [None, 8, 4]}
    asked = {**studies.measure_tasks.__kwdefaults__, **ASKED, "tasks": "kvneox_copy", **asked, "overwrite": True}
    runs = Runs(measure_tasks, studies.plan, asked)
    monkeypatch.setattr(studies, "AT_ONCE", 9)
    found = [[run.press for run in group] for group in studies._together(runs)]
    assert found == [["no_press"] * 3 + ["keydiff"] * 6, ["snapkv"] * 6, ["knorm"] * 6]


def test_other_documents_are_other_runs(study, monkeypatch):
    """The same task under the same name may ask something else: another Python has another language reference."""
    from kvneox_lib.measures import evaluation

    monkeypatch.setattr(evaluation.AskedTask, "documents_sha256", "other")
    monkeypatch.setattr(evaluation, "evaluate_each", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        measure_tasks(**ASKED, press="keydiff", compression_ratio=0.5, output_dir=str(study.folder))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": "kvneox_passkeys"}, "did you mean kvneox_passkey"),
        ({"tasks": "kvneox"}, "is a group; allowed are single tasks, of it kvneox_cloze"),
        ({"question": "between"}, "question='between'"),
        ({"limit": 0}, "limit=0"),
        ({"limit": 1.5}, "limit=1.5"),
        ({"weights": "random"}, "random weights have none"),
        ({"press": "snapkvv"}, "did you mean"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure_tasks(**{**ASKED, **wrong}, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_context_that_is_too_short_for_a_press_is_an_error_or_is_counted(tmp_path):
    """lm-eval's way to ask several at once does not fail for the one that is short."""
    from lm_eval.api.instance import Instance

    from kvneox_lib.measures.tasks import KVNeoXLM

    lm = KVNeoXLM("demo", press="snapkv", question="inside")
    long, short = ("word " * 200, " word"), ("a b", " c")
    requests = [Instance("loglikelihood", {}, pair, 0, ("some", i, 1)) for i, pair in enumerate((long, short))]
    lm.loglikelihood(requests, disable_tqdm=True)
    told = lm.get_model_info()
    assert told["n_not_compressed"] == 1 and told["context_rule"] == "inside=2"
    assert told["kept_fraction"] == pytest.approx(0.5, abs=0.01)  # of what was compressed
    with pytest.raises(ValueError, match="no prompt has a context that it can compress"):
        lm.loglikelihood(requests[1:], disable_tqdm=True)


def asked_about(texts: list[str], right: np.ndarray) -> Scores:
    """What the harness says of questions about these texts."""
    samples = [
        {
            "doc_id": i,
            "filter": "none",
            "acc": float(hit),
            "doc": {"question": f"number {i}", "passage": text, "label": 1},
        }
        for i, (text, hit) in enumerate(zip(texts, right))
    ]
    metrics = pd.DataFrame([("acc", "none", right.mean(), 0.1, True)], columns=METRICS)
    return Scores(metrics, samples, [], 0, 1)


def test_questions_about_one_text_are_not_independent():
    rng = np.random.default_rng(0)
    right, plain = np.repeat(rng.random(12) < 0.5, 10), np.ones(120, bool)
    texts = [f"a passage, and it is number {i // 10}" for i in range(120)]
    (row,) = asked_about(texts, right).table(asked_about(texts, plain)).itertuples()
    ends = row.delta_score_ci95_low, row.delta_score_ci95_high
    assert ends == pytest.approx(interval(right - 1.0, None, np.arange(120) // 10).ends) and np.isnan(row.mcnemar_p)
    apart = [f"a passage, and it is number {i} of them" for i in range(120)]
    (row,) = asked_about(apart, right).table(asked_about(apart, plain)).itertuples()
    assert (row.score_ci95_low, row.score_ci95_high) == wilson_ci95(int(right.sum()), 120) and row.mcnemar_p < 1e-6
    assert row.delta_score_ci95_high - row.delta_score_ci95_low < 0.5 * (ends[1] - ends[0])


def test_p_values_are_corrected_for_all_that_are_shown():
    runs = pd.DataFrame({"press": ["no_press", "snapkv", "keydiff"], "mcnemar_p": [1.0, 0.03, 0.04], "kv_bits": None})
    assert pages.corrected(runs).tolist() == pytest.approx([np.nan, 0.06, 0.06], nan_ok=True)
    assert "2 个 McNemar p" in pages.correction(runs) and "小于 0.05 的有 0 个" in pages.correction(runs)
    assert pages.correction(runs.iloc[:1]) == ""


def test_mcnemar():
    """Ten discordant pairs, one of them for it: twice (1 + 10) of the 1,024 ways."""
    assert mcnemar_p(1, 9) == mcnemar_p(9, 1) == pytest.approx(2 * 11 / 1024)
    assert mcnemar_p(0, 0) == 1.0 and mcnemar_p(5, 5) == 1.0


def test_kendall_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for _ in range(20):
        one, other = (pd.Series(rng.integers(0, 6, 12)) for _ in range(2))
        tau, low, high, n = kendall(one, other)
        assert tau == pytest.approx(stats.kendalltau(one, other).statistic) and low <= tau <= high and n == 12
    rising = pd.Series(range(8))
    assert kendall(rising, rising)[:3] == (1.0, 1.0, 1.0) and kendall(rising, -rising)[0] == -1.0
    assert np.isnan(kendall(rising, pd.Series([1.0] * 8))[0])


def test_a_score_far_from_what_was_published_is_said(demo, tokenizer):
    """Of weights that are Pythia's: what the demo scores was never published."""
    (metric, (value, stderr)), *_ = published("pythia-70m", "lambada_openai", 0).items()
    table = pd.DataFrame([{"metric": metric, "filter": "none", "value": value + 2 * stderr, "stderr": stderr}])
    pythia = LoadedModel(demo, tokenizer, "pythia-70m", "pretrained", "somewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beside = beside_published(table, pythia, "lambada_openai", 0)
    assert beside["published"].tolist() == [value] and beside["published_stderr"].tolist() == [stderr]
    far = table.assign(value=value + 10 * stderr)
    with pytest.warns(UserWarning, match="more than three standard errors apart"):
        beside_published(far, pythia, "lambada_openai", 0)
    bundled = LoadedModel(demo, tokenizer, "pythia-70m", "bundled", "somewhere")
    assert beside_published(far, bundled, "lambada_openai", 0)["published"].isna().all()


def test_pages_of_few_runs(study):
    assert pages.modes_of(study.records) == ["outside", "inside"]
    table = pages.at_middle_ratio(study.records, "outside")
    assert table.index.tolist() == ["no_press", "keydiff", "random"] and table.columns.tolist() == ["口令", "抄写"]
    assert len(pages.score_table(study.records)) == 12 and len(pages.prompt_table(study.records)) == 4
    assert set(pages.inside_against_outside(study.records)) == {"口令", "抄写"}
    assert pages.published_table(study.table("scores")).empty


@pytest.mark.slow
def test_the_command_line(monkeypatch, capsys):
    """As README says it."""
    from kvneox_lib.__main__ import main

    page = (REPOSITORY / "README_zh.md").read_text(encoding="utf-8")
    line, in_bits = re.findall(r"^python -m kvneox_lib (tasks .*pretrained=demo.*)$", page, re.M)
    assert "kv_bits=4" in in_bits
    monkeypatch.setattr(sys, "argv", ["kvneox_lib", *line.split()])
    assert main() == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "exact_match" in line)
    assert float(row.split("|")[7]) >= 0.7
    monkeypatch.setattr(sys, "argv", ["kvneox_lib", *line.replace("kvneox_passkey", "kvneox_pass").split()])
    assert main() == 2 and "did you mean kvneox_passkey" in capsys.readouterr().err


def test_the_command_line_in_bits(monkeypatch, tmp_path, capsys):
    from kvneox_lib.__main__ import main

    def asked(bits: int, *more: str) -> list[str]:
        given = f"pretrained=demo,press=keydiff,compression_ratio=0.5,kv_bits={bits}"
        return ["kvneox_lib", "tasks", "--model_args", given, "--tasks", "kvneox_copy", "--limit", "2", *more]

    for bits in (8, 2):
        monkeypatch.setattr(sys, "argv", asked(bits, "--output_path", str(tmp_path / str(bits))))
        assert main() == 0
    told = [json.loads(next(tmp_path.glob(f"{bits}/*/results_*.json")).read_text())["config"] for bits in (8, 2)]
    assert [one["kv_bits"] for one in told] == [8, 2] and told[1]["kv_bytes"] < 0.5 * told[0]["kv_bytes"]
    monkeypatch.setattr(sys, "argv", asked(3))
    assert main() == 2 and "kv_bits=3: allowed is 8, 4, 2, or None" in capsys.readouterr().err


OWN_TASK = """
task: shouting
test_split: test
output_type: loglikelihood
custom_dataset: !function shouting.documents
doc_to_text: "{{word}} is shouted"
doc_to_target: " {{word|upper}}"
num_fewshot: 6
metric_list:
  - metric: acc
"""
OWN_DOCUMENTS = """
from datasets import Dataset

def documents(**_):
    words = "one two three four five six seven eight nine ten".split()
    return {"test": Dataset.from_list([{"word": word} for word in words])}
"""


def test_the_command_line_with_a_file_a_task_of_ones_own_and_a_cache(monkeypatch, tmp_path):
    """The shots are the context, though the harness' index does not have the task; answers that are kept are of their
    press alone."""
    from lm_eval import tasks

    from kvneox_lib.measures import command

    (tmp_path / "shouting.yaml").write_text(OWN_TASK)
    (tmp_path / "shouting.py").write_text(OWN_DOCUMENTS)
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))  # seconds
    told = []
    saying = command._evaluate

    def listening(evaluate, lm, **how):
        results = saying(evaluate, lm, **how)
        told.append((lm.get_model_info(), results["samples"]["shouting"]))
        return results

    monkeypatch.setattr(command, "_evaluate", listening)
    for press in ("no_press", "knorm", "knorm"):
        asked = {"tasks": "shouting", "model_args": {"pretrained": "demo", "press": press, "compression_ratio": 0.8}}
        (tmp_path / "asked.yaml").write_text(json.dumps(asked | {"limit": 3}))
        arguments = ["--config", str(tmp_path / "asked.yaml"), "--include_path", str(tmp_path)]
        kept = ["--use_cache", str(tmp_path / "cache"), "--log_samples", "--output_path", str(tmp_path / "out")]
        assert command.run([*arguments, *kept]) == 0
    answers = [[one["resps"] for one in samples] for _, samples in told]
    assert answers[0] != answers[1] == answers[2]
    assert told[1][0]["context_rule"] == "fewshot=3" and "context_rule" not in told[2][0]  # nothing was read again


def test_what_a_press_draws_hangs_on_the_seed_and_the_context_alone(demo):
    from kvneox_lib import make_press
    from kvneox_lib.measures.answers import compressed_each

    def kept(names: list[str], context, seed: int = 0):
        presses = [make_press(name, 0.5) for name in names]
        found = compressed_each(demo, context, presses, seed)
        return [one.cache.layers[0].keys for one in found][names.index("random")]

    one, other = range(100, 180), range(101, 181)
    alone = kept(["random"], one)
    for beside in (["random", "knorm"], ["knorm", "random"], ["kvzip", "random"], ["random", "leverage", "random"]):
        torch.randn(3)
        assert torch.equal(kept(beside, one), alone), beside
    places = [kept(["random"], context, seed)[..., 0] for context, seed in ((one, 0), (one, 1), (other, 0))]
    assert not torch.equal(places[0], places[1]) and not torch.equal(places[0], places[2])


def test_passkeys_hang_on_the_press():
    """keydiff keeps them; snapkv, which sees no question, does not."""
    from kvneox_lib import make_press
    from kvneox_lib.measures.evaluation import asked_tasks, evaluate_each
    from kvneox_lib.measures.tasks import KVNeoXLM

    loaded = load_model("demo")
    (asked,) = asked_tasks(["kvneox_passkey"], loaded, num_fewshot=None, limit=24, seed=0).values()
    presses = [None, make_press("keydiff", 0.5), make_press("snapkv", 0.5)]
    told = evaluate_each(KVNeoXLM(loaded, batch_size=8), presses, asked)
    plain, keydiff, snapkv = (results["results"]["kvneox_passkey"]["exact_match,none"] for results, _ in told)
    assert plain >= 0.9 and keydiff >= 0.7 and snapkv <= 0.3


def test_the_library_does_not_import_the_harness_by_itself():
    import subprocess

    script = "import sys, kvneox_lib, kvneox_lib.studies.table; print('lm_eval' in sys.modules); kvneox_lib.KVNeoXLM"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and done.stdout.split() == ["False"], done.stderr
