"""A decode step's attention, and RMSNorm, on a CPU, compiled by numba: one pass over memory each.
Import it through `compiled`.

The library's matrix kernels lay out every head's keys anew for the three or so queries that meet
them, and read as many keys for each row as the longest row has. Here each key is read once, in
place, by the row that has it. Products and sums are in float32. Invariant: what a row gets is a
function of that row alone, whatever the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, njit, prange, types, uint16
from numba.extending import intrinsic

# Sums may be taken in any order and multiply-adds fused; nothing is assumed about numbers that are
# not finite.
FAST = {"reassoc", "contract", "arcp", "nsz"}
LOG2_E = np.float32(1.4426950408889634)
CACHE_LINE = 64  # bytes
LEAST = np.float32(-126.0)  # below 2 ** LEAST a weight is nothing

_BITS, _FLOAT = ir.IntType(32), ir.FloatType()


@intrinsic
def widen(context: Any, x: Any) -> Any:
    """A bf16's bits, or a float32, as a float32."""

    def from_bits(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        high = builder.shl(builder.zext(args[0], _BITS), ir.Constant(_BITS, 16))
        return builder.bitcast(high, _FLOAT)

    if x == uint16:
        return float32(uint16), from_bits
    return float32(float32), lambda _context, _builder, _signature, args: args[0]


@intrinsic
def narrow(context: Any, x: Any, like: Any) -> Any:
    """A float32 in the type of `like`: itself, or the bits of the nearest bf16 (ties to even)."""

    def to_bits(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _BITS)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_BITS, 16)), ir.Constant(_BITS, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_BITS, 0x7FFF)))
        # Rounding could carry a NaN's bits over into a number.
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        high = builder.trunc(builder.lshr(rounded, ir.Constant(_BITS, 16)), ir.IntType(16))
        return builder.select(is_nan, ir.Constant(ir.IntType(16), 0x7FC0), high)

    if like == uint16:
        return uint16(float32, uint16), to_bits
    return float32(float32, float32), lambda _context, _builder, _signature, args: args[0]


@intrinsic
def power_of_two(context: Any, n: Any) -> Any:
    """2 ** n of an int32 from -126 to 127, as a float32."""

    def build(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponent = builder.add(args[0], ir.Constant(_BITS, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(_BITS, 23)), _FLOAT)

    return float32(types.int32), build


@intrinsic
def fetch(context: Any, row: Any, at: Any) -> Any:
    """Ask for the cache line where row[at] stands, before it is read."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _BITS, _BITS, _BITS])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(function, [place, *(ir.Constant(_BITS, n) for n in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(row, types.int64), build


@njit(fastmath=FAST, inline="always")
def exp2(x: Any) -> Any:  # pragma: no cover
    """2 ** x for x <= 0, to 2e-7 of itself: the C library's takes one number at a time."""
    x = max(x, LEAST)
    whole = np.rint(x)
    f = x - whole  # within a half of 0: the series' next term is below 2e-7
    p = np.float32(1.5403530e-4)
    for c in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        p = p * f + np.float32(c)
    return p * power_of_two(np.int32(whole))


@njit(fastmath=FAST)
def _score(
    query: Any, keys: Any, scale: Any, begin: Any, after: Any, scores: Any
) -> None:  # pragma: no cover
    """scores (S, T) += scale * query (S, D) keys (D, C), of the T columns from `begin` on;
    meanwhile `after` (D, C) is fetched."""
    shared, length = scores.shape
    end, line = begin + length, CACHE_LINE // keys.itemsize
    for d in range(0, len(keys), 4):  # four at a time: a score is written a quarter as often
        k0, k1 = keys[d, begin:end], keys[d + 1, begin:end]
        k2, k3 = keys[d + 2, begin:end], keys[d + 3, begin:end]
        for r in range(4):
            for j in range(begin, end, line):
                fetch(after[d + r], j)
        for i in range(shared):
            s, q = scores[i], query[i]
            q0, q1 = widen(q[d]) * scale, widen(q[d + 1]) * scale
            q2, q3 = widen(q[d + 2]) * scale, widen(q[d + 3]) * scale
            for j in range(length):
                first = q0 * widen(k0[j]) + q1 * widen(k1[j])
                s[j] += first + (q2 * widen(k2[j]) + q3 * widen(k3[j]))


@njit(fastmath=FAST)
def _softmax(scores: Any) -> None:  # pragma: no cover
    """Scores (T,) into shares of their exponentials, in place."""
    largest, total = scores[0], np.float32(0.0)
    for j in range(len(scores)):
        largest = max(largest, scores[j])
    for j in range(len(scores)):
        scores[j] = exp2((scores[j] - largest) * LOG2_E)
        total += scores[j]
    share = np.float32(1.0) / total
    for j in range(len(scores)):
        scores[j] *= share


@njit(fastmath=FAST)
def _sum(weights: Any, values: Any, begin: Any, after: Any, sums: Any) -> None:  # pragma: no cover
    """sums (S, D) += weights (S, T) values (C, D), of the T rows from `begin` on; meanwhile `after`
    (C, D) is fetched."""
    (shared, length), size, line = weights.shape, sums.shape[1], CACHE_LINE // values.itemsize
    whole = length - length % 4
    for j in range(0, whole, 4):
        at = begin + j
        v0, v1, v2, v3 = values[at], values[at + 1], values[at + 2], values[at + 3]
        for r in range(4):
            for d in range(0, size, line):
                fetch(after[at + r], d)
        for i in range(shared):
            s, w = sums[i], weights[i]
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            for d in range(size):
                first = w0 * widen(v0[d]) + w1 * widen(v1[d])
                s[d] += first + (w2 * widen(v2[d]) + w3 * widen(v3[d]))
    for j in range(whole, length):
        v0 = values[begin + j]
        for i in range(shared):
            s, w0 = sums[i], weights[i, j]
            for d in range(size):
                s[d] += w0 * widen(v0[d])


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def attend(
    query: Any, key: Any, value: Any, positions: Any, window: Any, scale: Any, out: Any
) -> None:  # pragma: no cover
    """softmax(scale * q K^T) V of one new token a row over its keys 0 .. position, at most the last
    `window` of them.

    query (B, K, S, D), key by column (B, K, D, C), value (B, K, C, D), positions (B, 1), out (B, K,
    S, D), all contiguous, D a multiple of 4. While one head is worked on the next one's keys and
    values are fetched: two threads alone do not keep the memory busy.
    """
    rows, heads, shared, size = query.shape
    for one in prange(rows * heads):
        row, head = one // heads, one % heads
        after = min(one + 1, rows * heads - 1)
        next_row, next_head = after // heads, after % heads
        end = positions[row, 0] + 1
        begin = max(0, end - window)
        weights = np.zeros((shared, end - begin), np.float32)
        sums = np.zeros((shared, size), np.float32)
        _score(query[row, head], key[row, head], scale, begin, key[next_row, next_head], weights)
        for i in range(shared):
            _softmax(weights[i])
        _sum(weights, value[row, head], begin, value[next_row, next_head], sums)
        for i in range(shared):
            for d in range(size):
                out[row, head, i, d] = narrow(sums[i, d], query[row, head, i, d])


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def rms_norm(
    x: Any, normed: Any, out: Any, weight: Any, eps: Any, scale: Any
) -> None:  # pragma: no cover
    """scale = 1 / sqrt(mean(x^2) + eps), (B,) float32, normed = x * scale, out = w * normed, each
    rounded; x, normed and out (B, D) and weight (D,) alike, contiguous."""
    rows, size = x.shape
    for row in prange(rows):
        total = np.float32(0.0)
        for d in range(size):
            total += widen(x[row, d]) * widen(x[row, d])
        factor = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        scale[row] = factor
        for d in range(size):
            normed[row, d] = narrow(widen(x[row, d]) * factor, x[row, d])
            out[row, d] = narrow(widen(normed[row, d]) * widen(weight[d]), x[row, d])
