"""Finding tasks: those of lm-evaluation-harness and those in the box, loaded where their data may be out of reach.

The harness builds a task by fetching its data set. Here a data set in the cache is used without asking the network, and
whether the network can be asked at all is decided once, in seconds, before libraries retry for half a minute.
"""

import errno
import importlib.util
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from huggingface_hub import constants

from kvneox_lib.inputs import hub
from kvneox_lib.neox.checks import check_int, did_you_mean

if TYPE_CHECKING:  # lm_eval takes a second to import, and is an extra
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

PACKAGES = "lm-eval[longbench,ruler]==0.4.13"
POSITIONS = 2048  # of every Pythia
RULER = ("ruler", "niah_", "longcxt")  # how its tasks, its group and its tag begin
ENDLESS = ("ruler", "ruler_vt", "ruler_cwe", "longcxt")  # RULER's that try for ever to fit a prompt, deaf to Ctrl-C
SHORTEST = 1024  # of the lengths at which these were seen to come to an end
A_LINE_THAT_NAMES = re.compile(r"""^task:[ \t]*["']?([\w.-]+)["']?[ \t]*$""", re.M)
ANOTHER_TASK = "or take tasks in the box, kvneox_*, which need no network"
WITHOUT_SENTENCES = (
    "it cuts essays into sentences with nltk's punkt_tab, which is not here and cannot be fetched. Two ways out: "
    "`python -m nltk.downloader punkt_tab` where there is a connection, and NLTK_DATA set to that folder; "
    f"{ANOTHER_TASK}."
)


def task_manager(
    *,
    tokenizer: Path | None = None,
    max_length: int | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    bundled_only: bool = False,
    **metadata,
) -> "TaskManager":
    """What finds the harness' tasks, those in the box, and those in the folders `include_path`, which come first.

    tokenizer: the folder of the model's own, with which RULER measures how long its prompts are. max_length: the
    model's positions, which those prompts fill. bundled_only: leave the harness' 14,000 tasks out, which take 5 s to
    read. metadata: more that tasks are told; `max_seq_lengths=[1024, 2048]` gives RULER several lengths.
    """
    told = {"max_seq_lengths": [POSITIONS if max_length is None else max_length], **metadata}
    for length in told["max_seq_lengths"]:
        check_int("max_length" if "max_seq_lengths" not in metadata else "max_seq_lengths", length, least=1)
    if tokenizer is not None:
        told = {"tokenizer": str(_folder("tokenizer", tokenizer)), **told}
    included = [include_path] if isinstance(include_path, str | Path) else include_path or []
    folders = [bundled_tasks(), *(_folder("include_path", folder) for folder in included)]
    return _harness().TaskManager(include_path=folders, include_defaults=not bundled_only, metadata=told)


def bundled_tasks() -> Path:
    """The folder of those in the box."""
    from kvneox_lib.inputs.tasks import documents

    return Path(documents.__file__).parent


def check_task_names(names: Sequence[str], manager: "TaskManager | None" = None) -> None:
    """Every name is a task, a group or a tag, or the path of a task's YAML. No data set is touched.

    Without a manager the harness' names are read only if one of `names` is not in the box.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"tasks={names!r}: must be a list of at least one name, such as ['lambada_openai']")
    known = set((manager or _manager(bundled_only=True)).all_tasks)
    if not manager and not known.issuperset(names):
        known = set(_manager(bundled_only=False).all_tasks)
    for name in names:
        if name not in known and not (name.endswith(".yaml") and Path(name).is_file()):
            allowed = "a task, group or tag that `lm-eval ls all` lists, one in the box (kvneox_*), or a .yaml file"
            raise ValueError(f"tasks={name!r}: {did_you_mean(name, known)}allowed is {allowed}")


def check_single_task(name: str) -> None:
    """What has scores of its own. No data set is touched."""
    if isinstance(name, str) and name in _named_in_a_line():
        return
    check_task_names([name])
    if name.endswith(".yaml"):
        raise ValueError(
            f"tasks={name!r}: allowed is a name; a YAML of your own goes with `python -m kvneox_lib tasks`"
        )
    if members := members_of(name, _manager(is_bundled(name))):
        raise ValueError(f"tasks={name!r}: is a group; allowed are single tasks, of it {', '.join(members)}")


def members_of(name: str, manager: "TaskManager") -> list[str]:
    """The tasks of a group or a tag; none if it is a task itself. No data set is touched."""
    entry = manager.task_index[name]
    if name in manager.all_groups:
        return [part if isinstance(part, str) else part["task"] for part in entry.cfg["task"]]
    return sorted(entry.tags) if name in manager.all_tags else []  # of a tag, `tags` are its tasks


def task_index() -> dict:
    """What the harness and the box say of each task, by its name; read once."""
    return _manager(bundled_only=False).task_index


def is_bundled(name: str) -> bool:
    return name in _manager(bundled_only=True).all_tasks


def load_tasks(names: Sequence[str], manager: "TaskManager") -> "list[Task | Group]":
    """The tasks and groups that `names` stand for, with their data: what lm_eval.simple_evaluate takes as `tasks`.

    Data that cannot be had are a ConnectionError that says what is missing and which ways out there are; a package that
    is missing, an ImportError that says how it is installed. Prompts that a task invents are the same at every call.
    RULER's scores carry the lengths that were asked for as their names.
    """
    check_task_names(names, manager)
    with _draws_of_the_caller_kept():
        found = [built for name in names for built in _load(name, manager)]
        loaded = manager.load(found)  # refuses a task that is there twice
    for task in loaded["tasks"].values():
        _score_at_lengths_asked_for(task)
    for group in loaded.get("groups", {}).values():
        _average_at_lengths_asked_for(group)
    return found


@contextmanager
def cache_first() -> Iterator[None]:
    """Within it, whoever calls datasets.load_dataset gets what is in the cache without a question to the network, and a
    clear ConnectionError in seconds instead of retries. For runs that let the harness load tasks by itself."""
    import datasets
    import requests

    load_dataset, get = datasets.load_dataset, requests.get

    def cached_or_fetched(path, name=None, **options):
        return _cached_or_fetched(load_dataset, path, name, **options)

    def get_if_reachable(url, **options):
        return _get_if_reachable(get, url, **options)

    with replaced(datasets, "load_dataset", cached_or_fetched), replaced(requests, "get", get_if_reachable):
        yield


# ---- finding --------------------------------------------------------------------------------------------------------


def _harness():
    try:
        return importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise ImportError(f"tasks want lm-evaluation-harness ({error}): pip install '{PACKAGES}'") from error


def _folder(parameter: str, folder: str | Path) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"{parameter}={str(folder)!r}: no such folder; must be one that exists")
    return path


@cache
def _named_in_a_line() -> frozenset[str]:
    """Tasks whose YAML says so in a line, as most do: half a second, where the harness' index takes five and more. The
    harness is not imported for that: a sweep reads its params files again for each run."""
    spec = importlib.util.find_spec("lm_eval")
    folders = [Path(__file__).parent, *map(Path, spec.submodule_search_locations if spec else ())]
    files = [path for folder in folders for path in (folder / "tasks").rglob("*.yaml")]
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in files)
    return frozenset(name for text in texts for name in A_LINE_THAT_NAMES.findall(text))


@cache
def _manager(bundled_only: bool) -> "TaskManager":
    """To look names up."""
    return task_manager(bundled_only=bundled_only)


# ---- loading --------------------------------------------------------------------------------------------------------


def _load(name: str, manager: "TaskManager") -> "list[Task | Group]":
    """A group is one thing, a tag is as many as it has tasks."""
    if name in ENDLESS and any(length < SHORTEST for length in (manager.metadata or {}).get("max_seq_lengths", ())):
        lengths = manager.metadata["max_seq_lengths"]
        raise ValueError(f"max_seq_lengths={lengths}: tasks={name!r} wants {SHORTEST} or more, or it would never end")
    try:
        with cache_first(), _nltk_if_reachable(name):
            _seed_as_the_harness_does()
            loaded = manager.load([name])
    except ImportError as error:
        raise ImportError(f"tasks={name!r}: a package is missing ({error}): pip install '{PACKAGES}'") from error
    except LookupError as error:
        if "punkt_tab" not in str(error):
            raise
        raise ConnectionError(f"tasks={name!r}: {WITHOUT_SENTENCES}") from error
    except OSError as error:
        if hub.is_the_disks_fault(error):
            raise
        ours = type(error) is ConnectionError
        what = str(error) if ours else f"its data cannot be had ({_first_line(error)}); {ANOTHER_TASK}."
        raise ConnectionError(f"tasks={name!r}: {what}") from error
    group = loaded.get("groups", {}).get(name)
    return [group] if group else list(loaded["tasks"].values())


@contextmanager
def _draws_of_the_caller_kept() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _seed_as_the_harness_does() -> None:
    """With the seeds that simple_evaluate sets before it builds tasks.

    ruler_cwe shuffles with a generator of its own, which goes on from load to load: its module starts anew.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)


@contextmanager
def _nltk_if_reachable(name: str) -> Iterator[None]:
    """RULER's code fetches punkt_tab while it is imported, though only essays need it; nltk would wait two minutes."""
    try:
        nltk = importlib.import_module("nltk") if name.startswith(RULER) else None
    except ImportError:  # RULER will say so
        nltk = None
    if nltk is None:
        yield
        return
    download = nltk.download

    def if_reachable(*what, **options) -> bool:
        if constants.HF_HUB_OFFLINE or hub._unreachable(nltk.downloader.Downloader.DEFAULT_URL):
            return False
        return download(*what, **options)

    with replaced(nltk, "download", if_reachable):
        yield


# ---- data sets ------------------------------------------------------------------------------------------------------


def _cached_or_fetched(load_dataset, path, name=None, **options):
    """datasets.load_dataset, which by itself asks the hub even for what it has in its cache."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    if path in FORMATS or Path(path).is_dir():
        return load_dataset(path, name, **options)
    with suppress(Exception):  # of many kinds: not there, another configuration, written by an older version
        return _cached(load_dataset, path, name, **options)
    return _fetched(load_dataset, path, name, **options)


def _cached(load_dataset, path, name, **options):
    import datasets

    with replaced(datasets.config, "HF_HUB_OFFLINE", True), replaced(constants, "HF_HUB_OFFLINE", True):
        try:
            return load_dataset(path, name, **options)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
            return _cached_where_nothing_may_be_written(load_dataset, path, name, **options)


def _cached_where_nothing_may_be_written(load_dataset, path, name, **options):
    """`datasets` locks files beside what it reads, so it is shown a folder with links to its cache, and reads all of it
    into memory, where what tasks derive from it stays as well."""
    import datasets

    with tempfile.TemporaryDirectory() as links:
        for folder in Path(datasets.config.HF_DATASETS_CACHE).iterdir():
            if folder.is_dir():
                Path(links, folder.name).symlink_to(folder)
        return load_dataset(path, name, cache_dir=links, keep_in_memory=True, **options)


def _fetched(load_dataset, path, name, **options):
    import datasets

    endpoint, why = hub.endpoint(), hub.out_of_reach()
    if not why and datasets.config.HF_HUB_OFFLINE:
        why = "HF_DATASETS_OFFLINE forbids to ask the hub"
    try:
        if not why:
            with replaced(datasets.config, "HF_ENDPOINT", endpoint):
                return load_dataset(path, name, **options)
    except (httpx.HTTPError, RuntimeError, OSError) as error:  # hf_xet raises RuntimeError
        if hub.is_the_disks_fault(error):
            raise
        why = f"{endpoint} did not deliver ({_first_line(error)})"
    what = path if name is None else f"{path} ({name})"
    raise ConnectionError(
        f"the data set {what} is not in the cache ({datasets.config.HF_DATASETS_CACHE}), and {why}.\n"
        "Three ways out: set HF_ENDPOINT to a mirror of the hub that this machine can reach; set HF_HOME to a cache "
        f"that was filled where there is a connection; {ANOTHER_TASK}."
    )


def _get_if_reachable(get, url, **options):
    """requests.get, for the two tasks of RULER that read a fixed address."""
    if why := "HF_HUB_OFFLINE forbids to ask" if constants.HF_HUB_OFFLINE else hub._unreachable(url):
        raise ConnectionError(f"{url} is read from there alone, and it cannot be reached ({why}); {ANOTHER_TASK}.")
    return get(url, **options)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def replaced(owner, attribute: str, value) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


# ---- RULER's lengths ------------------------------------------------------------------------------------------------


def _score_at_lengths_asked_for(task: "Task") -> None:
    """RULER names its scores after lengths, from 4096 on. Another length the harness reports by accident, without an
    order of better and worse, beside a 4096 of -1 that stands for nothing. Only what was asked for remains."""
    if not all(str(metric).isdigit() for metric in task.aggregation()):
        return
    from lm_eval.api.metrics import mean

    scores, lengths = task.config.process_results, _lengths(task.config.metadata)

    def process_results(doc: dict, results: list[str]) -> dict[str, float]:
        length = str(doc["max_length"])
        return {length: scores(doc, results)[length]}

    task.set_config("process_results", process_results)
    task.set_config("metric_list", [{"metric": length, "aggregation": "mean"} for length in lengths])
    task._aggregation_list = dict.fromkeys(lengths, mean)
    task._higher_is_better = dict.fromkeys(lengths, True)


def _average_at_lengths_asked_for(group: "Group") -> None:
    averages = group.aggregate_metric_list or []
    if averages and all(average.metric.isdigit() for average in averages):
        group.aggregate_metric_list = [replace(averages[0], metric=length) for length in _lengths(group.metadata)]


def _lengths(metadata: dict) -> list[str]:
    return [str(length) for length in metadata["max_seq_lengths"]]
