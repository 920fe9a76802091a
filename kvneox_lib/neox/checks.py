"""What may be given, checked before any work: a ValueError with the name, the value and what is allowed."""

import difflib
from collections.abc import Iterable

import torch


def check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")


def did_you_mean(name, allowed: Iterable[str], most: int = 2) -> str:
    """`did you mean A or B? ` for a word that is near others, else nothing."""
    near = difflib.get_close_matches(str(name), map(str, allowed), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def check_choice(name: str, value, allowed: Iterable[str], more: str = "") -> None:
    """`value` is one of the words `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        near = did_you_mean(value, allowed)
        raise ValueError(f"{name}={value!r}: {near}allowed is one of {', '.join(map(str, allowed))}{more}")


def check_ids(name: str, ids: torch.Tensor, model, *, least: int = 1, rows: int | None = None) -> torch.Tensor:
    """`ids` (batch, T) are tokens of the model's, T at least `least`, and as many `rows`; they come back on its device.

    An id outside the vocabulary would end the process on a GPU, and a text of floats fail deep in the model.
    """
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}; must be a tensor of token ids, (batch, T)")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} has dtype {ids.dtype}; must be whole numbers, torch.long")
    if ids.dim() != 2 or len(ids) < 1 or ids.shape[1] < least or (rows is not None and len(ids) != rows):
        batch = "batch of at least 1" if rows is None else f"batch of {rows}, as input_ids has"
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; must be (batch, T) with T of at least {least}, {batch}")
    embedding = model.model.embed_tokens
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= embedding.num_embeddings:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} has the id {wrong}; must be from 0 to {embedding.num_embeddings - 1}, the vocabulary")
    return ids.to(embedding.weight.device, torch.long)


def check_temperature(temperature: float) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature!r}: must be 0 (greedy) or above")
