"""Σ log(1 + exp(x)), x = a s + bias, over all entries of S: its functions of the walk (walk.py)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logsumexp import LEAST_EXCESS, LOG2_E
from .tiles import anchors, column_halves, ids_of, leave

EMPTY = (0.0, 0.0)


class Constants(NamedTuple):
    a: Any  # both in the accumulation type
    bias: Any


@triton.jit
def constants(terms, bounds, SOURCE: tl.constexpr):
    a = tl.zeros((), tl.float64)
    if terms.scale.tensor is not None:
        a += tl.load(terms.scale.tensor).to(tl.float64)
    else:
        a = a + terms.scale.value + terms.scale.rest
    bias = tl.load(terms.bias)
    return Constants(a.to(bias.dtype), bias)


@triton.jit
def log1p(y):
    """log(1 + y) for y in [0, 1], exact to rounding however small y is."""
    if y.dtype == tl.float64:
        u = 1 + y
        return tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1, u - 1)))
    else:  # 2 atanh(y / (2 + y))
        z = y / (2 + y)
        u = z * z
        p = u * (1.0 / 13) + 1.0 / 11
        p = p * u + 1.0 / 9
        p = p * u + 1.0 / 7
        p = p * u + 1.0 / 5
        p = p * u + 1.0 / 3
        return 2 * z * (p * u + 1)


@triton.jit
def sigmoid(x, y):
    """1 / (1 + exp(-x)), given y = exp(-|x|)."""
    return tl.where(x > 0, 1.0, y) / (1 + y)


@triton.jit
def signs(acc, tile):
    """-1 where equal ids make an entry a positive."""
    if tile.ids.equal_positive is None:
        return 1.0
    else:
        row_ids, column_ids = ids_of(acc, tile)
        equal = (row_ids[:, None] == column_ids[None, :]) & (acc > -float("inf"))
        return tl.where(equal, -1.0, 1.0).to(acc.dtype)


@triton.jit
def arguments(acc, sign, constants):
    """x and exp(-|x|)."""
    x = (acc * constants.a + constants.bias) * sign
    return x, tl.exp2(tl.abs(x) * -LOG2_E)


@triton.jit
def sums(acc, tile, constants, AXIS: tl.constexpr):
    sign = signs(acc, tile)
    x, y = arguments(acc, sign, constants)
    # One after the other: there are no registers for both.
    total = tl.sum(tl.maximum(x, 0.0) + log1p(y), AXIS)
    return total, tl.sum(sigmoid(x, y) * sign, AXIS)


@triton.jit
def is_too_large(acc, tile):
    """Whether half of its columns are to be looked at at a time. What does not spill is found by trying
    (tests/compile): the masks of ids leave the more registers, the fewer the parts are."""
    ids = tile.ids
    if acc.dtype == tl.float64:
        return acc.shape[0] * acc.shape[1] > 512
    elif ids.images is not None and ids.equal_positive is None:
        return acc.shape[0] * acc.shape[1] > 4096
    else:
        return acc.shape[0] * acc.shape[1] > 2048


@triton.jit
def row_sums(acc, tile, constants):
    SPLITS: tl.constexpr = is_too_large(acc, tile)
    if SPLITS:
        left, right, right_tile = column_halves(acc, tile)
        total, slope = row_sums(left, tile, constants)
        more, more_slope = row_sums(right, right_tile, constants)
        return total + more, slope + more_slope
    else:
        return sums(acc, tile, constants, 1)


@triton.jit
def leave_column_sums(acc, tile, constants, out):
    SPLITS: tl.constexpr = is_too_large(acc, tile)
    if SPLITS:
        left, right, right_tile = column_halves(acc, tile)
        leave_column_sums(left, tile, constants, out)
        leave_column_sums(right, right_tile, constants, out)
    else:
        total, slope = sums(acc, tile, constants, 0)
        leave(out, acc, tile, 0, total, slope)


@triton.jit
def partials(acc, tile, terms, constants, out):
    """Of the rows where they are anchors; then nothing is left for the columns, and else all."""
    if tile.row < tile.piece.row_anchors:
        total, slope = row_sums(acc, tile, constants)
        leave(out, acc, tile, 1, total, slope)
        nothing = tl.zeros((acc.shape[1],), acc.dtype)
        leave(out, acc, tile, 0, nothing, nothing)
    else:
        leave_column_sums(acc, tile, constants, out)


@triton.jit
def merge(total, slope, new_total, new_slope, constants):
    return total + tl.sum(new_total, 0), slope + tl.sum(new_slope, 0)


@triton.jit
def finish(total, slope, poisoned, constants):
    a = constants.a
    poisoned |= ((a > 0) & (a < float("inf"))) == 0
    return tl.where(poisoned, float("nan"), total), tl.where(poisoned, float("nan"), slope)


@triton.jit
def weights(scores, tile, terms, constants, AXIS: tl.constexpr):
    """a sigmoid(x) g, and that times s; of an entry's two anchors one counts."""
    offs, mask = anchors(scores, tile, AXIS)
    if AXIS == 0:
        mask &= tile.row >= tile.piece.row_anchors
    g = tl.load(terms.upstream + offs, mask=mask, other=0.0).to(scores.dtype) * constants.a
    sign = signs(scores, tile)
    x, y = arguments(scores, sign, constants)
    gradient = sigmoid(x, y) * sign * tl.expand_dims(g, AXIS)
    return gradient, gradient * tl.maximum(scores, LEAST_EXCESS)
