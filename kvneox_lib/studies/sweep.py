"""From params files to runs: each is one notebook under papermill, with the records that it will write.

What is to be run, again or at all, Snakemake decides from those names; so this module knows, without loading a model,
what a notebook is going to call its records. The workflow that uses it is in Snakefile.
"""

import ast
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvneox_lib.inputs.weights import demo_folder
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies.arguments import check_argument, check_arguments, expand_variables, rules_of
from kvneox_lib.studies.digest import code_digest
from kvneox_lib.studies.params import Lines, Mistakes, read_yaml, unknown
from kvneox_lib.studies.plan import declared, target_of, trained_length
from kvneox_lib.studies.table import BY_NOTEBOOK, StudyRow

STUDY_KEYS = ("notebook", "fixed", "grid", "resources")
RESOURCES = {"gpus": 0, "cores": 1, "mem_mb": 1}  # what a run may ask for, and the least of it
NAMED = ("model", "weights", "dataset", "tasks")  # no default of a notebook decides on these
EXECUTED = "results/notebooks"  # where the executed notebooks go


@dataclass(frozen=True)
class Run:
    """One execution of a notebook."""

    study: str  # rules are named after it
    notebook: Path
    parameters: dict  # all of the notebook's; as written: `$NAME` gets its value where the notebook is executed
    outputs: tuple[str, ...]  # the records that it makes
    needs: tuple[str, ...]  # records among its own that an earlier run makes: its baseline
    executed: str
    code: str  # changes with the code that makes its figures
    gpus: int
    mem_mb: int | None
    cores: int | None  # None: all of this machine that the sweep has


def read_sweep(paths: Iterable[str | Path], notebooks: Path) -> list[Run]:
    """The runs of these params files, in their order. ValueError tells all mistakes, with file and line."""
    found, makers, seen, messages = [], {}, Counter(), []
    for path in map(Path, paths):
        mistakes = Mistakes(path)
        for study in _studies(read_yaml(path, mistakes), mistakes):
            if _check_study(study, notebooks, mistakes):
                name = study["notebook"]
                seen[name] += 1
                place = f"{name}_{seen[name]}" if seen[name] > 1 else name, notebooks / f"{name}.ipynb", path.stem
                found += _expand(study, *place, makers, mistakes)
        messages += [str(mistakes)] if mistakes.found else []
    if messages:
        raise ValueError("\n".join(messages))
    return found


# ---- checking -------------------------------------------------------------------------------------------------------


def _studies(content, mistakes: Mistakes) -> list[Lines]:
    if mistakes.found and content is None:  # not YAML
        return []
    keys = content if isinstance(content, Lines) else Lines()
    for key in set(keys) - {"studies"}:
        mistakes.add(keys.lines[key], unknown("key", key, ["studies"]))
    listed = keys.get("studies")
    if not isinstance(listed, list) or not listed or not all(isinstance(study, Lines) for study in listed):
        mistakes.add(keys.lines.get("studies", 1), "`studies:` must be a list of studies, each with `- notebook: ...`")
        return []
    return listed


def _check_study(study: Lines, notebooks: Path, mistakes: Mistakes) -> bool:
    """Whether the study can be expanded; what is wrong with it is added to `mistakes`."""
    before, notebook = len(mistakes.found), study.get("notebook")
    for key in set(study) - set(STUDY_KEYS):
        mistakes.add(study.lines[key], unknown("key", key, STUDY_KEYS))
    if notebook not in list(BY_NOTEBOOK):
        mistakes.add(study.lines.get("notebook", study.line), unknown("notebook", notebook, BY_NOTEBOOK))
        return False
    row = BY_NOTEBOOK[notebook]
    defaults = notebook_defaults(notebooks / f"{notebook}.ipynb")
    for part in ("fixed", "grid", "resources"):
        if not isinstance(study.get(part, Lines()), Lines):
            mistakes.add(study.lines[part], f"{part}: must be a mapping, `name: value` on each line")
            return False
    fixed, grid = study.get("fixed", Lines()), study.get("grid", Lines())
    for name, value in fixed.items():
        _check(row, name, [value], fixed.lines[name], mistakes)
    for name, values in grid.items():
        if name in fixed:
            mistakes.add(grid.lines[name], f"{name} is in fixed (line {fixed.lines[name]}) and in grid; keep one")
        if name == "press" and row.is_timed:
            mistakes.add(grid.lines[name], "press: what is timed takes turns in one run; list all of them in fixed")
        _check_axis(row, name, values, grid.lines[name], mistakes)
    missing = [name for name in NAMED if name in defaults and name not in fixed and name not in grid]
    if missing:
        what = f"{notebook} wants {', '.join(missing)}: what is measured is never left to a default"
        mistakes.add(study.line, what)
    models = grid["model"] if isinstance(grid.get("model"), list) else [fixed.get("model")]
    _check_resources(study.get("resources", Lines()), models, mistakes)
    return len(mistakes.found) == before


def _check_axis(row: StudyRow, name: str, values, line: int, mistakes: Mistakes) -> None:
    """Of the grid: a list of values, or for presses a word that stands for one."""
    listed = values if isinstance(values, list) else [values]
    if not listed or (not isinstance(values, list) and name != "press"):
        mistakes.add(line, f"{name}: {values!r}; in grid stands a list of values, [a, b, c]")
    _check(row, name, listed, line, mistakes)


def _check_resources(resources: Lines, models: list, mistakes: Mistakes) -> None:
    for name, value in resources.items():
        if name not in RESOURCES:
            mistakes.add(resources.lines[name], unknown("resource", name, RESOURCES))
            continue
        if isinstance(value, Lines):
            lacking = [model for model in models if model not in value]
            if lacking:
                mistakes.add(resources.lines[name], f"{name}: lacks {', '.join(map(str, lacking))}")
        for number in value.values() if isinstance(value, Lines) else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or number < RESOURCES[name]:
                allowed = f"allowed is a whole number, {RESOURCES[name]} or above, or one for each model"
                mistakes.add(resources.lines[name], f"{name}: {number!r}; {allowed}")


def _resources_of(study: Lines, model: str) -> dict:
    """What a run with this model asks for: a resource is a number, or one for each model."""
    wanted = study.get("resources", {})
    return {name: value[model] if isinstance(value, Lines) else value for name, value in wanted.items()}


def _check(row: StudyRow, name: str, values: list, line: int, mistakes: Mistakes) -> None:
    if name not in rules_of(row.measure):
        mistakes.add(line, unknown("parameter", name, rules_of(row.measure)))
        return
    for value in values:
        try:
            check_argument(row.measure, name, expand_variables(name, value), in_a_sweep=True)
        except ValueError as error:
            mistakes.add(line, " ".join(str(error).split()))


# ---- expanding ------------------------------------------------------------------------------------------------------


def _expand(study: Lines, name: str, notebook: Path, sweep: str, makers: dict, mistakes: Mistakes) -> list[Run]:
    """The study's runs. `makers`: which run makes each record names so far; no two make the same one."""
    row, found = BY_NOTEBOOK[study["notebook"]], []
    for point, is_baseline in _points(study):
        parameters = {**notebook_defaults(notebook), **study.get("fixed", {}), **point}
        try:
            asked = {key: expand_variables(key, value) for key, value in parameters.items()}
            names = _declared_records(row, asked)
        except ValueError as error:
            mistakes.add(_line_of(str(error), study), " ".join(str(error).split()))
            return []
        own = [record for record in names if record not in makers]
        if not own and is_baseline:  # the same for another ratio
            continue
        if not own:
            mistakes.add(study.line, f"{name} {point or ''}: {names[0]} is already made by {makers[names[0]]}")
            return []
        wanted = _resources_of(study, parameters["model"])
        label = own[0].rpartition("/")[2].rpartition(".")[0]
        run = Run(
            study=name,
            notebook=notebook,
            parameters=parameters,
            outputs=tuple(own),
            needs=tuple(record for record in names if record not in own),
            executed=f"{EXECUTED}/{sweep}/{name}/{label}.ipynb",
            code=code_digest(row.measure, target_of(asked).folder == demo_folder()),
            gpus=wanted.get("gpus", 0),
            mem_mb=wanted.get("mem_mb"),
            cores=wanted.get("cores", None if row.is_timed else 1),
        )
        makers |= dict.fromkeys(own, f"{sweep}: {name}")
        found.append(run)
    return found


def _declared_records(row: StudyRow, asked: dict) -> list[str]:
    """With their folder. What a notebook drops with a warning, a file must not ask for."""
    check_arguments(row.measure, asked, in_a_sweep=True)
    if re.search(r"[{}]", str(asked["output_dir"])):
        raise ValueError(f"output_dir={asked['output_dir']!r}: braces mean something else to Snakemake; leave them out")
    planned = {run.press for run in row.plan(asked, trained_length(asked))}
    dropped = [name for name in expand_presses(asked["press"]) if name not in planned] if row.has_baseline else []
    if dropped:
        how = "" if asked["kv_bits"] is None else f" at kv_bits={asked['kv_bits']}"
        raise ValueError(
            f"press={', '.join(dropped)}: {row.notebook} cannot measure{how} what acts only while decoding"
        )
    return [f"{asked['output_dir']}/{run_id}.json" for run_id in declared(row.measure, row.plan, asked)]


@cache
def notebook_defaults(notebook: Path) -> dict:
    """The parameters of a notebook, from its cell that is tagged so."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    (cell,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    assignments = (node for node in ast.parse("".join(cell["source"])).body if isinstance(node, ast.Assign))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def _line_of(message: str, study: Lines) -> int:
    """Of the parameter that the message begins with; the study's, where the file does not give that one."""
    name = re.match(r"\w*", message)[0]
    lines = [study[part].lines[name] for part in ("fixed", "grid") if name in study.get(part, {})]
    return lines[0] if lines else study.line


def _points(study: Lines) -> list[tuple[dict, bool]]:
    """The grid's combinations. A notebook that compares with no_press measures it itself; where each press is a run of
    its own, that baseline is one too, made before them: else each of them would make it, all at the same time."""
    grid = {name: values for name, values in study.get("grid", {}).items()}
    with_baseline = "press" in grid and BY_NOTEBOOK[study["notebook"]].has_baseline
    if "press" in grid:
        listed = grid["press"] if isinstance(grid["press"], list) else [grid["press"]]
        names = dict.fromkeys(name for press in listed for name in expand_presses(press))
        grid["press"] = [name for name in names if name != "no_press" or not with_baseline]
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    baselines = [{**point, "press": "no_press"} for point in points] if with_baseline else []
    return [(point, True) for point in baselines] + [(point, False) for point in points]


# ---- when the sweep has ended ---------------------------------------------------------------------------------------


def summary(found: Iterable[Run]) -> str:
    """What is done, and why the rest is not; and where a notebook failed after it had measured."""
    found = list(found)
    missing = [run for run in found if not all(Path(record).exists() for record in run.outputs)]
    counted = f"{len(found) - len(missing)} of {len(found)} runs are done"
    lines = [f"  {run.study} {Path(run.executed).stem}: {_what_happened(run)}" for run in missing]
    failed = [(run, error) for run in found if run not in missing and (error := _error_in(run))]
    lines += [f"  {run.study} {Path(run.executed).stem}: measured, but then it {error}" for run, error in failed]
    return "\n".join([counted + (", these are not:" if missing else "."), *lines])


def _what_happened(run: Run) -> str:
    if not Path(run.executed).exists():
        lacking = [record for record in run.needs if not Path(record).exists()]
        return f"waits for {lacking[0]}" if lacking else "not run"
    return _error_in(run) or f"interrupted, or it wrote other records than it should have; see {run.executed}"


def _error_in(run: Run) -> str | None:
    if not Path(run.executed).exists():
        return None
    executed = json.loads(Path(run.executed).read_text(encoding="utf-8"))
    outputs = [output for cell in executed["cells"] for output in cell.get("outputs", [])]
    errors = [output for output in outputs if output["output_type"] == "error"]
    if not errors:
        return None
    return f"FAILED with {errors[0]['ename']}: {errors[0]['evalue']}\n    traceback in {run.executed}"
