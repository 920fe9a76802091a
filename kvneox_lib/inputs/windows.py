"""Text cut into windows of context and continuation, with what each token is worth in bytes and words."""

import hashlib
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvneox_lib.inputs.files import cache_folder, write_atomically
from kvneox_lib.inputs.text import Text
from kvneox_lib.neox.checks import check_int


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
    check_int("context_length", context_length, 1)
    check_int("continuation_length", continuation_length, 2)  # the first one is not scored
    if max_windows is not None:
        check_int("max_windows", max_windows, 1)
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
