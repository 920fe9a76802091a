"""Which entries of a context survive a press: how many, and at which positions.

Nobody asks the presses: kept keys are looked up among those of an uncompressed pass. Keys that were rotated to new
positions afterwards are told by the press inside; keys that were changed tell nothing.
"""

import kvpress
import torch
from transformers import Cache

from kvneox_lib.measures.prefill import prefill, prefill_each
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_ids
from kvneox_lib.neox.hooks import in_turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, evictions, with_model
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.facts import parts_of, rerotates


def kept_counts(cache: Cache) -> torch.Tensor:
    """(layers, batch, heads): entries that each head still sees."""
    counts = []
    for index, held in enumerate(cache.layers):
        count = held.keys.new_full(held.keys.shape[:2], held.keys.shape[2], dtype=torch.long)
        if evictions(cache).get(index) is not None:
            batch, head, _ = (part.to(count.device) for part in evictions(cache)[index])
            count.index_put_((batch, head), count.new_tensor(-1), accumulate=True)
        counts.append(count)
    return torch.stack(counts)


@torch.no_grad()
@with_model
def kept_positions(model, input_ids: torch.Tensor, press) -> torch.Tensor:
    """(layers, batch, heads, T) booleans: which tokens survive."""
    input_ids = check_ids("input_ids", input_ids, model)
    ((_, kept),) = prefill_and_find(model, input_ids, [press])
    if kept is None:
        what = "rotates" if rerotates(press) else "changes"
        raise ValueError(f"{type(press).__name__} {what} the keys it keeps, so their positions cannot be read off")
    return kept


@torch.no_grad()
@in_turn
def prefill_and_find(
    model: KVNeoXForCausalLM, input_ids: torch.Tensor, presses: list
) -> list[tuple[CompactCache, torch.Tensor | None]]:
    """`prefill_each`, and with each cache its `kept_positions`, None where they cannot be told."""
    told_by = [press.press if isinstance(press, kvpress.KeyRerotationPress) else press for press in presses]
    inside = [inner for inner, press in zip(told_by, presses) if inner is not press]
    full, *caches = prefill_each(model, input_ids, [None, *presses, *inside])
    own, of_inside = caches[: len(presses)], iter(caches[len(presses) :])
    found = []
    for press, inner, cache in zip(presses, told_by, own):
        compressed = cache if inner is press else next(of_inside)
        kept = None
        if not rerotates(inner):
            kept = _positions_in(compressed, _read_by_kvcompose(model, input_ids) if _is_kvcompose(press) else full)
        found.append((cache, kept))
    return found


def _is_kvcompose(press) -> bool:
    return press is not None and any(isinstance(part, kvpress.KVComposePress) for part in parts_of(press))


def _read_by_kvcompose(model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> CompactCache:
    """KVCompose reads the context with eager attention, which rounds otherwise: its keys are not those of others."""
    with attention(model, "eager"):
        return prefill(model, input_ids, None)


def _positions_in(compressed: Cache, full: Cache) -> torch.Tensor | None:
    """(layers, batch, heads, T) booleans: which keys of `full` are still seen in `compressed`."""
    head_dim = full.layers[0].keys.shape[-1]
    direction = torch.randn(head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = []
    for layer, (all_of, some) in enumerate(zip(full.layers, compressed.layers)):
        tags, kept_tags = ((held.keys.double().cpu() @ direction) for held in (all_of, some))  # one number per key
        order = tags.argsort(-1)
        found = torch.searchsorted(tags.gather(-1, order), kept_tags).clamp(max=tags.shape[-1] - 1)
        positions = order.gather(-1, found)
        if not torch.equal(tags.gather(-1, positions), kept_tags):
            return None
        mask = torch.zeros_like(tags, dtype=torch.bool).scatter_(-1, positions, True)
        if evictions(compressed).get(layer) is not None:
            mask[tuple(part.cpu() for part in evictions(compressed)[layer])] = False
        kept.append(mask)
    return torch.stack(kept)
