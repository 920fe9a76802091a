"""The storage of a stream: the first tokens and a ring of the last ones, with the attention that reads it.

With `rerotate` positions are those inside the cache. For the keys of the window that changes nothing: their distance to
the query is the true one. A sink's distance stops growing once the cache is full. So every key is rotated once, to its
own position, and a query twice: to its true position for the window, to its slot for the sinks. Nothing is ever rotated
again, nothing drifts, and a text is read in chunks under a banded mask, with the result of reading token by token.
"""

import warnings

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.kernels import attend_with_few_queries, attend_with_one_query, is_for_few_queries
from kvneox_lib.neox.modeling import KVNeoXForCausalLM

QUERIES_AT_ONCE = 128  # in one product with the keys of their windows
ANGLES_AT_ONCE = 4096  # positions whose cos and sin are kept at hand


class Rotation:
    """cos and sin of positions. Angles are computed in double precision: in float32 those of position 100,000 are off
    by 0.004, and with them the distances between neighbours."""

    def __init__(self, inv_freq: torch.Tensor):
        self.inv_freq = inv_freq.double().cpu()  # (pairs,)
        self.first, self.table = 0, None

    def at(self, start: int, stop: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(stop - start, pairs) each, of the positions from `start` on."""
        if self.table is None or not self.first <= start <= stop <= self.first + self.table.shape[1]:
            self.first = start
            positions = torch.arange(start, max(stop, start + ANGLES_AT_ONCE), dtype=torch.float64)
            angles = torch.outer(positions, self.inv_freq)
            self.table = torch.stack([angles.cos(), angles.sin()]).to(like.device, like.dtype)
        return self.table[:, start - self.first : stop - self.first].unbind()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """states (rows, n, D) in half-split order, cos and sin (n, pairs)."""
    pairs, half = cos.shape[-1], states.shape[-1] // 2
    rotated = states.clone()
    first, second = states[..., :pairs], states[..., half : half + pairs]
    rotated[..., :pairs] = first * cos - second * sin
    rotated[..., half : half + pairs] = second * cos + first * sin
    return rotated


class StreamingLayer(CacheLayerMixin):
    """Keys and values (batch * heads, n_sink + window + 1, D) in slots: the sinks, then a ring with the last tokens.

    A token past the sinks has slot n_sink + (position - n_sink) mod (window + 1). It writes its key there, over the one
    that has just left its window, and then sees all slots.
    """

    is_sliding = False

    def __init__(self, n_sink: int, window: int, rerotate: bool, inv_freq: torch.Tensor):
        super().__init__()
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.rerotate, self.rotation, self.sink_rotation = rerotate, Rotation(inv_freq), Rotation(inv_freq)
        self.seen = self.n_compressions = 0

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Take in unrotated keys, and values, and answer unrotated queries, all (batch, heads, n, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        start, stop = self.seen, self.seen + query.shape[2]
        own = self.rotation.at(start, stop, query)
        rows, keys = query.flatten(0, 1) * scaling, rotate(key.detach().flatten(0, 1), *own)
        values = value.detach().flatten(0, 1)  # what is kept takes no graph along
        for_window = for_sinks = rotate(rows, *own)
        if self.rerotate and self.n_sink and stop > self.capacity + 1:
            for_sinks = rotate(rows, *self._at_slots(start, stop, query))
        attend = self._attend_one if stop - start == 1 else self._attend_many
        output = attend(for_window, for_sinks, keys, values)
        self.seen = stop
        self.n_compressions += stop > self.capacity
        return output.view(query.shape)

    def _at_slots(self, start: int, stop: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the slots of the queries `start` to `stop`, the last slot for most of them."""
        last = self.capacity
        cos, sin = self.sink_rotation.at(min(start, last), last + 1, like)
        surplus = stop - max(start, last) - 1
        return tuple(torch.cat([part, part[-1:].expand(surplus, -1)]) if surplus else part for part in (cos, sin))

    def _attend_one(self, for_window, for_sinks, key, value):
        position = self.seen
        slot = position if position < self.n_sink else self._slots(position)
        self.keys[:, slot], self.values[:, slot] = key[:, 0], value[:, 0]
        filled = min(position, self.capacity) + 1
        keys, values = self.keys[:, :filled], self.values[:, :filled]
        if for_sinks is for_window:
            rows = for_window[None], keys[None], values[None]
            if is_for_few_queries(rows[0]):
                return attend_with_few_queries(*rows, 1.0)[0]
            return attend_with_one_query(for_window, keys, values, 1.0)
        scores = torch.bmm(keys, torch.cat([for_window, for_sinks], dim=1).transpose(1, 2))  # (rows, slots, 2)
        scores[:, : self.n_sink, 0] = scores[:, : self.n_sink, 1]
        weights = scores[..., 0].softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights[:, None], values)

    def _attend_many(self, for_window, for_sinks, key, value):
        start, stop, n_sink = self.seen, self.seen + key.shape[1], self.n_sink
        n_known = min(stop, n_sink)
        new_sinks = max(0, n_known - start)
        self.keys[:, start : start + new_sinks] = key[:, :new_sinks]
        self.values[:, start : start + new_sinks] = value[:, :new_sinks]
        sink_keys, sink_values = self.keys[:, :n_known], self.values[:, :n_known]
        # the window before the chunk, in the order of time, then the chunk itself
        first = max(n_sink, start - self.window)
        slots = self._slots(torch.arange(first, max(first, start), device=key.device))
        keys = torch.cat([self.keys[:, slots], key[:, new_sinks:]], dim=1)
        values = torch.cat([self.values[:, slots], value[:, new_sinks:]], dim=1)

        output = torch.empty_like(value)
        for begin in range(start, stop, QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, stop)
            oldest = max(n_sink, begin - self.window)
            seen = slice(oldest - first, max(oldest, end) - first)
            queries = slice(begin - start, end - start)
            scores = key.new_empty(len(key), end - begin, n_known + max(oldest, end) - oldest)
            scores[..., :n_known].baddbmm_(for_sinks[:, queries], sink_keys.transpose(1, 2), beta=0)
            scores[..., n_known:].baddbmm_(for_window[:, queries], keys[:, seen].transpose(1, 2), beta=0)
            self._hide(scores, begin, end, n_known, oldest)
            weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
            output[:, queries] = torch.bmm(weights[..., n_known:], values[:, seen]).baddbmm_(
                weights[..., :n_known], sink_values
            )
        kept = min(stop - max(start, n_sink), self.window + 1)
        if kept > 0:
            slots = self._slots(torch.arange(stop - kept, stop, device=key.device))
            self.keys[:, slots], self.values[:, slots] = key[:, -kept:], value[:, -kept:]
        return output

    def _slots(self, position):
        return self.n_sink + (position - self.n_sink) % (self.window + 1)

    def _hide(self, scores: torch.Tensor, begin: int, end: int, n_known: int, oldest: int) -> None:
        """What the queries `begin` to `end` do not see of the sinks and of the keys from `oldest` on: triangles at the
        two ends of the band, and nothing between them."""
        newest = max(begin, self.n_sink)
        later = scores[..., scores.shape[-1] - (end - newest) :] if end > newest else scores[..., :0]
        _hide_where(torch.triu, later, 1 + begin - newest)
        _hide_where(torch.tril, scores[..., n_known : n_known + end - begin], begin - self.window - oldest - 1)
        if begin < n_known:
            _hide_where(torch.triu, scores[..., :n_known], 1 + begin)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        with torch.inference_mode(False):  # such tensors could not be written to outside of it
            self.keys, self.values = (key_states.new_zeros(batch * heads, self.capacity + 1, dim) for _ in range(2))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.batch = batch

    def update(self, key_states, value_states, cache_kwargs=None):
        raise NotImplementedError("slots are in no order: only this library's attention can read them")

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        return self.seen + len(cache_position), 0

    def get_seq_length(self) -> int:
        """Tokens read, not held: where transformers goes on."""
        return self.seen

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen = self.n_compressions = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for states in (self.keys, self.values):
            states.copy_(states.unflatten(0, (self.batch, -1))[beam_idx.to(states.device)].flatten(0, 1))

    def _refuse(self, *_) -> None:
        raise NotImplementedError("what has left the window cannot be brought back, nor a sample be repeated")

    crop = batch_repeat_interleave = batch_select_indices = _refuse


def _hide_where(triangle, scores: torch.Tensor, diagonal: int) -> None:
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
    scores.masked_fill_(triangle(hidden, diagonal), -torch.inf)


class StreamingCache(Cache):
    """A transformers Cache whose layers keep `n_sink` first tokens and `window` last ones, and the one being read."""

    def __init__(self, model: KVNeoXForCausalLM, n_sink: int, window: int, rerotate: bool):
        check_settings(n_sink, window)
        self.trained, self.rerotate = model.config.max_position_embeddings, rerotate
        if rerotate and n_sink + window + 1 > self.trained:
            raise ValueError(
                f"n_sink={n_sink}, window={window}: with the token being read that is position {n_sink + window + 1}, "
                f"the model was trained on {self.trained}; allowed is n_sink + window of up to {self.trained - 1}"
            )
        native = model.model.rotary_emb.native
        if native.attention_scaling != 1 or native.rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type={native.rope_type!r}: allowed are those that neither scale attention nor change with length"
            )
        # Without sinks only distances within the window count.
        self.may_pass_trained = not rerotate and (n_sink > 0 or window + 1 > self.trained)
        n_layers = model.config.num_hidden_layers
        super().__init__(layers=[StreamingLayer(n_sink, window, rerotate, native.inv_freq) for _ in range(n_layers)])

    def check(self, batch: int) -> None:
        """Whether the stream can go on with so many rows."""
        first = self.layers[0]
        if len({layer.seen for layer in self.layers}) > 1:
            raise ValueError("the stream was interrupted in the middle of the model; reset() begins a new one")
        if first.is_initialized and first.batch != batch:
            raise ValueError(
                f"input_ids has {batch} row(s), this stream began with {first.batch}; go on with as many, or reset()"
            )

    def arguments(self, n: int, device: torch.device) -> dict:
        """With what the model reads the next `n` tokens: at position 0, where nothing is rotated."""
        if self.may_pass_trained and self.get_seq_length() + n > self.trained:
            self.may_pass_trained = False  # said once
            warnings.warn(
                f"rerotate=False: from here on positions pass {self.trained}, on which the model was trained; expect "
                "poor text, or take rerotate=True",
                stacklevel=2,
            )
        return {"past_key_values": self, "position_ids": torch.zeros(1, n, dtype=torch.long, device=device)}

    @property
    def kv_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)


def check_settings(n_sink: int, window: int) -> None:
    check_int("n_sink", n_sink, 0)
    check_int("window", window, 1)
