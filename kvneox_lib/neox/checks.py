"""What may be given, checked before any work: a ValueError with the name, the value and what is allowed."""

import difflib
from collections.abc import Iterable


def check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")


def did_you_mean(name, allowed: Iterable[str], most: int = 2) -> str:
    """`did you mean A or B? ` for a word that is near others, else nothing."""
    near = difflib.get_close_matches(str(name), list(allowed), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def check_choice(name: str, value, allowed: Iterable[str], more: str = "") -> None:
    """`value` is one of the words `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        near = did_you_mean(value, allowed)
        raise ValueError(f"{name}={value!r}: {near}allowed is one of {', '.join(map(str, allowed))}{more}")
