"""Reading a params file: YAML in which every key knows its line, and what each parameter of a notebook may be.

A sweep is refused as a whole, before anything runs: a typing error that shows itself after three hours is an expensive
one. Every mistake is told with file, line, and what is allowed there.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from kvneox_lib.inputs.text import HUB, SPLITS, WIKITEXT_SUBSETS
from kvneox_lib.inputs.weights import ATTENTION, DTYPES, find_target
from kvneox_lib.neox.checks import did_you_mean
from kvneox_lib.presses.by_name import press_row

ALL_PRESSES = ("all", "every")


class Mistakes(ValueError):
    """All that is wrong with a params file, one `FILE:LINE: what, and what is allowed` a line."""

    def __init__(self, path: Path):
        self.path = path
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        self.found.append((line, message))

    def __str__(self) -> str:
        return "\n".join(f"{self.path}:{line}: {message}" for line, message in sorted(self.found))


class Lines(dict):
    """A mapping of the file; `lines` says where each of its keys stands, `line` where it begins."""

    def __init__(self, values=(), lines=(), line: int = 1):
        super().__init__(values)
        self.lines, self.line = dict(lines), line


def read_yaml(path: Path, mistakes: Mistakes):
    """The file as dicts with lines, lists and plain values. YAML itself keeps the last of two equal keys in silence."""
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, mistakes)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        mistakes.add(mark.line + 1, f"not YAML: {error.problem or error.context}")
    except yaml.YAMLError as error:
        mistakes.add(1, f"not YAML: {' '.join(str(error).split())}")
    finally:
        loader.dispose()


def _build(loader: yaml.SafeLoader, node: yaml.Node, mistakes: Mistakes):
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, mistakes) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    seen = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
        if key.value in seen and key.value != "<<":
            mistakes.add(line, f"{key.value!r} is given twice, here and in line {seen[key.value]}; keep one")
        seen[key.value] = line
    loader.flatten_mapping(node)  # `<<: *name` puts what is merged first: keys written here override it
    values = {key.value: _build(loader, value, mistakes) for key, value in node.value}
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    return Lines(values, lines, node.start_mark.line + 1)


def unknown(what: str, name, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    return f"{what} {name!r} is unknown; {did_you_mean(name, allowed)}Allowed: {', '.join(allowed)}"


def expand_variables(name: str, value):
    """`$NAME` and `${NAME}` in a text: the one way to name a folder of your machine in a file that others use too."""
    if not isinstance(value, str):
        return value
    for match in re.finditer(r"\$\{?(\w+)\}?", value):
        if match[1] not in os.environ:
            raise ValueError(
                f"{name}: the environment variable {match[1]} is not set; `export {match[1]}=<folder>` first"
            )
    return os.path.expanduser(os.path.expandvars(value))


# ---- what a parameter may be ----------------------------------------------------------------------------------------


def check_value(name: str, value, default) -> None:
    """`value` for a notebook's parameter whose default is `default`; ValueError says what is allowed instead. None is
    allowed where it is the default, or where a limit can be lifted."""
    if value is None and (default is None or name in OPTIONAL):
        return
    check = CHECKS.get(name) or _like(default)
    several = name in SEVERAL and isinstance(value, list)
    if several and not value:
        raise ValueError(f"{name}: []; a list must not be empty")
    for item in value if several else [value]:
        check(name, item)


def _refuse(name: str, value, allowed: str) -> None:
    raise ValueError(f"{name}: {value!r}; allowed is {allowed}")


def _whole(least: int) -> Callable:
    def check(name, value):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _refuse(name, value, f"a whole number, {least} or above")

    return check


def _share(below_one: bool) -> Callable:
    def check(name, value):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or (below_one and value == 1):
            _refuse(name, value, "a number from 0 to below 1" if below_one else "a number from 0 to 1")

    return check


def _of_type(kind: type | tuple[type, ...], allowed: str) -> Callable:
    def check(name, value):
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            _refuse(name, value, allowed)

    return check


def _one_of(*allowed: str) -> Callable:
    def check(name, value):
        if value not in allowed:
            raise ValueError(unknown(name, value, allowed))

    return check


def _like(default) -> Callable:
    """For parameters of notebooks that this table does not know."""
    if isinstance(default, bool):
        return _of_type(bool, "true or false")
    if isinstance(default, int):
        return _whole(0)
    if isinstance(default, float):
        return _of_type((int, float), "a number")
    return _of_type(str, "a text") if isinstance(default, str) else lambda name, value: None


def _weights(name, value):
    if value == "auto":
        allowed = "pretrained, or random in 03_speed: auto may load another model than the file declares"
        _refuse(name, value, allowed)
    _one_of("pretrained", "random")(name, value)


def _press(name, value):
    if value not in ALL_PRESSES:
        press_row(value)


def _model(name, value):
    find_target(expand_variables(name, value), None)


def _dataset(name, value):
    if value not in (*HUB, "python-docs") and not (
        isinstance(value, str) and Path(expand_variables(name, value)).exists()
    ):
        _refuse(name, value, f"{', '.join(HUB)}, python-docs, or the path of a file or folder that exists")


def _folder(name, value):
    if not isinstance(value, str) or not Path(expand_variables(name, value)).is_dir():
        _refuse(name, value, "a folder that exists")


def _device(name, value):
    if not isinstance(value, str) or not re.fullmatch(r"auto|all|cpu|mps|cuda(:\d+)?", value):
        _refuse(name, value, "auto, all, cpu, cuda, cuda:<number> or mps")


def _overwrite(name, value):
    raise ValueError(f"{name}: is not for params files: what is done again follows from what changed")


OPTIONAL = ("max_windows", "context_limit", "min_new_tokens", "sample_idx", "data_dir", "depths", "max_tokens")
SEVERAL = ("press", "presses", "compression_ratio", "query_aware", "context_lengths", "batch_sizes", "depths")
SEVERAL += ("methods", "ablation_sinks", "ablation_sizes")
_COUNTS = ("context_length", "continuation_length", "context_limit", "max_windows", "control_windows", "batch_size")
_COUNTS += ("n_keys", "keys_per_context", "context_lengths", "batch_sizes", "max_new_tokens", "min_new_tokens")
_COUNTS += ("repeats", "max_tokens", "window", "dense_limit", "recompute_samples", "ablation_sizes")
CHECKS: dict[str, Callable] = {
    **dict.fromkeys(_COUNTS, _whole(1)),
    **dict.fromkeys(("sample_idx", "seed", "n_sink", "ablation_sinks", "sample_tokens"), _whole(0)),
    **dict.fromkeys(("press", "presses"), _press),
    "compression_ratio": _share(below_one=True),
    **dict.fromkeys(("depths", "position"), _share(below_one=False)),
    "methods": _one_of("dense", "window", "sinks", "recompute"),
    "query_aware": _of_type(bool, "true or false"),
    "model": _model,
    "weights": _weights,
    "dataset": _dataset,
    "data_dir": _folder,
    "subset": _one_of(*WIKITEXT_SUBSETS),
    "split": _one_of(*SPLITS),
    "attn_implementation": _one_of("auto", *ATTENTION),
    "dtype": _one_of("auto", *DTYPES),
    "device": _device,
    "overwrite": _overwrite,
}
