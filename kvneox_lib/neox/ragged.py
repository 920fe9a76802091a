"""A layer of a cache whose rows, one a sample and head, hold different numbers of entries, or hold them in few bits."""

import copy
from collections.abc import Sequence

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvneox_lib.neox.bits import GROUP, form_of
from kvneox_lib.neox.kernels import attend_to_rows, is_for_few_queries, rows_of
from kvneox_lib.neox.room import Room, check_rows, check_states
from kvneox_lib.neox.stored import Blocks, Tiles


class RaggedLayer(CacheLayerMixin):
    """What was held after compression is kept apart, see `stored`. What comes after is as long in every row. In few
    bits, 64 tokens of that, the oldest, join the others when there are as many beside the last `residual` ones: before
    the next tokens are read, so that what was just read can be taken back.
    """

    is_sliding = False

    def __init__(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        batch: int,
        logical: int,
        headroom: int,
        bits: int = 0,
        residual: int = 0,
    ):
        """keys, values: one (n_i, D) for each row, sample by sample. logical: the length that the model believes in."""
        super().__init__()
        self.is_initialized, self.batch, self.logical, self.residual = True, batch, logical, residual
        in_full = min(residual, *map(len, keys)) if bits else 0
        room = headroom if not bits else min(headroom, GROUP)
        self.new_keys, self.new_values = Room(room), Room(room)  # (1, rows, n, D)
        if in_full:
            for room, rows in ((self.new_keys, keys), (self.new_values, values)):
                room.append(torch.stack([row[-in_full:] for row in rows])[None])
            keys, values = ([row[:-in_full] for row in rows] for rows in (keys, values))
        form = form_of(bits, keys[0]) if bits else None
        self.held = Blocks.of(form, keys, values, headroom) if bits else Tiles(keys, values)

    @classmethod
    def of(
        cls,
        layers: Sequence[DynamicLayer],
        evicted: Sequence[tuple | None],
        order: Sequence[int] | None = None,
        bits: int = 0,
        residual: int = 0,
    ) -> "RaggedLayer":
        """One layer of the samples in `layers`, without what was evicted from each; `order` as in `stack`."""
        keys, values = [], []
        for layer, gone in zip(layers, evicted):
            keys += _left(layer.keys, gone)
            values += _left(layer.values, gone)
        batch, heads = sum(len(layer.keys) for layer in layers), layers[0].keys.shape[1]
        if order is not None:
            rows = _rows_of(order, heads)
            keys, values = [keys[row] for row in rows], [values[row] for row in rows]
        logical = max(layer.get_seq_length() for layer in layers)
        return cls(keys, values, batch, logical, layers[0].headroom, bits, residual)

    @classmethod
    def stack(cls, layers: Sequence["RaggedLayer"], order: Sequence[int] | None) -> "RaggedLayer":
        """Of layers in few bits. What some have read since, beyond what all have, goes into blocks with the rest."""
        least, one = min(layer.new_keys.length for layer in layers), layers[0]
        stacked, order = copy.copy(one), range(sum(layer.batch for layer in layers)) if order is None else order
        for layer in layers:
            layer._join(layer.new_keys.length - least)
        rows = _rows_of(order, len(one.held.lengths) // one.batch)
        stacked.batch, stacked.logical = len(order), max(layer.logical for layer in layers)
        stacked.held = Blocks.stack([layer.held for layer in layers], rows, one.held.headroom)
        for name in ("new_keys", "new_values"):
            room, rooms = Room(getattr(one, name).headroom), [getattr(layer, name).filled for layer in layers]
            if least:
                room.append(torch.cat(rooms, dim=1)[:, rows])
            setattr(stacked, name, room)
        return stacked

    @property
    def bits(self) -> int:
        return self.held.bits

    @property
    def headroom(self) -> int:
        return self.new_keys.headroom

    def keep_in(self, bits: int, residual: int) -> None:
        """What was held as it is."""
        if not self.bits:
            rows = self.held.as_tensors(0), self.held.as_tensors(1)
            layer = RaggedLayer(*rows, self.batch, self.logical - self.new_keys.length, self.headroom, bits, residual)
            for room, new in ((layer.new_keys, self.new_keys), (layer.new_values, self.new_values)):
                if new.length:
                    room.append(new.filled)
            self.__dict__.update(layer.__dict__ | {"logical": self.logical})

    def expect(self, n_tokens: int) -> None:
        if self.bits:
            self.held.headroom, n_tokens = n_tokens, min(n_tokens, GROUP)
        self.new_keys.headroom = self.new_values.headroom = n_tokens

    def settle(self) -> None:
        """Have whole groups join what was held before."""
        if self.bits:
            self._join((self.new_keys.length - self.residual) // GROUP * GROUP)

    def _join(self, n: int) -> None:
        """The first `n` of what came later."""
        if n <= 0:
            return
        self.held.append(*(room.filled[0, :, :n] for room in (self.new_keys, self.new_values)))
        for room in (self.new_keys, self.new_values):
            room.assign(room.filled[:, :, n:].clone())

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Take in new keys and values and answer the queries, all (batch, heads, T, D)."""
        check_rows(len(query), self.batch)
        by_kernel = is_for_few_queries(query)
        if by_kernel:
            self._check(*query.shape[1::2], query.dtype, key, value)
        self.settle()
        self.logical += query.shape[2]
        self.new_keys.append(key.flatten(0, 1)[None])
        self.new_values.append(value.flatten(0, 1)[None])
        if by_kernel:
            return attend_to_rows(query, self.held.as_rows(), self._new_rows(), scaling)
        return self._attend_part_by_part(query, scaling)

    def make_room(self, batch: int, heads: int, n: int, dim: int, dtype: torch.dtype):
        """As a CompactLayer does; what was held after compression is stored apart."""
        check_rows(batch, self.batch)
        self._check(heads, dim, dtype)
        self.settle()
        self.logical += n
        like = torch.empty(1, len(self.held.lengths), 0, dim, dtype=dtype, device=self.held.device)
        self.new_values.make_room(like, n)
        at = self.new_keys.make_room(like, n)
        return self.held.as_rows(), self._new_rows(), at

    def _check(self, heads: int, dim: int, dtype: torch.dtype, *given: torch.Tensor) -> None:
        new = self.new_keys.buffer, self.new_values.buffer
        stored = [(x.shape[-1], x.dtype) for x in (*(buffer for buffer in new if buffer is not None), *given)]
        n_heads = len(self.held.lengths) // self.batch
        check_states((heads, dim, dtype), *((n_heads, *of) for of in [(self.held.dim, self.held.dtype), *stored]))

    def _new_rows(self):
        return rows_of(self.new_keys.buffer, self.new_values.buffer, self.new_keys.length)

    def _attend_part_by_part(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        n = query.shape[2]
        new_keys, new_values = self.new_keys.filled[0].float(), self.new_values.filled[0].float()
        # float32 also for half precision: its scores would be rounded to a hundredth
        queries = (query.flatten(0, 1).float() * scaling).transpose(1, 2)  # (rows, D, T)
        scores = torch.bmm(new_keys, queries)  # (rows, n new, T)
        if n > 1:
            later = torch.ones(n, n, dtype=torch.bool, device=scores.device).tril(-1)  # entry i, query j < i
            scores[:, -n:].masked_fill_(later, -torch.inf)
        top = scores.amax(1)  # (rows, T): each query sees at least itself
        scores = scores.sub_(top[:, None]).exp_()
        total, output = scores.sum(1), torch.bmm(scores.transpose(1, 2), new_values)  # (rows, T), (rows, T, D)
        for keys, values, hidden, row in self.held.parts(n):
            scores = torch.bmm(keys, queries[row]).add_(hidden)  # (tiles, size, T)
            higher = top.scatter_reduce(0, row[:, None].expand(-1, n), scores.amax(1), "amax")
            shrunk, top = (top - higher).exp_(), higher
            scores = scores.sub_(top[row][:, None]).exp_()
            total = total.mul_(shrunk).index_add_(0, row, scores.sum(1))
            output = output.mul_(shrunk[..., None]).index_add_(0, row, torch.bmm(scores.transpose(1, 2), values))
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

    def _take_rows(self, order: torch.Tensor) -> None:
        if not self.bits:
            self.reset()
        self.__dict__.update(RaggedLayer.stack([self], order.tolist()).__dict__)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take_rows(torch.arange(self.batch)[torch.as_tensor(indices).cpu()])

    def reset(self) -> None:
        if self.bits:
            raise NotImplementedError("what was compressed cannot be reset; make another cache")
        raise NotImplementedError(
            "entries are stored for each head: samples cannot be reordered, repeated or reset; use the CompactCache "
            "before make_ragged() for that"
        )

    def crop(self, max_length: int) -> None:
        """Take back what was read after compression; of what is in few bits also what was there before, if it is as
        long in all rows."""
        surplus = self.logical - (max_length if max_length >= 0 else self.logical + max_length)
        new = self.new_keys.length
        if surplus > new and not self.bits:
            raise ValueError(f"max_length={max_length}: what was compressed cannot be cropped")
        if surplus <= 0:
            return
        left = self.held.take_back(surplus - new) if surplus > new else ()
        self.logical -= surplus
        for room in (self.new_keys, self.new_values):
            room.length = max(new - surplus, 0)
        for room, states in zip((self.new_keys, self.new_values), left):
            room.append(states[None])

    # A view of a layer as others know it: (batch, heads, T, D), those of a row that were evicted in front, as zeros. It
    # is made when asked for. What is assigned must be its beginning: kvpress takes a question back so.
    keys = property(lambda self: self._as_tensor(0), lambda self, tensor: self._assign(0, tensor))
    values = property(lambda self: self._as_tensor(1), lambda self, tensor: self._assign(1, tensor))

    def _as_tensor(self, which: int) -> torch.Tensor:
        held, new = self.held, (self.new_keys, self.new_values)[which]
        shape = len(held.lengths), self.logical, held.dim
        dense, end = torch.zeros(shape, dtype=held.dtype, device=held.device), self.logical - new.length
        if new.length:
            dense[:, end:] = new.filled[0]
        for row, states in zip(dense, held.as_tensors(which)):
            row[end - len(states) : end] = states
        return dense.unflatten(0, (self.batch, -1))

    def _assign(self, which: int, tensor: torch.Tensor | None) -> None:
        if tensor is None:  # as a layer is made
            return
        if not torch.equal(tensor, self._as_tensor(which)[:, :, : tensor.shape[2]]):
            raise NotImplementedError("what is kept for each head, or in few bits, can be cropped, not replaced")
        self.crop(tensor.shape[2])

    @property
    def allocated_bytes(self) -> int:
        return self.held.nbytes + self.new_keys.nbytes + self.new_values.nbytes

    @property
    def used_bytes(self) -> int:
        return self.held.used_bytes + self.new_keys.filled_bytes + self.new_values.filled_bytes

    def lengths(self) -> torch.Tensor:
        return (self.held.lengths + self.new_keys.length).view(self.batch, -1)


def _left(states: torch.Tensor, gone: tuple[torch.Tensor, ...] | None) -> list[torch.Tensor]:
    """(n_i, D) for each sample and head of states (batch, heads, n, D), without the (batch, head, position) gone."""
    if gone is None:
        return [*states.flatten(0, 1)]
    keep = torch.ones(states.shape[:3], dtype=torch.bool, device=states.device)
    keep[tuple(index.to(keep.device) for index in gone)] = False
    return [row[mask] for row, mask in zip(states.flatten(0, 1), keep.flatten(0, 1))]


def _rows_of(order: Sequence[int], heads: int) -> list[int]:
    return [sample * heads + head for sample in order for head in range(heads)]
