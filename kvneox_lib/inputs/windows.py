"""Text cut into windows of context and continuation, with what each token is worth in bytes and words."""

import hashlib
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from kvneox_lib.inputs.files import cache_folder, write_atomically
from kvneox_lib.inputs.text import Text
from kvneox_lib.neox.checks import check_int

LARGE = 4_000_000  # bytes of a document that is still tokenized whole: that takes up to 200 bytes of memory for each
PART = 500_000  # bytes of the parts of a larger one


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
    path = cache_folder() / "tokens" / f"{key}.npz"
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
    starts = byte_offsets(text, [match.start() for match in re.finditer(r"\S+", text)])
    tokens = np.searchsorted(np.cumsum(n_bytes), starts, side="right")
    return np.bincount(tokens, minlength=len(n_bytes)).astype(np.int32)


def byte_offsets(text: str, characters: Sequence[int]) -> np.ndarray:
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (code >= 0x80) + (code >= 0x800).astype(np.int64) + (code >= 0x10000)
    return np.concatenate(([0], np.cumsum(width)))[np.array(characters, dtype=np.int64)]


def _save(path: Path, tokens: Tokens) -> None:
    try:
        write_atomically(path, lambda file: np.savez(file, **vars(tokens)))
    except OSError as error:  # a cache that cannot be written costs time, not the run
        warnings.warn(f"tokens are not cached: {error}; set KVNEOX_CACHE to a folder that can be written", stacklevel=2)


# ---- large documents ------------------------------------------------------------------------------------------------


def parts(document: str) -> list[str]:
    """A document of more than `LARGE` bytes in even parts of some `PART` bytes that end where a word ends; any other is
    one part. Tokenizers like Pythia's never join a word with the space after it, so tokens are those of the whole."""
    size = len(document.encode())
    n = 1 if size <= LARGE else -(-size // PART)
    ends = [_word_end(document, i * len(document) // n) for i in range(1, n)]
    return [document[start:end] for start, end in pairwise((0, *ends, len(document)))]


def _word_end(text: str, start: int) -> int:
    found = re.compile(r"(?<=\S)\s").search(text, start, start + 10_000)
    return found.start() if found else start  # not every script has spaces


def part_at(document: str, place: float) -> tuple[str, float]:
    """The part in which `place` lies, from 0, the beginning of the document, to 1, its end; and the place in it."""
    found = parts(document)
    i = min(int(place * len(found)), len(found) - 1)
    return found[i], place * len(found) - i


def first_tokens(document: str, tokenizer, n: int | None) -> np.ndarray:
    """The ids of the first `n` tokens, or of all that there are. Parts that come later are not tokenized."""
    ids = []
    for part in parts(document):
        ids.append(tokenize(part, tokenizer).ids)
        if n is not None and sum(map(len, ids)) >= n:
            break
    return np.concatenate(ids)[:n]


# ---- windows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """n windows of T = context_length + continuation_length tokens. Scored are the tokens after the first of the
    continuation: that one is predicted by the prefill, which no press has touched."""

    input_ids: torch.Tensor  # (n, T)
    token_bytes: torch.Tensor  # (n, T) UTF-8 bytes of each token
    token_words: torch.Tensor  # (n, T) words that begin in each token
    document: torch.Tensor  # (n,) index of the document
    part: torch.Tensor  # (n,) index of the part of a large document, else 0
    position: torch.Tensor  # (n,) where in the tokens of the document, or of that part, the window begins
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

    A document of more than 4 MB is read in `parts`, each cut as if it were a document; those in which no window is
    taken are not tokenized, but count as many windows as the first of them has.
    """
    check_int("context_length", context_length, 1)
    check_int("continuation_length", continuation_length, 2)  # the first one is not scored
    if max_windows is not None:
        check_int("max_windows", max_windows, 1)
    length = context_length + continuation_length
    documents = text.documents if isinstance(text, Text) else [text] if isinstance(text, str) else text
    pieces = [(d, k, piece) for d, document in enumerate(documents) for k, piece in enumerate(parts(document))]
    tokenized, places = _choose(pieces, tokenizer, length, max_windows)
    if not places:
        longest = max((len(t.ids) for t in tokenized.values()), default=0)
        what = "document(s)" if len(pieces) == len(documents) else "document(s) and parts of large ones"
        raise ValueError(
            f"context_length={context_length}, continuation_length={continuation_length}: a window wants {length} "
            f"tokens, the longest of {len(pieces)} {what} has {longest}; ask for fewer or give a longer text"
        )

    def cut(field: str) -> torch.Tensor:  # (n, T)
        rows = [getattr(tokenized[i], field)[p : p + length] for i, p in places]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    document, part, position = torch.tensor([(*pieces[i][:2], p) for i, p in places]).T
    return Windows(cut("ids"), cut("n_bytes"), cut("n_words"), document, part, position, context_length)


def _choose(
    pieces: list[tuple[int, int, str]], tokenizer, length: int, max_windows: int | None
) -> tuple[dict[int, Tokens], list[tuple[int, int]]]:
    """The tokens of the pieces that were needed, and the windows: (number of the piece, position in its tokens).

    Windows are chosen by counts that are guesses for what was not read; what they fall into is read and counted, and
    they are chosen again, until they lie in what has been counted.
    """
    tokenized, counts = {}, []
    for i, (_, k, piece) in enumerate(pieces):
        if k == 0:
            tokenized[i] = tokenize(piece, tokenizer)
            guess = max(1, len(tokenized[i].ids) // length)
        counts.append(len(tokenized[i].ids) // length if k == 0 else guess)
    while True:
        n = sum(counts)
        wanted = n if max_windows is None else min(n, max_windows)
        chosen = [(2 * i + 1) * n // (2 * wanted) for i in range(wanted)]
        ends = np.cumsum(counts)
        inside = np.searchsorted(ends, chosen, side="right").tolist()
        unread = sorted(set(inside) - tokenized.keys())
        if not unread:
            return tokenized, [(i, int(w - ends[i] + counts[i]) * length) for i, w in zip(inside, chosen)]
        for i in unread:
            tokenized[i] = tokenize(pieces[i][2], tokenizer)
            counts[i] = len(tokenized[i].ids) // length
