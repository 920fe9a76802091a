"""Text, and the ways to cut it: `load_text` finds documents (hub, mirror, disk, or the box Python came in), `windows`
cuts them into context + continuation, `recall_samples` hides passkeys in them. Everything here is deterministic, and a
`Text` carries a name that says what was really read, whatever was asked for."""

import difflib
import hashlib
import json
import os
import platform
import queue
import random
import re
import socket
import tempfile
import threading
import urllib.request
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pandas as pd
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

WIKITEXT_SUBSETS = ("wikitext-103-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-2-raw-v1")
SPLITS = ("test", "validation", "train")
# deepmind/pg19 is a loading script, which `datasets` no longer runs; emozilla/pg19 is its parquet copy.
HUB = {
    "wikitext": ("Salesforce/wikitext", "{subset}/{split}-*.parquet"),
    "pg19": ("emozilla/pg19", "data/{split}-*.parquet"),
}
FOLDER_NAMES = {"gutenberg-pre1919": "Gutenberg (pre-1919)"}  # folders whose own name says too little
SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")
CONNECT_SECONDS = 4.0  # for the one attempt that decides whether there is a connection at all
ANSWER_SECONDS = 60.0  # for a hub that was reached and is slow to answer


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
    path = Path(dataset).expanduser()
    if dataset not in (*HUB, "python-docs") and not path.exists():
        _check_choice("dataset", str(dataset), (*HUB, "python-docs"), "; nor is there a file or folder of that name")
    if data_dir is not None and dataset not in HUB:
        raise ValueError(f"data_dir={str(data_dir)!r}: goes with dataset='wikitext' or 'pg19', not with {dataset!r}")
    if dataset == "wikitext" and subset is not None:
        _check_choice("subset", subset, WIKITEXT_SUBSETS)
    if dataset == "python-docs":
        text = _python_docs()
    elif dataset not in HUB:
        text = _read_path(path, split)
    elif data_dir is not None:
        text = _read_data_dir(Path(data_dir).expanduser(), dataset, subset, split)
    else:
        text = _read_hub_or(fallback, dataset, subset or WIKITEXT_SUBSETS[0], split)
    return text if sample_idx is None else _pick(text, sample_idx)


def _check_choice(parameter: str, value: str, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{parameter}={value!r}: must be one of {', '.join(allowed)}{more}.{hint}")


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
    return Text([book], ["The Python Language Reference"], name, "pydoc_data.topics")


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


def _read_path(path: Path, split: str, name: str | None = None) -> Text:
    name = name or _name(path)
    files = sorted(file for file in (path.iterdir() if path.is_dir() else [path]) if file.suffix in SUFFIXES)
    files = [file for file in files if not file.name.startswith("README") or file == path]
    if not files:
        raise ValueError(f"{path}: no file to read; it must end in {', '.join(SUFFIXES)}, or be a folder of such")
    split_of = {file: s for file in files for s in SPLITS if re.fullmatch(rf"{s}(-\d+-of-\d+.*)?", file.stem)}
    if split_of and path.is_dir():
        _check_choice("split", split, sorted(set(split_of.values())), f" (what {path} holds)")
        files = [file for file in files if split_of.get(file) == split]
        name = name if split == "test" else f"{name} ({split})"
    return Text(*_read_files(files), name, str(path))


def _read_files(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(documents, titles). A .txt or .md is a document; the rows of all .parquet and .jsonl form one table."""
    tables = [_read_table(file) for file in files if file.suffix in (".parquet", ".jsonl")]
    documents, titles = _rows_to_documents(pd.concat(tables, ignore_index=True)) if tables else ([], [])
    for file in files:
        if file.suffix not in (".parquet", ".jsonl"):
            documents.append(_read_utf8(file))
            titles.append(file.stem)
    if not any(document.strip() for document in documents):
        raise ValueError(f"{', '.join(map(str, files))}: empty, no text to read; give a file that has some")
    return documents, titles


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fix = f"convert it, as in `iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}`"
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); {fix}") from None


def _read_table(path: Path) -> pd.DataFrame:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty file; give one that has rows with a column `text`")
    content = None if path.suffix == ".parquet" else _read_utf8(path)
    try:
        # not pandas' reader of JSON lines: it would turn a text that looks like a date or a number into one
        rows = content and [dict(json.loads(line)) for line in content.split("\n") if line.strip()]
        frame = pd.read_parquet(path) if content is None else pd.DataFrame(rows)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: damaged or not {path.suffix} ({error}); fetch or write it again") from error
    if "text" not in frame:
        raise ValueError(f"{path}: has no column `text`, only {', '.join(map(str, frame))}; rename the right one")
    if bad := [i for i, row in enumerate(frame["text"]) if not isinstance(row, str)]:
        raise ValueError(f"{path}: row {bad[0]} of column `text` is {frame['text'][bad[0]]!r}, not a string; drop it")
    return frame


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
    _check_choice("split", split, SPLITS)
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
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

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
    why = "HF_HUB_OFFLINE forbids to ask the hub" if constants.HF_HUB_OFFLINE else _unreachable(endpoint)
    try:
        if not why:
            HfApi(endpoint=endpoint).dataset_info(repo, timeout=ANSWER_SECONDS)  # snapshot_download would wait for ever
            return snapshot(etag_timeout=ANSWER_SECONDS)
    except (httpx.HTTPError, RuntimeError, OSError) as error:  # hf_xet raises RuntimeError
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's fault: full, or not writable
        why = f"{endpoint} did not deliver ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    raise ConnectionError(
        f"{repo} ({pattern}) is not in the cache ({constants.HF_HUB_CACHE}), and {why}.\n"
        "Three ways out: set HF_ENDPOINT to a mirror of the hub that this machine can reach; give as data_dir a local "
        "folder with these files; or take dataset='python-docs', which needs no network."
    )


def _unreachable(endpoint: str) -> str | None:
    """Why no connection opens to `endpoint`, or to the proxy before it, within CONNECT_SECONDS; None if one does.

    Asked once, before huggingface_hub, which would try again. It is the connection that is timed, never the answer, and
    in a thread, because looking a name up knows no timeout.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"HF_ENDPOINT={endpoint!r}: must be a URL such as https://huggingface.co")
    proxies = {} if urllib.request.proxy_bypass(url.hostname) else urllib.request.getproxies()
    if proxy := proxies.get(url.scheme) or proxies.get("all"):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or {"https": 443, "socks5": 1080}.get(url.scheme, 80)
    outcome = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()
            outcome.put(None)
        except OSError as error:
            outcome.put(f"{url.hostname} cannot be reached ({error})")

    threading.Thread(target=connect, daemon=True).start()
    try:
        return outcome.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        return f"{url.hostname} did not answer within {CONNECT_SECONDS:g} s"


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A text in tokens, with what each token is worth; over a whole text both counts are exact."""

    ids: np.ndarray  # (n,)
    n_bytes: np.ndarray  # (n,) UTF-8 bytes, also where a character is split over tokens
    n_words: np.ndarray  # (n,) words that begin in the token; a word is what str.split() says


def tokenize(text: str, tokenizer) -> Tokens:
    """Cached under KVNEOX_CACHE (default ~/.cache/kvneox), by a hash of the text and of the whole tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer={type(tokenizer).__name__}: must be a fast tokenizer (one with a tokenizer.json)")
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text  # Pythia's: Unicode NFC
    size = len(text.encode())
    key = hashlib.sha256(f"1\0{backend.to_str()}\0{text}".encode()).hexdigest()[:32]
    path = Path(os.environ.get("KVNEOX_CACHE") or "~/.cache/kvneox").expanduser() / "tokens" / f"{key}.npz"
    try:
        with np.load(path) as file:  # the zip's checksums notice damage
            tokens = Tokens(file["ids"], file["n_bytes"], file["n_words"])
        if tokens.n_bytes.sum() == size and len(tokens.ids) == len(tokens.n_bytes) == len(tokens.n_words):
            return tokens
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int32)
    n_bytes = _bytes_per_id(tokenizer)[ids] if len(ids) else ids
    if n_bytes.sum() != size:
        raise ValueError(f"tokenizer: its tokens have {n_bytes.sum()} bytes, the text {size}; need a byte-level BPE")
    tokens = Tokens(ids, n_bytes, _words_per_token(text, n_bytes))
    _save(path, tokens)
    return tokens


def _bytes_per_id(tokenizer) -> np.ndarray:
    """A byte-level BPE writes every byte as one character of its own alphabet; only added tokens are plain text."""
    added = {i: len(token.content.encode()) for i, token in tokenizer.added_tokens_decoder.items()}
    table = {i: added.get(i, len(token)) for token, i in tokenizer.get_vocab().items()}
    return np.array([table.get(i, 0) for i in range(max(table) + 1)], dtype=np.int32)


def _words_per_token(text: str, n_bytes: np.ndarray) -> np.ndarray:
    starts = _byte_offsets(text, [match.start() for match in re.finditer(r"\S+", text)])
    tokens = np.searchsorted(np.cumsum(n_bytes), starts, side="right")
    return np.bincount(tokens, minlength=len(n_bytes)).astype(np.int32)


def _byte_offsets(text: str, characters: Sequence[int]) -> np.ndarray:
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (code >= 0x80) + (code >= 0x800).astype(np.int64) + (code >= 0x10000)
    return np.concatenate(([0], np.cumsum(width)))[np.array(characters, dtype=np.int64)]


def _save(path: Path, tokens: Tokens) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, ids=tokens.ids, n_bytes=tokens.n_bytes, n_words=tokens.n_words)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:  # a cache that cannot be written costs time, not the run
        warnings.warn(f"tokens are not cached: {error}; set KVNEOX_CACHE to a folder that can be written", stacklevel=2)


# ---- windows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """n windows of T = context_length + continuation_length tokens. Scored are the tokens after the first of the
    continuation: that one is predicted by the prefill, which no press has touched."""

    input_ids: torch.Tensor  # (n, T)
    token_bytes: torch.Tensor  # (n, T) UTF-8 bytes of each token
    token_words: torch.Tensor  # (n, T) words that begin in each token
    document: torch.Tensor  # (n,) index of the document
    position: torch.Tensor  # (n,) where in the document's tokens the window begins
    context_length: int

    @property
    def n_bytes(self) -> torch.Tensor:  # (n,) of the scored tokens
        return self.token_bytes[:, self.context_length + 1 :].sum(1)

    @property
    def n_words(self) -> torch.Tensor:  # (n,) of the scored tokens
        return self.token_words[:, self.context_length + 1 :].sum(1)


def windows(
    text: Text | str | Sequence[str],
    tokenizer,
    *,
    context_length: int,
    continuation_length: int,
    max_windows: int | None = None,
) -> Windows:
    """Cut each document, from its first token on, into consecutive windows that do not overlap; the tail that fills
    none is dropped, and no window reaches over two documents. Of more than `max_windows` those are taken that are
    spread evenly over all of them: number floor((i + 1/2) n / max_windows), so a long book gives more than a short one.
    """
    _check_int("context_length", context_length, 1)
    _check_int("continuation_length", continuation_length, 2)  # the first one is not scored
    if max_windows is not None:
        _check_int("max_windows", max_windows, 1)
    length = context_length + continuation_length
    documents = text.documents if isinstance(text, Text) else [text] if isinstance(text, str) else text
    tokenized = [tokenize(document, tokenizer) for document in documents]
    places = [(d, p) for d, t in enumerate(tokenized) for p in range(0, len(t.ids) - length + 1, length)]
    if not places:
        longest = max((len(t.ids) for t in tokenized), default=0)
        raise ValueError(
            f"context_length={context_length}, continuation_length={continuation_length}: a window wants {length} "
            f"tokens, the longest of {len(tokenized)} document(s) has {longest}; ask for fewer or give a longer text"
        )
    if max_windows is not None and len(places) > max_windows:
        places = [places[(2 * i + 1) * len(places) // (2 * max_windows)] for i in range(max_windows)]

    def cut(field: str) -> torch.Tensor:  # (n, T)
        rows = [getattr(tokenized[d], field)[p : p + length] for d, p in places]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    document, position = torch.tensor(places).T
    return Windows(cut("ids"), cut("n_bytes"), cut("n_words"), document, position, context_length)


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")


# ---- recall ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecallKey:
    name: str
    digits: str
    question_ids: torch.Tensor  # (n,)
    answer_ids: torch.Tensor  # (n,) the digits with the space before them
    depth: float  # as asked or drawn; the statement is at the nearest gap, see `span`
    span: tuple[int, int]  # tokens of the context that are the statement
    digits_span: tuple[int, int]  # those of them that are the digits: context_ids[slice(*digits_span)] == answer_ids


@dataclass(frozen=True)
class RecallSample:
    context_ids: torch.Tensor  # (context_length,)
    keys: list[RecallKey]


def recall_samples(
    tokenizer,
    *,
    filler: str,
    n_keys: int,
    keys_per_context: int,
    context_length: int,
    depths: Sequence[float] | None = None,
    seed: int = 0,
) -> list[RecallSample]:
    """Contexts of exactly `context_length` tokens of `filler` in which passkeys are stated, `n_keys` in all.

    Key number i is at depths[i % len(depths)], 0 the start of the context and 1 its end, or at a random depth each. A
    statement stands between two sentences of the filler (between two words where no sentence ends near), contexts are
    spread evenly over the filler and begin with a sentence. Filler and statements are tokenized apart and their ids
    concatenated, so every span is exact; they meet where a word begins, so the text as a whole has the same tokens.
    """
    _check_int("n_keys", n_keys, 1)
    _check_int("keys_per_context", keys_per_context, 1)
    _check_int("context_length", context_length, 1)
    if depths is not None and (not len(depths) or not all(0 <= depth <= 1 for depth in depths)):
        raise ValueError(f"depths={depths!r}: must be numbers from 0 to 1, at least one")
    rng = random.Random(seed)
    text = tokenize(filler, tokenizer)
    gaps = _gaps(filler, text, tokenizer)
    n_samples, jitter = -(-n_keys // keys_per_context), rng.random()
    samples = []
    for i in range(n_samples):
        numbers = range(i * keys_per_context, min((i + 1) * keys_per_context, n_keys))
        wanted = [rng.random() if depths is None else float(depths[k % len(depths)]) for k in numbers]
        keys = _make_keys(tokenizer, rng, filler, wanted)
        n_filler = context_length - sum(len(statement) for _, statement in keys)
        if n_filler < 1 or n_filler > len(text.ids):
            raise ValueError(
                f"context_length={context_length}: {len(keys)} statements have {context_length - n_filler} tokens"
                f" and leave {n_filler} for the filler, which has {len(text.ids)}; between 1 and that is allowed"
            )
        start = _last_at_most(gaps[0], (i + jitter) / n_samples * (len(text.ids) - n_filler))
        samples.append(_assemble(text.ids[start : start + n_filler], [g - start for g in gaps], keys))
    return samples


def _make_keys(tokenizer, rng: random.Random, filler: str, depths: list[float]) -> list[tuple[RecallKey, list[int]]]:
    """A key for each depth with the ids of its statement; its spans are those in the statement, until it is placed."""
    keys, names, numbers = [], set(), rng.sample(range(10_000, 100_000), len(depths))
    while len(keys) < len(depths):
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
        name = ("".join(syllables) + rng.choice(("", "l", "n", "r", "s"))).capitalize()
        if name in names or name in filler:
            continue
        names.add(name)
        digits, depth = str(numbers[len(keys)]), depths[len(keys)]
        question = f"\n\nWhat is the passkey of {name}? The passkey of {name} is"
        parts = f" The passkey of {name} is", f" {digits}", ". Remember it.", question
        before, answer, after, question = tokenizer(list(parts), add_special_tokens=False).input_ids
        ids, digits_span = before + answer + after, (len(before), len(before) + len(answer))
        key = RecallKey(name, digits, torch.tensor(question), torch.tensor(answer), depth, (0, len(ids)), digits_span)
        keys.append((key, ids))
    return keys


def _gaps(filler: str, text: Tokens, tokenizer) -> list[np.ndarray]:
    """Token positions before which a sentence has ended, and those before which a word has; always with 0."""
    ends = np.cumsum(text.n_bytes)
    normalizer = tokenizer.backend_tokenizer.normalizer
    filler = normalizer.normalize_str(filler) if normalizer else filler
    found = []
    for pattern in (r"[.!?][\"'”’)\]]*(?=\s)", r"\S(?=\s)"):
        places = _byte_offsets(filler, [match.end() for match in re.finditer(pattern, filler)])
        found.append(np.concatenate(([0], 1 + np.flatnonzero(np.isin(ends, places)))))
    return found


def _last_at_most(gaps: np.ndarray, limit: float) -> int:
    return int(gaps[np.searchsorted(gaps, limit, side="right") - 1])


def _assemble(filler: np.ndarray, gaps: list[np.ndarray], keys: list[tuple[RecallKey, list[int]]]) -> RecallSample:
    sentences, words = ([*g[(g >= 0) & (g <= len(filler))]] for g in gaps)

    def place(key: RecallKey) -> int:
        target = key.depth * len(filler)
        best = min(sentences, key=lambda gap: abs(gap - target))
        return best if abs(best - target) <= 0.05 * len(filler) else min(words, key=lambda gap: abs(gap - target))

    ids, placed, done = [], [], 0
    for at, key, statement in sorted(((place(k), k, s) for k, s in keys), key=lambda row: (row[0], row[1].depth)):
        ids += filler[done:at].tolist()
        shift, done = len(ids), at
        ids += statement
        spans = {f: tuple(shift + i for i in getattr(key, f)) for f in ("span", "digits_span")}
        placed.append(replace(key, **spans))
    return RecallSample(torch.tensor(ids + filler[done:].tolist()), placed)
