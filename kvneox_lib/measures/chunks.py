"""Reading a context in chunks, and evicting while it is read.

One pass over a context holds queries, keys, values and more of all its tokens at once: the peak of memory is there,
before decoding begins. With `prefill_chunk` only those of a chunk are held. Each layer reads all chunks before the next
layer reads any, and is compressed when it has them all, as in one pass: of the whole context there are at any time the
hidden states, and the keys and values of one layer. The hooks of kvpress take a call that reads as many tokens as the
cache holds for a whole context, so none is attached; a press' hook is called with what one pass would have called it
with, and the result is that of one pass.

With `evict_while_reading` memory does not grow with the context at all. Here each chunk goes through all layers, after
it every layer is cut to what the press would keep of the whole context, and the next chunk reads what is left: a layer
never holds more than that and a chunk. KeyDiff's authors call it block prompt processing, kvpress' BlockPress simulates
it. It is another method than compressing at the end, with another result: later tokens have themselves been read from a
compressed cache. Positions stay the true ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import kvpress
import torch
from kvpress.utils import compute_n_kept

from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.hooks import refuse_attached, turn
from kvneox_lib.neox.masks import LayerMasks
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import applied, check_press
from kvneox_lib.presses.facts import (
    FINCH_WINDOW,
    acts,
    evicts_only_at_the_end,
    keep_tokens_of,
    last_states_read,
    needs_whole_pass,
    not_scored,
)


def check_reading(model: KVNeoXForCausalLM, n_tokens: int, press, prefill_chunk, evict_while_reading: bool) -> None:
    """Refuse what cannot be read in chunks, or not with the result of one pass."""
    if prefill_chunk is None:
        if evict_while_reading:
            raise ValueError("evict_while_reading=True: allowed beside a prefill_chunk, after each of which is evicted")
        return
    check_int("prefill_chunk", prefill_chunk, 1)
    kind = model.model.rotary_emb.native.rope_type
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"prefill_chunk={prefill_chunk}: rope_type={kind!r} rotates early tokens by how many follow")
    name, why = type(press).__name__, needs_whole_pass(press)
    if not evict_while_reading:
        if why is not None:
            raise ValueError(f"prefill_chunk={prefill_chunk} cannot serve {name}: {why}. Leave it None")
        return
    if press is None:
        raise ValueError("evict_while_reading=True: allowed with a press, which says what is evicted")
    why = why or evicts_only_at_the_end(press)
    if why is not None:
        raise ValueError(
            f"evict_while_reading=True cannot serve {name}: {why}. Allowed are presses that score by keys, values or "
            "the last queries and keep the best of each head, as keydiff or snapkv do"
        )
    budget, (what, n_not_scored) = budget_of(press, n_tokens), not_scored(press, n_tokens)
    if budget <= n_not_scored:
        raise ValueError(
            f"evict_while_reading=True: {name} keeps {budget} of {n_tokens} tokens, allowed is to keep more than {what}"
        )


def budget_of(press: kvpress.ScorerPress, n_tokens: int) -> int:
    """Entries of each head that the press keeps of a context."""
    keep_tokens = keep_tokens_of(press)
    return compute_n_kept(n_tokens, press.compression_ratio) if keep_tokens is None else min(keep_tokens, n_tokens)


def read_in_chunks(
    model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int, chunk: int, evict: bool
) -> tuple[CompactCache, torch.Tensor]:
    """The cache, and the last hidden states (batch, d)."""
    read = _read_chunk_by_chunk if evict else _read_layer_by_layer
    if acts(press) == "exit":
        with applied(press, model):
            _make_ready(None, model)
            cache, last = read(model, input_ids, None, headroom, chunk)
            press._context_ids, press._cache = input_ids, cache  # KVzip takes them from the call of one pass
    else:
        with turn(model):
            refuse_attached(model)
            check_press(press, model)
            _make_ready(press, model)
            cache, last = read(model, input_ids, press, headroom, chunk)
    return cache, model.model.final_layer_norm(last)


def _make_ready(press, model: KVNeoXForCausalLM) -> None:
    """What a press' context manager does, but for attaching hooks."""
    if press is not None:
        press.post_init_from_model(model)
    if isinstance(press, kvpress.FinchPress):
        press.window_size = FINCH_WINDOW  # else it looks for a delimiter, see `with_delimiter`
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb


def _read_layer_by_layer(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int, chunk: int):
    n_tokens = input_ids.shape[1]
    cache = CompactCache(max(0, n_tokens - chunk) + headroom)  # for a layer's first chunk, the others will follow
    hidden = _embed(model, input_ids)  # (batch, T, d): what a layer has read is replaced by what it says
    for layer in model.model.layers:
        attended = None if press is None else layer.input_layernorm(hidden)
        for start in range(0, n_tokens, chunk):
            part = hidden[:, start : start + chunk]
            masks = LayerMasks(None, model.config._attn_implementation)  # those of all chunks would be a square
            part.copy_(_through(layer, part, start, cache, masks))
        cache.expect(headroom)
        if press is not None:
            called = _call(attended, 0, cache, layer.self_attn)
            press.forward_hook(layer.self_attn, (), called | {"hidden_states": attended}, (None, None))
    return cache, hidden[:, -1]


def _read_chunk_by_chunk(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int, chunk: int):
    n_tokens = input_ids.shape[1]
    budget = budget_of(press, n_tokens)
    first = budget % chunk or chunk  # so that whole chunks follow a full budget, as with the blocks of BlockPress
    edges = [0, *range(first, n_tokens, chunk), n_tokens]
    cache = CompactCache(min(budget + chunk, n_tokens) - edges[1] + headroom)
    n_recent = last_states_read(press) + 1  # SnapKV wants to see more than its window
    recent = [None] * len(model.model.layers)  # for each layer the last hidden states that it attended with
    for start, stop in zip(edges, edges[1:]):
        cache.expect(headroom if stop == n_tokens else chunk)
        hidden, masks = _embed(model, input_ids[:, start:stop]), LayerMasks(None, model.config._attn_implementation)
        for index, layer in enumerate(model.model.layers):
            attended = layer.input_layernorm(hidden[:, -n_recent:])
            before = [] if recent[index] is None else [recent[index]]
            recent[index] = torch.cat([*before, attended], dim=1)[:, -n_recent:].clone()
            hidden = _through(layer, hidden, start, cache, masks)
            _evict(press, layer.self_attn, cache, recent[index], stop, budget)
    return cache, hidden[:, -1]


def _embed(model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    return model.model.emb_dropout(model.model.embed_in(input_ids))


def _through(layer, hidden: torch.Tensor, start: int, cache: CompactCache, masks: LayerMasks) -> torch.Tensor:
    """What the layer says about tokens of which the first has position `start`."""
    return layer(hidden, attention_mask=masks, use_cache=True, **_call(hidden, start, cache, layer.self_attn))


def _call(hidden: torch.Tensor, start: int, cache: CompactCache, module) -> dict:
    """What an attention layer is called with beside hidden states."""
    positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
    return {
        "past_key_values": cache,
        "position_ids": positions[None],
        "cache_position": positions,
        "position_embeddings": module.rotary_emb(hidden, positions[None]),
    }


def _evict(press, module, cache: CompactCache, recent: torch.Tensor, n_read: int, budget: int) -> None:
    """Cut a layer to `budget` entries of each head. recent: its last hidden states (batch, n, d)."""
    layer = cache.layers[module.layer_idx]
    keys, values = layer.keys, layer.values
    if keys.shape[2] <= budget:
        return
    called = _call(recent, n_read - recent.shape[1], cache, module)
    if last_states_read(press) == 0:
        recent = recent[:, -1:].expand(-1, n_read, -1)  # it may still ask how many there were
    with _keeping(press, budget, keys.shape[2]):
        scores = press.score(module, recent, keys, values, None, called | {"hidden_states": recent})
    # In the order of time, which windows and sinks of the next eviction rely on
    kept = scores.topk(budget, dim=-1).indices.sort(dim=-1).values
    kept = kept[..., None].expand(-1, -1, -1, keys.shape[3])
    layer.keys, layer.values = keys.gather(2, kept), values.gather(2, kept)


@contextmanager
def _keeping(press: kvpress.ScorerPress, n_kept: int, n_held: int) -> Iterator[None]:
    """At the ratio that keeps so many of so many: some scores depend on it."""
    asked, press.compression_ratio = press.compression_ratio, 1 - (n_kept + 0.5) / n_held
    try:
        yield
    finally:
        press.compression_ratio = asked
