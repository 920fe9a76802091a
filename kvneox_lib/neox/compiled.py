"""The products of a decoding step, compiled by numba: they read memory as fast as it can be read.

Numbers are read as they are stored and widened to float32 on the way, so that half precision reads half the bytes on
any processor. Work is cut into shares that threads take one after the other. The threads are torch's own: two pools
would keep each other from the cores (a step was slower than without these kernels). Compiled code is kept on disk.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch.nn.functional import pad

TILE, AHEAD = 64, 16  # keys whose scores are at hand together; so many ahead memory is asked for
LINE_BYTES = 64
PIECE = 512  # of a row of weights: while it is multiplied, memory is asked for the same of later rows
SHARES_PER_THREAD = 4
# Sums may be put in another order; but NaN stays NaN and infinity infinity.
FAST = {"reassoc", "contract", "arcp", "nsz"}
ZERO, NOTHING = np.float32(0), np.float32(-np.inf)
ENDLESS = 2**62  # the length of what is known by its address alone
STORED_AS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
compiled = njit(fastmath=FAST, error_model="numpy")  # an exception would want Python, which runs in one thread


# ---- running on torch's threads -------------------------------------------------------------------------------------


def call_here(kernel, *arguments: int) -> None:
    given = (ctypes.c_int64 * (2 + len(arguments)))(0, 0, *arguments)
    kernel.ctypes(ctypes.addressof(given))


def run(kernel, *arguments: int) -> None:
    """`kernel` on each of torch's threads; it finds its arguments, addresses and numbers, behind two counters."""
    given = (ctypes.c_int64 * (2 + len(arguments)))(0, 0, *arguments)
    n_threads, openmp = torch.get_num_threads(), torchs_openmp()
    if n_threads == 1:
        kernel.ctypes(ctypes.addressof(given))
    elif openmp is not None:
        openmp.GOMP_parallel(kernel.address, ctypes.addressof(given), n_threads, 0)
    else:  # not on Linux
        others = [_pool(n_threads - 1).submit(kernel.ctypes, ctypes.addressof(given)) for _ in range(n_threads - 1)]
        kernel.ctypes(ctypes.addressof(given))
        for other in others:
            other.result()


@cache
def torchs_openmp() -> ctypes.CDLL | None:
    """The library whose threads torch runs on, if it can be called from here."""
    library, n_threads = ctypes.CDLL(None), torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads + 1)
        is_torchs = library.omp_get_max_threads() == n_threads + 1
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    except AttributeError:
        return None
    finally:
        torch.set_num_threads(n_threads)
    return library if is_torchs else None


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


# ---- what numba does not have ---------------------------------------------------------------------------------------


@intrinsic
def pointer(context, address):
    def write(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), write


@intrinsic
def count_up(context, numbers, index, by):
    """numbers[index] before it grows, whichever threads do so at once."""

    def write(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "acq_rel")

    return types.int64(numbers, types.intp, types.int64), write


@intrinsic
def widen(context, number):
    """float32 of a number as it is stored."""

    def write(context, builder, signature, args):
        float32, int32 = ir.FloatType(), ir.IntType(32)
        if number == types.float32:
            return args[0]
        bits = builder.zext(args[0], int32)
        if number == types.uint16:
            return builder.bitcast(builder.shl(bits, int32(16)), float32)
        # float16: its bits below the sign in the places of float32's are the number over 2^112
        unsigned = builder.shl(builder.and_(bits, int32(0x7FFF)), int32(13))
        scaled = builder.bitcast(builder.fmul(builder.bitcast(unsigned, float32), float32(2.0**112)), int32)
        not_finite = builder.icmp_unsigned(">=", unsigned, int32(0x7C00 << 13))
        unsigned = builder.select(not_finite, builder.or_(unsigned, int32(0x7F800000)), scaled)
        sign = builder.shl(builder.and_(bits, int32(0x8000)), int32(16))
        return builder.bitcast(builder.or_(unsigned, sign), float32)

    return types.float32(number), write


@intrinsic
def narrow(context, number, like):
    """As it is stored among numbers such as `like`: float32 as it is, bfloat16 (uint16) rounded to even."""

    def write(context, builder, signature, args):
        if like == types.float32:
            return args[0]
        int32, int16 = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(args[0], int32)
        odd = builder.and_(builder.lshr(bits, int32(16)), int32(1))
        rounded = builder.add(bits, builder.add(odd, int32(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        rounded = builder.select(is_nan, int32(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, int32(16)), int16)

    return like(types.float32, like), write


@intrinsic
def power_of_two(context, exponent):
    """2 ** exponent for a whole number from -126 to 127."""

    def write(context, builder, signature, args):
        int32 = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.add(args[0], int32(127)), int32(23)), ir.FloatType())

    return types.float32(types.int32), write


@intrinsic
def ask_for(context, numbers, index):
    """Have memory bring the line with that number; there need not be one."""

    def write(context, builder, signature, args):
        byte, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        prefetch = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
        place = builder.bitcast(builder.gep(data, [args[1]]), byte)
        called = builder.module.declare_intrinsic("llvm.prefetch", [byte], prefetch)
        builder.call(called, [place, int32(0), int32(2), int32(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(numbers, types.intp), write


@compiled
def exp_of_negative(x):
    """To 2e-7, in steps that a compiler does for many numbers at once. Below -87 it is 1e-38."""
    if x < np.float32(-87):
        x = np.float32(-87)
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    rest = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    series = np.float32(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * rest + np.float32(term)
    return series * power_of_two(np.int32(n))


@compiled
def four_dots(row, numbers, first, stride):
    """The products of `row` with four rows of `numbers`, the first beginning at `first`."""
    n = row.shape[0]
    a, b = numbers[first : first + n], numbers[first + stride : first + stride + n]
    c, d = numbers[first + 2 * stride : first + 2 * stride + n], numbers[first + 3 * stride : first + 3 * stride + n]
    in_a = in_b = in_c = in_d = ZERO
    for i in range(n):
        x = widen(row[i])
        in_a += x * widen(a[i])
        in_b += x * widen(b[i])
        in_c += x * widen(c[i])
        in_d += x * widen(d[i])
    return in_a, in_b, in_c, in_d


@compiled
def dot(row, numbers, first):
    part, total = numbers[first : first + row.shape[0]], ZERO
    for i in range(row.shape[0]):
        total += widen(row[i]) * widen(part[i])
    return total


# ---- few queries over all keys and values ---------------------------------------------------------------------------


@compiled
def add_four(output, values, first, stride, weights, t):
    n = output.shape[0]
    a, b = values[first : first + n], values[first + stride : first + stride + n]
    c, d = values[first + 2 * stride : first + 2 * stride + n], values[first + 3 * stride : first + 3 * stride + n]
    of_a, of_b, of_c, of_d = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
    for i in range(n):
        output[i] += of_a * widen(a[i]) + of_b * widen(b[i]) + (of_c * widen(c[i]) + of_d * widen(d[i]))


@compiled
def ask_for_four(numbers, first, stride, n):
    for t in range(4):
        for i in range(0, n, LINE_BYTES // numbers.itemsize):
            ask_for(numbers, first + (AHEAD + t) * stride + i)


@compiled
def take_in(query, keys, values, first, stride, n, scores, state):
    """Add the tile of `n` keys and values from `first` on to what the query has seen: state (D + 2) is the weighted sum
    of values, the largest score and the sum of weights relative to it."""
    dim = query.shape[0]
    output, most, fours = state[:dim], state[dim], n - n % 4
    for t in range(0, fours, 4):
        ask_for_four(keys, first + t * stride, stride, dim)
        scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = four_dots(query, keys, first + t * stride, stride)
    for t in range(fours, n):
        scores[t] = dot(query, keys, first + t * stride)
    for t in range(n):
        most = max(most, scores[t])
    if most > state[dim]:
        shrunk = np.exp(state[dim] - most)
        for i in range(dim):
            output[i] *= shrunk
        state[dim], state[dim + 1] = most, state[dim + 1] * shrunk
    total = ZERO
    for t in range(n):
        scores[t] = exp_of_negative(scores[t] - most)
    for t in range(n):
        total += scores[t]
    state[dim + 1] += total
    for t in range(0, fours, 4):
        ask_for_four(values, first + t * stride, stride, dim)
        add_four(output, values, first + t * stride, stride, scores, t)
    for t in range(fours, n):
        value, weight = values[first + t * stride : first + t * stride + dim], scores[t]
        for i in range(dim):
            output[i] += weight * widen(value[i])


@compiled
def take_in_all(queries, keys, values, first, stride, n, hidden, scores, states):
    """`n` keys and values. hidden: how many of the last ones the first query must not see; the next sees one more."""
    n_queries = queries.shape[0]
    for start in range(0, n, TILE):
        for j in range(n_queries):
            visible = min(TILE, n - max(0, hidden - j) - start)
            if visible > 0:
                take_in(queries[j], keys, values, first + start * stride, stride, visible, scores, states[j])


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
            place = starts[row] + low * stride
            take_in_all(queries[row], keys, values, place, stride, until - low, hidden, scores, state)
        if high > n_held:
            hidden = n_queries - 1 - (n_new + n_held - high)
            place, n = new_starts[row] + since * new_stride, high - n_held - since
            take_in_all(queries[row], new_keys, new_values, place, new_stride, n, hidden, scores, state)
        begin, row = stop, row + 1


@compiled
def put_together(row, ends, n_shares, states, output):
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
                    output[j, i] += part * state[i]
        if total != 0:
            for i in range(dim):
                output[j, i] /= total


@compiled
def share_of(entry, n_entries, n_shares):
    """In which share it is, of those that begin at share * n_entries // n_shares."""
    return (n_shares * (entry + 1) - 1) // n_entries


def _attend(stored):
    @cfunc(types.void(types.voidptr), cache=True)
    def attend(arguments):
        given = carray(arguments, 19, np.int64)
        n_shares, n_rows, n_queries, dim = given[2], given[3], given[4], given[5]
        queries = carray(pointer(given[6]), (n_rows, n_queries, dim), np.float32)
        output = carray(pointer(given[7]), (n_rows, n_queries, dim), np.float32)
        states = carray(pointer(given[8]), (n_rows + n_shares, n_queries, dim + 2), np.float32)
        keys, values = carray(pointer(given[9]), ENDLESS, stored), carray(pointer(given[10]), ENDLESS, stored)
        starts, lengths = carray(pointer(given[11]), n_rows, np.int64), carray(pointer(given[12]), n_rows, np.int64)
        held = keys, values, starts, lengths, given[13]
        keys, values = carray(pointer(given[14]), ENDLESS, stored), carray(pointer(given[15]), ENDLESS, stored)
        new = keys, values, carray(pointer(given[16]), n_rows, np.int64), given[17], given[18]
        ends = ends_of(lengths, given[17])
        n_shares = max(1, min(n_shares, ends[-1]))  # none of them empty
        share = count_up(given, 0, 1)
        while share < n_shares:
            read_share(share, n_shares, ends, queries, held, new, states)
            if count_up(given, 1, 1) == n_shares - 1:  # all others are done
                for row in range(n_rows):
                    put_together(row, ends, n_shares, states, output[row])
            share = count_up(given, 0, 1)

    return attend


# ---- what comes before attention ------------------------------------------------------------------------------------


@compiled
def turn(numbers, cos, sin, half, rest, scale, output, like):
    """A query or a key (D) in half-split order, its rotary part turned."""
    for i in range(half):
        first, second, c, s = widen(numbers[i]), widen(numbers[half + i]), widen(cos[i]), widen(sin[i])
        output[i] = narrow((first * c - second * s) * scale, like)
        output[half + rest + i] = narrow((second * c + first * s) * scale, like)
    for i in range(rest):
        output[half + i] = narrow(widen(numbers[2 * half + i]) * scale, like)
        output[2 * half + rest + i] = narrow(widen(numbers[2 * half + rest + i]) * scale, like)


@compiled
def place_token(numbers, cos, sin, half, rest, scale, query, keys, values, place, like):
    """numbers (3, D): the query, scaled, goes to `query`, key and value among those of the cache."""
    dim = numbers.shape[1]
    turn(numbers[0], cos, sin, half, rest, scale, query, ZERO)
    turn(numbers[1], cos, sin, half, rest, np.float32(1), keys[place : place + dim], like)
    value = values[place : place + dim]
    for i in range(dim):
        value[i] = narrow(widen(numbers[2, i]), like)


def _turn_into(stored):
    @cfunc(types.void(types.voidptr), cache=True)
    def turn_into(arguments):
        given = carray(arguments, 19, np.int64)
        batch, n, heads, dim, half, at = given[2], given[3], given[4], given[5], given[6], given[7]
        rest, scale = (dim - 2 * half) // 2, carray(pointer(given[8]), 1, np.float32)[0]
        fused = carray(pointer(given[9]), (batch, n, heads, 3, dim), stored)
        cos, sin = carray(pointer(given[10]), ENDLESS, stored), carray(pointer(given[11]), ENDLESS, stored)
        queries = carray(pointer(given[13]), (batch * heads, n, dim), np.float32)
        keys, values = carray(pointer(given[14]), ENDLESS, stored), carray(pointer(given[15]), ENDLESS, stored)
        starts, stride, like = carray(pointer(given[16]), batch * heads, np.int64), given[18], fused[0, 0, 0, 0, 0]
        for row in range(batch * heads):
            sample, head = row // heads, row % heads
            for t in range(n):
                angle, place = sample * given[12] + t * dim, starts[row] + (at + t) * stride
                c, s, numbers = cos[angle : angle + half], sin[angle : angle + half], fused[sample, t, head]
                place_token(numbers, c, s, half, rest, scale, queries[row, t], keys, values, place, like)

    return turn_into


# ---- few rows times all weights -------------------------------------------------------------------------------------


@compiled
def multiply_one(x, weight, begin, end, output):
    n_in, numbers = x.shape[0], weight.ravel()
    fours = end - (end - begin) % 4
    for out in range(begin, fours, 4):
        a = b = c = d = ZERO
        for start in range(0, n_in, PIECE):
            piece, first = x[start : start + PIECE], out * n_in + start
            for row in range(4):
                for i in range(0, PIECE, LINE_BYTES // weight.itemsize):
                    ask_for(numbers, first + (4 + row) * n_in + i)
            in_a, in_b, in_c, in_d = four_dots(piece, numbers, first, n_in)
            a, b, c, d = a + in_a, b + in_b, c + in_c, d + in_d
        output[out], output[out + 1], output[out + 2], output[out + 3] = a, b, c, d
    for out in range(fours, end):
        output[out] = dot(x, weight[out], 0)


@compiled
def two_by_four(first, second, a, b, c, d):
    """The products of two rows of weights with four rows of x."""
    a1 = b1 = c1 = d1 = a2 = b2 = c2 = d2 = ZERO
    for i in range(first.shape[0]):
        one, other = widen(first[i]), widen(second[i])
        a1 += one * a[i]
        b1 += one * b[i]
        c1 += one * c[i]
        d1 += one * d[i]
        a2 += other * a[i]
        b2 += other * b[i]
        c2 += other * c[i]
        d2 += other * d[i]
    return a1, b1, c1, d1, a2, b2, c2, d2


@compiled
def multiply_share(x, weight, bias, has_bias, begin, end, output):
    """x (one row or four, n in); output (rows, n out), from `begin` to `end`"""
    n_in, numbers = x.shape[1], weight.ravel()
    if x.shape[0] == 1:
        multiply_one(x[0], weight, begin, end, output[0])
    else:
        for out in range(begin, end, 2):
            other = min(out + 1, end - 1)
            for i in range(0, 2 * n_in, LINE_BYTES // weight.itemsize):
                ask_for(numbers, (out + 2) * n_in + i)
            a1, b1, c1, d1, a2, b2, c2, d2 = two_by_four(weight[out], weight[other], x[0], x[1], x[2], x[3])
            output[0, out], output[1, out], output[2, out], output[3, out] = a1, b1, c1, d1
            output[0, other], output[1, other], output[2, other], output[3, other] = a2, b2, c2, d2
    if has_bias:
        for r in range(x.shape[0]):
            for out in range(begin, end):
                output[r, out] += widen(bias[out])


def _multiply(stored):
    @cfunc(types.void(types.voidptr), cache=True)
    def multiply(arguments):
        given = carray(arguments, 10, np.int64)
        n_shares, n_rows, n_out, n_in = given[2], given[3], given[4], given[5]
        x, weight = (
            carray(pointer(given[6]), (n_rows, n_in), np.float32),
            carray(pointer(given[7]), (n_out, n_in), stored),
        )
        output = carray(pointer(given[9]), (n_rows, n_out), np.float32)
        share = count_up(given, 0, 1)
        while share < n_shares:
            begin, end = share * n_out // n_shares, (share + 1) * n_out // n_shares
            multiply_share(x, weight, carray(pointer(given[8]), ENDLESS, stored), given[8] != 0, begin, end, output)
            share = count_up(given, 0, 1)

    return multiply


# ---- for tensors ----------------------------------------------------------------------------------------------------


class Rows:
    """Keys and values of rows in one stretch of memory: the number with which each row begins, how many entries it has
    (all rows alike, or each), and how far it is from one to the next."""

    def __init__(self, keys, values, starts: torch.Tensor, lengths: torch.Tensor | int, stride: int):
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


@cache
def kernel_for(make, dtype: torch.dtype):
    return make(STORED_AS[dtype])


def attend(queries: torch.Tensor, held: Rows, new: Rows) -> torch.Tensor:
    """softmax(queries keys^T) values for queries, and the result, (rows, n queries, D) in float32.

    Held entries of a row come before its new ones, of which each row has as many; the last query sees all, the one
    before it all but the last, and so on. All shares are of one size, however the lengths of rows differ.
    """
    n_rows, n_queries, dim = queries.shape
    n_shares = torch.get_num_threads() * SHARES_PER_THREAD
    output, states = torch.empty_like(queries), torch.empty(n_rows + n_shares, n_queries, dim + 2)
    places = queries.data_ptr(), output.data_ptr(), states.data_ptr()
    kernel = kernel_for(_attend, held.held[0].dtype)
    run(kernel, n_shares, n_rows, n_queries, dim, *places, *held.arguments, *new.arguments)
    return output


def turn_into(new: Rows, at: int, fused: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int, scaling: float):
    """Split what `query_key_value` gives for (batch, n) tokens, turn queries and keys by cos and sin (1 or batch, n, D)
    in half-split order, and write keys and values among the rows of `new`, from entry `at` on. The queries
    (rows, n, D), scaled, in float32. In float32 and bfloat16 only."""
    batch, n, width = fused.shape
    dim = cos.shape[-1]
    heads = width // (3 * dim)
    queries, scale = torch.empty(batch * heads, n, dim), ctypes.c_float(scaling)
    turns = cos.data_ptr(), sin.data_ptr(), 0 if len(cos) == 1 else n * dim
    given = batch, n, heads, dim, half, at, ctypes.addressof(scale), fused.data_ptr(), *turns, queries.data_ptr()
    call_here(kernel_for(_turn_into, fused.dtype), *given, *new.arguments)
    return queries


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (up to 4 rows, n in) weight^T + bias, in float32."""
    n_out, n_in = weight.shape
    x, n_rows = in_fours(x.float()), len(x)
    output = torch.empty(len(x), n_out)
    places = x.data_ptr(), weight.data_ptr(), address_of(bias), output.data_ptr()
    run(kernel_for(_multiply, weight.dtype), torch.get_num_threads() * SHARES_PER_THREAD, len(x), n_out, n_in, *places)
    return output[:n_rows]


def in_fours(x: torch.Tensor) -> torch.Tensor:
    """(rows, n): one row or four."""
    return pad(x, (0, 0, 0, 4 - len(x))) if 1 < len(x) < 4 else x.contiguous()


def address_of(bias: torch.Tensor | None) -> int:
    return 0 if bias is None else bias.data_ptr()
