"""The hardest negatives of float32 embeddings, exact, at the price of a bfloat16 product.

The scores of the embeddings rounded to bfloat16 tell which few entries can still be the largest of a row
or column: with x = x̂ + Δx,

    |<x, y> - <x̂, ŷ>| <= ‖Δx‖ ‖y‖ + ‖x̂‖ ‖Δy‖        (Cauchy-Schwarz)

so that entries further than twice this bound below the largest rounded score are out. The others are
scored again from the float32 embeddings, in float64 and in one order for both directions, rounded once
to float32. Where too many remain (equal or nearly equal scores throughout), the whole of S is scored in
float32 instead; the host launches that pass in any case and it returns at once if it is not needed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .hardest import EMPTY, argmax_tile, better_of, constants, finish
from .tiles import NO_INDEX, candidates, is_poisoned, leave, load_bound

__all__ = ["EMPTY", "constants", "partials", "rescore_kernel"]
# Rounding errors are bounded in units of 2^-22, two units in the last place of float32.
UNIT = tl.constexpr(2.0**-22)
# What a term that underflows can lose: the smallest normal float32.
UNDERFLOW = tl.constexpr(2.0**-126)


@triton.jit
def partials(acc, tile, terms, constants, out):
    search_tile(acc, tile, terms, out, 1)
    search_tile(acc, tile, terms, out, 0)


@triton.jit
def search_tile(acc, tile, terms, out, AXIS: tl.constexpr):
    """Leaves what hardest.py does, and the second largest score."""
    best, index = argmax_tile(acc, tile, terms, AXIS)
    offs = tl.expand_dims(candidates(acc, tile, AXIS), 1 - AXIS)
    rest = tl.where(offs == tl.expand_dims(index, AXIS), -float("inf"), acc)
    leave(out, acc, tile, AXIS, best, index, tl.max(rest, AXIS))


@triton.jit
def upper_norm(square, D):
    """No less than the norm whose square was summed in float32 over D terms."""
    return tl.sqrt(square + D * UNDERFLOW) * (1.0 + (D + 16) * UNIT)


@triton.jit
def score_bounds(side, row, bounds, OTHER: tl.constexpr):
    """(error, slack): error >= |s - ŝ| for every score of `row`, slack >= 8 roundings of one.

    The D additions of the rounded product may each err by 2 units of their running sum.
    """
    D = bounds.D
    norm = upper_norm(tl.load(side.norms + row), D)
    delta = upper_norm(tl.load(side.norms + side.num_rows + row), D)
    other_norm = upper_norm(load_bound(bounds, 3 * OTHER + 1), D)
    other_delta = upper_norm(load_bound(bounds, 3 * OTHER + 2), D)
    rounded, other_rounded = norm + delta, other_norm + other_delta
    error = delta * other_norm + rounded * other_delta + D * UNIT * rounded * other_rounded
    return error, 4 * UNIT * norm * other_norm + D * UNDERFLOW


@triton.jit
def exact_scores(
    anchor_ptr, others_ptr, stride_others, offs_j, mask_j, D,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<anchor, others[j]> [BLOCK_J], summed in float64: the same for both directions, to the bit."""
    acc = tl.zeros((BLOCK_J, BLOCK_D), tl.float64)
    rows = others_ptr + offs_j.to(tl.int64)[:, None] * stride_others
    for d in tl.range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        anchor = tl.load(anchor_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float64)
        mask = mask_j[:, None] & (offs_d < D)[None, :]
        acc += anchor[None, :] * tl.load(rows + offs_d[None, :], mask=mask, other=0.0).to(
            tl.float64
        )
    return tl.where(mask_j, tl.sum(acc, 1).to(tl.float32), -float("inf"))


@triton.jit
def best_of(best, index, scores, offs_j):
    """The larger of the best so far and of the scores of the candidates offs_j."""
    new_best = tl.max(scores, 0)
    new_index = tl.min(tl.where(scores == new_best, offs_j, NO_INDEX), 0)
    return better_of(best, index, new_best, new_index)


# One anchor a program; r[slot] is the second largest rounded score of a tile, v[slot], j[slot] the largest.
#
#   threshold = max v - 2 error - slack       (or, from the second piece on, the best so far - error)
#   best = the largest of exact(j[slot])      over the slots with v >= threshold > r
#   best = the largest of that and exact(all negatives of the tile) over the slots with r >= threshold
#
# guard.work[0] counts the scores to compute; beyond the limit this program and the others give up.
@triton.jit
def rescore_kernel(
    images, captions, ids, piece, partials, score_ptr, index_ptr, bounds, guard,
    row_slots, column_first, column_slots,
    TILES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    num_rows = piece.row_stop - piece.row_start
    if tl.program_id(1) == 0:
        row = piece.row_start + number
        if (number < num_rows) & (row < piece.row_anchors):
            pair = row - ids.pair_row
            partner = tl.where((pair >= 0) & (pair < ids.pair_count), pair + ids.pair_column, -1)
            slots = Slots(number, num_rows, 0, row_slots, 0, piece.num_columns, True)
            rescore_anchor(
                images, captions, ids.images, ids.captions, partner, partials, slots,
                score_ptr, index_ptr, row, bounds, guard, 1,
                TILES.block_n, BLOCK_S, BLOCK_J, BLOCK_D,
            )  # fmt: skip
    else:
        if number < piece.column_anchors:
            pair = number - ids.pair_column
            partner = tl.where((pair >= 0) & (pair < ids.pair_count), pair + ids.pair_row, -1)
            slots = Slots(
                partials.column_base + number, piece.column_anchors, 1, column_slots,
                piece.row_start, piece.row_stop, column_first == 1,
            )  # fmt: skip
            rescore_anchor(
                captions, images, ids.captions, ids.images, partner, partials, slots,
                score_ptr + piece.row_anchors, index_ptr + piece.row_anchors, number,
                bounds, guard, 0, TILES.block_m, BLOCK_S, BLOCK_J, BLOCK_D,
            )  # fmt: skip


class Slots(NamedTuple):
    """Where the partial results of an anchor are, and of which candidates."""

    base: Any
    stride: Any
    first: Any
    stop: Any
    candidate: Any  # the first of slot `first`
    candidate_stop: Any
    is_first: Any  # no piece came before


@triton.jit
def rescore_anchor(
    side, others, anchor_ids, other_ids, partner, partials, slots, score_ptr, index_ptr, anchor,
    bounds, guard, OTHER: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = (offs_s >= slots.first) & (offs_s < slots.stop)
    positions = slots.base + offs_s.to(tl.int64) * slots.stride
    value = tl.load(partials.first + positions, mask=mask_s, other=-float("inf"))
    winner = tl.load(partials.second + positions, mask=mask_s, other=0)
    second = tl.load(partials.third + positions, mask=mask_s, other=-float("inf"))

    best = tl.full((), -float("inf"), tl.float32)
    index = tl.full((), NO_INDEX, tl.int32)
    if slots.is_first == 0:
        best = tl.load(score_ptr + anchor)
        index = tl.load(index_ptr + anchor).to(tl.int32)
        index = tl.where(index < 0, NO_INDEX, index)
    error, slack = score_bounds(side, anchor, bounds, OTHER)
    threshold = tl.maximum(tl.max(value, 0) - 2 * error, best - error) - slack
    # Without a finite bound there is no certificate. An anchor without negatives needs none.
    unbounded = (error < float("inf")) == 0
    contender = (value >= threshold) & (value > -float("inf"))
    crowded = contender & (second >= threshold) & (second > -float("inf"))
    single = contender & (crowded == 0)
    num_single = tl.sum(single.to(tl.int32), 0)
    work = num_single + tl.sum(crowded.to(tl.int32), 0) * BLOCK
    work = tl.where(unbounded, guard.limit + 1, work.to(tl.int64))
    poisoned = is_poisoned(bounds, "dot")
    work = tl.where(poisoned, 0, work)
    total = tl.atomic_add(guard.work, work, sem="relaxed") + work

    if (total <= guard.limit) & (poisoned == 0):
        anchor_ptr = side.pointer + anchor.to(tl.int64) * side.stride
        offs_j = tl.arange(0, BLOCK_J)
        rank = tl.cumsum(single.to(tl.int32), 0) - 1
        for base in tl.range(0, num_single, BLOCK_J):
            chosen = single[:, None] & (rank[:, None] == (base + offs_j)[None, :])
            j = tl.sum(tl.where(chosen, winner[:, None], 0), 0)
            mask_j = base + offs_j < num_single
            scores = exact_scores(
                anchor_ptr, others.pointer, others.stride, j, mask_j, bounds.D, BLOCK_J, BLOCK_D
            )
            best, index = best_of(best, index, scores, j)
        slot = tl.min(tl.where(crowded, offs_s, NO_INDEX), 0)
        while slot < NO_INDEX:
            first = slots.candidate + (slot - slots.first) * BLOCK
            for offset in tl.range(0, BLOCK, BLOCK_J):
                j = first + offset + offs_j
                mask_j = j < slots.candidate_stop
                if anchor_ids is not None:
                    anchor_id = tl.load(anchor_ids + anchor)
                    mask_j &= tl.load(other_ids + j, mask=mask_j, other=0) != anchor_id
                else:
                    mask_j &= j != partner
                scores = exact_scores(
                    anchor_ptr, others.pointer, others.stride, j, mask_j, bounds.D,
                    BLOCK_J, BLOCK_D,
                )  # fmt: skip
                best, index = best_of(best, index, scores, j)
            slot = tl.min(tl.where(crowded & (offs_s > slot), offs_s, NO_INDEX), 0)

    best, index = finish(best, index, poisoned, 0)
    tl.store(score_ptr + anchor, best)
    tl.store(index_ptr + anchor, index)
