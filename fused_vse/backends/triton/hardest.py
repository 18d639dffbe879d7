"""Hardest negative of every anchor: its functions of the walk (walk.py), and the sparse backward pass."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .order import over_distance, pull
from .tiles import NO_INDEX, anchors, below_ceiling, candidates, leave, nothing, poison

constants = nothing
EMPTY = (-float("inf"), NO_INDEX.value)


@triton.jit
def argmax_tile(acc, tile, terms, AXIS: tl.constexpr):
    """Maximum along AXIS and the smallest candidate that attains it."""
    best = tl.max(below_ceiling(acc, tile, terms.ceiling, AXIS), AXIS)
    winners = acc == tl.expand_dims(best, AXIS)
    offs = tl.expand_dims(candidates(acc, tile, AXIS), 1 - AXIS)
    return best, tl.min(tl.where(winners, offs, NO_INDEX), AXIS)


@triton.jit
def partials(acc, tile, terms, constants, out):
    best, index = argmax_tile(acc, tile, terms, 1)
    leave(out, acc, tile, 1, best, index)
    best, index = argmax_tile(acc, tile, terms, 0)
    leave(out, acc, tile, 0, best, index)


@triton.jit
def merge(best, index, new, where, constants):
    """The larger score, ties to the smaller index."""
    new_best = tl.max(new, 0)
    new_index = tl.min(tl.where(new == new_best[None, :], where, NO_INDEX), 0)
    return better_of(best, index, new_best, new_index)


@triton.jit
def better_of(best, index, new_best, new_index):
    better = (new_best > best) | ((new_best == best) & (new_index < index))
    return tl.where(better, new_best, best), tl.where(better, new_index, index)


@triton.jit
def finish(best, index, poisoned, constants):
    """Score and index; -1 for none, NaN and -1 if the input is poisoned."""
    found = (best > -float("inf")) & (poisoned == 0)
    return tl.where(poisoned, float("nan"), best), tl.where(found, index, -1).to(tl.int64)


@triton.jit
def weights(scores, tile, terms, constants, AXIS: tl.constexpr):
    """[the candidate is the hardest] g, of given scores."""
    offs, mask = anchors(scores, tile, AXIS)
    index = tl.load(terms.index + offs, mask=mask, other=-1).to(tl.int32)
    g = tl.load(terms.upstream + offs, mask=mask, other=0.0)
    chosen = tl.expand_dims(index, AXIS) == tl.expand_dims(candidates(scores, tile, AXIS), 1 - AXIS)
    gradient = tl.where(chosen, tl.expand_dims(g, AXIS), 0.0)
    return gradient, gradient


# keys[a] = the row of [I; T] that anchor a of [R + C] points at; N + M for none.
@triton.jit
def target_keys_kernel(
    index_ptr, keys_ptr, num_images, num_captions, num_row_anchors, num_anchors,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_anchors
    index = tl.load(index_ptr + offs, mask=mask, other=-1)
    target = index + tl.where(offs < num_row_anchors, num_images, 0)
    key = tl.where(index >= 0, target, num_images + num_captions)
    tl.store(keys_ptr + offs, key.to(tl.int32), mask=mask)


class Side(NamedTuple):
    """The images or the captions."""

    pointer: Any  # [rows, D]
    stride: int
    first_anchor: int  # position of its first anchor in [R + C]
    num_anchors: int
    first_pair: int  # its row of pair 0


@triton.jit
def weight_of(upstream_ptr, score_ptr, position, mask, SIDE: tl.constexpr):
    """The upstream gradient, for the order similarity over the distance."""
    weight = tl.load(upstream_ptr + position, mask=mask, other=0.0)
    if SIDE != "dot":
        weight = over_distance(weight, tl.load(score_ptr + position, mask=mask, other=0.0))
    return weight


@triton.jit
def pull_of(side, row, mask, own, SIDE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    offs = row.to(tl.int64) * side.stride + tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return pull(tl.load(side.pointer + offs, mask=mask, other=0.0).to(ACC), own, SIDE)


# Row r of one side gets, with o the other side's embeddings (for the order similarity, what they pull at
# row r, and all weights over the distance) and g the upstream gradients of the anchors:
#
#   d[r] = d_positive[k] o[the other row of pair k]                  if r is in pair k
#        + g[r] o[index[r]]                                          if r is an anchor
#        + sum of g[a] o[a] over the other side's anchors a with index[a] == r, in ascending order
#
# Those are order[starts[r] : starts[r + 1]], from a stable sort. Without one, for at most BLOCK_A anchors,
# every program looks through their indices itself: one launch for the whole backward pass.
@triton.jit
def hardest_backward_kernel(
    own, others, d_own_ptr, d_positive_ptr, positive_ptr, upstream_ptr, score_ptr, index_ptr,
    order_ptr, starts_ptr, pair_count, num_row_anchors, num_anchors, D,
    SIDE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = upstream_ptr.dtype.element_ty
    row = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    here = tl.zeros((BLOCK_D,), ACC)
    if SIDE != "dot":
        here += pull_of(own, row, mask_d, here, "dot", ACC, BLOCK_D)

    pair = row - own.first_pair
    is_pair = (pair >= 0) & (pair < pair_count)
    acc = weight_of(d_positive_ptr, positive_ptr, pair, is_pair, SIDE) * pull_of(
        others, others.first_pair + pair, mask_d & is_pair, here, SIDE, ACC, BLOCK_D
    )
    position = own.first_anchor + row
    index = tl.load(index_ptr + position, mask=row < own.num_anchors, other=-1)
    acc += weight_of(upstream_ptr, score_ptr, position, index >= 0, SIDE) * pull_of(
        others, index, mask_d & (index >= 0), here, SIDE, ACC, BLOCK_D
    )
    if order_ptr is not None:
        for number in tl.range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
            source = tl.load(order_ptr + number)
            acc += weight_of(upstream_ptr, score_ptr, source, True, SIDE) * pull_of(
                others, source - others.first_anchor, mask_d, here, SIDE, ACC, BLOCK_D
            )
    else:
        offs = tl.arange(0, BLOCK_A)
        mask = offs < others.num_anchors
        chosen = tl.load(index_ptr + others.first_anchor + offs, mask=mask, other=-1) == row
        anchor = tl.min(tl.where(chosen, offs, NO_INDEX), 0)
        while anchor < NO_INDEX:
            source = others.first_anchor + anchor
            acc += weight_of(upstream_ptr, score_ptr, source, True, SIDE) * pull_of(
                others, anchor, mask_d, here, SIDE, ACC, BLOCK_D
            )
            anchor = tl.min(tl.where(chosen & (offs > anchor), offs, NO_INDEX), 0)
    acc *= poison(score_ptr, num_row_anchors, num_anchors)
    pointers = d_own_ptr + row.to(tl.int64) * D + offs_d
    tl.store(pointers, acc.to(d_own_ptr.dtype.element_ty), mask=mask_d)
