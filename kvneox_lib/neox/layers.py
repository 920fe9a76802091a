"""All layers of the model for up to four tokens, in one call.

What a decoding step does between its large products is little, but each call for it costs more than its arithmetic:
what was read since has driven the code and its data from the processor's caches. Here the threads stay in compiled code
from the first layer to the last. They take shares of a phase and wait for each other before the next one begins; this
works with any number of threads, since one that comes late finds nothing left to do.
"""

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import nn

from kvneox_lib.neox.compiled import (
    Rows,
    _turn_into,
    address_of,
    ends_of,
    in_fours,
    kernel_for,
    multiply_share,
    place_token,
    put_together,
    read_share,
    run,
    shares_at_most,
)
from kvneox_lib.neox.words import (
    ENDLESS,
    ZERO,
    at,
    compiled,
    count_up,
    exp_of_negative,
    number,
    per_word,
    place,
    pointer,
)

PHASES, NUMBERS = 5, 23  # of a layer


@compiled
def normalize(x, scale, shift, eps, output):
    """The output in order of words."""
    n = np.float32(x.shape[1])
    for r in range(x.shape[0]):
        total, square = ZERO, ZERO
        for i in range(x.shape[1]):
            total += x[r, i]
        mean = total / n
        for i in range(x.shape[1]):
            square += (x[r, i] - mean) * (x[r, i] - mean)
        factor = np.float32(1) / np.sqrt(square / n + eps)
        for i in range(x.shape[1]):
            turned = (x[r, i] - mean) * factor * number(scale, i) + number(shift, i)
            output[r, place(i, x.shape[1], per_word(scale[0]))] = turned


@compiled
def gelu(x):
    """With the error function by a formula of Abramowitz and Stegun (7.1.26), good to 1.5e-7."""
    z = abs(x) * np.float32(0.7071067811865476)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
    series = np.float32(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(term)
    tail = np.float32(0.5) * series * t * exp_of_negative(-z * z)
    return x * (np.float32(1) - tail) if x > 0 else x * tail


@compiled
def next_share(counters, phase, n_shares):
    """Of a phase; -1 when all of them are done, by whomever."""
    share = count_up(counters, 2 * phase, 1)
    if share < n_shares:
        return share
    while count_up(counters, 2 * phase + 1, 0) < n_shares:
        pass
    return -1


@compiled
def done(counters, phase):
    count_up(counters, 2 * phase + 1, 1)


@compiled
def multiply_part(x, numbers, which, share, n_shares, output, dtype):
    """By the weight that stands there among the numbers of a layer, its bias behind it. Where the part begins, ends."""
    n_out = output.shape[1]
    begin, end = share * n_out // n_shares, (share + 1) * n_out // n_shares
    weight, bias = at(numbers[which], ENDLESS, dtype), at(numbers[which + 1], ENDLESS, dtype)
    multiply_share(x, weight, bias, numbers[which + 1] != 0, begin, end, output)
    return begin, end


def _read_layers(stored, held_as, version, keep):
    values_as = stored if held_as is stored else np.uint32

    @cfunc(types.void(types.voidptr), cache=keep)
    def read_layers(arguments):
        given = carray(arguments, 23, np.int64)
        _ = version
        most, n_layers, batch, n, heads = given[2], given[3], given[4], given[5], given[6]
        dim, half, inner, rows = given[7], given[8], given[9], given[10]
        width, n_queries = heads * dim, batch * heads
        counters, all_numbers = at(given[11], ENDLESS, np.int64), at(given[12], ENDLESS, np.int64)
        settings, step = at(given[13], 2, np.float32), given[16]
        cos, sin = at(given[14], ENDLESS, stored), at(given[15], ENDLESS, stored)
        x = carray(pointer(given[17]), (rows, width), np.float32)
        fused = carray(pointer(given[18]), (rows, 3 * width), np.float32)
        wide = carray(pointer(given[19]), (2 * rows, inner), np.float32)
        middle, wide = wide[:rows], wide[rows:]
        attended = carray(pointer(given[20]), (rows, width), np.float32)
        queries = carray(pointer(given[21]), (2 * n_queries, n, dim), np.float32)
        answers = queries[n_queries:]
        states = carray(pointer(given[22]), (n_queries + most, n, dim + 2), np.float32)
        one, other = np.empty((rows, width), np.float32), np.empty((rows, width), np.float32)
        turned, per = np.empty(dim, np.float32), per_word(cos[0])
        for layer in range(n_layers):
            numbers, phase = all_numbers[layer * NUMBERS :], layer * PHASES

            # from x to queries, keys and values, and to the middle of the MLP
            normalize(x, at(numbers[0], width, stored), at(numbers[1], width, stored), settings[0], one)
            normalize(x, at(numbers[2], width, stored), at(numbers[3], width, stored), settings[0], other)
            share = next_share(counters, phase, 2 * most)
            while share >= 0:
                if share < most:
                    multiply_part(one, numbers, 4, share, most, fused, stored)
                else:
                    begin, end = multiply_part(other, numbers, 6, share - most, most, middle, stored)
                    for r in range(rows):
                        for i in range(begin, end):
                            middle[r, i] = gelu(middle[r, i])
                        for i in range(begin, end):
                            wide[r, place(i, inner, per)] = middle[r, i]
                done(counters, phase)
                share = next_share(counters, phase, 2 * most)

            # queries and keys are turned; keys and values go into the cache
            keys, values = at(numbers[12], ENDLESS, held_as), at(numbers[13], ENDLESS, values_as)
            lengths = at(numbers[15], n_queries, np.int64)
            held = keys, values, at(numbers[14], n_queries, np.int64), lengths, numbers[16]
            keys, values = at(numbers[17], ENDLESS, stored), at(numbers[18], ENDLESS, stored)
            starts = at(numbers[19], n_queries, np.int64)
            new = keys, values, starts, numbers[20], numbers[21]
            phase += 1
            if next_share(counters, phase, 1) >= 0:
                for row in range(n_queries):
                    for t in range(n):
                        angle, token = row // heads * step + t * dim, row // heads * n + t
                        split = fused[token].reshape(heads, 3, dim)[row % heads]
                        first, query = starts[row] + (numbers[22] + t) * numbers[21], queries[row, t]
                        place_token(split, cos, sin, angle, half, settings[1], query, keys, values, first, turned)
                done(counters, phase)
            next_share(counters, phase, 1)

            # attention
            phase += 1
            ends = ends_of(lengths, numbers[20])
            n_shares = max(1, min(most, ends[-1]))
            share = next_share(counters, phase, n_shares)
            while share >= 0:
                read_share(share, n_shares, ends, queries, held, new, states)
                done(counters, phase)
                share = next_share(counters, phase, n_shares)
            phase += 1
            if next_share(counters, phase, 1) >= 0:
                for row in range(n_queries):
                    put_together(row, ends, n_shares, per, states, answers[row])
                    for t in range(n):
                        for i in range(dim):
                            in_order = place(row % heads * dim + i, width, per)
                            attended[row // heads * n + t, in_order] = answers[row, t, i]
                done(counters, phase)
            next_share(counters, phase, 1)

            # and back to x
            phase += 1
            share = next_share(counters, phase, most)
            while share >= 0:
                multiply_part(attended, numbers, 8, share, most, one, stored)
                begin, end = multiply_part(wide, numbers, 10, share, most, other, stored)
                for r in range(rows):
                    for i in range(begin, end):
                        x[r, i] += one[r, i] + other[r, i]
                done(counters, phase)
                share = next_share(counters, phase, most)

    return read_layers


# ---- for tensors ----------------------------------------------------------------------------------------------------


def compile_for(dtype: torch.dtype, bits: int) -> None:
    """All that reads a token which goes on from a cache."""
    kernel_for(_turn_into, dtype)
    kernel_for(_read_layers, dtype, bits)


def numbers_of(layer: nn.Module, held: Rows | None, new: Rows, first: int) -> list[int]:
    """What the kernel must know of a layer and its cache, as addresses and sizes."""
    attention, mlp = layer.attention, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    products = attention.query_key_value, mlp.dense_h_to_4h, attention.dense, mlp.dense_4h_to_h
    addresses = [address_of(of) for module in (*norms, *products) for of in (module.weight, module.bias)]
    return [*addresses, *(held or new.none()).arguments, *new.arguments, first]


def read_layers(layers, rooms, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (batch, n, d) after all layers, whose keys and values go into the rooms (see `CompactLayer.make_room`).
    cos, sin (1 or batch, n, D) in half-split order."""
    (batch, n, width), attention = x.shape, layers[0].attention
    heads, dim = attention.config.num_attention_heads, attention.head_size
    inner, most = layers[0].mlp.dense_h_to_4h.out_features, shares_at_most()
    numbers = torch.tensor([number for layer, room in zip(layers, rooms) for number in numbers_of(layer, *room)])
    settings = torch.tensor([layers[0].input_layernorm.eps, attention.scaling])
    cos, sin, rows = cos.contiguous(), sin.contiguous(), in_fours(x.flatten(0, 1).float())
    rows = rows.clone() if rows.data_ptr() == x.data_ptr() else rows
    fused, wide, attended = (torch.empty(len(rows), size) for size in (3 * width, 2 * inner, width))
    queries = torch.empty(2 * batch * heads, n, dim)
    states = torch.empty(batch * heads + most, n, dim + 2)
    counters = torch.zeros(2 * PHASES * len(layers), dtype=torch.int64)
    sizes = most, len(layers), batch, n, heads, dim, attention.rotary_ndims // 2, inner, len(rows)
    turns = cos.data_ptr(), sin.data_ptr(), 0 if len(cos) == 1 else n * dim
    given = counters, numbers, settings
    buffers = rows, fused, wide, attended, queries, states
    places = *(part.data_ptr() for part in given), *turns, *(part.data_ptr() for part in buffers)
    held_in = {0 if held is None else held.bits for held, _, _ in rooms}
    run(kernel_for(_read_layers, x.dtype, *held_in), *sizes, *places)
    return rows[: batch * n].to(x.dtype).view(x.shape)
