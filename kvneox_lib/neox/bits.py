"""Keys and values in 8, 4 or 2 bits a number.

Each number of a group is stored as a whole multiple of the group's step above its least number (KIVI, Liu et al. 2024,
arXiv:2402.02750): keys in groups of 64 tokens, each channel by itself, since some channels of keys are large in all
tokens; values in groups of up to 64 channels, each token by itself. Steps and least numbers are bfloat16, rounded so
that the whole group is within reach.

A block holds up to 64 tokens of one head, in words of 32 bits: codes of the keys (channel by channel), a word of step
and least number for each channel, codes of the values (token by token, for each group of channels), and their words of
step and least number. A token that is not there has a negative step. A row of 64 codes is laid into 2 * bits words so
that the first code of each word is taken from all of them together, then the second, and so on.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import pad

BITS = (8, 4, 2)
GROUP = 64  # tokens of a block, and channels of a value that share a step at most
LANES = 16  # words of a wide register; stretches of codes are whole multiples
ABSENT = -(2**31)  # a step of -0.0
NOT_FINITE = 0x7FC07FC0  # NaN and NaN: of a group of which any number is not finite, all are lost
BLOCKS_AT_ONCE = 64  # are packed: what that takes stays in a processor's cache


def in_sixteens(dim: int) -> int:
    return -(-dim // 16) * 16


def check_bits(name: str, bits: int | None) -> None:
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise ValueError(f"{name}={bits!r}: allowed is {', '.join(map(str, BITS))}, or None: numbers as they are")


@dataclass(frozen=True)
class Form:
    """Where in a block what is."""

    bits: int
    dim: int
    halves: bool  # whether numbers are read two a word: then channels are in order of words, see `compiled`

    @property
    def channels(self) -> int:
        """Of the keys, with those that fill up."""
        return in_sixteens(self.dim)

    @property
    def groups(self) -> list[int]:
        """Of a value's channels: 64 each, and what is left, filled up to 16, 32 or 64."""
        rest = self.dim % GROUP
        last = [next(width for width in (16, 32, 64) if width >= rest)] if rest else []
        return [GROUP] * (self.dim // GROUP) + last

    @property
    def sizes(self) -> list[int]:
        """Words of key codes, of key steps, of value codes and of value steps."""
        of_codes = 2 * self.bits * self.channels, 2 * self.bits * sum(self.groups)
        return [of_codes[0], self.channels, of_codes[1], GROUP * len(self.groups)]

    @property
    def n_words(self) -> int:
        return sum(self.sizes)

    @property
    def order(self) -> torch.Tensor:
        """The channels as they are stored."""
        return _order(self.dim, self.halves)


@cache
def _order(dim: int, halves: bool) -> torch.Tensor:
    with torch.inference_mode(False):
        channels = torch.arange(dim)
        return torch.cat([channels[::2], channels[1::2]]) if halves else channels


def form_of(bits: int, like: torch.Tensor) -> Form:
    return Form(bits, like.shape[-1], like.dtype.itemsize == 2)


def pack(keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, form: Form) -> torch.Tensor:
    """(blocks, words) of keys and values (blocks, 64, D), of which the first `counts` (blocks) are there."""
    at_once = BLOCKS_AT_ONCE if keys.device.type == "cpu" else max(1, len(keys))
    some = zip(*(x.split(at_once) for x in (keys, values, counts.to(keys.device))))
    return torch.cat([_pack(*parts, form) for parts in some])


def _pack(keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, form: Form) -> torch.Tensor:
    there = torch.arange(GROUP, device=keys.device) < counts[:, None]  # (blocks, 64)
    order = form.order.to(keys.device)
    keys, values = (_filled(x[..., order].float(), there) for x in (keys, values))
    key_codes, key_steps = _quantized(pad(keys, (0, form.channels - form.dim)).transpose(-1, -2), form.bits)
    value_codes, value_steps = [], []
    for width, group in zip(form.groups, values.split(GROUP, dim=-1)):
        filled = torch.cat([group, group[..., :1].expand(*group.shape[:-1], width - group.shape[-1])], dim=-1)
        codes, steps = _quantized(filled, form.bits)
        value_codes.append(_words(codes, form.bits))
        value_steps.append(steps.masked_fill(~there, ABSENT))
    return torch.cat([_words(key_codes, form.bits), key_steps, *value_codes, *value_steps], dim=-1)


def unpack(words: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (n, 64, D) in float32 of blocks (n, words), and which tokens are there (n, 64)."""
    key_codes, key_steps, value_codes, value_steps = words.split(form.sizes, dim=-1)
    keys = _numbers(key_codes, key_steps, GROUP, form.bits).transpose(1, 2)[..., : form.dim]
    groups = form.groups
    of_groups = value_codes.split([2 * form.bits * width for width in groups], dim=-1), value_steps.split(GROUP, dim=-1)
    values = [_numbers(codes, steps, width, form.bits) for codes, steps, width in zip(*of_groups, groups)]
    back = form.order.argsort().to(words.device)
    return keys[..., back], torch.cat(values, dim=-1)[..., back], value_steps[:, :GROUP] >= 0


def _filled(x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """x (blocks, 64, D) with the first token in the place of those that are not there, so that no group grows."""
    return x if there.all() else torch.where(there[..., None], x, x[:, :1])


def _quantized(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of groups (..., rows, n), and a word (..., rows) each of step (upper half) and least number."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least = _bfloat16_below(least)
    step = _bfloat16_above((most - least) / (2**bits - 1))
    finite = step.isfinite() & least.isfinite()
    codes = ((x - least) / step.where(step > 0, 1)).round_().clamp_(0, 2**bits - 1).where(finite, 0).int()
    words = (step.view(torch.int32) | (least.view(torch.int32) >> 16 & 0xFFFF)).where(finite, NOT_FINITE)
    return codes, words[..., 0]


def _bfloat16_below(x: torch.Tensor) -> torch.Tensor:
    """The greatest bfloat16 that is not above x, of whose bits it is the upper half; one more if x is negative."""
    numbers = x.contiguous().view(torch.int32)
    return torch.where(x < 0, numbers + 0xFFFF, numbers).bitwise_and_(-0x10000).view(torch.float32)


def _bfloat16_above(x: torch.Tensor) -> torch.Tensor:
    """The least bfloat16 that is not below x, which is not negative."""
    return (x.contiguous().view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., words) of codes (..., rows, n)."""
    parts = codes.unflatten(-1, (32 // bits, -1))  # (..., rows, codes of a word, words)
    words = parts[..., 0, :].clone()
    for part in range(1, 32 // bits):
        words |= parts[..., part, :] << bits * part
    return words.flatten(-2)


def _numbers(words: torch.Tensor, steps: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    """(blocks, rows, n) from the words of their codes and of their steps."""
    shifts = bits * torch.arange(32 // bits, device=words.device)
    rows = words.unflatten(-1, (-1, n * bits // 32))
    codes = (rows[..., None, :] >> shifts[:, None].int()).bitwise_and_(2**bits - 1).flatten(-2)
    step = (steps & -0x10000).view(torch.float32)[..., None]
    least = (steps << 16).view(torch.float32)[..., None]
    return codes * step + least
