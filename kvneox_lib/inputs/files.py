"""Where this library keeps what is costly to make again, and how a file is written: whole, or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where this library keeps what is costly to make again."""
    return Path(os.environ.get("KVNEOX_CACHE") or "~/.cache/kvneox").expanduser()


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
