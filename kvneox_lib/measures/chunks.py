"""Reading a context in chunks, and evicting while it is read.

One pass over a context holds hidden states, queries and keys of all its tokens at once: the peak of memory is there,
before any press has acted. In chunks only those of a chunk are held. kvpress' hooks take a call that reads as many
tokens as the cache holds for the whole context, so none is attached; what a press may ask for is collected and handed
to its own hook in the last chunk, layer by layer, in a call that looks like one over the whole context. The result is
that of one pass.

So read, the cache still grows with the context. With `evict_while_reading` each layer is cut after every chunk to what
the press would keep of the whole context, and the next chunk reads what is left: a layer never holds more than that and
a chunk. KeyDiff's authors call it block prompt processing, kvpress' BlockPress simulates it. It is another method than
compressing at the end, with another result: later tokens have themselves been read from a compressed cache. Positions
stay the true ones.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import kvpress
import torch
from kvpress.utils import compute_n_kept

from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.hooks import hooked, refuse_attached, turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import applied, check_press
from kvneox_lib.presses.facts import (
    FINCH_WINDOW,
    acts,
    evicts_only_at_the_end,
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
    budget, (what, n_not_scored) = budget_of(press, n_tokens), not_scored(press)
    if budget <= n_not_scored:
        raise ValueError(
            f"evict_while_reading=True: {name} keeps {budget} of {n_tokens} tokens, allowed is to keep more than {what}"
        )


def budget_of(press: kvpress.ScorerPress, n_tokens: int) -> int:
    """Entries of each head that the press keeps of a context."""
    return compute_n_kept(n_tokens, press.compression_ratio)


def read_in_chunks(
    model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int, chunk: int, evict: bool
) -> tuple[CompactCache, torch.Tensor]:
    """The cache, and the last hidden states (batch, d)."""
    n_tokens = input_ids.shape[1]
    budget, first = n_tokens, chunk
    if evict:
        budget = budget_of(press, n_tokens)
        first = budget % chunk or chunk  # from a full budget on there are whole chunks, as BlockPress has its blocks
    edges = [0, *range(first, n_tokens, chunk), n_tokens]
    cache = CompactCache(min(budget + chunk, n_tokens) - edges[1] + headroom)
    reading = _Reading(press, n_tokens, budget if evict else None)
    with _surrounding(press, model, input_ids), hooked(reading.attentions(model), reading.after_attention):
        for start, stop in zip(edges, edges[1:]):
            cache.expect(headroom if stop == n_tokens else chunk)
            reading.n_read = stop
            positions = torch.arange(start, stop, device=input_ids.device)[None]
            read = model.model(input_ids=input_ids[:, start:stop], past_key_values=cache, position_ids=positions)
    return cache, read.last_hidden_state[:, -1]


@contextmanager
def _surrounding(press, model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> Iterator[None]:
    """What the press' own context manager does but for attaching hooks, in a turn of the model's."""
    if acts(press) == "exit":
        with applied(press, model):
            yield
            press._context_ids = input_ids  # KVzip has seen the last chunk alone
        return
    with turn(model):
        refuse_attached(model)
        check_press(press, model)
        if press is not None:
            press.post_init_from_model(model)
        if isinstance(press, kvpress.FinchPress):
            press.window_size = FINCH_WINDOW  # else it looks for a delimiter, see `with_delimiter`
        yield


class _Reading:
    """What is kept of a context of `n_tokens` for the press while it is read, and what the press does with it.

    budget: what is left of a layer after each chunk. None: the press acts when all is read.
    """

    def __init__(self, press, n_tokens: int, budget: int | None):
        self.press, self.n_tokens, self.budget, self.n_read = press, n_tokens, budget, 0
        self.states = defaultdict(list)  # layer to hidden states (batch, n, d), one after the other
        reads = last_states_read(press)
        self.n_last = reads and reads + 1  # SnapKV wants to see more than its window

    def attentions(self, model: KVNeoXForCausalLM) -> list:
        """The layers on which the press acts, as kvpress wants to find them."""
        if self.press is None or acts(self.press) == "exit":
            return []
        attentions = [layer.self_attn for layer in model.model.layers]
        for module in attentions:
            module.rotary_emb = model.model.rotary_emb
        return attentions

    def after_attention(self, module, args, kwargs, output) -> None:
        self._keep(module.layer_idx, kwargs["hidden_states"])
        if self.budget is not None:
            self._evict(module, kwargs)
        elif self.n_read == self.n_tokens:
            # Weights of this chunk are not those of the context: without any, presses compute what they need
            self.press.forward_hook(module, args, self._as_one_pass(module, kwargs), (output[0], None))

    def _keep(self, layer: int, hidden: torch.Tensor) -> None:
        if self.n_last == 0:
            return
        self.states[layer].append(hidden)
        if self.n_last is not None:
            self.states[layer] = [torch.cat(self.states[layer], dim=1)[:, -self.n_last :].clone()]

    def _as_one_pass(self, module, kwargs: dict) -> dict:
        """With what the layer would have been called in one pass."""
        hidden = self._unread(kwargs["hidden_states"], self.n_tokens)
        if self.n_last != 0:
            hidden = torch.cat(self.states.pop(module.layer_idx), dim=1)
            hidden = torch.cat([self._unread(hidden, self.n_tokens - hidden.shape[1]), hidden], dim=1)
        positions = torch.arange(self.n_tokens, device=hidden.device)
        whole = {"hidden_states": hidden, "cache_position": positions, "position_ids": positions[None]}
        return kwargs | whole | {"position_embeddings": module.rotary_emb(hidden, positions[None])}

    def _recent(self, module, kwargs: dict) -> dict:
        """The same for the last tokens; where none are looked at, it may still be asked how many there were."""
        if self.n_last == 0:
            return kwargs | {"hidden_states": self._unread(kwargs["hidden_states"], self.n_read)}
        (hidden,) = self.states[module.layer_idx]
        positions = torch.arange(self.n_read - hidden.shape[1], self.n_read, device=hidden.device)
        return kwargs | {"hidden_states": hidden, "position_embeddings": module.rotary_emb(hidden, positions[None])}

    @staticmethod
    def _unread(like: torch.Tensor, length: int) -> torch.Tensor:
        """(batch, length, d) in the place of states that the press does not look at, without memory of their own."""
        return like.new_zeros(1).expand(len(like), length, like.shape[2])

    def _evict(self, module, kwargs: dict) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        keys, values = layer.keys, layer.values
        if keys.shape[2] <= self.budget:
            return
        recent = self._recent(module, kwargs)
        with _keeping(self.press, self.budget, keys.shape[2]):
            scores = self.press.score(module, recent["hidden_states"], keys, values, None, recent)
        # In the order of time, which windows and sinks of the next evictions rely on
        kept = scores.topk(self.budget, dim=-1).indices.sort(dim=-1).values
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
