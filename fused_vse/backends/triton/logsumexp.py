"""log Σ exp(a s) over every anchor's negatives: its functions of the walk (walk.py).

With c = a log2 e, exp(a s) = exp2(c s). An anchor's result is a reference r, which is a score, and
log Σ exp2(c (s - r)) apart from it: at large logits their sum would absorb the logarithm.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import anchors, below_ceiling, leave, load_bound

EMPTY = (-float("inf"), 0.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of anything in this range is a normal float32.
LARGEST_EXPONENT = tl.constexpr(120.0)
# Of a score below its reference: 0 exp2(-inf) must not become NaN.
LEAST_EXCESS = tl.constexpr(-1e30)


class Constants(NamedTuple):
    c: Any  # float64
    reach: Any  # no less than c |s|
    shift: Any
    one_exp: (
        Any  # whether exp2(c s - shift) serves all of S, for the row and the column sum of an entry
    )


@triton.jit
def constants(terms, bounds, SOURCE: tl.constexpr):
    """One exp is for the dot product, of which |c s| <= reach = c max|I_i| max|T_j|.

    That leaves exponents in [-2 reach + top, top]. `top` lifts them to normal numbers and is safe while the
    sum over all candidates of an anchor stays below the overflow.
    """
    scale = terms.scale
    c = tl.full((), LOG2_E, tl.float64)
    if scale.tensor is not None:
        c *= tl.load(scale.tensor).to(tl.float64)
    else:
        c = c * scale.value + c * scale.rest
    reach = tl.zeros((), tl.float32)
    shift = reach
    one_exp = tl.full((), 0, tl.int1)
    if SOURCE == "dot" and bounds is not None:
        norms = tl.sqrt(load_bound(bounds, 1)) * tl.sqrt(load_bound(bounds, 4))
        reach = tl.abs(c.to(tl.float32)) * norms * 1.01
        top = tl.maximum(2 * reach - LARGEST_EXPONENT, 0.0)
        most = top + tl.log2(tl.full((), 0.0, tl.float32) + bounds.num_candidates)
        shift = reach - top
        one_exp = most <= LARGEST_EXPONENT
    return Constants(c, reach, shift, one_exp)


@triton.jit
def finite(reference):
    """0 for -inf: the reference of an empty sum, which must not make -inf - -inf."""
    return tl.where(reference == -float("inf"), 0.0, reference)


@triton.jit
def sum_exp2(acc, tile, terms, c, AXIS: tl.constexpr):
    """r = max s and sum exp2(c (s - r)) along AXIS; -inf and 0 where every entry is -inf."""
    largest = tl.max(below_ceiling(acc, tile, terms.ceiling, AXIS), AXIS)
    exps = tl.exp2((acc - tl.expand_dims(finite(largest), AXIS)) * c)
    if terms.ceiling is not None:
        # The others are above the largest. Not by the ceiling: for a second tile there are no registers.
        exps = tl.where(acc <= tl.expand_dims(largest, AXIS), exps, 0.0)
    return largest, tl.sum(exps, AXIS)


@triton.jit
def partials(acc, tile, terms, constants, out):
    """(r, sum exp2(c (s - r))) of the tile's rows and columns; (0, sum exp2(c s - shift)) with one exp."""
    c = constants.c.to(acc.dtype)
    if constants.one_exp:
        exps = tl.exp2(below_ceiling(acc, tile, terms.ceiling, 1) * c - constants.shift)
        row_sum = tl.sum(exps, 1)
        exps = tl.exp2(below_ceiling(acc, tile, terms.ceiling, 0) * c - constants.shift)
        column_sum = tl.sum(exps, 0)
        row_max, column_max = tl.zeros_like(row_sum), tl.zeros_like(column_sum)
    else:
        row_max, row_sum = sum_exp2(acc, tile, terms, c, 1)
        column_max, column_sum = sum_exp2(acc, tile, terms, c, 0)
    leave(out, acc, tile, 1, row_max, row_sum)
    leave(out, acc, tile, 0, column_max, column_sum)


@triton.jit
def merge(largest, total, reference, sums, constants):
    """Both sums rescaled to the larger reference."""
    c = constants.c.to(total.dtype)
    new_largest = tl.maximum(largest, tl.max(reference, 0))
    total *= tl.exp2((largest - finite(new_largest)) * c)
    total += tl.sum(sums * tl.exp2((reference - finite(new_largest)[None, :]) * c), 0)
    return new_largest, total


@triton.jit
def finish(largest, total, poisoned, constants):
    """Reference and log_sum. One exp has no largest score, but a bound on it: the logarithm of the whole sum
    over c is near it unless c is small."""
    c = constants.c.to(largest.dtype)
    rest = tl.log2(total.to(tl.float64))
    whole = constants.shift + rest
    bounded = tl.minimum(whole.to(largest.dtype), constants.reach) / c
    reference = tl.where(constants.one_exp, bounded, largest)
    rest = tl.where(constants.one_exp, whole - c.to(tl.float64) * reference.to(tl.float64), rest)
    log_sum = tl.where(total > 0, rest * tl.full((), LN_2, tl.float64), -float("inf"))
    reference = tl.where(total > 0, reference, 0.0)
    # A scale out of range may leave a NaN in the sum, but none where there are no terms.
    poisoned |= (total != total) | (((c > 0) & (c < float("inf"))) == 0)
    return (
        tl.where(poisoned, float("nan"), reference),
        tl.where(poisoned, float("nan"), log_sum),
    )


@triton.jit
def weights(scores, tile, terms, constants, AXIS: tl.constexpr):
    """a q with q = exp(a (s - reference) - log_sum) g, and that times s - reference."""
    c = constants.c.to(scores.dtype)
    offs, mask = anchors(scores, tile, AXIS)
    reference = tl.load(terms.reference + offs, mask=mask, other=0.0)
    # exp2(-inf) = 0 for what is no anchor, or has no negatives.
    log_sum = tl.load(terms.log_sum + offs, mask=mask, other=float("inf"))
    log_sum = tl.where(log_sum == -float("inf"), float("inf"), log_sum).to(c.dtype) * LOG2_E
    # Of float64, as log_sum is.
    g = tl.load(terms.upstream + offs, mask=mask, other=0.0).to(c.dtype) * (c * LN_2)
    excess = scores - tl.expand_dims(reference, AXIS)
    exps = tl.exp2(excess * c - tl.expand_dims(log_sum, AXIS)) * tl.expand_dims(g, AXIS)
    return exps, exps * tl.maximum(excess, LEAST_EXCESS)
