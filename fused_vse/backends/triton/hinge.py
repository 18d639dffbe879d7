"""Σ [s - threshold]₊ over every anchor's negatives: its functions of the walk (walk.py)."""

import triton
import triton.language as tl

from .tiles import anchors, below_ceiling, leave, nothing

constants = nothing
EMPTY = (0.0, 0)


@triton.jit
def add_both(total, active, other_total, other_active):
    return total + other_total, active + other_active


@triton.jit
def hinge_tile(acc, tile, terms, out, AXIS: tl.constexpr):
    """Leaves the sum of [s - threshold]+ along AXIS, and how many are above 0."""
    acc = below_ceiling(acc, tile, terms.ceiling, AXIS)
    offs, mask = anchors(acc, tile, AXIS)
    threshold = tl.load(terms.threshold + offs, mask=mask, other=0.0)
    excess = acc - tl.expand_dims(threshold, AXIS)
    active = excess > 0
    # One reduction of both: two would need the tile twice, for which there are no registers.
    hinges = tl.where(active, excess, 0.0), active.to(tl.int32)
    total, count = tl.reduce(hinges, AXIS, add_both)
    leave(out, acc, tile, AXIS, total, count)


@triton.jit
def partials(acc, tile, terms, constants, out):
    hinge_tile(acc, tile, terms, out, 1)
    hinge_tile(acc, tile, terms, out, 0)


@triton.jit
def merge(total, active, new_total, new_active, constants):
    return total + tl.sum(new_total, 0), active + tl.sum(new_active, 0)


@triton.jit
def finish(total, active, poisoned, constants):
    return tl.where(poisoned, float("nan"), total), tl.where(poisoned, 0, active).to(tl.int64)


@triton.jit
def weights(scores, tile, terms, constants, AXIS: tl.constexpr):
    """[s > threshold] g."""
    offs, mask = anchors(scores, tile, AXIS)
    threshold = tl.load(terms.threshold + offs, mask=mask, other=float("inf"))
    g = tl.load(terms.upstream + offs, mask=mask, other=0.0)
    active = scores > tl.expand_dims(threshold, AXIS)
    gradient = tl.where(active, tl.expand_dims(g, AXIS), 0.0)
    return gradient, gradient
