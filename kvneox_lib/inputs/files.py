"""Where this library keeps what is costly to make again, how a file is written (whole, or not at all), and what tells
the contents of files from others, whatever these are called."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

READ_WHOLE = 2**26  # bytes; of a larger file that many are read, in blocks spread evenly over it
BLOCK = 2**20
LEFT_BEHIND = 3600  # seconds after which nobody is still writing a file


def digest_of_files(paths: Iterable[Path]) -> str:
    """16 letters that follow from what is in the files and in which order of names, not from where they lie."""
    of_each = (_digest_of_file(path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths))
    return hashlib.sha256("".join(of_each).encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    n_blocks = -(-min(size, READ_WHOLE) // BLOCK)
    step = max(BLOCK, (size - BLOCK) / max(1, n_blocks - 1)) if size > READ_WHOLE else BLOCK
    with path.open("rb") as file:
        for block in range(n_blocks):
            file.seek(int(block * step))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where this library keeps what is costly to make again."""
    return Path(os.environ.get("KVNEOX_CACHE") or "~/.cache/kvneox").expanduser()


def make_ready(folder: Path) -> None:
    """Make the folder, and learn before any work whether it can be written. What a killed process was writing goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process has just written it to its end
            if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                path.unlink()
    tempfile.TemporaryFile(dir=folder).close()


def write_atomically(path: Path, content: str | Callable[[BinaryIO], None]) -> None:
    """Text, or what a function writes into the open file. A reader sees the old file, or the new one, whatever happens
    on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from others
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
