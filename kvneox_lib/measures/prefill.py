"""Reading a context under a press.

Prefill happens inside the press' context manager and decoding outside it: some presses act only when it closes. After
compression positions go on from the true length, which the cache no longer knows, unless the press rotated the keys it
kept to new positions.
"""

import weakref

import torch
from kvpress import BasePress
from transformers import Cache, DynamicCache

from kvneox_lib.measures.chunks import check_reading, read_in_chunks
from kvneox_lib.neox.bits import check_bits
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.hooks import hooked, in_turn, refuse_attached
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import applied, check_context, check_press, readable_at_once
from kvneox_lib.presses.facts import FINCH_WINDOW, decoding_part, rerotates, rows_independent


@torch.no_grad()
def prefill(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int = 0, **reading) -> CompactCache:
    """The cache after `press` compressed `input_ids`; what a head-wise press evicted is in `evictions(cache)`.

    headroom: how many tokens follow. reading: prefill_chunk and evict_while_reading, see `chunks`.
    """
    return _prefill(model, input_ids, press, headroom, **reading)[0]


def prefill_rows(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int, **reading):
    """`prefill`, whatever the press does to a batch, and the last hidden states (batch, d)."""
    parts = [_prefill(model, rows, press, headroom, **reading) for rows in readable_at_once(input_ids, press)]
    caches, hidden = zip(*parts)
    return caches[0] if len(caches) == 1 else CompactCache.stack(caches), torch.cat(hidden)


def _prefill(
    model: KVNeoXForCausalLM,
    input_ids: torch.Tensor,
    press,
    headroom: int,
    prefill_chunk: int | None = None,
    evict_while_reading: bool = False,
):
    """The cache, and the last hidden states (batch, d), which no press has touched."""
    if not rows_independent(press) and len(input_ids) > 1:
        raise ValueError(f"{type(press).__name__} mixes the rows of a batch; give it one row at a time")
    check_context(press, input_ids.shape[1])
    check_reading(model, input_ids.shape[1], press, prefill_chunk, evict_while_reading)
    if prefill_chunk is not None:
        return read_in_chunks(model, input_ids, press, headroom, prefill_chunk, evict_while_reading)
    cache, input_ids = CompactCache(headroom), with_delimiter(press, input_ids)
    with applied(press, model):
        hidden = model.model(input_ids=input_ids, past_key_values=cache).last_hidden_state[:, -1]
    return cache, hidden


def store(cache: CompactCache, press, kv_bits: int | None = None) -> None:
    """Give back what `press` evicted head by head, unless it goes on while decoding and must find its entries; and keep
    the rest in so few bits, see `CompactCache.settle`."""
    if kv_bits is not None:
        cache.bits = kv_bits
        cache.settle()
    elif decoding_part(press) is None:
        cache.make_ragged()


def bits_of_each(kv_bits: list[int | None] | None, presses: list) -> list[int | None]:
    """In how many bits what each press leaves is kept: as they are given, or None for all."""
    kv_bits = kv_bits or [None] * len(presses)
    for bits, press in zip(kv_bits, presses, strict=True):
        check_kv_bits(bits, press)
    return kv_bits


def check_kv_bits(kv_bits: int | None, press) -> None:
    check_bits("kv_bits", kv_bits)
    if kv_bits is not None and decoding_part(press) is not None:
        raise ValueError(
            f"kv_bits={kv_bits} cannot serve {type(press).__name__}: it evicts while decoding, by keys and values as "
            "they are. Leave kv_bits None"
        )


@torch.no_grad()
@in_turn
def prefill_each(
    model: KVNeoXForCausalLM,
    input_ids: torch.Tensor,
    presses: list,
    prefill_chunk: int | None = None,
    evict_while_reading: bool = False,
) -> list[CompactCache]:
    """`prefill` under each press. They share one pass where they act in hooks alone: a hook runs after the attention of
    its layer, so what it evicts changes nothing in the layers above, and all presses see the same keys."""
    refuse_attached(model)
    for press in presses:
        check_press(press, model)
        check_context(press, input_ids.shape[1])
        check_reading(model, input_ids.shape[1], press, prefill_chunk, evict_while_reading)
    if prefill_chunk is not None:
        reading = {"prefill_chunk": prefill_chunk, "evict_while_reading": evict_while_reading}
        return [prefill(model, input_ids, press, **reading) for press in presses]
    sharing = [(press, CompactCache(headroom=0)) for press in presses if shares_the_pass(press, len(input_ids))]
    if len(sharing) < 2:
        return [prefill(model, input_ids, press) for press in presses]

    dice = [{} for _ in sharing]  # a device's generator to its state: each press draws what it would draw alone

    def fork(module, args, kwargs, output):
        read = kwargs["past_key_values"].layers[module.layer_idx]
        generator = _generator(read.keys.device)
        untouched = generator.get_state()  # where this is the first layer on its device
        for (press, cache), states in zip(sharing, dice):
            cache.update(read.keys, read.values, module.layer_idx)
            module._last_cache = weakref.ref(cache)  # where evictions per head are written down
            if press is not None:
                generator.set_state(states.get(generator, untouched))
                press.forward_hook(module, args, {**kwargs, "past_key_values": cache}, output)
                states[generator] = generator.get_state()
        batch, heads, _, dim = read.keys.shape
        read.keys = read.values = read.keys.new_empty(batch, heads, 0, dim)  # no layer above needs them

    for press, _ in sharing:
        if press is not None:
            press.post_init_from_model(model)
    attentions = [layer.self_attn for layer in model.model.layers]
    for module in attentions:
        module.rotary_emb = model.model.rotary_emb  # as kvpress' own context does
    with hooked(attentions, fork):
        model.model(input_ids=input_ids, past_key_values=DynamicCache())
    shared = iter([cache for _, cache in sharing])
    return [
        next(shared) if shares_the_pass(press, len(input_ids)) else prefill(model, input_ids, press)
        for press in presses
    ]


def _generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type != "cuda" else torch.cuda.default_generators[device.index or 0]


def shares_the_pass(press, n_rows: int) -> bool:
    in_hooks = press is None or (
        type(press).__call__ is BasePress.__call__ and not hasattr(press, "delimiter_token_id")
    )
    return in_hooks and (n_rows == 1 or rows_independent(press))


def first_position(cache: Cache, n_context: int, press) -> int:
    """The position of the token that follows a compressed context of `n_context` tokens."""
    return cache.get_seq_length() if rerotates(press) else n_context


def with_delimiter(press, input_ids: torch.Tensor) -> torch.Tensor:
    """For FINCH, mark where the question begins, with an id that the text does not use."""
    if not hasattr(press, "delimiter_token_id"):
        return input_ids
    unused = next(i for i in range(input_ids.max() + 2) if not (input_ids == i).any())
    press.delimiter_token_id = unused
    context, question = input_ids[:, :-FINCH_WINDOW], input_ids[:, -FINCH_WINDOW:]
    return torch.cat([context, input_ids.new_full((1, 1), unused), question], dim=1)
