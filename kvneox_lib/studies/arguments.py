"""What a study may be asked for. Each parameter of a measuring function says it in its annotation, `Annotated[int,
whole(1)]`; the run and the sweep read it there, before anything is loaded.
"""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from kvneox_lib.inputs.harness import check_single_task
from kvneox_lib.inputs.templates import expand_templates
from kvneox_lib.inputs.text import HUB, SPLITS, WIKITEXT_SUBSETS
from kvneox_lib.inputs.weights import ATTENTION, DTYPES, find_target
from kvneox_lib.neox.bits import BITS
from kvneox_lib.neox.checks import check_choice, check_int
from kvneox_lib.presses.by_name import expand_presses, press_row


@dataclass(frozen=True, eq=False)
class Rule:
    """`check(name, value)` raises ValueError. several: a list of such values will do, too."""

    check: Callable[[str, object], None]
    several: bool = False
    not_in_a_sweep: Mapping[object, str] | None = None  # values, and why a params file may not have them
    may_be_empty: bool = False  # the list


def refuse(name: str, value, allowed: str) -> None:
    raise ValueError(f"{name}={value!r}: allowed is {allowed}")


def whole(least: int, several: bool = False, may_be_empty: bool = False) -> Rule:
    return Rule(lambda name, value: check_int(name, value, least), several, may_be_empty=may_be_empty)


def share(below_one: bool = False, several: bool = False) -> Rule:
    def check(name, value):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or (below_one and value == 1):
            refuse(name, value, "a number from 0 to below 1" if below_one else "a number from 0 to 1")

    return Rule(check, several)


def one_of(*allowed: str, several: bool = False, not_in_a_sweep: Mapping | None = None) -> Rule:
    return Rule(lambda name, value: check_choice(name, value, allowed), several, not_in_a_sweep)


def yes_or_no(several: bool = False, not_in_a_sweep: Mapping | None = None) -> Rule:
    def check(name, value):
        if not isinstance(value, bool):
            refuse(name, value, "true or false")

    return Rule(check, several, not_in_a_sweep)


def _bits(name, value):
    if value is not None and (type(value) is not int or value not in BITS):
        refuse(name, value, f"None, {', '.join(map(str, BITS))}")


def _press(name, value):
    expand_presses(value)


def _template(name, value):
    expand_templates(value)


def _one_press(name, value):
    press_row(value)


def _task(name, value):
    check_single_task(value)


def _limit(name, value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value <= 0 or (value >= 1 and value != int(value)):
        refuse(name, value, "a number of documents, or a share of them below 1")


def _model(name, value):
    find_target(value, None)


def _revision(name, value):
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w./-]*", value) or value == "main":
        refuse(name, value, "None, which is the hub's main, or the name of a branch, tag or commit, such as step1000")


def _dataset(name, value):
    known = value in (*HUB, "python-docs")
    if not known and not (isinstance(value, str) and value and Path(value).expanduser().exists()):
        refuse(name, value, f"{', '.join(HUB)}, python-docs, or the path of a file or folder that exists")


def _folder(name, value):
    if not isinstance(value, str) or not Path(value).expanduser().is_dir():
        refuse(name, value, "a folder that exists")


def _output_dir(name, value):
    if not isinstance(value, str | Path) or not str(value):
        refuse(name, value, "the path of a folder")


def _device(name, value):
    if not isinstance(value, str) or not re.fullmatch(r"auto|all|cpu|mps|cuda(:\d+)?", value):
        refuse(name, value, "auto, all, cpu, cuda, cuda:<number> or mps")


def _quality_weights(name, value):
    if value == "random":
        raise ValueError(
            f"{name}='random': quality is measured, which random weights have none of; allowed is auto or pretrained"
        )
    check_choice(name, value, ("auto", "pretrained"))


Revision = Annotated[str, Rule(_revision)]
_MAY_BE_ANOTHER = "it may load another model than is declared; allowed is pretrained"
_AUTO, _AUTO_OR_RANDOM = {"auto": _MAY_BE_ANOTHER}, {"auto": f"{_MAY_BE_ANOTHER} or random"}
Model = Annotated[str, Rule(_model)]
Weights = Annotated[
    str, one_of("auto", "pretrained", "random", not_in_a_sweep=_AUTO_OR_RANDOM)
]  # for time and memory alone
QualityWeights = Annotated[str, Rule(_quality_weights, not_in_a_sweep=_AUTO)]
Dataset = Annotated[str, Rule(_dataset)]
Subset = Annotated[str, one_of(*WIKITEXT_SUBSETS)]
Split = Annotated[str, one_of(*SPLITS)]
Index = Annotated[int, whole(0)]
Folder = Annotated[str, Rule(_folder)]
Press = Annotated[str, Rule(_one_press)]
Presses = Annotated[str | Sequence[str], Rule(_press, several=True)]
Ratio = Annotated[float, share(below_one=True)]
Ratios = Annotated[float | Sequence[float], share(below_one=True, several=True)]
Budgets = Annotated[int | Sequence[int], whole(1, several=True)]
Bits = Annotated[int | None | Sequence[int | None], Rule(_bits, several=True)]
Tasks = Annotated[str | Sequence[str], Rule(_task, several=True)]
Questions = Annotated[str | Sequence[str], one_of("outside", "inside", several=True)]
Templates = Annotated[str | Sequence[str], Rule(_template, several=True)]
Cut = Annotated[str, one_of("left", "middle")]
Limit = Annotated[int | float, Rule(_limit)]
Count = Annotated[int, whole(1)]
Counts = Annotated[int | Sequence[int], whole(1, several=True)]
Share = Annotated[float, share()]
Shares = Annotated[Sequence[float], share(several=True)]
YesOrNo = Annotated[bool, yes_or_no()]
YesesAndNoes = Annotated[bool | Sequence[bool], yes_or_no(several=True)]
Attention = Annotated[str, one_of("auto", *ATTENTION)]
Dtype = Annotated[str, one_of("auto", *DTYPES)]
Dtypes = Annotated[str | Sequence[str], one_of("auto", *DTYPES, several=True)]
Device = Annotated[str, Rule(_device)]
OutputDir = Annotated[str, Rule(_output_dir)]
_AGAIN = {True: "what is done again follows from what changed"}
Overwrite = Annotated[bool, yes_or_no(not_in_a_sweep=_AGAIN)]


def rule_of(hint) -> Rule:
    return hint.__metadata__[0]


@cache
def rules_of(measure: Callable) -> dict[str, tuple[Rule, bool]]:
    """For each parameter its rule, and whether None is allowed."""
    found = {}
    for name, hint in get_type_hints(measure, include_extras=True).items():
        optional = type(None) in get_args(hint)
        annotated = next((part for part in (hint, *get_args(hint)) if hasattr(part, "__metadata__")), None)
        if annotated is not None:
            found[name] = (rule_of(annotated), optional)
    return found


def check_arguments(measure: Callable, asked: Mapping, in_a_sweep: bool = False) -> None:
    for name, value in asked.items():
        check_argument(measure, name, value, in_a_sweep)
    find_target(asked["model"], asked.get("revision"))  # a folder has that revision, or none
    if asked.get("data_dir") is not None and asked.get("dataset") not in HUB:
        refuse(
            "data_dir", asked["data_dir"], f"None beside dataset={asked['dataset']!r}: it goes with {' or '.join(HUB)}"
        )


def check_argument(measure: Callable, name: str, value, in_a_sweep: bool = False) -> None:
    rule, optional = rules_of(measure)[name]
    if value is None and optional:
        return
    several = rule.several and isinstance(value, list | tuple)
    if several and not value and not rule.may_be_empty:
        raise ValueError(f"{name}={value!r}: a list must not be empty")
    for item in value if several else [value]:
        why = in_a_sweep and isinstance(item, str | bool) and (rule.not_in_a_sweep or {}).get(item)
        if why:
            raise ValueError(f"{name}={item!r} is not for a params file: {why}")
        rule.check(name, item)


def values_matter(measure: Callable) -> bool:
    """Whether a figure depends on the values of the weights: then random ones are refused."""
    rule = rules_of(measure).get("weights")
    try:
        return rule is None or bool(rule[0].check("weights", "random"))
    except ValueError:
        return True


def defaults_of(measure: Callable) -> dict:
    return {name: parameter.default for name, parameter in inspect.signature(measure).parameters.items()}


def expand_variables(name: str, value):
    """`$NAME` and `${NAME}` in a text: the one way to name a folder of your machine in a file that others use too."""
    if not isinstance(value, str):
        return value
    for match in re.finditer(r"\$\{?(\w+)\}?", value):
        if match[1] not in os.environ:
            raise ValueError(f"{name}: the variable {match[1]} is not set; `export {match[1]}=<folder>` first")
    return os.path.expanduser(os.path.expandvars(value))
