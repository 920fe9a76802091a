"""Attention over keys and values in few bits (see `bits` for how they lie), compiled by numba: what is stored is read,
and never written out as numbers.

The sum over a group, of a query's numbers times (step * code + least), is a sum over codes, each weighted by number
times step, and one number more. So keys and values want the same: rows of codes, each row times a weight, added up. A
word holds codes of several columns; one is cut out by a mask where it stands, and stands for a multiple by a power of
two, which the sum is divided by. That is three instructions for as many codes as a register holds: and, convert,
multiply and add.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvneox_lib.neox.bits import GROUP, LANES
from kvneox_lib.neox.words import NOTHING, ZERO, ask_for, compiled, first_of, second_of, weigh

# Blocks are known by their address; the type that code takes them for tells their bits.
MARKS = {8: np.uint8, 4: np.uint16, 2: np.uint64}
BITS_OF_MARK = {types.uint8: 8, types.uint16: 4, types.uint64: 2}
SUMS_AT_ONCE = 8  # registers full of them: more would not stay in registers
ANY_ORDER = ("reassoc", "contract", "arcp", "nsz")
INT32, INT64, FLOAT32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
WORDS, NUMBERS = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT32, LANES)


@intrinsic
def bits_of(context, codes):
    def write(context, builder, signature, args):
        return INT64(BITS_OF_MARK[codes.dtype])

    return types.int64(codes), write


def _adder(width: int):
    """A function: to `sums` (width) rows of so many codes are added, each times its weight. The first row begins at
    word `first`. A register full of words has one row or more, and their number must be a multiple of that."""

    @intrinsic
    def add_rows(context, codes, first, weights, n_rows, sums):
        bits = BITS_OF_MARK[codes.dtype]

        def write(context, builder, signature, args):
            start, at_weights, at_sums = (
                context.make_array(signature.args[index])(context, builder, args[index]).data for index in (0, 2, 4)
            )
            start = builder.gep(builder.bitcast(start, INT32.as_pointer()), [args[1]])
            for part in range(0, 32 // bits, SUMS_AT_ONCE):
                parts = range(part, min(part + SUMS_AT_ONCE, 32 // bits))
                _add_parts(builder, bits, width, parts, start, at_weights, args[3], at_sums)
            return context.get_dummy_value()

        return types.void(codes, types.int64, weights, types.int64, sums), write

    return add_rows


def _add_parts(builder, bits: int, width: int, parts: range, start, at_weights, n_rows, at_sums) -> None:
    """Those codes of all words."""
    in_a_row = width * bits // 32  # words
    rows = LANES // in_a_row  # of a register
    held = [cgutils.alloca_once_value(builder, ir.Constant(NUMBERS, [FLOAT32(0)] * LANES)) for _ in parts]
    with cgutils.for_range(builder, builder.udiv(n_rows, INT64(rows)), intp=INT64) as loop:
        words = _load(builder, start, builder.mul(loop.index, INT64(LANES)), WORDS)
        weights = _load(builder, at_weights, builder.mul(loop.index, INT64(rows)), ir.VectorType(FLOAT32, rows))
        weights = _taken(builder, weights, [lane // in_a_row for lane in range(LANES)])
        for part, total in zip(parts, held):
            codes = builder.sitofp(_cut_out(builder, words, bits, part), NUMBERS)
            product = builder.fmul(codes, weights, flags=ANY_ORDER)
            builder.store(builder.fadd(builder.load(total), product, flags=ANY_ORDER), total)
    for part, total in zip(parts, held):
        total = builder.load(total)
        while total.type.count > in_a_row:
            half = total.type.count // 2
            low, high = (_taken(builder, total, range(at, at + half)) for at in (0, half))
            total = builder.fadd(low, high, flags=ANY_ORDER)
        shrink = FLOAT32(1.0 if part == 32 // bits - 1 else 2.0 ** (-bits * part))
        total = builder.fmul(total, ir.Constant(total.type, [shrink] * in_a_row), flags=ANY_ORDER)
        before = _load(builder, at_sums, INT64(part * in_a_row), total.type)
        into = builder.bitcast(builder.gep(at_sums, [INT64(part * in_a_row)]), total.type.as_pointer())
        builder.store(builder.fadd(before, total, flags=ANY_ORDER), into, align=4)


def _cut_out(builder, words, bits: int, part: int):
    """A code of each word, times a power of two; the last one alone, as the sign is among its bits."""
    if part == 32 // bits - 1:
        return builder.lshr(words, ir.Constant(WORDS, [INT32(bits * part)] * LANES))
    return builder.and_(words, ir.Constant(WORDS, [INT32((2**bits - 1) << bits * part)] * LANES))


def _load(builder, place, index, vector):
    return builder.load(builder.bitcast(builder.gep(place, [index]), vector.as_pointer()), align=4)


def _taken(builder, vector, lanes):
    chosen = ir.Constant(ir.VectorType(INT32, len(lanes)), [INT32(lane) for lane in lanes])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), chosen)


add_rows_of_64, add_rows_of_32, add_rows_of_16 = map(_adder, (64, 32, 16))


@compiled
def score_block(query, codes, words, first, key_steps, value_steps, scores, weights):
    """Of all tokens of a block; NOTHING of those that are not there."""
    dim, least = query.shape[0], ZERO
    steps = words[first + key_steps : first + key_steps + dim]
    for i in range(dim):
        weights[i] = query[i] * second_of(steps[i])
        least += query[i] * first_of(steps[i])
    for t in range(GROUP):
        scores[t] = least
    add_rows_of_64(codes, first, weights, (dim + 15) // 16 * 16, scores)
    there = words[first + value_steps : first + value_steps + GROUP]
    for t in range(GROUP):
        scores[t] = scores[t] if there[t] < np.uint32(0x80000000) else NOTHING


@compiled
def add_block(codes, words, first, value_steps, bits, scores, weights, output):
    """The values of a block, each times its weight (scores)."""
    at = first
    for start in range(0, output.shape[0], GROUP):
        least, width = ZERO, min(GROUP, output.shape[0] - start)
        steps = words[value_steps + start : value_steps + start + GROUP]
        for t in range(GROUP):
            weights[t] = scores[t] * second_of(steps[t])
            least += scores[t] * first_of(steps[t])
        into = output[start : start + width]
        if width == 64:
            add_rows_of_64(codes, at, weights, GROUP, into)
        elif width == 32:
            add_rows_of_32(codes, at, weights, GROUP, into)
        else:
            add_rows_of_16(codes, at, weights, GROUP, into)
        at += 2 * bits * width
        for i in range(width):
            into[i] += least


@compiled
def read_blocks(queries, codes, words, first, begin, end, n_words, states):
    """Add entries `begin` to `end` of a row, whose blocks begin at word `first`, to what the queries have seen; states
    as for `words.weigh`."""
    n_queries, dim = queries.shape
    bits, filled = bits_of(codes), dim // GROUP * GROUP
    if dim > filled:
        filled += 16 if dim - filled <= 16 else 32 if dim - filled <= 32 else 64
    key_steps = (dim + 15) // 16 * 16 * 2 * bits
    value_codes = key_steps + (dim + 15) // 16 * 16
    value_steps = value_codes + 2 * bits * filled
    scores, weights = np.empty(GROUP, np.float32), np.zeros(max(dim + 15, GROUP), np.float32)
    output = np.zeros((n_queries, filled), np.float32)
    for block in range(begin // GROUP, (end + GROUP - 1) // GROUP):
        start, low, high = first + block * n_words, begin - block * GROUP, end - block * GROUP
        for i in range(0, n_words, 16):
            ask_for(words, start + n_words + i)
        for j in range(n_queries):
            for i in range(dim, weights.shape[0]):
                weights[i] = ZERO
            score_block(queries[j], codes, words, start, key_steps, value_steps, scores, weights)
            for t in range(low):
                scores[t] = NOTHING
            for t in range(high, GROUP):
                scores[t] = NOTHING
            shrunk = weigh(scores, GROUP, states[j])
            if shrunk < 1:
                for i in range(filled):
                    output[j, i] *= shrunk
            add_block(codes, words, start + value_codes, start + value_steps, bits, scores, weights, output[j])
    for j in range(n_queries):
        for i in range(dim):
            states[j, i] += output[j, i]
