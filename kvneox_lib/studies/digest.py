"""A digest of the code that makes a study's figures: when it changes, what was measured before is outdated.

It covers the module of the measuring function and all of this library that it leads to, as Python understands them:
comments, docstrings and layout do not count, nor does anything in Chinese, which is only shown, never measured. What
shows figures (notebook cells, `pages`, the report) is not in it: rooms above import a study, never the other way.
"""

import ast
import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from kvneox_lib.inputs.weights import demo_folder, digest_of_weights

LIBRARY = Path(__file__).parents[1]
# How a record is named and kept, and what may be asked for, changes no figure.
NO_FIGURES = tuple(f"kvneox_lib.studies.{name}" for name in ("records", "provenance", "arguments"))
CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


@cache
def code_digest(measure: Callable, bundled_weights: bool) -> str:
    trees, waiting = {}, [measure.__module__]
    while waiting:
        module = waiting.pop()
        path = LIBRARY.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module not in (*trees, *NO_FIGURES) and path.is_file():
            trees[module] = ast.parse(path.read_text(encoding="utf-8"))
            waiting += _imported(trees[module])
    dumped = (name + ast.dump(_only_what_acts(trees[name])) for name in sorted(trees))
    digest = hashlib.sha256("\0".join(dumped).encode())
    if bundled_weights:
        digest.update(digest_of_weights(demo_folder()).encode())
    return digest.hexdigest()[:16]


def _imported(tree: ast.AST) -> list[str]:
    """Modules of this library; a name that is imported from a package may be one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvneox_lib":
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("kvneox_lib.")]
    return found


def _only_what_acts(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CHINESE.search(node.value):
            node.value = ""
    return tree
