"""Prompts answered under presses: how likely a continuation is, and what the model says.

A prompt is a context, which the press sees, and a rest of at least one token, which is read after compression. All that
is asked of one context shares its compression, and all presses share the pass that reads it, as far as they can.
"""

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvneox_lib.measures.decoding import continue_rows
from kvneox_lib.measures.perplexity import read_on
from kvneox_lib.measures.prefill import bits_of_each, first_position, prefill_each, shares_the_pass, store
from kvneox_lib.measures.speed import entry_bytes
from kvneox_lib.measures.survivors import kept_counts
from kvneox_lib.neox.bits import GROUP
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import check_context
from kvneox_lib.presses.facts import decoding_part


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, as much of it as the model can read."""

    ids: tuple[int, ...]
    n_context: int  # of them, from the first on, the press sees
    n_cut: int = 0  # tokens that were left out
    rule: str = ""  # of `questions`, by which the end of the context was found

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[: self.n_context]

    @property
    def rest(self) -> tuple[int, ...]:
        return self.ids[self.n_context :]


def shortened(ids: Sequence[int], n_context: int, room: int, cut: str, rule: str = "") -> Prompt:
    """At most `room` tokens of a prompt: its end, or what is left of it when its "middle" is cut out."""
    n_cut = max(len(ids) - room, 0)
    first = room // 2 if cut == "middle" and n_cut else 0
    left = (*ids[:first], *ids[first + n_cut :])
    n_context -= min(max(n_context - first, 0), n_cut)
    return Prompt(left, min(n_context, len(left) - 1), n_cut, rule)


@dataclass
class Compressed:
    """A context as a press left it; as it is where it was too short for the press, which is None then."""

    cache: CompactCache | None  # None: used up
    position: int  # of the token that comes next
    press: object
    kept_fraction: float
    kv_bytes: int  # of the entries that are kept


def compressed_each(
    model: KVNeoXForCausalLM,
    context: Sequence[int],
    presses: list,
    seed: int = 0,
    kv_bits: list[int | None] | None = None,
) -> list[Compressed]:
    """The context under each press, in the bits that are given for each. One that draws does so by the seed and the
    context alone, whatever is read beside it or was read before."""
    n, kv_bits = len(context), bits_of_each(kv_bits, presses)
    if n == 0:
        return [Compressed(CompactCache(bits=bits), 0, None, 1.0, 0) for bits in kv_bits]
    presses = [press if is_long_enough(n, press) else None for press in presses]
    found = []
    together = [press for press in presses if shares_the_pass(press, 1)]
    shared = iter(_read(model, context, together, seed))
    for press, bits in zip(presses, kv_bits):
        cache = next(shared) if shares_the_pass(press, 1) else _read(model, context, [press], seed)[0]
        kept, position = kept_counts(cache), first_position(cache, n, press)
        kv_bytes = int(kept.sum()) * entry_bytes(model)
        if bits is not None:
            store(cache, press, bits)
            kv_bytes = cache.used_bytes
        found.append(Compressed(cache, position, press, float(kept.float().mean()) / n, kv_bytes))
    return found


def _read(model: KVNeoXForCausalLM, context: Sequence[int], presses: list, seed: int) -> list[CompactCache]:
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(draws_for(seed, context))
        return prefill_each(model, _ids(model, context), presses) if presses else []


def draws_for(seed: int, context: Sequence[int]) -> int:
    """What the generator is set to before a context is read."""
    return zlib.crc32(repr((seed, *context)).encode())


def is_long_enough(n_context: int, press) -> bool:
    try:
        check_context(press, n_context)
    except ValueError:
        return False
    return n_context > 0


def likelihoods(
    model: KVNeoXForCausalLM, found: list[Compressed], asked: dict[tuple, list[Sequence[int]]]
) -> Iterator[list[tuple[float, bool]]]:
    """Under each press: of each continuation, by the rest of the prompt that comes before it, the loglikelihood, and
    whether it is what the model would say. Uses the caches up."""
    for one in found:
        one.cache.expect(max(len(rest) + max(map(len, of_rest)) for rest, of_rest in asked.items()))
        store(one.cache, one.press)
        yield [answer for rest, of_rest in asked.items() for answer in _read_each(model, one, rest, of_rest)]
        one.cache = None  # freed before the next is read on


def _read_each(model, found: Compressed, rest, continuations) -> Iterator[tuple[float, bool]]:
    """What all continuations of a rest have in common is read once. Everything is taken back, which costs nothing; but
    a press that acts while decoding evicts for good: it gets copies, also of itself, for its counters. In few bits
    whole groups of what was read before are rounded, so that what is in common must be shorter than one."""
    cache, position, acts = found.cache, found.position, decoding_part(found.press) is not None
    is_exact = not acts and (cache.bits is None or len(rest) <= GROUP)
    common = rest[:-1] if len(continuations) > 1 and is_exact else ()
    if common:
        positions = torch.arange(position, position + len(common), device=model.device)[None]
        with torch.no_grad():
            model.model(input_ids=_ids(model, common), past_key_values=cache, position_ids=positions)
    rest, position = rest[len(common) :], position + len(common)
    for tokens in continuations:
        own, press = copy.deepcopy((cache, found.press)) if acts else (cache, found.press)
        nll, hit = (of[0, -len(tokens) :] for of in read_on(model, own, _ids(model, [*rest, *tokens]), position, press))
        if not acts:
            cache.crop(1 - len(rest) - len(tokens))  # the last of them was never read
        yield -float(nll.double().sum()), bool(hit.all())
    if common:
        cache.crop(-len(common))


def continuations(
    model: KVNeoXForCausalLM,
    found: list[list[Compressed]],
    rests: list[Sequence[int]],
    presses: list,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_when: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """(batch, n) under each press: what follows the rests; `found` is of each row under each press, and used up."""
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "stop_when": stop_when}
    questions = [_ids(model, rest)[0] for rest in rests]
    for press, rows in zip(presses, zip(*found)):
        caches, positions = [row.cache for row in rows], [row.position for row in rows]
        yield continue_rows(model, caches, questions, copy.deepcopy(press), positions, **how)
        for row in rows:
            row.cache = None


def _ids(model: KVNeoXForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([[*ids]], device=model.device)
