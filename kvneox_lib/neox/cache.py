"""A cache that decodes at the speed of memory.

transformers' DynamicCache copies all keys and values for every token. Here each layer owns buffers with head-room: a
new token is written behind the others, and when a press assigns fewer keys the large buffer is given back at once.

Head-wise presses evict different entries in each head, which kvpress only masks. `make_ragged` keeps each head's own
entries and frees the rest.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.kernels import attend_to_rows, compiled, is_for_few_queries, rows_of
from kvneox_lib.neox.modeling import EvictionsFollow, evictions


def check_rows(given: int, held: int) -> None:
    """torch would copy a single row into all of them."""
    if given != held:
        raise ValueError(f"input_ids has {given} row(s), the cache holds {held}; go on with as many")


def check_states(given: tuple[int, int, torch.dtype], *held: tuple[int, int, torch.dtype]) -> None:
    """Heads, head dimension and dtype. The kernels would read and write memory as what it is not."""
    for states in held:
        if states != given:
            ours, theirs = (f"{heads} heads of {dim} in {dtype}" for heads, dim, dtype in (given, states))
            raise ValueError(f"the model has {ours}, the cache {theirs}; go on with what it was filled by")


class Room:
    """A tensor (batch, heads, n, D) with room to grow along n."""

    def __init__(self, headroom: int):
        self.headroom = headroom
        self.buffer: torch.Tensor | None = None
        self.length = 0

    @property
    def filled(self) -> torch.Tensor | None:
        return None if self.buffer is None else self.buffer[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.nbytes

    def append(self, new: torch.Tensor) -> torch.Tensor:
        at = self.make_room(new, new.shape[2])
        self.buffer[:, :, at : self.length] = new
        return self.filled

    def make_room(self, like: torch.Tensor, n: int) -> int:
        """For `n` more entries of such tensors (batch, heads, _, D), which the caller writes; where they begin."""
        at, length = self.length, self.length + n
        if self.buffer is not None and self.buffer.shape[:2] != like.shape[:2]:
            if at:
                check_rows(len(like), len(self.buffer))
            else:  # it was reset
                self.buffer = None
        if self.buffer is None or length > self.buffer.shape[2]:
            old, outgrown = self.filled, self.buffer is not None
            self._allocate(like, length + max(self.headroom, length // 4 if outgrown else 0))
            if outgrown:
                self.buffer[:, :, :at] = old
        self.length = length
        return at

    def assign(self, tensor: torch.Tensor | None) -> None:
        """What a press leaves. The leading part of what is there is a crop and copies nothing."""
        if tensor is None:
            self.buffer, self.length = None, 0
            return
        if self.buffer is not None and tensor.dim() == 4:
            filled = self.filled
            same_place = tensor.data_ptr() == filled.data_ptr() and tensor.stride() == filled.stride()
            if same_place and tensor.shape[:2] == filled.shape[:2] and tensor.shape[2] <= self.length:
                self.length = tensor.shape[2]
                return
        self._allocate(tensor, tensor.shape[2] + self.headroom)
        self.buffer[:, :, : tensor.shape[2]] = tensor
        self.length = tensor.shape[2]

    def _allocate(self, like: torch.Tensor, capacity: int) -> None:
        self.buffer = like.new_empty(*like.shape[:2], capacity, like.shape[3])


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

    def reset(self) -> None:
        self._keys.length = self._values.length = 0

    @property
    def allocated_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def lengths(self) -> torch.Tensor:
        """(batch, heads) entries held."""
        keys = self.keys
        return torch.full(keys.shape[:2], keys.shape[2])


class CompactCache(EvictionsFollow, Cache):
    """A transformers Cache on CompactLayers. `headroom`: how many tokens follow, if that is known."""

    def __init__(self, headroom: int = 128):
        check_int("headroom", headroom, 0)
        super().__init__(layer_class_to_replicate=partial(CompactLayer, headroom))

    @property
    def kv_bytes(self) -> int:
        """What is allocated, head-room included."""
        return sum(layer.allocated_bytes for layer in self.layers)

    @property
    def kv_lengths(self) -> torch.Tensor:
        """(layers, batch, heads): entries physically held, masked ones included."""
        return torch.stack([layer.lengths() for layer in self.layers])

    def expect(self, n_tokens: int) -> None:
        """That many follow: what is allocated from now on has room for them."""
        for layer in self.layers:
            layer.headroom = layer._keys.headroom = layer._values.headroom = n_tokens

    def make_ragged(self) -> None:
        """Free what head-wise presses evicted. After prefill, for presses that are idle while decoding."""
        for index, evicted in list(evictions(self).items()):
            if _names_any(evicted):
                self.layers[index] = RaggedLayer.of([self.layers[index]], [evicted])
                evictions(self)[index] = None

    @classmethod
    def stack(cls, caches: Sequence["CompactCache"], order: Sequence[int] | None = None) -> "CompactCache":
        """One cache for a batch from those of its samples. They may hold different numbers of entries.

        order: the sample, counted through all caches, that comes to each row; as they are, if None.
        """
        stacked = cls(caches[0].layers[0].headroom)
        for index, layers in enumerate(zip(*(cache.layers for cache in caches))):
            evicted = [evictions(cache).get(index) for cache in caches]
            if any(map(_names_any, evicted)) or len({layer.get_seq_length() for layer in layers}) > 1:
                stacked.layers.append(RaggedLayer.of(layers, evicted, order))
            else:
                states = (torch.cat(parts) for parts in zip(*((layer.keys, layer.values) for layer in layers)))
                stacked.update(*(states if order is None else (part[order] for part in states)), index)
        return stacked


class RaggedLayer(CacheLayerMixin):
    """Rows (one a sample and head) that hold different numbers of entries.

    What was held after compression is cut into tiles of one size, the last of a row padded, so that one product over
    all tiles reads each entry once, however uneven the rows are; the softmax is put together from the tiles of a row.
    What comes after is as long in every row and kept apart.
    """

    is_sliding = False

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], batch: int, logical: int, headroom: int):
        """keys, values: one (n_i, D) for each row, sample by sample. logical: the length that the model believes in."""
        super().__init__()
        self.is_initialized, self.batch, self.logical = True, batch, logical
        self.held, device = torch.tensor([len(row) for row in keys]), keys[0].device
        self.tile_keys, self.tile_values = _tiles(keys), _tiles(values)  # (tiles, size, D)
        size = self.tile_keys.shape[1]
        n_tiles = -(-self.held // size)
        self.row = torch.arange(len(keys)).repeat_interleave(n_tiles).to(device)  # of each tile
        # the entry of its row with which a tile begins
        first = torch.cat([torch.arange(n) * size for n in n_tiles.tolist()])
        hidden = (first[:, None] + torch.arange(size) >= self.held[self.row.cpu()][:, None]).to(device)
        self.hidden = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[..., None]
        self.new_keys, self.new_values = Room(headroom), Room(headroom)  # (1, rows, n, D)

    @classmethod
    def of(
        cls,
        layers: Sequence[CompactLayer],
        evicted: Sequence[tuple | None],
        order: Sequence[int] | None = None,
    ) -> "RaggedLayer":
        """One layer of the samples in `layers`, without what was evicted from each; `order` as in `stack`."""
        keys, values = [], []
        for layer, gone in zip(layers, evicted):
            keep = torch.ones(layer.keys.shape[:3], dtype=torch.bool, device=layer.keys.device)
            if gone is not None:
                keep[tuple(index.to(keep.device) for index in gone)] = False
            for rows, states in ((keys, layer.keys), (values, layer.values)):
                rows += [row[mask] for row, mask in zip(states.flatten(0, 1), keep.flatten(0, 1))]
        batch, heads = sum(len(layer.keys) for layer in layers), layers[0].keys.shape[1]
        if order is not None:
            rows = [sample * heads + head for sample in order for head in range(heads)]
            keys, values = [keys[row] for row in rows], [values[row] for row in rows]
        return cls(keys, values, batch, max(layer.get_seq_length() for layer in layers), layers[0].headroom)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Take in new keys and values and answer the queries, all (batch, heads, T, D)."""
        check_rows(len(query), self.batch)
        by_kernel = is_for_few_queries(query)
        if by_kernel:
            self._check(*query.shape[1::2], query.dtype, key, value)
        self.logical += query.shape[2]
        self.new_keys.append(key.flatten(0, 1)[None])
        self.new_values.append(value.flatten(0, 1)[None])
        if by_kernel:
            return attend_to_rows(query, self._held_rows(), self._new_rows(), scaling)
        return self._attend_by_tiles(query, scaling)

    def make_room(self, batch: int, heads: int, n: int, dim: int, dtype: torch.dtype):
        """As a CompactLayer does; what was held after compression is stored apart."""
        check_rows(batch, self.batch)
        self._check(heads, dim, dtype)
        self.logical += n
        like = self.tile_keys.new_empty(1, len(self.held), 0, dim)
        self.new_values.make_room(like, n)
        at = self.new_keys.make_room(like, n)
        return self._held_rows(), self._new_rows(), at

    def _check(self, heads: int, dim: int, dtype: torch.dtype, *given: torch.Tensor) -> None:
        new = self.new_keys.buffer, self.new_values.buffer
        stored = [self.tile_keys, self.tile_values, *(buffer for buffer in new if buffer is not None), *given]
        held = ((len(self.held) // self.batch, x.shape[-1], x.dtype) for x in stored)
        check_states((heads, dim, dtype), *held)

    def _held_rows(self):
        """Each row's tiles lie one behind the other, and only the last of them is padded."""
        (size, dim), n_tiles = self.tile_keys.shape[1:], -(-self.held // self.tile_keys.shape[1])
        n_words = dim // compiled().per(self.tile_keys.dtype)
        starts = (n_tiles.cumsum(0) - n_tiles) * size * n_words
        return compiled().Rows(self.tile_keys, self.tile_values, starts, self.held, n_words)

    def _new_rows(self):
        return rows_of(self.new_keys.buffer, self.new_values.buffer, self.new_keys.length)

    def _attend_by_tiles(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        n, row = query.shape[2], self.row
        new_keys, new_values = self.new_keys.filled[0].float(), self.new_values.filled[0].float()
        # float32 also for half precision: its scores would be rounded to a hundredth
        queries = (query.flatten(0, 1).float() * scaling).transpose(1, 2)  # (rows, D, T)
        new = torch.bmm(new_keys, queries)  # (rows, n new, T)
        if n > 1:
            later = torch.ones(n, n, dtype=torch.bool, device=new.device).tril(-1)  # entry i, query j < i
            new[:, -n:].masked_fill_(later, -torch.inf)
        old = torch.bmm(self.tile_keys.float(), queries[row]).add_(self.hidden)  # (tiles, size, T)
        top = new.amax(1).scatter_reduce_(0, row[:, None].expand(-1, n), old.amax(1), "amax")  # (rows, T)
        new = new.sub_(top[:, None]).exp_()
        old = old.sub_(top[row][:, None]).exp_()
        total = new.sum(1).index_add_(0, row, old.sum(1))
        output = torch.bmm(new.transpose(1, 2), new_values)  # (rows, T, D)
        output.index_add_(0, row, torch.bmm(old.transpose(1, 2), self.tile_values.float()))
        return output.div_(total[..., None]).to(query.dtype).view(query.shape)

    def update(self, key_states, value_states, cache_kwargs=None):
        raise NotImplementedError("heads hold different entries here: only this library's attention can read them")

    def lazy_initialization(self, key_states, value_states) -> None:
        pass

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        return self.logical + len(cache_position), 0

    def get_seq_length(self) -> int:
        return self.logical

    def get_max_cache_shape(self) -> int:
        return -1

    def _refuse(self, *_) -> None:
        raise NotImplementedError(
            "entries are stored for each head: samples cannot be reordered, repeated or reset; use the CompactCache "
            "before make_ragged() for that"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = reset = _refuse

    def crop(self, max_length: int) -> None:
        """Take back what was read after compression."""
        surplus = self.logical - (max_length if max_length >= 0 else self.logical + max_length)
        if surplus > self.new_keys.length:
            raise ValueError(f"max_length={max_length}: what was compressed cannot be cropped")
        if surplus > 0:
            self.logical -= surplus
            self.new_keys.length -= surplus
            self.new_values.length -= surplus

    @property
    def allocated_bytes(self) -> int:
        held = self.tile_keys, self.tile_values, self.hidden, self.new_keys, self.new_values
        return sum(part.nbytes for part in held)

    def lengths(self) -> torch.Tensor:
        return (self.held + self.new_keys.length).view(self.batch, -1)


def _names_any(evicted: tuple[torch.Tensor, ...] | None) -> bool:
    return evicted is not None and len(evicted[0]) > 0


def _tiles(rows: list[torch.Tensor]) -> torch.Tensor:
    """(tiles, size, D) of rows (n_i, D). A sixteenth of the mean length as size wastes about 3 %."""
    size = min(256, max(8, sum(map(len, rows)) // len(rows) // 16))
    tiles = [pad(row, (0, 0, 0, -len(row) % size)).unflatten(0, (-1, size)) for row in rows if len(row)]
    return torch.cat(tiles) if tiles else rows[0].new_empty(0, size, rows[0].shape[-1])
