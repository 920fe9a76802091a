"""Numbers as they are stored, for code compiled by numba.

They are read a word at a time and widened to float32 on the way: half precision, two numbers a word, reads half the
bytes on any processor. What is multiplied with them is in the order of their words: the first number of each, then the
second ("in order of words").
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

AHEAD = 16  # so many rows ahead memory is asked for
LINE_BYTES = 64
# Sums may be put in another order; but NaN stays NaN and infinity infinity.
FAST = {"reassoc", "contract", "arcp", "nsz"}
ZERO, NOTHING = np.float32(0), np.float32(-np.inf)
ENDLESS = 2**62  # the length of what is known by its address alone
WORDS = {torch.float32: np.float32, torch.bfloat16: np.uint32, torch.float16: np.int32}
compiled = njit(fastmath=FAST, error_model="numpy")  # an exception would want Python, which runs in one thread


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
def per_word(context, word):
    """How many numbers a word holds."""

    def write(context, builder, signature, args):
        return ir.IntType(64)(1 if word == types.float32 else 2)

    return types.int64(word), write


@intrinsic
def first_of(context, word):
    """The first number of a word, in float32."""

    def write(context, builder, signature, args):
        float32, int32 = ir.FloatType(), ir.IntType(32)
        if word == types.float32:
            return args[0]
        if word == types.uint32:  # bfloat16 is the upper half of float32
            return builder.bitcast(builder.shl(args[0], int32(16)), float32)
        return _from_float16(builder, builder.and_(args[0], int32(0xFFFF)))

    return types.float32(word), write


@intrinsic
def second_of(context, word):
    def write(context, builder, signature, args):
        float32, int32 = ir.FloatType(), ir.IntType(32)
        if word == types.float32:
            return float32(0)
        if word == types.uint32:
            return builder.bitcast(builder.and_(args[0], int32(0xFFFF0000)), float32)
        return _from_float16(builder, builder.lshr(args[0], int32(16)))

    return types.float32(word), write


def _from_float16(builder, bits):
    """Its bits below the sign, in the places of float32's, are the number over 2^112."""
    float32, int32 = ir.FloatType(), ir.IntType(32)
    unsigned = builder.shl(builder.and_(bits, int32(0x7FFF)), int32(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(unsigned, float32), float32(2.0**112)), int32)
    not_finite = builder.icmp_unsigned(">=", unsigned, int32(0x7C00 << 13))
    unsigned = builder.select(not_finite, builder.or_(unsigned, int32(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, int32(0x8000)), int32(16))
    return builder.bitcast(builder.or_(unsigned, sign), float32)


@intrinsic
def word_of(context, first, second, like):
    """Two numbers as they are stored in a word such as `like`: float32 is the first as it is, bfloat16 both rounded."""

    def write(context, builder, signature, args):
        if like == types.float32:
            return args[0]
        int32, halves = ir.IntType(32), []
        for number in args[:2]:
            bits = builder.bitcast(number, int32)
            odd = builder.and_(builder.lshr(bits, int32(16)), int32(1))
            rounded = builder.add(bits, builder.add(odd, int32(0x7FFF)))  # to even
            is_nan = builder.fcmp_unordered("uno", number, number)
            halves.append(builder.lshr(builder.select(is_nan, int32(0x7FC00000), rounded), int32(16)))
        return builder.or_(halves[0], builder.shl(halves[1], int32(16)))

    return like(types.float32, types.float32, like), write


@intrinsic
def power_of_two(context, exponent):
    """2 ** exponent for a whole number from -126 to 127."""

    def write(context, builder, signature, args):
        int32 = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.add(args[0], int32(127)), int32(23)), ir.FloatType())

    return types.float32(types.int32), write


@intrinsic
def ask_for(context, words, index):
    """Have memory bring the line with that word; there need not be one."""

    def write(context, builder, signature, args):
        byte, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        prefetch = ir.FunctionType(ir.VoidType(), [byte, int32, int32, int32])
        place = builder.bitcast(builder.gep(data, [args[1]]), byte)
        called = builder.module.declare_intrinsic("llvm.prefetch", [byte], prefetch)
        builder.call(called, [place, int32(0), int32(2), int32(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(words, types.intp), write


@compiled
def at(address, n, dtype):
    return carray(pointer(address), n, dtype)


@compiled
def number(words, i):
    """The i-th number."""
    if per_word(words[0]) == 1:
        return first_of(words[i])
    return second_of(words[i // 2]) if i % 2 else first_of(words[i // 2])


@compiled
def place(i, n, per):
    """Of the i-th of `n` numbers, in order of words."""
    return i % per * (n // per) + i // per


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
def four_dots(row, words, first, stride):
    """The products of `row` (numbers in order of words) with four rows of words, the first beginning at `first`."""
    per = per_word(words[0])
    n = row.shape[0] // per
    one, two = row[:n], row[row.shape[0] - n :]
    a, b = words[first : first + n], words[first + stride : first + stride + n]
    c, d = words[first + 2 * stride : first + 2 * stride + n], words[first + 3 * stride : first + 3 * stride + n]
    in_a = in_b = in_c = in_d = ZERO
    for i in range(n):
        x, y = one[i], two[i]
        in_a += x * first_of(a[i])
        in_b += x * first_of(b[i])
        in_c += x * first_of(c[i])
        in_d += x * first_of(d[i])
        if per == 2:
            in_a += y * second_of(a[i])
            in_b += y * second_of(b[i])
            in_c += y * second_of(c[i])
            in_d += y * second_of(d[i])
    return in_a, in_b, in_c, in_d


@compiled
def dot(row, words, first):
    per = per_word(words[0])
    n = row.shape[0] // per
    one, two, part, total = row[:n], row[row.shape[0] - n :], words[first : first + n], ZERO
    for i in range(n):
        total += one[i] * first_of(part[i])
        if per == 2:
            total += two[i] * second_of(part[i])
    return total


@compiled
def add_four(output, values, first, stride, weights, t):
    per = per_word(values[0])
    n = output.shape[0] // per
    one, two = output[:n], output[output.shape[0] - n :]
    a, b = values[first : first + n], values[first + stride : first + stride + n]
    c, d = values[first + 2 * stride : first + 2 * stride + n], values[first + 3 * stride : first + 3 * stride + n]
    of_a, of_b, of_c, of_d = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
    for i in range(n):
        one[i] += of_a * first_of(a[i]) + of_b * first_of(b[i]) + (of_c * first_of(c[i]) + of_d * first_of(d[i]))
        if per == 2:
            two[i] += (
                of_a * second_of(a[i]) + of_b * second_of(b[i]) + (of_c * second_of(c[i]) + of_d * second_of(d[i]))
            )


@compiled
def add_one(output, values, first, weight):
    per = per_word(values[0])
    n = output.shape[0] // per
    one, two, value = output[:n], output[output.shape[0] - n :], values[first : first + n]
    for i in range(n):
        one[i] += weight * first_of(value[i])
        if per == 2:
            two[i] += weight * second_of(value[i])


@compiled
def ask_for_four(words, first, stride, n):
    for t in range(4):
        for i in range(0, n, LINE_BYTES // 4):
            ask_for(words, first + (AHEAD + t) * stride + i)


@compiled
def weigh(scores, n, state):
    """The first `n` scores become weights. state (D + 2) is the weighted sum of values so far, the largest score, and
    the sum of weights relative to it. A larger score shrinks what came before; by how much is returned."""
    dim = state.shape[0] - 2
    most, shrunk = state[dim], np.float32(1)
    for t in range(n):
        most = max(most, scores[t])
    if most > state[dim]:
        shrunk = np.exp(state[dim] - most)
        for i in range(dim):
            state[i] *= shrunk
        state[dim], state[dim + 1] = most, state[dim + 1] * shrunk
    total, top = ZERO, most if most > NOTHING else ZERO  # -inf - -inf is NaN
    for t in range(n):
        scores[t] = exp_of_negative(scores[t] - top)
    for t in range(n):
        total += scores[t]
    state[dim + 1] += total
    return shrunk
