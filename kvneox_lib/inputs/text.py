"""Finding text: on the hub or a mirror of it, on disk, or in the box that Python came in.

A `Text` carries a name that says what was really read, whatever was asked for.
"""

import json
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pandas as pd
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from kvneox_lib.inputs import hub
from kvneox_lib.inputs.files import digest_of_files
from kvneox_lib.neox.checks import check_choice

WIKITEXT_SUBSETS = ("wikitext-103-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-2-raw-v1")
SPLITS = ("test", "validation", "train")
# deepmind/pg19 is a loading script, which `datasets` no longer runs; emozilla/pg19 is its parquet copy.
HUB = {
    "wikitext": ("Salesforce/wikitext", "{subset}/{split}-*.parquet"),
    "pg19": ("emozilla/pg19", "data/{split}-*.parquet"),
}
FOLDER_NAMES = {"gutenberg-pre1919": "Gutenberg (pre-1919)"}  # folders whose own name says too little
PYTHON_DOCS = "pydoc_data.topics"
SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")


@dataclass(frozen=True)
class Text:
    documents: list[str]  # one per book, or one running text; nothing is ever cut across two of them
    titles: list[str]
    name: str  # for records and figures: what was read, not what was asked for
    source: str


def load_text(
    dataset: str = "python-docs",
    *,
    subset: str | None = None,
    split: str = "test",
    sample_idx: int | None = None,
    data_dir: str | Path | None = None,
    fallback: str | None = None,
) -> Text:
    """Read `dataset`: `wikitext` or `pg19` (from the hub, or from the folder `data_dir`), `python-docs` (the language
    reference inside every Python: needs nothing), or the path of a .txt, .md, .jsonl, .parquet or a folder of them.

    subset: of wikitext (default wikitext-103-v1). split: of wikitext, pg19, and of folders whose files are named by
    split. sample_idx: keep this one document. fallback="python-docs": what stands in, with a warning and under its own
    name, when the hub cannot be reached; without it that is a ConnectionError. A copy in the hub's cache is used
    without asking the network; otherwise the decision that there is no connection takes under 5 s.
    """
    if fallback not in (None, "python-docs"):
        raise ValueError(f"fallback={fallback!r}: must be None or 'python-docs'")
    if not isinstance(dataset, str | Path) or not str(dataset):
        raise ValueError(f"dataset={dataset!r}: must be one of {', '.join(HUB)}, python-docs, or a path")
    path = Path(dataset).expanduser()
    if dataset not in (*HUB, "python-docs") and not path.exists():
        check_choice("dataset", str(dataset), (*HUB, "python-docs"), ", or the path of a file or folder that exists")
    if sample_idx is not None and (isinstance(sample_idx, bool) or not isinstance(sample_idx, int) or sample_idx < 0):
        raise ValueError(f"sample_idx={sample_idx!r}: must be a whole number, 0 or above")
    if data_dir is not None and dataset not in HUB:
        raise ValueError(f"data_dir={str(data_dir)!r}: goes with dataset='wikitext' or 'pg19', not with {dataset!r}")
    if dataset == "wikitext" and subset is not None:
        check_choice("subset", subset, WIKITEXT_SUBSETS)
    if dataset == "python-docs":
        text = _python_docs()
    elif dataset not in HUB:
        text = _read_path(path, split)
    elif data_dir is not None:
        text = _read_data_dir(Path(data_dir).expanduser(), dataset, subset, split)
    else:
        text = _read_hub_or(fallback, dataset, subset or WIKITEXT_SUBSETS[0], split)
    return text if sample_idx is None else _pick(text, sample_idx)


def _pick(text: Text, sample_idx: int) -> Text:
    n = len(text.documents)
    if isinstance(sample_idx, bool) or not isinstance(sample_idx, int) or not 0 <= sample_idx < n:
        raise ValueError(f"sample_idx={sample_idx!r}: {text.source} has {n} document(s), so 0 to {n - 1} are allowed")
    return Text([text.documents[sample_idx]], [text.titles[sample_idx]], text.name, text.source)


def _python_docs() -> Text:
    """The topics in the order of their names, as one book. Its text depends on Python's version, so the name has it."""
    from pydoc_data.topics import topics

    name = f"python-docs {platform.python_version()}"
    book = "\n\n".join(topics[topic].strip("\n") for topic in sorted(topics))
    return Text([book], ["The Python Language Reference"], name, PYTHON_DOCS)


# ---- local files ----------------------------------------------------------------------------------------------------


def _read_data_dir(folder: Path, dataset: str, subset: str | None, split: str) -> Text:
    """The folder itself, or where a copy of the hub's repository keeps its files: in <subset>/ or in data/."""
    if not folder.is_dir():
        raise ValueError(f"data_dir={str(folder)!r}: no such folder (a single file is given as dataset=<its path>)")
    if dataset == "pg19":
        return _read_path(folder / "data" if (folder / "data").is_dir() else folder, split, _name(folder))
    if subset is not None and folder.name in WIKITEXT_SUBSETS and folder.name != subset:
        raise ValueError(f"subset={subset!r}: data_dir={str(folder)!r} is {folder.name}; ask for that, or leave it out")
    inner = folder / (subset or WIKITEXT_SUBSETS[0])
    return _read_path(inner if inner.is_dir() else folder, split)


def _name(path: Path) -> str:
    return FOLDER_NAMES.get(path.resolve().name, path.resolve().name)


def digest_of_text(path: Path) -> str:
    """Of all that could be read there, in whatever split; of a folder with those in it that a data_dir may have."""
    folders = [inner for name in ("data", *WIKITEXT_SUBSETS) if (inner := path / name).is_dir()]
    return digest_of_files(file for place in (path, *folders) for file in _files_at(place))


def _files_at(path: Path) -> list[Path]:
    files = sorted(file for file in (path.iterdir() if path.is_dir() else [path]) if file.suffix.lower() in SUFFIXES)
    return [file for file in files if file.is_file() and (not file.name.startswith("README") or file == path)]


def _read_path(path: Path, split: str, name: str | None = None) -> Text:
    name, files = name or _name(path), _files_at(path)
    if not files:
        raise ValueError(f"{path}: no file to read; it must end in {', '.join(SUFFIXES)}, or be a folder of such")
    split_of = {file: s for file in files for s in SPLITS if re.fullmatch(rf"{s}(-\d+-of-\d+.*)?", file.stem)}
    if split_of and path.is_dir():
        check_choice("split", split, sorted(set(split_of.values())), f" (what {path} holds)")
        files = [file for file in files if split_of.get(file) == split]
        name = name if split == "test" else f"{name} ({split})"
    return Text(*_read_files(files), name, str(path))


def _read_files(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(documents, titles). A .txt or .md is a document; the rows of all .parquet and .jsonl form one table."""
    tables = [_read_table(file) for file in files if file.suffix.lower() in (".parquet", ".jsonl")]
    documents, titles = _rows_to_documents(pd.concat(tables, ignore_index=True)) if tables else ([], [])
    for file in files:
        if file.suffix.lower() not in (".parquet", ".jsonl"):
            documents.append(_read_utf8(file))
            titles.append(file.stem)
    if not any(document.strip() for document in documents):
        raise ValueError(f"{', '.join(map(str, files))}: empty, no text to read; give a file that has some")
    return documents, titles


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        fix = f"convert it, as in `iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}`"
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); {fix}") from None


def _read_table(path: Path) -> pd.DataFrame:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty file; give one that has rows with a column `text`")
    content = None if path.suffix.lower() == ".parquet" else _read_utf8(path)
    try:
        # not pandas' reader of JSON lines: it would turn a text that looks like a date or a number into one
        frame = pd.read_parquet(path) if content is None else pd.DataFrame(_json_lines(content))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: damaged or not {path.suffix} ({error}); fetch or write it again") from error
    if "text" not in frame:
        raise ValueError(f"{path}: has no column `text`, only {', '.join(map(str, frame))}; rename the right one")
    if bad := [i for i, row in enumerate(frame["text"]) if not isinstance(row, str)]:
        raise ValueError(f"{path}: row {bad[0]} of column `text` is {frame['text'][bad[0]]!r}, not a string; drop it")
    return frame


def _json_lines(content: str) -> list[dict]:
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
                str(rows[-1].get("text")).encode()  # half a surrogate pair is a letter to JSON alone
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _rows_to_documents(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Are the rows books, or the lines of one running text? They are lines if `text` is the only column and no row has
    a line break before its end (WikiText); otherwise each row is a document (PG-19).

    Lines are concatenated as they are, which gives back WikiText's original file: they bring their line breaks along.
    One without gets one, and an empty row, another form of WikiText's blank line, becomes that line, " \\n".
    """
    rows = list(frame["text"])
    if list(frame.columns) != ["text"] or any("\n" in row[:-1] for row in rows):
        title = next((column for column in ("short_book_title", "title") if column in frame), None)
        return rows, [str(value) for value in frame[title]] if title else [""] * len(rows)
    while rows and not rows[-1]:
        rows.pop()
    return ["".join(row if row.endswith("\n") else f"{row or ' '}\n" for row in rows)], [""]


# ---- the hub --------------------------------------------------------------------------------------------------------


def _read_hub_or(fallback: str | None, dataset: str, subset: str, split: str) -> Text:
    check_choice("split", split, SPLITS)
    repo, pattern = HUB[dataset]
    try:
        files = _hub_files(repo, pattern.format(subset=subset, split=split))
    except ConnectionError as error:
        if fallback is None:
            raise
        text = _python_docs()
        warnings.warn(f"{text.name} STANDS IN for {dataset}: {error}", stacklevel=3)
        return text
    documents, titles = _read_files(files)
    name = "PG-19" if dataset == "pg19" else subset
    folder = files[0].parent  # …/snapshots/<commit>/<folder>
    source = f"{repo}@{folder.parent.name}/{folder.name}/{split}"
    return Text(documents, titles, name if split == "test" else f"{name} ({split})", source)


def _hub_files(repo: str, pattern: str) -> list[Path]:
    """The files of one split: from the hub's cache, else downloaded (these alone: PG-19's other splits are 11 GB)."""
    endpoint = hub.endpoint()

    def snapshot(**how) -> list[Path]:
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=pattern, endpoint=endpoint, **how)
        files = sorted(Path(folder).glob(pattern))
        # test-00000-of-00003.parquet: a shard that is missing after a broken transfer would be silently less text
        wanted = re.search(r"-of-(\d+)", files[0].name) if files else None
        if not files or (wanted and len(files) != int(wanted[1])):
            raise FileNotFoundError(f"{len(files)} file(s) match {pattern}, not all that there should be")
        return files

    try:
        return snapshot(local_files_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    why = hub.out_of_reach()
    try:
        if not why:
            HfApi(endpoint=endpoint).dataset_info(
                repo, timeout=hub.ANSWER_SECONDS
            )  # snapshot_download would wait for ever
            return snapshot(etag_timeout=hub.ANSWER_SECONDS)
    except (httpx.HTTPError, RuntimeError, OSError) as error:  # hf_xet raises RuntimeError
        if hub.is_the_disks_fault(error):
            raise
        why = f"{endpoint} did not deliver ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    local_copy = "as data_dir a local folder with these files"
    in_the_box = "dataset='python-docs', which needs no network"
    raise hub.not_to_be_had(f"{repo} ({pattern})", why, local_copy, in_the_box)
