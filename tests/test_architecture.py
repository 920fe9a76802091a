"""The house is as docs/architecture.md says: imports run one way, and a study or a parameter stands in few places."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from kvneox_lib.studies.table import STUDIES

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = ("neox", "inputs", "presses", "measures", "studies", "pages")


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((REPOSITORY / "kvneox_lib" / room).glob("*.py"))]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name and name.split(".")[0] == "kvneox_lib"}


def test_the_page_names_every_room_and_there_are_no_others():
    folders = {path.parent.name for path in (REPOSITORY / "kvneox_lib").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    order = re.search(r"^neox .*pages.*$", PAGE, re.M)[0]
    assert re.findall(r"\w+", order)[: len(ROOMS)] == list(ROOMS)
    assert len(PAGE.splitlines()) <= 120  # three screens


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_never_run_back(path):
    allowed = ROOMS[: ROOMS.index(path.parent.name) + 1]
    for name in imported(path):
        parts = name.split(".")
        assert len(parts) > 1 and parts[1] in allowed, f"{path.name} imports {name}"


def listed(heading: str) -> list[str]:
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    return re.findall(r"^- `([^`]+)`", section, re.M)


@pytest.mark.parametrize("heading", ["加一种 press", "加一项研究", "加一项任务", "加一个参数", "加一张图"])
def test_what_the_lists_name_is_there(heading):
    files = listed(heading)
    assert len(files) >= 2
    for name in files:
        assert (REPOSITORY / name).is_file(), name


def mentioning(pattern: str) -> set[str]:
    """Committed files that are written by hand, without tests, prose for readers, and what records hold."""
    places = ["kvneox_lib", "notebooks", "params", "workflow", "Snakefile", "tools", "README_zh.md"]
    found = subprocess.run(
        [
            "grep",
            "-rlE",
            "--include=*.py",
            "--include=*.ipynb",
            "--include=*.yaml",
            "--include=Snakefile",
            pattern,
            *places,
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return set(found.stdout.split())


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_stands_where_its_list_says_and_nowhere_else(name):
    """Its measuring function and its notebook's name: an edit that the list does not name would show here."""
    row = STUDIES[name]
    module = row.measure.__module__.replace(".", "/") + ".py"
    notebooks = {f"notebooks/{other.notebook}.ipynb" for other in STUDIES.values() if other.measure is row.measure}
    of_function = {path for path in mentioning(rf"\b{row.measure.__name__}\b") if "/pages/" not in path}
    assert of_function == {module, "kvneox_lib/studies/table.py", *notebooks}
    of_notebook = mentioning(rf"\b{row.notebook}\b")
    assert {path for path in of_notebook if not path.startswith("params/")} <= {module, "kvneox_lib/studies/table.py"}
    assert any(path == "params/demo.yaml" for path in of_notebook)


@pytest.mark.parametrize(
    ("parameter", "study"),
    [("control_windows", "wikitext_ppl"), ("recompute_samples", "streaming"), ("decode_only", "speed")],
)
def test_a_parameter_stands_where_its_list_says_and_nowhere_else(parameter, study):
    """Beside the function that it is handed to, and pages that show it."""
    row = STUDIES[study]
    module = row.measure.__module__.replace(".", "/") + ".py"
    notebooks = {f"notebooks/{other.notebook}.ipynb" for other in STUDIES.values() if other.measure is row.measure}
    elsewhere = ("kvneox_lib/measures", "kvneox_lib/pages", "params")
    found = {path for path in mentioning(rf"\b{parameter}\b") if not path.startswith(elsewhere)}
    assert found == {module, *notebooks}
