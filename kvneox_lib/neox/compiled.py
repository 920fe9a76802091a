"""The products of a decoding step, compiled by numba: they read memory as fast as it can be read.

Numbers are read as they are stored (see `words`), or in few bits each (see `codes`). Work is cut into shares that
threads take one after the other. The threads are torch's own: two pools would keep each other from the cores, and a
step was slower than without these kernels. Compiled code is kept on disk.
"""

import ctypes
import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numba import carray, cfunc, types
from numba.extending import overload
from torch.nn.functional import pad

from kvneox_lib.neox.codes import BITS_OF_MARK, MARKS, read_blocks
from kvneox_lib.neox.words import (
    ENDLESS,
    LINE_BYTES,
    NOTHING,
    WORDS,
    ZERO,
    add_four,
    add_one,
    ask_for,
    ask_for_four,
    at,
    compiled,
    count_up,
    dot,
    first_of,
    four_dots,
    number,
    per_word,
    place,
    pointer,
    second_of,
    weigh,
    word_of,
)

TILE = 64  # keys whose scores are at hand together
SHARES_PER_THREAD = 4
# Numba looks only at a kernel's own file to see whether what it keeps on disk is outdated; this is in each kernel, too.
MODULES = ("words", "bits", "codes", "compiled", "layers", "packer")
SOURCES = [Path(__file__).with_name(f"{name}.py") for name in MODULES]
VERSION = int(hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:15], 16)


# ---- running on torch's threads -------------------------------------------------------------------------------------


def run(kernel, *arguments: int) -> None:
    """`kernel` on each of torch's threads; it finds its arguments, addresses and numbers, behind two counters."""
    n_threads, openmp = torch.get_num_threads(), torchs_openmp()
    if n_threads == 1:
        call_here(kernel, *arguments)
        return
    given = _given(arguments)
    if openmp is not None:
        openmp.GOMP_parallel(kernel.address, ctypes.addressof(given), n_threads, 0)
    else:  # not on Linux
        others = [_pool(n_threads - 1).submit(kernel.ctypes, ctypes.addressof(given)) for _ in range(n_threads - 1)]
        kernel.ctypes(ctypes.addressof(given))
        for other in others:
            other.result()


def call_here(kernel, *arguments: int) -> None:
    """On this thread alone."""
    given = _given(arguments)
    kernel.ctypes(ctypes.addressof(given))


def _given(arguments: tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int64 * (2 + len(arguments)))(0, 0, *arguments)


def shares_at_most() -> int:
    """Into so many work is cut, so that no thread waits long for the others."""
    return torch.get_num_threads() * SHARES_PER_THREAD


@cache
def torchs_openmp() -> ctypes.CDLL | None:
    """The library whose threads torch runs on, if it can be called from here."""
    n_threads = torch.get_num_threads()
    try:
        library = ctypes.CDLL(None)
        torch.set_num_threads(n_threads + 1)
        is_torchs = library.omp_get_max_threads() == n_threads + 1
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    except (AttributeError, OSError, TypeError):
        return None
    finally:
        torch.set_num_threads(n_threads)
    return library if is_torchs else None


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


# ---- few queries over all keys and values ---------------------------------------------------------------------------


@compiled
def take_in(query, keys, values, first, stride, n, scores, state):
    """Add the tile of `n` keys and values from `first` on to what the query has seen, see `weigh`."""
    dim = query.shape[0]
    output, fours, n_words = state[:dim], n - n % 4, dim // per_word(keys[0])
    for t in range(0, fours, 4):
        ask_for_four(keys, first + t * stride, stride, n_words)
        scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = four_dots(query, keys, first + t * stride, stride)
    for t in range(fours, n):
        scores[t] = dot(query, keys, first + t * stride)
    weigh(scores, n, state)
    for t in range(0, fours, 4):
        ask_for_four(values, first + t * stride, stride, n_words)
        add_four(output, values, first + t * stride, stride, scores, t)
    for t in range(fours, n):
        add_one(output, values, first + t * stride, scores[t])


@compiled
def take_in_all(queries, keys, values, first, stride, n, hidden, scores, states):
    """`n` keys and values. hidden: how many of the last ones the first query must not see; the next sees one more."""
    n_queries = queries.shape[0]
    for start in range(0, n, TILE):
        for j in range(n_queries):
            visible = min(TILE, n - max(0, hidden - j) - start)
            if visible > 0:
                take_in(queries[j], keys, values, first + start * stride, stride, visible, scores, states[j])


def take_in_held(queries, keys, values, first, low, until, stride, hidden, scores, states):
    """Entries `low` to `until` of what a row held before, whose first one begins at word `first`."""


@overload(take_in_held)
def _take_in_held(queries, keys, values, first, low, until, stride, hidden, scores, states):
    def read_numbers(queries, keys, values, first, low, until, stride, hidden, scores, states):
        take_in_all(queries, keys, values, first + low * stride, stride, until - low, hidden, scores, states)

    def read_bits(queries, keys, values, first, low, until, stride, hidden, scores, states):
        read_blocks(queries, keys, values, first, low, until, stride, states)

    return read_bits if keys.dtype in BITS_OF_MARK else read_numbers


@compiled
def ends_of(lengths, n_new):
    """Where the entries of each row end, if all rows are put one after the other."""
    ends = np.zeros(lengths.shape[0] + 1, np.int64)
    for row in range(lengths.shape[0]):
        ends[row + 1] = ends[row] + lengths[row] + n_new
    return ends


@compiled
def read_share(share, n_shares, ends, queries, held, new, states):
    """Of all rows' entries, one after the other, a share: held ones of a row come before its new ones. States go to
    row + share, which no other part of a row has."""
    begin, end = share * ends[-1] // n_shares, (share + 1) * ends[-1] // n_shares
    keys, values, starts, lengths, stride = held
    new_keys, new_values, new_starts, n_new, new_stride = new
    n_queries, dim = queries.shape[1:]
    scores = np.empty(TILE, np.float32)
    row = np.searchsorted(ends, begin, side="right") - 1
    while begin < end:
        stop, state = min(end, ends[row + 1]), states[row + share]
        state[:, :dim] = ZERO
        state[:, dim] = NOTHING
        state[:, dim + 1] = ZERO
        low, high, n_held = begin - ends[row], stop - ends[row], lengths[row]
        until, since = min(high, n_held), max(low - n_held, 0)
        if low < until:
            hidden = n_queries - 1 - (n_new + n_held - until)
            take_in_held(queries[row], keys, values, starts[row], low, until, stride, hidden, scores, state)
        if high > n_held:
            hidden = n_queries - 1 - (n_new + n_held - high)
            first, n = new_starts[row] + since * new_stride, high - n_held - since
            take_in_all(queries[row], new_keys, new_values, first, new_stride, n, hidden, scores, state)
        begin, row = stop, row + 1


@compiled
def put_together(row, ends, n_shares, per, states, output):
    """From the states of all shares that hold a part of the row; zeros where there is nothing to see."""
    n_queries, dim = output.shape
    output[:] = ZERO
    if ends[row] == ends[row + 1]:
        return
    first, last = share_of(ends[row], ends[-1], n_shares), share_of(ends[row + 1] - 1, ends[-1], n_shares)
    for j in range(n_queries):
        most, total = NOTHING, ZERO
        for share in range(first, last + 1):
            most = max(most, states[row + share, j, dim])
        for share in range(first, last + 1):
            state = states[row + share, j]
            if state[dim + 1] != 0:
                part = np.exp(state[dim] - most)
                total += part * state[dim + 1]
                for i in range(dim):
                    output[j, i] += part * state[place(i, dim, per)]
        if total != 0:
            for i in range(dim):
                output[j, i] /= total


@compiled
def share_of(entry, n_entries, n_shares):
    """In which share it is, of those that begin at share * n_entries // n_shares."""
    return (n_shares * (entry + 1) - 1) // n_entries


def _attend(stored, held_as, version, keep):
    values_as = stored if held_as is stored else np.uint32

    @cfunc(types.void(types.voidptr), cache=keep)
    def attend(arguments):
        given = carray(arguments, 19, np.int64)
        _ = version
        n_shares, n_rows, n_queries, dim = given[2], given[3], given[4], given[5]
        queries = carray(pointer(given[6]), (n_rows, n_queries, dim), np.float32)
        output = carray(pointer(given[7]), (n_rows, n_queries, dim), np.float32)
        states = carray(pointer(given[8]), (n_rows + n_shares, n_queries, dim + 2), np.float32)
        keys, values = at(given[9], ENDLESS, held_as), at(given[10], ENDLESS, values_as)
        lengths = at(given[12], n_rows, np.int64)
        held = keys, values, at(given[11], n_rows, np.int64), lengths, given[13]
        keys, values = at(given[14], ENDLESS, stored), at(given[15], ENDLESS, stored)
        new = keys, values, at(given[16], n_rows, np.int64), given[17], given[18]
        ends, per = ends_of(lengths, given[17]), per_word(new[0][0])
        n_shares = max(1, min(n_shares, ends[-1]))  # none of them empty
        share = count_up(given, 0, 1)
        while share < n_shares:
            read_share(share, n_shares, ends, queries, held, new, states)
            if count_up(given, 1, 1) == n_shares - 1:  # all others are done
                for row in range(n_rows):
                    put_together(row, ends, n_shares, per, states, output[row])
            share = count_up(given, 0, 1)

    return attend


# ---- what comes before attention ------------------------------------------------------------------------------------


@compiled
def turn(numbers, cos, sin, first_angle, half, scale, turned):
    """numbers (D), a query or a key, in half-split order and its rotary part turned."""
    rest = (numbers.shape[0] - 2 * half) // 2
    for i in range(half):
        first, second = numbers[i], numbers[half + i]
        c, s = number(cos, first_angle + i), number(sin, first_angle + i)
        turned[i] = (first * c - second * s) * scale
        turned[half + rest + i] = (second * c + first * s) * scale
    for i in range(rest):
        turned[half + i] = numbers[2 * half + i] * scale
        turned[2 * half + rest + i] = numbers[2 * half + rest + i] * scale


@compiled
def store(numbers, words, first):
    per = per_word(words[0])
    for i in range(numbers.shape[0] // per):
        words[first + i] = word_of(numbers[per * i], numbers[per * i + per - 1], words[0])


@compiled
def place_token(numbers, cos, sin, first_angle, half, scale, query, keys, values, first, turned):
    """numbers (3, D): the query, scaled and in order of words, goes to `query`, key and value to the cache."""
    dim, per = numbers.shape[1], per_word(keys[0])
    turn(numbers[0], cos, sin, first_angle, half, scale, turned)
    for i in range(dim):
        query[place(i, dim, per)] = turned[i]
    turn(numbers[1], cos, sin, first_angle, half, np.float32(1), turned)
    store(turned, keys, first)
    store(numbers[2], values, first)


def _turn_into(stored, version, keep):
    @cfunc(types.void(types.voidptr), cache=keep)
    def turn_into(arguments):
        given = carray(arguments, 19, np.int64)
        _ = version
        batch, n, heads, dim, half, since = given[2], given[3], given[4], given[5], given[6], given[7]
        scale, fused = at(given[8], 1, np.float32)[0], at(given[9], ENDLESS, stored)
        cos, sin = at(given[10], ENDLESS, stored), at(given[11], ENDLESS, stored)
        queries = carray(pointer(given[13]), (batch * heads, n, dim), np.float32)
        keys, values = at(given[14], ENDLESS, stored), at(given[15], ENDLESS, stored)
        starts, numbers, turned = (
            at(given[16], batch * heads, np.int64),
            np.empty((3, dim), np.float32),
            np.empty(dim, np.float32),
        )
        for row in range(batch * heads):
            for t in range(n):
                token = (row // heads * n + t) * heads + row % heads
                for i in range(3 * dim):
                    numbers[i // dim, i % dim] = number(fused, token * 3 * dim + i)
                angle, first = row // heads * given[12] + t * dim, starts[row] + (since + t) * given[18]
                place_token(numbers, cos, sin, angle, half, scale, queries[row, t], keys, values, first, turned)

    return turn_into


# ---- few rows times all weights -------------------------------------------------------------------------------------


@compiled
def multiply_one(x, weight, stride, begin, end, output):
    """x (n in) in order of words; weight (words), `stride` of them a row."""
    fours = end - (end - begin) % 4
    for out in range(begin, fours, 4):
        for row in range(4):
            for i in range(0, stride, LINE_BYTES // 4):
                ask_for(weight, (out + 4 + row) * stride + i)
        output[out], output[out + 1], output[out + 2], output[out + 3] = four_dots(x, weight, out * stride, stride)
    for out in range(fours, end):
        output[out] = dot(x, weight, out * stride)


@compiled
def two_by_four(x, weight, first, second):
    """The products of four rows of x (4, n in) in order of words with two rows of words."""
    per = per_word(weight[0])
    n, last = x.shape[1] // per, x.shape[1]
    one, other = weight[first : first + n], weight[second : second + n]
    a, b, c, d = x[0, :n], x[1, :n], x[2, :n], x[3, :n]
    e, f, g, h = x[0, last - n :], x[1, last - n :], x[2, last - n :], x[3, last - n :]
    a1 = b1 = c1 = d1 = a2 = b2 = c2 = d2 = ZERO
    for i in range(n):
        p, q = first_of(one[i]), first_of(other[i])
        a1 += p * a[i]
        b1 += p * b[i]
        c1 += p * c[i]
        d1 += p * d[i]
        a2 += q * a[i]
        b2 += q * b[i]
        c2 += q * c[i]
        d2 += q * d[i]
        if per == 2:
            p, q = second_of(one[i]), second_of(other[i])
            a1 += p * e[i]
            b1 += p * f[i]
            c1 += p * g[i]
            d1 += p * h[i]
            a2 += q * e[i]
            b2 += q * f[i]
            c2 += q * g[i]
            d2 += q * h[i]
    return a1, b1, c1, d1, a2, b2, c2, d2


@compiled
def multiply_share(x, weight, bias, has_bias, begin, end, output):
    """x (one row or four, n in) in order of words; output (rows, n out), from `begin` to `end`"""
    stride = x.shape[1] // per_word(weight[0])
    if x.shape[0] == 1:
        multiply_one(x[0], weight, stride, begin, end, output[0])
    else:
        for out in range(begin, end, 2):
            other = min(out + 1, end - 1)
            for i in range(0, 2 * stride, LINE_BYTES // 4):
                ask_for(weight, (out + 2) * stride + i)
            a1, b1, c1, d1, a2, b2, c2, d2 = two_by_four(x, weight, out * stride, other * stride)
            output[0, out], output[1, out], output[2, out], output[3, out] = a1, b1, c1, d1
            output[0, other], output[1, other], output[2, other], output[3, other] = a2, b2, c2, d2
    if has_bias:
        for out in range(begin, end):
            for r in range(x.shape[0]):
                output[r, out] += number(bias, out)


def _multiply(stored, version, keep):
    @cfunc(types.void(types.voidptr), cache=keep)
    def multiply(arguments):
        given = carray(arguments, 10, np.int64)
        _ = version
        n_shares, n_rows, n_out, n_in = given[2], given[3], given[4], given[5]
        x, weight = carray(pointer(given[6]), (n_rows, n_in), np.float32), at(given[7], ENDLESS, stored)
        bias, output = at(given[8], ENDLESS, stored), carray(pointer(given[9]), (n_rows, n_out), np.float32)
        share = count_up(given, 0, 1)
        while share < n_shares:
            begin, end = share * n_out // n_shares, (share + 1) * n_out // n_shares
            multiply_share(x, weight, bias, given[8] != 0, begin, end, output)
            share = count_up(given, 0, 1)

    return multiply


# ---- for tensors ----------------------------------------------------------------------------------------------------


class Rows:
    """Keys and values of rows in one stretch of memory: the word with which each row begins, how many entries it has
    (all rows alike, or each), and how many words it is from one to the next. In few bits: keys and values are the same
    blocks, and so many words it is from one to the next; entries are counted as if all blocks were full."""

    def __init__(self, keys, values, starts: torch.Tensor, lengths: torch.Tensor | int, stride: int, bits: int = 0):
        self.bits = bits
        self.held = keys, values, starts, lengths  # lest they go
        places = keys.data_ptr(), values.data_ptr(), starts.data_ptr()
        self.arguments = *places, lengths if isinstance(lengths, int) else lengths.data_ptr(), stride

    def none(self) -> "Rows":
        """As many rows without entries."""
        return Rows(*self.held[:3], _zeros(len(self.held[2])), 0)


@cache
def _zeros(n: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(n, dtype=torch.int64)


def per(dtype: torch.dtype) -> int:
    """Numbers a word."""
    return 4 // dtype.itemsize


@cache
def kernel_for(make, dtype: torch.dtype, *held: int):
    """Of a kernel that reads a cache there is one for each number of bits (0: as `dtype`) in which it may be held."""
    types_of = WORDS[dtype], *(MARKS.get(bits, WORDS[dtype]) for bits in held)
    try:
        return make(*types_of, VERSION, keep=True)
    except RuntimeError:  # no folder to keep it in can be written to
        return make(*types_of, VERSION, keep=False)


def attend(queries: torch.Tensor, held: Rows, new: Rows) -> torch.Tensor:
    """softmax(queries keys^T) values for queries (rows, n queries, D) in order of words, and the result, in float32.

    Held entries of a row come before its new ones, of which each row has as many; the last query sees all, the one
    before it all but the last, and so on. All shares are of one size, however the lengths of rows differ.
    """
    n_rows, n_queries, dim = queries.shape
    n_shares = shares_at_most()
    output, states = torch.empty_like(queries), torch.empty(n_rows + n_shares, n_queries, dim + 2)
    places = queries.data_ptr(), output.data_ptr(), states.data_ptr()
    kernel = kernel_for(_attend, new.held[0].dtype, held.bits)
    run(kernel, n_shares, n_rows, n_queries, dim, *places, *held.arguments, *new.arguments)
    return output


def in_order_of_words(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., n) for products with numbers stored in `dtype`, in float32."""
    if dtype == torch.float32:
        return x.float().contiguous()
    return x.float().unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).contiguous()


def turn_into(
    new: Rows, since: int, fused: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int, scaling: float
):
    """Split what `query_key_value` gives for (batch, n) tokens, turn queries and keys by cos and sin (1 or batch, n, D)
    in half-split order, and write keys and values among the rows of `new`, from entry `since` on. The queries
    (rows, n, D), scaled, in order of words, in float32. For float32 and bfloat16."""
    batch, n, width = fused.shape
    dim = cos.shape[-1]
    heads = width // (3 * dim)
    queries, scale = torch.empty(batch * heads, n, dim), ctypes.c_float(scaling)
    turns = cos.data_ptr(), sin.data_ptr(), 0 if len(cos) == 1 else n * dim
    given = batch, n, heads, dim, half, since, ctypes.addressof(scale), fused.data_ptr(), *turns, queries.data_ptr()
    call_here(kernel_for(_turn_into, fused.dtype), *given, *new.arguments)
    return queries


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (up to 4 rows, n in) weight^T + bias, in float32."""
    n_out, n_in = weight.shape
    n_rows, x = len(x), in_fours(in_order_of_words(x, weight.dtype))
    output = torch.empty(len(x), n_out)
    places = x.data_ptr(), weight.data_ptr(), address_of(bias), output.data_ptr()
    run(kernel_for(_multiply, weight.dtype), shares_at_most(), len(x), n_out, n_in, *places)
    return output[:n_rows]


def in_fours(x: torch.Tensor) -> torch.Tensor:
    """(rows, n): one row or four."""
    return pad(x, (0, 0, 0, 4 - len(x))) if 1 < len(x) < 4 else x.contiguous()


def address_of(bias: torch.Tensor | None) -> int:
    return 0 if bias is None else bias.data_ptr()
