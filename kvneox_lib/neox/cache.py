"""A cache that decodes at the speed of memory.

transformers' DynamicCache copies all keys and values for every token. Here each layer owns buffers with head-room: a
new token is written behind the others, and when a press assigns fewer keys the large buffer is given back at once.

Head-wise presses evict different entries in each head, which kvpress only masks. `make_ragged` keeps each head's own
entries and frees the rest. With `bits` what was compressed is kept in so few bits a number: see `settle`.
"""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvneox_lib.neox.bits import check_bits
from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.kernels import rows_of
from kvneox_lib.neox.modeling import EvictionsFollow, evictions
from kvneox_lib.neox.ragged import RaggedLayer
from kvneox_lib.neox.room import Room, check_rows, check_states


class CompactLayer(DynamicLayer):
    """A DynamicLayer whose `keys` and `values` are views of preallocated buffers."""

    keys = property(lambda self: self._keys.filled, lambda self, tensor: self._keys.assign(tensor))
    values = property(lambda self: self._values.filled, lambda self, tensor: self._values.assign(tensor))

    def __init__(self, headroom: int = 128):
        self.headroom = headroom
        self._keys, self._values = Room(headroom), Room(headroom)
        super().__init__()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states, value_states, cache_kwargs=None) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._keys.append(key_states), self._values.append(value_states)

    def make_room(self, batch: int, heads: int, n: int, dim: int, dtype: torch.dtype):
        """For `n` more tokens, whose keys and values the caller writes: no rows stored apart, the rows that they join
        and the entry where they begin."""
        keys, values = self._keys.buffer, self._values.buffer
        check_rows(batch, len(keys))
        check_states((heads, dim, dtype), *((x.shape[1], x.shape[3], x.dtype) for x in (keys, values)))
        if self._keys.length != self._values.length:
            raise ValueError(f"the cache holds {self._keys.length} keys and {self._values.length} values in a layer")
        if keys.shape != values.shape:  # one was replaced, the other cropped
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self._values.make_room(self._values.buffer, n)
        at = self._keys.make_room(self._keys.buffer, n)
        return None, rows_of(self._keys.buffer, self._values.buffer, self._keys.length), at

    def expect(self, n_tokens: int) -> None:
        self.headroom = self._keys.headroom = self._values.headroom = n_tokens

    def reset(self) -> None:
        self._keys.length = self._values.length = 0

    @property
    def allocated_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def used_bytes(self) -> int:
        return self._keys.filled_bytes + self._values.filled_bytes

    def lengths(self) -> torch.Tensor:
        """(batch, heads) entries held."""
        keys = self.keys
        return torch.full(keys.shape[:2], keys.shape[2])


class CompactCache(EvictionsFollow, Cache):
    """A transformers Cache on CompactLayers.

    headroom: how many tokens follow, if that is known. bits: 8, 4 or 2 for each number of what was read and compressed
    when the model reads on; presses see all of it as it is. residual: how many of the last tokens stay as they are;
    when they are rounded with what came later, taking that back does not bring them back.
    """

    def __init__(self, headroom: int = 128, bits: int | None = None, residual: int = 0):
        check_int("headroom", headroom, 0)
        check_bits("bits", bits)
        check_int("residual", residual, 0)
        super().__init__(layer_class_to_replicate=partial(CompactLayer, headroom))
        self.bits, self.residual = bits, residual

    @property
    def kv_bytes(self) -> int:
        """What is allocated, head-room included."""
        return sum(layer.allocated_bytes for layer in self.layers)

    @property
    def used_bytes(self) -> int:
        """Of what is held, masked entries included, without room for more."""
        return sum(layer.used_bytes for layer in self.layers)

    @property
    def kv_lengths(self) -> torch.Tensor:
        """(layers, batch, heads): entries physically held, masked ones included."""
        return torch.stack([layer.lengths() for layer in self.layers])

    def expect(self, n_tokens: int) -> None:
        """That many follow: what is allocated from now on has room for them."""
        for layer in self.layers:
            layer.expect(n_tokens)

    def make_ragged(self) -> None:
        """Free what head-wise presses evicted. After prefill, for presses that are idle while decoding."""
        for index, evicted in list(evictions(self).items()):
            if _names_any(evicted):
                self._keep_rows(index)

    def settle(self) -> None:
        """Keep what was read in `bits`, where there are any, and free what was evicted. The model does that before it
        reads on, unless a press is attached."""
        if self.bits is None:
            return
        for index, layer in enumerate(self.layers):
            if isinstance(layer, RaggedLayer):
                layer.keep_in(self.bits, self.residual)
            elif layer.get_seq_length() > 0:
                self._keep_rows(index)

    def _keep_rows(self, index: int) -> None:
        layer, evicted = self.layers[index], evictions(self).get(index)
        self.layers[index] = RaggedLayer.of([layer], [evicted], bits=self.bits or 0, residual=self.residual)
        evictions(self)[index] = None

    @classmethod
    def stack(cls, caches: Sequence["CompactCache"], order: Sequence[int] | None = None) -> "CompactCache":
        """One cache for a batch from those of its samples. They may hold different numbers of entries.

        order: the sample, counted through all caches, that comes to each row; as they are, if None.
        """
        first = caches[0]
        if len({cache.bits for cache in caches}) > 1:
            raise ValueError("caches in different numbers of bits cannot be one")
        for cache in caches:
            cache.settle()
        stacked = cls(first.layers[0].headroom, first.bits, first.residual)
        for index, layers in enumerate(zip(*(cache.layers for cache in caches))):
            evicted = [evictions(cache).get(index) for cache in caches]
            if isinstance(layers[0], RaggedLayer):
                stacked.layers.append(RaggedLayer.stack(layers, order))
            elif any(map(_names_any, evicted)) or len({layer.get_seq_length() for layer in layers}) > 1:
                stacked.layers.append(RaggedLayer.of(layers, evicted, order))
            else:
                states = (torch.cat(parts) for parts in zip(*((layer.keys, layer.values) for layer in layers)))
                stacked.update(*(states if order is None else (part[order] for part in states)), index)
        return stacked


def _names_any(evicted: tuple[torch.Tensor, ...] | None) -> bool:
    return evicted is not None and len(evicted[0]) > 0
