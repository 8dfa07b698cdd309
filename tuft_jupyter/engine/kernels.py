"""The small operations of a decoder, each in one pass over memory, on one CPU core. Compiled by numba when needed.

torch does an RMSNorm in nine operations, each of which reads and writes all rows; the attention of single tokens is two
matmuls of a few rows each, for which no kernel is made. Here a row is read once, and what is computed from it stays in
registers and the core's own cache.

Arrays are float32, or bfloat16 as their bits in int16: numpy has no such type. All is computed in fp32, and rounded
where torch's operations round. NaN comes out where NaN goes in: that is how a divergence is noticed.

Shapes: N rows, J heads of E each (a row that is normalized whole is one head) of rows with C heads; F MLP size, X = 2F;
C slots of S positions, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOAT, _INT, _SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_ZERO, _ONE = np.float32(0), np.float32(1)
_WHOLE = np.float32(1.5 * 2**23)
"""Added and taken away again: the nearest whole number."""


def _kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled without the interpreter's lock, and kept for other processes beside this file or in the user's cache.

    A sum's terms may be taken in any order; that there is no NaN may not be assumed.
    """
    how = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
    try:
        return njit(cache=True, **how)(function)
    except RuntimeError:  # neither can be written
        return njit(**how)(function)


@intrinsic
def _load(typing: Any, stored: Any) -> Any:
    """The number that an element of an array stands for."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if isinstance(stored, types.Float):
            return values[0]
        return builder.bitcast(builder.shl(builder.zext(values[0], _INT), _INT(16)), _FLOAT)

    return types.float32(stored), build


@intrinsic
def _stored(typing: Any, number: Any, like: Any) -> Any:
    """A number as an element of an array that has elements ``like`` this: rounded to the nearest, ties to even."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if isinstance(like, types.Float):
            return values[0]
        bits = builder.bitcast(values[0], _INT)
        odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _INT(0x7FFF)), odd), _INT(16))
        is_nan = builder.fcmp_unordered("uno", values[0], values[0])
        return builder.trunc(builder.select(is_nan, _INT(0x7FC0), rounded), _SHORT)

    return like(types.float32, like), build


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """2 to a whole number from -126 to 127, a float's exponent; infinity for 128."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(values[0], _INT(127)), _INT(23)), _FLOAT)

    return types.float32(types.int32), build


@njit(error_model="numpy", fastmath={"contract"})
def _exp(x: Any) -> Any:
    """Within a unit in the last place; infinite from 88.4 on, 1e-38 below -87.

    By Cody and Waite (1980): what is left of x beside whole powers of two, as a Taylor series.
    """
    x = max(x, np.float32(-87))
    x = min(x, np.float32(89))
    n = (x * np.float32(1.44269504088896341) + _WHOLE) - _WHOLE
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    p = p * r + _ONE
    p = p * r + _ONE
    return p * _power_of_two(np.int32(n))


@_kernel
def rms_norm(
    x_NCE: Array, weight_JE: Array, eps: float, y_NJE: Array, unit_NJE: Array, scale_NJ: Array
) -> None:
    """``y = weight * unit``, ``unit = x * scale`` of mean square 1, of the first J heads of each row."""
    heads, size = weight_JE.shape
    for n in range(len(x_NCE)):
        for j in range(heads):
            x, weight, y, unit = x_NCE[n, j], weight_JE[j], y_NJE[n, j], unit_NJE[n, j]
            total = _ZERO
            for e in range(size):
                total += _load(x[e]) * _load(x[e])
            scale = np.float32(1 / np.sqrt(np.float64(total) / size + eps))
            scale_NJ[n, j] = scale
            for e in range(size):
                unit[e] = _stored(_load(x[e]) * scale, x[e])
                y[e] = _stored(_load(unit[e]) * _load(weight[e]), x[e])


@_kernel
def rms_norm_back(dy_NJE: Array, weight_JE: Array, unit_NJE: Array, scale_NJ: Array, dx_NJE: Array) -> None:
    """The gradient in x."""
    heads, size = weight_JE.shape
    for n in range(len(dy_NJE)):
        for j in range(heads):
            dy, weight, unit, dx = dy_NJE[n, j], weight_JE[j], unit_NJE[n, j], dx_NJE[n, j]
            total = _ZERO
            for e in range(size):
                total += _load(dy[e]) * _load(weight[e]) * _load(unit[e])
            mean, scale = total / np.float32(size), scale_NJ[n, j]
            for e in range(size):
                dx[e] = _stored((_load(dy[e]) * _load(weight[e]) - _load(unit[e]) * mean) * scale, dy[e])


@_kernel
def rotate(x_NCE: Array, cos_NE: Array, sin_NE: Array, y_NJE: Array) -> None:
    """``y = x * cos + roll(x, E / 2) * sin``, of the first J heads of each row."""
    heads, size = y_NJE.shape[1:]
    half = size // 2
    for n in range(len(y_NJE)):
        cos, sin = cos_NE[n], sin_NE[n]
        for j in range(heads):
            low, high, y = x_NCE[n, j, :half], x_NCE[n, j, half:], y_NJE[n, j]
            for e in range(half):
                a, b = _load(low[e]), _load(high[e])
                y[e] = _stored(a * _load(cos[e]) + b * _load(sin[e]), low[e])
                y[half + e] = _stored(b * _load(cos[half + e]) + a * _load(sin[half + e]), low[e])


@_kernel
def swiglu(gate_up_NX: Array, y_NF: Array) -> None:
    """``silu(gate) * up`` of the halves of each row."""
    size = y_NF.shape[1]
    for n in range(len(y_NF)):
        gate, up, y = gate_up_NX[n, :size], gate_up_NX[n, size:], y_NF[n]
        for f in range(size):
            g = _load(gate[f])
            silu = _stored(g / (_ONE + _exp(-g)), gate[f])
            y[f] = _stored(_load(silu) * _load(up[f]), gate[f])


@_kernel
def swiglu_back(gate_up_NX: Array, dy_NF: Array, dgate_up_NX: Array) -> None:
    """The gradients in gate and up."""
    size = dy_NF.shape[1]
    for n in range(len(dy_NF)):
        gate, up, dy = gate_up_NX[n, :size], gate_up_NX[n, size:], dy_NF[n]
        dgate, dup = dgate_up_NX[n, :size], dgate_up_NX[n, size:]
        for f in range(size):
            g, d = _load(gate[f]), _load(dy[f])
            sigmoid = _ONE / (_ONE + _exp(-g))
            dup[f] = _stored(d * g * sigmoid, dy[f])
            dgate[f] = _stored(d * _load(up[f]) * sigmoid * (_ONE + g * (_ONE - sigmoid)), dy[f])


@_kernel
def _score(q_D: Array, keys_SD: Array, first: int, end: int, weights_S: Array) -> None:
    """``exp(K q)`` of the positions from ``first`` up to ``end``, over that of the largest."""
    top = np.float32(-np.inf)
    for s in range(first, end):
        score = _ZERO
        for d in range(len(q_D)):
            score += q_D[d] * _load(keys_SD[s, d])
        weights_S[s] = score
        top = max(top, score)
    for s in range(first, end):
        weights_S[s] = _exp(weights_S[s] - top)


@_kernel
def _weigh(weights_S: Array, values_SD: Array, first: int, end: int, o_D: Array) -> None:
    """``o = weights V``."""
    o_D[:] = _ZERO
    s = first
    while s + 4 <= end:  # four at a time: what was added up is read and written a quarter as often
        a, b, c, e = weights_S[s], weights_S[s + 1], weights_S[s + 2], weights_S[s + 3]
        for d in range(len(o_D)):
            o_D[d] += (
                a * _load(values_SD[s, d])
                + b * _load(values_SD[s + 1, d])
                + c * _load(values_SD[s + 2, d])
                + e * _load(values_SD[s + 3, d])
            )
        s += 4
    while s < end:
        a = weights_S[s]
        for d in range(len(o_D)):
            o_D[d] += a * _load(values_SD[s, d])
        s += 1


@_kernel
def attend(
    q_NHD: Array,
    k_NGD: Array,
    v_NGD: Array,
    keys_CGSD: Array,
    values_CGSD: Array,
    rows_C: Array,
    lengths_C: Array,
    scaling: float,
    window: int,
    o_NHD: Array,
) -> None:
    """One token of each sequence attends to the sequence's past and to itself.

    The sequence in slot c has row ``rows[c]`` of the tokens and ``lengths[c]`` positions; the token's key and value
    become the next ones. ``window``: how many positions are seen, 0 for all.
    """
    heads, size = q_NHD.shape[1:]
    each = heads // keys_CGSD.shape[1]
    q, o = np.empty(size, np.float32), np.empty(size, np.float32)
    weights = np.empty(keys_CGSD.shape[2], np.float32)
    for c in range(len(rows_C)):
        row, end = rows_C[c], lengths_C[c] + 1
        first = max(0, end - window) if window else 0
        for h in range(heads):
            g = h // each
            if h % each == 0:
                for d in range(size):
                    keys_CGSD[c, g, end - 1, d] = k_NGD[row, g, d]
                    values_CGSD[c, g, end - 1, d] = v_NGD[row, g, d]
            for d in range(size):
                q[d] = _load(q_NHD[row, h, d]) * scaling
            _score(q, keys_CGSD[c, g], first, end, weights)
            _weigh(weights, values_CGSD[c, g], first, end, o)
            total = weights[first:end].sum()
            for d in range(size):
                o_NHD[row, h, d] = _stored(o[d] / total, q_NHD[row, h, d])
