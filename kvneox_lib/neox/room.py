"""Tensors with room to grow, and what must hold of what is added to them."""

import torch


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

    @property
    def filled_bytes(self) -> int:
        return 0 if self.buffer is None else self.filled.nbytes

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
