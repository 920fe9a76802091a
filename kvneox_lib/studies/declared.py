"""What a notebook is going to write, before it runs: how its records are called, and a digest of the code behind them.

No model is loaded and no text is read for it; that is why a sweep has to name both.
"""

import ast
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from kvneox_lib.inputs.weights import PYTHIA_NAMES, demo_folder, find_target
from kvneox_lib.presses.by_name import expand_presses, make_press, press_row
from kvneox_lib.presses.facts import acts
from kvneox_lib.presses.registry import RATIO_PER_LAYER
from kvneox_lib.studies import explore, perplexity, recall, records, runs, speed, streaming

PYTHIA_LENGTH = 2048  # the trained length of all of them
LIBRARY = Path(__file__).parent


@cache
def notebook_defaults(notebook: Path) -> dict:
    """The parameters of a notebook, from its cell that is tagged so."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    (cell,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    assignments = (node for node in ast.parse("".join(cell["source"])).body if isinstance(node, ast.Assign))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def declared_records(notebook: str, asked: dict) -> list[str]:
    """The records, from the folder of results on, that a notebook writes for these parameters (all of them)."""
    return [f"{asked['output_dir']}/{run_id}.json" for run_id in dict.fromkeys(RECORDS[notebook](asked))]


# ---- the names, notebook by notebook --------------------------------------------------------------------------------


def _adapter(asked: dict) -> list[str]:
    target = find_target(asked["model"], None)
    if asked["device"] in ("auto", "all"):
        what = "00_adapter names its record after the one device that is used: allowed is cpu, cuda:0, ..."
        raise ValueError(f"device: {asked['device']!r}; {what}")
    others = {name: asked[name] for name in ("attn_implementation", "dtype", "device", "context_length")}
    if asked["device"] in ("cuda", "mps"):
        others["device"] += ":0"
    others["weights"] = "bundled" if target.folder == demo_folder() else "pretrained"
    return [records.run_id("stdlib-docstrings", target.name, asked["presses"], 0.5, **others)]


def _perplexity(asked: dict) -> list[str]:
    presses = ["no_press", *expand_presses(asked["press"])]
    return _of_text(perplexity.measure_perplexity, asked, asked["continuation_length"], presses, [{}])


def _recall(asked: dict) -> list[str]:
    presses = ["no_press", *expand_presses(asked["press"])]
    asleep = [name for name in presses if acts(_sample(name)) == "decoding"]
    if asleep:
        raise ValueError(
            f"press: {', '.join(asleep)}; 05_recall takes none that acts while decoding: a question is short"
        )
    modes = [{"query_aware": mode} for mode in runs.as_list(asked["query_aware"])]
    return _of_text(recall.measure_recall, asked, recall.QUESTION_TOKENS, presses, modes)


def _sample(name: str):
    return make_press(name, [0.5] if press_row(name).strength == RATIO_PER_LAYER else 0.5)


def _of_text(measure: Callable, asked: dict, others: int, presses: list[str], modes: list[dict]) -> list[str]:
    limit = _longest_window(asked, others)
    if limit is not None:
        asked = asked | {"context_length": min(asked["context_length"], limit - others)}
    return _names(measure, asked, _at_ratios(itertools.product(modes, presses), asked["compression_ratio"]))


def _longest_window(asked: dict, others: int) -> int | None:
    """None where it is not known. It must have room for a context and for the `others`, the tokens after it."""
    asked_limit, trained = asked.get("context_limit"), _trained_length(asked["model"])
    limit = min((length for length in (asked_limit, trained) if length is not None), default=None)
    if limit is not None and limit <= others:
        own = "continuation_length" if "continuation_length" in asked else "model"
        name = "context_limit" if limit == asked_limit else own
        what = f"the {others} tokens after the context leave no room for it in a window of {limit}"
        raise ValueError(f"{name}: {asked[name]!r}; {what}")
    return limit


def _at_ratios(variants: Iterable[tuple[dict, str]], ratios) -> Iterator[tuple[dict, str, float | None]]:
    for more, press in variants:
        for ratio in runs.own_ratios(press, ratios):
            yield more, press, ratio


def _names(measure: Callable, asked: dict, variants: Iterable[tuple[dict, str, float | None]]) -> list[str]:
    """Of each press, at a ratio, with what only that run of it has."""
    dataset = Path(asked["dataset"]).resolve().name if "dataset" in asked else runs.RANDOM_TOKENS
    known = {"dataset": dataset, "model": find_target(asked["model"], None).name, "weights": asked["weights"]}
    return [
        runs.name_run(asked | more, runs.defaults_of(measure), **known, press=press, ratio=ratio)
        for more, press, ratio in variants
    ]


def _trained_length(model: str) -> int | None:
    """None for a model of the hub whose config is not at hand."""
    target = find_target(model, None)
    if target.folder is not None:
        config = json.loads((target.folder / "config.json").read_text(encoding="utf-8"))
        return config.get("max_position_embeddings", PYTHIA_LENGTH)
    return PYTHIA_LENGTH if target.name in PYTHIA_NAMES else None


def _speed(asked: dict) -> list[str]:
    presses = ["no_press", *expand_presses(asked["press"])]
    cells = itertools.product(*(runs.as_list(asked[name]) for name in ("context_lengths", "batch_sizes")))
    variants = (
        ({"context_length": length, "batch_size": batch, "engine": engine}, press)
        for length, batch in cells
        for engine in speed.ENGINES
        for press in speed.for_engine(engine, presses)
    )
    return _names(speed.measure_speed, asked, _at_ratios(variants, asked["compression_ratio"]))


def _streaming(asked: dict) -> list[str]:
    readings = streaming.readings_of(asked)
    variants = ((reading.settings, reading.method, None) for reading in readings)
    return _names(streaming.measure_streaming, asked, variants)


def _explore(asked: dict) -> list[str]:
    for name in ("press", "compression_ratio"):
        if isinstance(asked[name], list):
            raise ValueError(
                f"{name}: {asked[name]!r}; 06_explore takes one; in grid, each of a list is a run of its own"
            )
    _longest_window(asked, asked["continuation_length"])
    return _names(explore.record_exploration, asked, _at_ratios([({}, asked["press"])], asked["compression_ratio"]))


RECORDS: dict[str, Callable[[dict], list[str]]] = {
    "00_adapter": _adapter,
    "01_wikitext_ppl": _perplexity,
    "02_pg19_ppl": _perplexity,
    "03_speed": _speed,
    "04_streaming": _streaming,
    "05_recall": _recall,
    "06_explore": _explore,
}
WITH_BASELINE = ("01_wikitext_ppl", "02_pg19_ppl", "05_recall")  # which measure no_press along with any press


# ---- the code -------------------------------------------------------------------------------------------------------


@cache
def code_digest(notebook: Path, bundled_weights: bool) -> str:
    """Of the notebook's code cells (but for the parameters: a run gives it all of them) and of the modules of this
    library that they lead to, as Python understands them: comments, docstrings and layout do not count. Nor does
    `figures`: how a picture looks changes no record."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if _does_something(cell))
    texts, waiting = {"": ast.parse(source)}, [""]
    while waiting:
        for module in _imported(texts[waiting.pop()]) - set(texts) - {"figures"}:
            path = LIBRARY / f"{module}.py"
            if path.is_file():
                texts[module] = ast.parse(path.read_text(encoding="utf-8"))
                waiting.append(module)
    dumped = (name + ast.dump(_without_docstrings(texts[name])) for name in sorted(texts))
    digest = hashlib.sha256("\0".join(dumped).encode())
    if bundled_weights:
        digest.update((demo_folder() / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def _does_something(cell: dict) -> bool:
    return cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _imported(tree: ast.AST) -> set[str]:
    """The modules of this library that are imported, `__init__` for the package itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "kvneox_lib":
            found |= {alias.name for alias in node.names} | {"__init__"}
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.partition(".")[2] for name in names if name.startswith("kvneox_lib.")}
        found |= {"__init__"} if "kvneox_lib" in names else set()
    return found
