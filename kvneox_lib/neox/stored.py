"""What rows (one a sample and head) held when their context was compressed, and how: Tiles as it is, Blocks in few
bits. Rows may hold different numbers of entries.

Both tell compiled code where their entries lie (`as_rows`), and give them to others part by part, in float32 (`parts`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import pad

from kvneox_lib.neox.bits import GROUP, Form, unpack
from kvneox_lib.neox.kernels import compiled, pack_blocks

# A part: keys and values (n, size, D), what is added to scores (n, size, 1), and the row of each (n)
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Tiles:
    """Entries are cut into tiles of one size, the last of a row padded, so that one product over all tiles reads each
    entry once, however uneven the rows are."""

    bits = 0

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]):
        """One (n_i, D) for each row."""
        self.lengths, self.device = torch.tensor([len(row) for row in keys]), keys[0].device
        self.keys, self.values = _tiles(keys), _tiles(values)  # (tiles, size, D)
        self.dim, self.dtype = self.keys.shape[2], self.keys.dtype
        size, n_tiles = self.keys.shape[1], self._n_tiles
        self.row = _owners(n_tiles)  # of each tile
        first = torch.cat([torch.arange(n) * size for n in n_tiles.tolist()])  # entry of its row with which it begins
        there = first[:, None] + torch.arange(size) < self.lengths[self.row][:, None]
        self.row, self.hidden = self.row.to(self.device), _added(there.to(self.device))

    @property
    def _n_tiles(self) -> torch.Tensor:
        return -(-self.lengths // self.keys.shape[1])

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.hidden.nbytes

    @property
    def used_bytes(self) -> int:
        return 2 * int(self.lengths.sum()) * self.dim * self.dtype.itemsize

    def as_rows(self):
        """Each row's tiles lie one behind the other, and only the last of them is padded."""
        (size, dim), n_tiles = self.keys.shape[1:], self._n_tiles
        n_words = dim // compiled().per(self.dtype)
        starts = (n_tiles.cumsum(0) - n_tiles) * size * n_words
        return compiled().Rows(self.keys, self.values, starts, self.lengths, n_words)

    def as_tensors(self, which: int) -> list[torch.Tensor]:
        """Keys (0) or values (1) of each row, (n_i, D)."""
        tiles = (self.keys, self.values)[which].split(self._n_tiles.tolist())
        return [row.flatten(0, 1)[:n] for row, n in zip(tiles, self.lengths.tolist())]

    def parts(self, n_queries: int) -> Iterator[Part]:
        yield self.keys.float(), self.values.float(), self.hidden, self.row


def _tiles(rows: list[torch.Tensor]) -> torch.Tensor:
    """(tiles, size, D) of rows (n_i, D). A sixteenth of the mean length as size wastes about 3 %."""
    size = min(256, max(8, sum(map(len, rows)) // len(rows) // 16))
    tiles = [pad(row, (0, 0, 0, -len(row) % size)).unflatten(0, (-1, size)) for row in rows if len(row)]
    return torch.cat(tiles) if tiles else rows[0].new_empty(0, size, rows[0].shape[-1])


def _owners(counts: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(counts)


def _added(there: torch.Tensor) -> torch.Tensor:
    """(n, size, 1): nothing to the scores of what is there, minus infinity to others."""
    return torch.zeros(there.shape, device=there.device).masked_fill_(~there, -torch.inf)[..., None]


NUMBERS_AT_ONCE = 2**22  # of keys, or of scores, in a part


class Blocks:
    """Entries in few bits, 64 tokens a block. Those of a row lie one behind the other, with room for some more."""

    def __init__(self, form: Form, dtype: torch.dtype, words: list[torch.Tensor], lengths: torch.Tensor, room: int):
        """words: blocks (n_i, words of a block) of each row. room: for so many tokens that all rows will get."""
        self.form, self.dtype, self.lengths, self.headroom = form, dtype, lengths, room
        self.n_blocks, self.device = torch.tensor([len(row) for row in words]), words[0].device
        self.same: list[int] = []  # how many tokens each of the last blocks holds, as far as that is so in all rows
        self._lay_out(words, -(-room // GROUP))

    @classmethod
    def of(cls, form: Form, keys: list[torch.Tensor], values: list[torch.Tensor], room: int) -> "Blocks":
        """One (n_i, D) for each row."""
        counts = [len(row) for row in keys]
        words = _packed(keys, values, form).split([-(-n // GROUP) for n in counts])
        blocks = cls(form, keys[0].dtype, words, torch.tensor(counts), room)
        if len(set(counts)) == 1:
            blocks.same = [min(GROUP, counts[0] - at) for at in range(0, counts[0], GROUP)]
        return blocks

    @classmethod
    def stack(cls, stored: Sequence["Blocks"], order: Sequence[int], room: int) -> "Blocks":
        """The rows of all, in that order."""
        words, lengths = [row for blocks in stored for row in blocks.rows()], torch.cat([one.lengths for one in stored])
        stacked = cls(stored[0].form, stored[0].dtype, [words[row] for row in order], lengths[list(order)], room)
        for counts in zip(*(reversed(one.same) for one in stored)):
            if len(set(counts)) > 1:
                break
            stacked.same.insert(0, counts[0])
        return stacked

    def rows(self) -> list[torch.Tensor]:
        """(n_i, words of a block) of each row."""
        return [self.words[at : at + n] for at, n in zip(self.first.tolist(), self.n_blocks.tolist())]

    def _lay_out(self, rows: list[torch.Tensor], free: int) -> None:
        held = self.n_blocks + free
        self.first, self.free = held.cumsum(0) - held, free
        with torch.inference_mode(False):  # it is written to again, perhaps outside of that
            self.words = torch.zeros(int(held.sum()), self.form.n_words, dtype=torch.int32, device=self.device)
        for row, at, n in zip(rows, self.first.tolist(), self.n_blocks.tolist()):
            self.words[at : at + n] = row

    @property
    def bits(self) -> int:
        return self.form.bits

    @property
    def dim(self) -> int:
        return self.form.dim

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    @property
    def used_bytes(self) -> int:
        return int(self.n_blocks.sum()) * self.form.n_words * self.words.itemsize

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """(rows, n, D), as many to each row."""
        n = keys.shape[1]
        packed = _packed(keys, values, self.form).unflatten(0, (len(keys), -1))  # (rows, blocks, words)
        if packed.shape[1] > self.free:
            self._lay_out(self.rows(), packed.shape[1] + max(-(-self.headroom // GROUP), int(self.n_blocks.max()) // 4))
        places = (self.first + self.n_blocks)[:, None] + torch.arange(packed.shape[1])
        self.words[places.to(self.device)] = packed
        self.free -= packed.shape[1]
        self.n_blocks, self.lengths = self.n_blocks + packed.shape[1], self.lengths + n
        self.same += [min(GROUP, n - at) for at in range(0, n, GROUP)]

    def take_back(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `n` tokens of all rows go. Those that were in a block with them, (rows, n left, D) keys and values,
        come out of it."""
        if n > sum(self.same):
            raise ValueError("what was compressed, of which heads or samples hold different numbers, cannot be cropped")
        left = 0
        while n > 0:
            count = self.same.pop()
            last = self.words[(self.first + self.n_blocks - 1).to(self.device)]
            self.n_blocks, self.lengths, self.free = self.n_blocks - 1, self.lengths - count, self.free + 1
            left, n = max(count - n, 0), n - count
        keys, values, _ = unpack(last, self.form)
        return keys[:, :left].to(self.dtype), values[:, :left].to(self.dtype)

    def as_rows(self):
        n_words = self.form.n_words
        starts, lengths = self.first * n_words, self.n_blocks * GROUP
        return compiled().Rows(self.words, self.words, starts, lengths, n_words, self.bits)

    def as_tensors(self, which: int) -> list[torch.Tensor]:
        unpacked = [unpack(row, self.form) for row in self.rows()]
        return [row[which][row[2]].to(self.dtype) for row in unpacked]

    def parts(self, n_queries: int) -> Iterator[Part]:
        places = torch.cat([torch.arange(at, at + n) for at, n in zip(self.first.tolist(), self.n_blocks.tolist())])
        owners, at_once = _owners(self.n_blocks), max(1, NUMBERS_AT_ONCE // (GROUP * max(n_queries, self.dim)))
        for some, row in zip(places.to(self.device).split(at_once), owners.to(self.device).split(at_once)):
            keys, values, there = unpack(self.words[some], self.form)
            yield keys, values, _added(there), row


def _packed(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], form: Form) -> torch.Tensor:
    """(blocks, words) of rows (n_i, D), one after the other."""
    return pack_blocks(*map(torch.cat, zip(*map(_in_blocks, keys, values))), form)


def _in_blocks(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocks, 64, D) of each (n, D), and how many tokens are in a block."""
    n = len(keys)
    filled = [pad(x, (0, 0, 0, -n % GROUP)).unflatten(0, (-1, GROUP)) for x in (keys, values)]
    return *filled, torch.tensor([min(GROUP, n - at) for at in range(0, n, GROUP)], dtype=torch.long)
