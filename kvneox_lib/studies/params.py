"""Reading a params file: YAML in which every key knows its line.

A sweep is refused as a whole, before anything runs: a typing error that shows itself after three hours is an expensive
one. Every mistake is told with file, line, and what is allowed there.
"""

from collections.abc import Iterable
from pathlib import Path

import yaml

from kvneox_lib.neox.checks import did_you_mean

MOST_VALUES = 20_000


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
        if node is None:
            return None
        _check_size(node)
        return _build(loader, node, mistakes)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        mistakes.add(mark.line + 1, f"not YAML: {error.problem or error.context}")
    except (yaml.YAMLError, RecursionError) as error:
        mistakes.add(1, f"not YAML: {' '.join(str(error).split())}")
    finally:
        loader.dispose()


def _check_size(node: yaml.Node, inside: tuple = (), counted: list | None = None) -> None:
    """Aliases can make a small file an endless one, or one of millions of values."""
    counted = [] if counted is None else counted
    counted.append(node)
    if node in inside:
        raise yaml.MarkedYAMLError(problem="an alias must not stand inside what it names", problem_mark=node.start_mark)
    if len(counted) > MOST_VALUES:
        what = f"with all aliases written out there are more than {MOST_VALUES} values"
        raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            _check_size(part, (*inside, node), counted)


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
