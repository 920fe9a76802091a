"""What the report reads: the records of a study, one machine, model and text at a time, and what stands in their place
where there are none.

Of a study the records in results/ count, else the committed ones in results/reference/. A figure or sentence asks for
what it needs; what is not there raises `Missing`, whose text `say`, `draw` and `tabulate` put in the place of it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unicodedata import east_asian_width

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from kvneox_lib.pages import figures, selecting
from kvneox_lib.pages.words import STUDY_NAMES, listed, model_in_words, plain, weights_in_words
from kvneox_lib.studies.records import load_records, packed_path, tables_of
from kvneox_lib.studies.table import STUDIES

# An exploration is of a single piece of text, timed once: no evidence.
NOTEBOOKS = {row.name: row.notebook for row in STUDIES.values() if row.name != "explore"}
MACHINE = ("device", "device_name", "dtype")
SETTING = (*MACHINE, "model", "weights", "dataset")  # as they turned out


class Missing(LookupError):
    """A record that the report wants and nobody has measured; the text is for the reader."""

    def __init__(self, study: str, what: str = ""):
        super().__init__(f"（缺少记录：{study}{what and f' 的 {what}'}，运行 notebooks/{NOTEBOOKS[study]}.ipynb 可得）")


def found_in(study: str, found, what: str):
    """`found`, if there is anything in it."""
    if not len(found):
        raise Missing(study, what)
    return found


@dataclass(frozen=True, eq=False)
class Records:
    """Runs of one study on one machine, with one model, text and protocol; one at each place on the axes."""

    study: str
    folder: Path  # relative to the repository
    root: Path
    frame: pd.DataFrame
    left_out: tuple[str, ...] = ()  # other settings that the study has too

    def runs(self, **wanted) -> pd.DataFrame:
        """The runs with these values, such as press="snapkv", compression_ratio=0.75."""
        found = self.frame
        for name, value in wanted.items():
            found = found[found[name] == value] if name in found else found.iloc[:0]
        if found.empty:
            raise Missing(self.study, "，".join(_wanted(name, value) for name, value in wanted.items()))
        return found

    def run(self, **wanted) -> pd.Series:
        return self.runs(**wanted).iloc[0]

    def table(self, name: str, **wanted) -> pd.DataFrame:
        """That table of those runs, one below the other, with the columns that tell the runs apart."""
        found = _table(self, name, tuple(wanted.items()))
        if found.empty:
            raise Missing(self.study, f"表 {name}")
        return found.copy()

    def show(self, column: str, spec: str, **wanted) -> str:
        """One figure as text."""
        return say(lambda: _shown(self, column, spec, wanted))

    @property
    def source(self) -> str:
        """Where the figures come from, for the line under each picture; report/sources.py links it."""
        return say(lambda: _source(self) + ("其余设置见 @tbl-records。" if self.left_out else ""))


@lru_cache(maxsize=512)
def _table(records: Records, name: str, wanted: tuple) -> pd.DataFrame:
    """A report asks for the same table in many sentences."""
    return tables_of(records.runs(**dict(wanted)), name)


def _wanted(name: str, value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, str) else f"{name}={value}"


def _shown(records: Records, column: str, spec: str, wanted: dict) -> str:
    value = records.run(**wanted).get(column)
    if pd.isna(value):
        raise Missing(records.study, column)
    return format(value, spec)


def _source(*several: Records) -> str:
    """Of one setting or of several together."""
    counts: dict[str, int] = {}
    for records in several:
        counts[_file(records)] = counts.get(_file(records), 0) + len(records.runs())
    files = "、".join(f"{file}，{n} 份记录" for file, n in counts.items())
    wanted = [*SETTING, "revision", "git_commit", "git_dirty"]
    runs = pd.concat([records.frame.reindex(columns=wanted).astype(object) for records in several])
    texts = listed("随机词元" if name == "random-tokens" else name for name in dict.fromkeys(runs["dataset"]))
    machines = listed(
        f"{listed(dict.fromkeys(part['device_name']))}（{device}，{dtype}）"
        for (device, dtype), part in runs.groupby(["device", "dtype"], sort=False)
    )
    commits = listed(sorted({str(commit)[:7] for commit in runs["git_commit"].dropna()}), none="不详")
    dirty = "，含未提交的改动" if runs["git_dirty"].eq(True).any() else ""
    notebooks = listed(dict.fromkeys(f"notebooks/{NOTEBOOKS[records.study]}.ipynb" for records in several))
    return (
        f"来源：{files}；模型 {_models_and_states(runs)}；文本 {texts}；设备 {machines}；"
        f"提交 {commits}{dirty}；笔记本 {notebooks}。"
    )


def _file(records: Records) -> str:
    packed = packed_path(records.folder)
    return (packed if (records.root / packed).exists() else records.folder).as_posix()


def _models_and_states(runs: pd.DataFrame) -> str:
    pairs = runs[["model", "weights"]].drop_duplicates().itertuples(index=False)
    models = listed(f"{model}（{weights_in_words(model, weights)}）" for model, weights in pairs)
    n = runs["revision"].dropna().nunique()
    return models + (f"，训练途中的 {n} 个状态" if n else "")


def sources(found: list[Records]) -> str:
    """Where a table comes from that shows several settings; of those without records, how to make them."""
    there = [records for records in found if len(records.frame)]
    missing = [say(records.runs) for records in found if not len(records.frame)]
    return (_source(*there) if there else "") + "".join(dict.fromkeys(missing))


def repository() -> Path:
    """The folder that holds report/, found upward from the working folder: cells run in report/."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "report" / "_quarto.yml").is_file()), here)


def settings(study: str, root: Path | None = None, revisions: bool = False) -> list[Records]:
    """The study's records, those of each setting apart, in the order of `_worth`; of models as they are used, or of
    their revisions."""
    if study not in NOTEBOOKS:
        raise ValueError(f"study={study!r}: must be one of {', '.join(NOTEBOOKS)}")
    root = root or repository()
    folders = (Path("results") / study, Path("results") / "reference" / study)
    return next((found for folder in folders if (found := settings_in(folder, root, revisions))), [])


def settings_in(folder: Path, root: Path, revisions: bool = False) -> list[Records]:
    """The same of that folder, relative to `root`, which is called after its study."""
    whole = root / folder
    files = [packed_path(whole), *sorted(whole.glob("*.json"))]
    return list(
        _settings_of(folder, root, revisions, tuple((path, path.stat().st_mtime_ns) for path in files if path.exists()))
    )


@lru_cache(maxsize=64)
def _settings_of(folder: Path, root: Path, revisions: bool, files: tuple) -> list[Records]:
    """As `files` are now: a report asks for the same settings many times."""
    choose = selecting.of_revisions if revisions else selecting.of_finished_models
    study, frame = folder.name, choose(load_records(root / folder))
    if frame.empty:
        return []
    for name in ("model", "dataset", "device_name"):
        frame[name] = frame[name].map(plain, na_action="ignore")
    keys = _keys(frame, study)
    groups = [_newest(part, study) for _, part in frame.groupby(keys, dropna=False, sort=False)]
    groups.sort(key=_worth)
    words = [_difference(part, frame, keys) for part in groups]
    return [
        Records(study, folder, root, part.reset_index(drop=True), tuple(words[:i] + words[i + 1 :]))
        for i, part in enumerate(groups)
    ]


def _worth(part: pd.DataFrame) -> tuple:
    """What compares most engines first, then what has most runs; float32, as quality is measured in, before others."""
    n_engines = part["engine"].nunique() if "engine" in part else 0
    return -n_engines, -len(part), part["dtype"].iloc[0] != "float32"


def _keys(frame: pd.DataFrame, study: str) -> list[str]:
    """The columns that hold records apart: SETTING, and the other parameters but for the axes of the study. Which
    processor it was, and the attention implementation, which follows from the press, are told apart only where time is
    measured."""
    row = STUDIES[study]
    together = set() if row.is_timed else {"attn_implementation", "device_name"}
    names = [name for name in dict.fromkeys((*SETTING, *row.parameters)) if name in frame and name not in together]
    apart = [name for name in names if name in SETTING or name not in row.axes]
    return [name for name in apart if name != "dataset" or name not in row.axes]  # a task among others


def _newest(part: pd.DataFrame, study: str) -> pd.DataFrame:
    """Of the records at the same place on the axes, the latest."""
    axes = [name for name in STUDIES[study].axes if name in part]
    return part.sort_values("started_at", kind="stable").drop_duplicates(axes, keep="last").sort_index()


def _difference(part: pd.DataFrame, frame: pd.DataFrame, keys: list[str]) -> str:
    differing = [name for name in keys if frame[name].nunique(dropna=False) > 1]
    words = [f"{name} {_value(part[name].iloc[0])}" for name in differing]
    return "，".join(words) + f"（{len(part)} 份）"


def _value(value) -> str:
    return "无" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def read(study: str, root: Path | None = None) -> Records:
    """The records of the setting that comes first."""
    found = settings(study, root)
    folder = Path("results") / "reference" / study
    return found[0] if found else Records(study, folder, root or repository(), pd.DataFrame())


# ---- what sentences ask of records ----------------------------------------------------------------------------------


def pressed(records: Records) -> pd.DataFrame:
    """The runs with a ratio, without the baseline."""
    found = selecting.pressed(records.runs())
    if found.empty:
        raise Missing(records.study, "有压缩率的 press")
    return found


def middle_ratio(records: Records) -> float:
    return selecting.middle_ratio(pressed(records))


def named(records: Records) -> str:
    """The study's name, and the text that it really used."""
    return f"{STUDY_NAMES[records.study]}（{records.run().dataset}）"


def models(*several: Records) -> str:
    """The models of these studies, in words."""
    frames = [records.frame for records in several if len(records.frame)]
    if not frames:
        raise Missing(several[0].study)
    pairs = pd.concat(frames)[["model", "weights"]].drop_duplicates().itertuples(index=False)
    return listed(dict.fromkeys(model_in_words(*pair) for pair in pairs))


# ---- what survives a missing record ---------------------------------------------------------------------------------


def say(sentence: Callable[..., str], *of) -> str:
    """`sentence(*of)`, or what it misses."""
    try:
        return sentence(*of)
    except Missing as missing:
        return str(missing)


def draw(picture: Callable[..., Figure], *of) -> Figure:
    try:
        return picture(*of)
    except Missing as missing:
        return figures.note(str(missing))


def tabulate(rows: Callable[..., pd.DataFrame], *of) -> Markdown:
    try:
        frame = rows(*of)
    except Missing as missing:
        frame = pd.DataFrame({"缺少": [str(missing)]})
    unbroken = frame.map(lambda cell: BETWEEN_NUMBERS.sub("\u00a0", str(cell)))
    if sum(column_widths(unbroken)) <= PAGE:
        frame = unbroken
    text = frame.map(lambda cell: re.sub(r"[|']", r"\\\g<0>", str(cell)))  # a quote stays straight: no gap in Chinese
    lines = text.to_markdown(index=False, disable_numparse=True).splitlines()
    lines[1] = "|".join(["", *(":" + "-" * width for width in column_widths(frame)), ""])
    return Markdown("\n".join(lines))


PAGE = 112  # half-width letters of a docx table side by side
BETWEEN_NUMBERS = re.compile(r"(?<=[\d,]) (?=[-+−\d\[])")  # where no line should end


def column_widths(frame: pd.DataFrame) -> list[int]:
    """What each column takes, in half-width letters, with four for the margins: its longest cell, but where these are
    wider than a page, or than 24, less; never less than its longest word. pandoc makes the columns of docx in
    proportion."""
    texts = [[re.sub(r"\[@[^]]*\]", "[00]", str(text)) for text in (name, *frame[name])] for name in frame]
    whole = [max(_width(text) for text in column) for column in texts]
    words = [max(len(word) for text in column for word in re.findall(r"[!-~\u00a0]+|$", text)) for column in texts]
    for most in range(24, 7, -1):
        widths = [max(word, min(most, width)) + 4 for width, word in zip(whole, words)]
        if sum(widths) <= PAGE:
            break
    return widths


def _width(text: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def sentences(*parts: Callable[[], str] | tuple) -> Markdown:
    """A paragraph of several sentences, each of which may miss its record: a function, or one and what it is of."""
    asked = [part if isinstance(part, tuple) else (part,) for part in parts]
    return Markdown("".join(dict.fromkeys(say(*part) for part in asked)))  # a note once


def code(*objects) -> Markdown:
    """Our own code as it is installed, in lines that fit a page."""
    texts = [narrow(textwrap.dedent(inspect.getsource(item)).rstrip()) for item in objects]
    return Markdown("\n\n".join(f"```python\n{text}\n```" for text in texts))


def narrow(source: str, width: int = 80) -> str:
    """The same code in lines of at most `width` letters: a long one is broken where that changes nothing."""
    lines = source.splitlines()
    for i, line in enumerate(lines):
        for parts in _ways_to_break(line, width) if len(line) > width else ():
            broken = "\n".join([*lines[:i], *parts, *lines[i + 1 :]])
            if _meaning(broken) == _meaning(source):
                return narrow(broken, width)
    return source


def _ways_to_break(line: str, width: int) -> Iterator[list[str]]:
    """The best first: the comment at its end on a line before; between arguments; anywhere."""
    indent = line[: len(line) - len(line.lstrip())]
    if found := re.fullmatch(r"(.*\S)  # (.*)", line):
        yield [*textwrap.wrap(found[2], width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "), found[1]]
    further = indent + " " * (0 if '"""' in line else 8 if line.lstrip().startswith("def ") else 4)
    for gap in (", ", " "):
        ends = [found.end() for found in re.finditer(gap, line[:width]) if found.start() > len(indent)]
        yield from ([line[:end].rstrip(), further + line[end:]] for end in reversed(ends))


def _meaning(source: str) -> str | None:
    """What Python reads; of a docstring, its words."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = " ".join(node.value.split())
    return ast.dump(tree)
