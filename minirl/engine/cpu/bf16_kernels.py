"""A decode step's attention and LoRA on a CPU that multiplies bf16 by pairs (AVX512-BF16), compiled
by numba. Import it through `compiled`.

kernels.py widens every number to float32 first and multiplies one by one. Here one instruction
multiplies 32, which are interleaved into pairs of two keys' or two values' numbers. Invariant: what
a row gets is a function of that row alone, whatever the threads; products are exact and summed in
float32, the softmax's weights are rounded to bf16, as in the library's own kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic, models, register_model

# numba's cache on the disk looks at the change of this file alone: after one of those functions it
# must be deleted by hand.
from minirl.engine.cpu.kernels import FAST, LOG2_E, exp2, fetch, narrow

LANES, BLOCK = 16, 32  # float32 and bf16 numbers of a register

_INT = ir.IntType(32)
_FLOATS, _BITS, _INTS = (
    ir.VectorType(ir.FloatType(), LANES),
    ir.VectorType(ir.IntType(16), BLOCK),
    ir.VectorType(_INT, LANES),
)


class _Brain(ir.Type):  # type: ignore[misc]
    """LLVM's own name of bf16, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Brain)

    def __hash__(self) -> int:
        return hash("bfloat")


_PAIRS = ir.VectorType(_Brain(), BLOCK)


class Register(types.Type):  # type: ignore[misc]
    """A register's content, as numba's compiler sees it: FLOATS or PAIRS."""


FLOATS, PAIRS = Register("16 float32"), Register("32 bf16")


@register_model(Register)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS if kind == FLOATS else _BITS)


def _place(context: Any, builder: Any, array: Any, value: Any, at: Any, pointee: Any) -> Any:
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())


@intrinsic
def floats(context: Any, row: Any, at: Any) -> Any:
    """row[at : at + 16] of float32 numbers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_place(context, builder, row, args[0], args[1], _FLOATS), align=4)

    return FLOATS(row, types.int64), build


@intrinsic
def put(context: Any, row: Any, at: Any, x: Any) -> Any:
    """row[at : at + 16] = x of float32 numbers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _place(context, builder, row, args[0], args[1], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(row, types.int64, FLOATS), build


@intrinsic
def halves(context: Any, row: Any, at: Any) -> Any:
    """row[at : at + 32] of bf16 numbers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_place(context, builder, row, args[0], args[1], _BITS), align=2)

    return PAIRS(row, types.int64), build


@intrinsic
def pair(context: Any, row: Any, at: Any) -> Any:
    """The pair row[at : at + 2], 16 times over."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = builder.load(_place(context, builder, row, args[0], args[1], _INT), align=2)
        first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), one, ir.Constant(_INT, 0))
        return builder.bitcast(
            builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES)), _BITS
        )

    return PAIRS(row, types.int64), build


def _shuffled(order: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_INT, len(order)), order)
    return lambda _context, builder, _signature, args: builder.shuffle_vector(
        args[0], args[1], mask
    )


# Registers are interleaved within each of their quarters, in one instruction: `low` and `high` do
# not keep the order, `first` and `second` of what was summed by them bring it back.
_LOW, _HIGH = (
    [8 * quarter + i for quarter in range(4) for i in some] for some in (range(4), range(4, 8))
)
_BACK = [(_LOW + _HIGH).index(i) for i in range(BLOCK)]


@intrinsic
def low(context: Any, a: Any, b: Any) -> Any:
    """Pairs (a[i], b[i]) of the first halves of the quarters of a and b."""
    return PAIRS(PAIRS, PAIRS), _shuffled([i for at in _LOW for i in (at, BLOCK + at)])


@intrinsic
def high(context: Any, a: Any, b: Any) -> Any:
    """Pairs (a[i], b[i]) of the second halves of the quarters of a and b."""
    return PAIRS(PAIRS, PAIRS), _shuffled([i for at in _HIGH for i in (at, BLOCK + at)])


@intrinsic
def first(context: Any, lows: Any, highs: Any) -> Any:
    """Numbers 0 to 15 of the 32 that were summed by `low` and `high`."""
    return FLOATS(FLOATS, FLOATS), _shuffled(_BACK[:LANES])


@intrinsic
def second(context: Any, lows: Any, highs: Any) -> Any:
    """Numbers 16 to 31 of the 32 that were summed by `low` and `high`."""
    return FLOATS(FLOATS, FLOATS), _shuffled(_BACK[LANES:])


@intrinsic
def dot(context: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums[i] + a's pair i . b's pair i, in float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [args[0], *(builder.bitcast(x, _PAIRS) for x in args[1:])])

    return FLOATS(FLOATS, PAIRS, PAIRS), build


@intrinsic
def zeros_for(context: Any, each: Any) -> Any:
    """A tuple of as many registers of zeros as `each` has entries."""
    kind = types.UniTuple(FLOATS, len(each))

    def build(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return context.make_tuple(builder, kind, [ir.Constant(_FLOATS, [0.0] * LANES)] * len(kind))

    return kind(each), build


@intrinsic
def sum_of(context: Any, x: Any) -> Any:
    """The sum of 16 float32 numbers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.FloatType()
        kind, name = ir.FunctionType(number, [number, _FLOATS]), "llvm.vector.reduce.fadd.v16f32"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [ir.Constant(number, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(FLOATS), build


@njit(fastmath=FAST)
def _order(sums: Any, each: Any) -> None:  # pragma: no cover
    """Bring rows (S, N), summed by `low` and `high`, into their order."""
    for i in range(len(each)):
        row = sums[i]
        for at in range(0, len(row), BLOCK):
            lows, highs = floats(row, at), floats(row, at + LANES)
            put(row, at, first(lows, highs))
            put(row, at + LANES, second(lows, highs))


@njit(fastmath=FAST)
def _score(
    query: Any, keys: Any, begin: Any, after: Any, scores: Any, each: Any
) -> None:  # pragma: no cover
    """scores (S, T) += query (S, D) keys (D, C), of the T columns from `begin` on; meanwhile
    `after` (D, C) is fetched.

    D is a multiple of 4, T and begin are of BLOCK.
    """
    for d in range(0, len(keys), 4):  # four at a time: a score is written a quarter as often
        k0, k1, k2, k3 = keys[d], keys[d + 1], keys[d + 2], keys[d + 3]
        for at in range(0, scores.shape[1], BLOCK):
            j = begin + at
            for r in range(4):
                fetch(after[d + r], j)
            x0, x1, x2, x3 = halves(k0, j), halves(k1, j), halves(k2, j), halves(k3, j)
            low0, high0, low2, high2 = low(x0, x1), high(x0, x1), low(x2, x3), high(x2, x3)
            for i in range(len(each)):
                s, q0, q2 = scores[i], pair(query[i], d), pair(query[i], d + 2)
                put(s, at, dot(dot(floats(s, at), low0, q0), low2, q2))
                put(s, at + LANES, dot(dot(floats(s, at + LANES), high0, q0), high2, q2))
    _order(scores, each)


@njit(fastmath=FAST)
def _softmax(
    scores: Any, scale: Any, begin: Any, end: Any, weights: Any
) -> Any:  # pragma: no cover
    """weights[begin:end] = exp(scale * (scores - largest)) in bf16, 0 elsewhere; returns 1 / their
    sum."""
    largest, total, factor = scores[begin], np.float32(0.0), scale * LOG2_E
    for j in range(begin, end):
        largest = max(largest, scores[j])
    weights[:] = 0
    for j in range(begin, end):
        weight = exp2((scores[j] - largest) * factor)
        total += weight
        weights[j] = narrow(weight, weights[j])
    return np.float32(1.0) / total


@njit(fastmath=FAST)
def _sum(
    weights: Any, values: Any, begin: Any, end: Any, after: Any, sums: Any, each: Any
) -> None:  # pragma: no cover
    """sums (S, D) = weights (S, T) values (C, D), of rows begin .. end - 1; meanwhile `after` (C,
    D) is fetched. D is a multiple of BLOCK.

    Where their number is odd the last one is paired with itself, at a weight of 0.
    """
    for d in range(0, sums.shape[1], BLOCK):
        lows, highs = zeros_for(each), zeros_for(each)
        for j in range(begin, end, 2):
            other = min(j + 1, end - 1)
            fetch(after[j], d)
            fetch(after[other], d)
            x, y = halves(values[j], d), halves(values[other], d)
            low0, high0 = low(x, y), high(x, y)
            for i in range(len(each)):
                w = pair(weights[i], j - begin)
                lows = tuple_setitem(lows, i, dot(lows[i], low0, w))
                highs = tuple_setitem(highs, i, dot(highs[i], high0, w))
        for i in range(len(each)):
            put(sums[i], d, lows[i])
            put(sums[i], d + LANES, highs[i])
    _order(sums, each)


@njit(fastmath=FAST, cache=True)
def multiply(a: Any, b: Any, out: Any) -> None:  # pragma: no cover
    """out (32,) float32 = a * b + a * b of bf16 bits (32,), by pairs: to see whether that can be
    compiled and runs."""
    x, y, unit = halves(a, 0), halves(b, 0), zeros_for((0, 0))
    lows, highs = dot(unit[0], low(x, x), low(y, y)), dot(unit[1], high(x, x), high(y, y))
    put(out, 0, first(lows, highs))
    put(out, LANES, second(lows, highs))


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def attend(
    query: Any, key: Any, value: Any, positions: Any, window: Any, scale: Any, out: Any, each: Any
) -> None:  # pragma: no cover
    """softmax(scale * q K^T) V of one new token a row over its keys 0 .. position, at most the last
    `window` of them.

    query (B, K, S, D), key by column (B, K, D, C), value (B, K, C, D), positions (B, 1), out (B, K,
    S, D), all contiguous bf16 bits; C and D are multiples of 32. each: any S numbers: a kernel is
    compiled for their count. While one head is worked on the next one's keys and values are
    fetched: two threads alone do not keep the memory busy.
    """
    rows, heads, _, size = query.shape
    for one in prange(rows * heads):
        row, head = one // heads, one % heads
        after = min(one + 1, rows * heads - 1)
        next_row, next_head = after // heads, after % heads
        end = positions[row, 0] + 1
        begin = max(0, end - window)
        start = (
            begin - begin % BLOCK
        )  # whole blocks; what stands before `begin` or behind `end` weighs nothing
        length = -(-(end - start) // BLOCK) * BLOCK
        scores, sums = (
            np.zeros((len(each), length), np.float32),
            np.empty((len(each), size), np.float32),
        )
        weights, shares = np.empty((len(each), length), np.uint16), np.empty(len(each), np.float32)
        _score(query[row, head], key[row, head], start, key[next_row, next_head], scores, each)
        for i in range(len(each)):
            shares[i] = _softmax(scores[i], scale, begin - start, end - start, weights[i])
        _sum(weights, value[row, head], start, end, value[next_row, next_head], sums, each)
        for i in range(len(each)):
            for d in range(size):
                out[row, head, i, d] = narrow(sums[i, d] * shares[i], query[row, head, i, d])


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def beside(x: Any, step: Any, a: Any, out: Any) -> None:  # pragma: no cover
    """out (B, D + R) = [x, x a^T] of x (B, D), in rows as `compiled.flat_rows` gives them, and a
    (R, D); D is a multiple of 32, R of 4."""
    rank, size = a.shape
    for row in prange(len(out)):
        x_row, o = x[row * step :], out[row]
        for d in range(size):
            o[d] = x_row[d]
        for r in range(0, rank, 4):  # four at a time: x is read a quarter as often
            s0, s1, s2, s3 = zeros_for((0, 0, 0, 0))
            for d in range(0, size, BLOCK):
                part = halves(x_row, d)
                s0, s1 = dot(s0, part, halves(a[r], d)), dot(s1, part, halves(a[r + 1], d))
                s2, s3 = dot(s2, part, halves(a[r + 2], d)), dot(s3, part, halves(a[r + 3], d))
            for i, s in enumerate((sum_of(s0), sum_of(s1), sum_of(s2), sum_of(s3))):
                o[size + r + i] = narrow(s, o[0])
