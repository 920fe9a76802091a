"""States of a model's training: where they are found, and that no record of one is taken for that of another."""

import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from conftest import REPOSITORY
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_models import old_pythia

from kvneox_lib.inputs.published import REVISION, published
from kvneox_lib.inputs.weights import PYTHIA, demo_folder, find_target, load_model
from kvneox_lib.measures.scores import beside_published
from kvneox_lib.studies.recall import measure_recall
from kvneox_lib.studies.records import load_records
from kvneox_lib.studies.sweep import read_sweep

NOTEBOOKS = REPOSITORY / "notebooks"
REPO = "EleutherAI/pythia-70m"
FEW = {"weights": "pretrained", "dataset": "python-docs", "press": "knorm", "compression_ratio": 0.5, "device": "cpu"}
FEW |= {"n_keys": 2, "keys_per_context": 2, "depths": None, "context_length": 200}


@pytest.fixture
def two_states(hub, tmp_path):
    """A tiny model under the name of pythia-70m, in two states of training and a third that is main."""
    for seed, revision in enumerate(("step512", "step143000", "main")):
        files, _ = old_pythia(tmp_path / f"model-{seed}", seed=seed)
        hub.add(REPO, files, revision=revision)
    return hub


@pytest.fixture
def checkpoints(tmp_path):
    """A folder called `demo` with two states: the bundled model, and it with other values."""
    folder = tmp_path / "demo"
    for name in ("step1", "step2"):
        shutil.copytree(demo_folder(), folder / name)
    changed = load_file(folder / "step1" / "model.safetensors")
    changed = {name: values + 0.05 * torch.randn_like(values) for name, values in changed.items()}
    save_file(changed, folder / "step1" / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- where they are found -------------------------------------------------------------------------------------------


def test_revisions_of_the_hub_are_other_models(two_states):
    loaded = {name: load_model("pythia-70m", revision=name, device="cpu") for name in ("step512", "step143000", None)}
    assert [model.revision for model in loaded.values()] == ["step512", "step143000", None]
    assert {model.name for model in loaded.values()} == {"pythia-70m"}
    assert len({model.weights_id for model in loaded.values()}) == 3
    assert load_model("pythia-70m", revision="main", device="cpu").revision is None


def test_in_a_folder_they_are_its_subfolders(checkpoints, demo):
    found = load_model(checkpoints, revision="step2", device="cpu", dtype="float32")
    assert (found.name, found.revision, found.weights) == ("demo", "step2", "pretrained")
    assert torch.equal(found.model.embed_out.weight, demo.embed_out.weight)
    assert find_target(str(checkpoints), "step1").folder == checkpoints / "step1"
    with pytest.raises(ValueError, match="revision='step3': .* is a folder; allowed is None, or a sub.*: step1, step2"):
        load_model(checkpoints, revision="step3")
    with pytest.raises(ValueError, match="revision='step1': demo is a folder; allowed is None$"):
        load_model("demo", revision="step1")


# ---- records --------------------------------------------------------------------------------------------------------


def test_each_has_records_and_figures_of_its_own(checkpoints, tmp_path):
    out = str(tmp_path / "out")
    first, second = (
        measure_recall(model=str(checkpoints), revision=name, **FEW, output_dir=out).records
        for name in ("step1", "step2")
    )
    assert set(first["run_id"]).isdisjoint(second["run_id"]) and all("__revision=step1__" in i for i in first["run_id"])
    assert (first["model"] == "demo").all() and (first["revision"] == "step1").all()
    assert (first["nll_mean"] - second["nll_mean"]).abs().min() > 1e-3
    bundled = measure_recall(model="demo", **FEW, output_dir=out).records
    assert bundled["nll_mean"].tolist() == pytest.approx(second["nll_mean"].tolist())  # the same weights
    assert bundled["revision"].isna().all() and set(bundled["run_id"]).isdisjoint(second["run_id"])
    again = measure_recall(model=str(checkpoints), revision="step1", **FEW, output_dir=out).records
    assert again["started_at"].tolist() == first["started_at"].tolist() and len(load_records(out)) == 6


def test_the_demo_in_the_place_of_a_revision_has_none(cache, tmp_path):
    """Nobody answers, so the bundled model steps in: no figure of it is told of a step."""
    asked = FEW | {"weights": "auto", "output_dir": str(tmp_path)}
    found = measure_recall(model="pythia-70m", revision="step512", **asked).records
    assert set(found["model"]) == {"demo"} and found["revision"].isna().all()
    assert not any("revision" in name for name in found["run_id"])


@pytest.mark.parametrize("wrong", ["main", "", "a b", 1000, "-x"])
def test_a_revision_has_one_name(wrong):
    with pytest.raises(ValueError, match=f"revision={re.escape(repr(wrong))}: allowed is None"):
        measure_recall(model="pythia-70m", revision=wrong)


@pytest.mark.parametrize(("revision", "is_there"), [(None, True), (REVISION, True), ("step512", False)])
def test_what_was_published_is_put_beside_the_last_state_alone(two_states, revision, is_there):
    loaded = load_model("pythia-70m", revision=revision, device="cpu")
    known = published("pythia-70m", "lambada_openai", 0)
    table = pd.DataFrame({"metric": ["acc"], "value": [known["acc"][0]], "stderr": [0.01]})
    assert beside_published(table, loaded, "lambada_openai", 0)["published"].notna().all() == is_there


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_the_sweep_over_sizes_asks_for_memory_by_size():
    found = read_sweep([REPOSITORY / "params" / "pythia-suite.yaml"], NOTEBOOKS)
    assert len({run.study for run in found}) == 3 and {run.parameters["model"] for run in found} == set(PYTHIA)
    for run in found:
        layers, hidden, _, vocabulary = PYTHIA[run.parameters["model"]]
        weights_mb = 4 * (12 * layers * hidden**2 + 2 * vocabulary * hidden) / 1e6  # in float32
        assert weights_mb + 8000 <= run.mem_mb <= 1.1 * weights_mb + 8100 and run.gpus == 1


def test_the_sweep_over_checkpoints_names_each():
    found = read_sweep([REPOSITORY / "params" / "pythia-checkpoints.yaml"], NOTEBOOKS)
    for study in {run.study for run in found}:
        states = [(run.parameters["model"], run.parameters["revision"]) for run in found if run.study == study]
        assert len(states) == len(set(states)) == 3 * 9 and ("pythia-410m", "step143000") in states
    for run in found:
        assert all(f"__revision={run.parameters['revision']}" in path for path in run.outputs)


def reduced(text: str) -> str:
    """The recall of a params file with everything in it that can be small, small: one model in two states, on text from
    the box."""
    study = next(study for study in yaml.safe_load(text)["studies"] if study["notebook"] == "05_recall")
    study["fixed"] |= {**FEW, "press": ["snapkv"]}
    study["grid"] = {"model": ["pythia-70m"], "revision": ["step512", "step143000"]}
    study["resources"] = {"mem_mb": {"pythia-70m": 1000}}
    return yaml.safe_dump({"studies": [study]})


@pytest.mark.slow
def test_two_states_give_two_records_and_other_figures(two_states: HubServer, tmp_path, monkeypatch):
    wanted = (REPOSITORY / "params" / "pythia-checkpoints.yaml").read_text(encoding="utf-8")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "few.yaml").write_text(reduced(wanted), encoding="utf-8")
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": two_states.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    command = [sys.executable, "-m", "snakemake", "-c", "1", "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--directory", str(tmp_path), "--configfile", str(tmp_path / "params" / "few.yaml")]
    environment = {**os.environ, **online, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = load_records(tmp_path / "results" / "recall")
    assert set(runs["revision"]) == {"step512", "step143000"} and set(runs["model"]) == {"pythia-70m"}
    assert runs["weights_id"].nunique() == 2 and set(runs["press"]) == {"no_press", "snapkv"}
    assert runs.groupby("press")["nll_mean"].nunique().tolist() == [2, 2]
