"""`bits.pack`, compiled by numba: a block at a time, in a tenth of the time, to the same words."""

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from kvneox_lib.neox.bits import ABSENT, GROUP, Form
from kvneox_lib.neox.bits import NOT_FINITE as WORD_NOT_FINITE
from kvneox_lib.neox.compiled import kernel_for, run
from kvneox_lib.neox.words import ENDLESS, at, count_up, first_of, per_word, pointer, second_of

# Codes are to be those of torch: no division becomes a product. All of the way down, since who is called inherits that.
exactly = njit(error_model="numpy")
ALL, ZERO, UPPER = np.int32(0xFFFF), np.int32(0), np.int32(-0x10000)
NOT_FINITE = np.int32(WORD_NOT_FINITE)


@exactly
def bfloat16_below(x):
    bits = np.float32(x).view(np.int32)
    return np.int32((bits + (ALL if x < 0 else ZERO)) & UPPER).view(np.float32)


@exactly
def bfloat16_above(x):
    return np.int32((np.float32(x).view(np.int32) + ALL) & UPPER).view(np.float32)


@exactly
def quantize(row, bits, codes):
    """A row of numbers into words of codes; the word of its step and its least number."""
    n, most_code = codes.shape[0], np.float32(2**bits - 1)
    least, most, spoiled = row[0], row[0], False
    for i in range(row.shape[0]):
        least, most = min(least, row[i]), max(most, row[i])
        spoiled |= row[i] != row[i]
    least = bfloat16_below(least)
    step = bfloat16_above((most - least) / most_code)
    if spoiled or not np.isfinite(least) or not np.isfinite(step):
        codes[:] = 0
        return NOT_FINITE
    by = step if step > 0 else np.float32(1)
    for i in range(n):
        codes[i] = 0
    for part in range(32 // bits):
        for i in range(n):
            code = np.rint((row[part * n + i] - least) / by)
            codes[i] |= np.int32(min(max(code, np.float32(0)), most_code)) << (bits * part)
    return np.float32(step).view(np.int32) | ((np.float32(least).view(np.int32) >> np.int32(16)) & ALL)


@exactly
def spread(token, words, first, numbers, n):
    """Of one key or value its numbers, in order of words."""
    for j in range(n):
        numbers[j, token] = first_of(words[first + j])
        if per_word(words[0]) == 2:
            numbers[n + j, token] = second_of(words[first + j])


@exactly
def pack_block(keys, values, count, dim, bits, channels, groups, by_channel, by_token, block):
    """keys, values: where they begin, words of 64 tokens. groups: the widths of groups of a value's channels."""
    n = dim // per_word(keys[0])
    for t in range(GROUP):
        token = t if t < count else 0
        spread(t, keys, token * n, by_channel, n)
        spread(t, values, token * n, by_token.T, n)
    in_a_row, steps = 2 * bits, channels * 2 * bits
    for c in range(dim):
        block[steps + c] = quantize(by_channel[c], bits, block[c * in_a_row : (c + 1) * in_a_row])
    codes, first = steps + channels, 0
    steps = codes + 2 * bits * groups.sum()
    for width in groups:
        in_a_row = width * bits // 32
        for t in range(GROUP):
            for c in range(dim, first + width):
                by_token[t, c] = by_token[t, first]
            row = by_token[t, first : first + width]
            step = quantize(row, bits, block[codes + t * in_a_row : codes + (t + 1) * in_a_row])
            block[steps + t] = step if t < count else np.int32(ABSENT)
        codes, steps, first = codes + GROUP * in_a_row, steps + GROUP, first + width


def _pack(stored, version, keep):
    @cfunc(types.void(types.voidptr), cache=keep)
    def pack(arguments):
        given = carray(arguments, 12, np.int64)
        _ = version
        n_blocks, dim, bits, channels, n_groups, n_words = given[2], given[3], given[4], given[5], given[6], given[7]
        keys, values = at(given[8], ENDLESS, stored), at(given[9], ENDLESS, stored)
        shapes = carray(pointer(given[10]), n_blocks + n_groups, np.int64)
        counts, groups = shapes[:n_blocks], shapes[n_blocks:]
        words = carray(pointer(given[11]), (n_blocks, n_words), np.int32)
        by_channel = np.empty((dim, GROUP), np.float32)
        by_token = np.empty((GROUP, groups.sum()), np.float32)
        a_block = GROUP * dim // per_word(keys[0])
        block = count_up(given, 0, 1)
        while block < n_blocks:
            start, end = block * a_block, (block + 1) * a_block
            these = keys[start:end], values[start:end], counts[block]
            pack_block(*these, dim, bits, channels, groups, by_channel, by_token, words[block])
            block = count_up(given, 0, 1)

    return pack


def pack(keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, form: Form) -> torch.Tensor:
    keys, values, shapes = keys.contiguous(), values.contiguous(), torch.cat([counts, torch.tensor(form.groups)])
    words = torch.zeros(len(keys), form.n_words, dtype=torch.int32)
    sizes = len(keys), form.dim, form.bits, form.channels, len(form.groups), form.n_words
    run(kernel_for(_pack, keys.dtype), *sizes, *(part.data_ptr() for part in (keys, values, shapes, words)))
    return words
