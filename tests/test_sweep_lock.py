"""Sweeps that are killed, and sweeps beside each other, with a notebook that waits until it is told to go on."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from conftest import REPOSITORY

from kvneox_lib.studies.sweep import read_sweep

PARAMS = """\
studies:
  - notebook: 01_wikitext_ppl
    fixed: {{model: demo, weights: pretrained, dataset: python-docs, press: knorm, output_dir: results/{name}}}
"""
WAITS = """\
import os, time
from pathlib import Path
Path("kernel").write_text(str(os.getpid()))
while output_dir == "results/one" and not Path("go").exists():
    time.sleep(0.1)
for path in OUTPUTS[output_dir]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{}")
"""


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A study in `tmp_path` of one notebook, which waits for a file `go` under params/one.yaml; what it is to write."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "workflow", "workflow")
    shutil.copy(REPOSITORY / "Snakefile", ".")
    os.symlink("workflow/profiles", "profiles")
    for folder in ("params", "notebooks"):
        os.mkdir(folder)
    made = {}
    for name in ("one", "two"):
        with open(f"params/{name}.yaml", "w") as file:
            file.write(PARAMS.format(name=name))
        (run,) = read_sweep([f"params/{name}.yaml"], REPOSITORY / "notebooks")
        made[f"results/{name}"] = run.outputs
    with open(REPOSITORY / "notebooks" / "01_wikitext_ppl.ipynb", encoding="utf-8") as file:
        notebook = json.load(file)
    parameters = next(cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    work = {**parameters, "id": "work", "metadata": {}, "source": [f"OUTPUTS = {made}\n{WAITS}"]}
    with open("notebooks/01_wikitext_ppl.ipynb", "w", encoding="utf-8") as file:
        json.dump({**notebook, "cells": [parameters, work]}, file)
    yield made
    open("go", "w").close()
    for sweep in STARTED:
        sweep.kill()


STARTED = []


def start(*arguments, name: str = "one") -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "-c", "1", *arguments, "--configfile", f"params/{name}.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    STARTED.append(subprocess.Popen(command, env=environment, **pipes))
    return STARTED[-1]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.1)


def kernel() -> psutil.Process:
    """That of the run that waits; it has written its number in whole."""
    wait_until(lambda: os.path.exists("kernel") and open("kernel").read())
    return psutil.Process(int(open("kernel").read()))


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_sweep_that_was_killed_leaves_nothing_running_and_goes_on(outputs):
    sweep = start()
    run = [kernel(), kernel().parent()]
    assert "execute.py" in " ".join(run[1].cmdline()) and run[1].ppid() == sweep.pid  # no shell between them
    sweep.kill()
    sweep.wait()
    wait_until(lambda: all(map(is_gone, run)), 20)
    os.makedirs(".snakemake/locks", exist_ok=True)  # what Snakemake leaves where its own lock is on
    with open(".snakemake/locks/0.output.lock", "w") as file:
        file.write("\n".join(outputs["results/one"]))
    open("go", "w").close()
    again = start()
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "1 of 1 runs are done." in told, told
    assert all(map(os.path.exists, outputs["results/one"]))


@pytest.mark.slow
def test_beside_a_live_sweep_another_may_run_unless_it_makes_the_same_records(outputs):
    sweep = start()
    kernel()
    same, dry, other = start(), start("-n"), start(name="two")
    told, _ = same.communicate(timeout=120)
    assert same.returncode != 0 and "LockException" not in told
    for words in ("Another sweep is running here", f"process {sweep.pid} on", "另一个批量运行正在进行"):
        assert words in told, told
    assert dry.communicate(timeout=120) and dry.returncode == 0
    told, _ = other.communicate(timeout=120)
    assert other.returncode == 0 and all(map(os.path.exists, outputs["results/two"])), told
    assert sweep.poll() is None and not any(map(os.path.exists, outputs["results/one"]))
    open("go", "w").close()
    told, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0 and all(map(os.path.exists, outputs["results/one"])), told
