"""The hardest negatives of float32 embeddings, exact, at the price of a bfloat16 product.

The scores of the embeddings rounded to bfloat16 tell which few entries can still be the largest of a row
or column: with x = x̂ + Δx,

    |<x, y> - <x̂, ŷ>| <= ‖Δx‖ ‖y‖ + ‖x̂‖ ‖Δy‖        (Cauchy-Schwarz)

so that entries further than twice this bound below the largest rounded score are out. The others are
scored again from the float32 embeddings, in float64 and in one order for both directions, rounded once
to float32. Where too many remain (equal or nearly equal scores throughout), the whole of S is scored in
float32 instead; the host launches that pass in any case and it returns at once if it is not needed.
"""

import triton
import triton.language as tl

from .rows import SURVEY_PROGRAMS, is_poisoned, load_block, load_bound, magnitude_bits
from .tiles import NO_INDEX

# Rounding errors are bounded in units of 2^-22, two units in the last place of float32.
UNIT = tl.constexpr(2.0**-22)
# What a term that underflows can lose: the smallest normal float32.
UNDERFLOW = tl.constexpr(2.0**-126)


# quantized[r] = bfloat16(rows[r]), norms[0, r] = |rows[r]|^2, norms[1, r] = |rows[r] - quantized[r]|^2,
# and bounds[0 and 1] the maxima of both over the rows of each program.
@triton.jit
def quantize_kernel(
    rows_ptr, quantized_ptr, norms_ptr, bounds_ptr, stride_rows, stride_quantized, num_rows, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    max_square = tl.zeros((BLOCK_R,), tl.int32)
    max_error = tl.zeros((BLOCK_R,), tl.int32)
    for row in tl.range(program * BLOCK_R, num_rows, SURVEY_PROGRAMS * BLOCK_R):
        offs_row = row + tl.arange(0, BLOCK_R)
        squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        errors = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            x = load_block(rows_ptr, stride_rows, offs_row, num_rows, offs_d, D, tl.float32)
            rounded = x.to(tl.bfloat16)
            mask = (offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
            pointers = quantized_ptr + offs_row.to(tl.int64)[:, None] * stride_quantized
            tl.store(pointers + offs_d[None, :], rounded, mask=mask)
            error = x - rounded.to(tl.float32)
            squares += x * x
            errors += error * error
        square, error = tl.sum(squares, 1), tl.sum(errors, 1)
        tl.store(norms_ptr + offs_row, square, mask=offs_row < num_rows)
        tl.store(norms_ptr + num_rows + offs_row, error, mask=offs_row < num_rows)
        max_square = tl.maximum(max_square, magnitude_bits(square))
        max_error = tl.maximum(max_error, magnitude_bits(error))
    tl.store(bounds_ptr + program, tl.max(max_square, 0))
    tl.store(bounds_ptr + SURVEY_PROGRAMS + program, tl.max(max_error, 0))


@triton.jit
def upper_norm(square, D):
    """No less than the norm whose square was summed in float32 over D terms."""
    return tl.sqrt(square + D * UNDERFLOW) * (1.0 + (D + 16) * UNIT)


@triton.jit
def score_bounds(norms_ptr, num_rows, row, other_bounds_ptr, num_other_bounds, D):
    """(error, slack): error >= |s - ŝ| for every score of `row`, slack >= 8 roundings of one.

    The D additions of the rounded product may each err by 2 units of their running sum.
    """
    norm = upper_norm(tl.load(norms_ptr + row), D)
    delta = upper_norm(tl.load(norms_ptr + num_rows + row), D)
    other_norm = upper_norm(load_bound(other_bounds_ptr, 0, num_other_bounds, tl.float32), D)
    other_delta = upper_norm(load_bound(other_bounds_ptr, 1, num_other_bounds, tl.float32), D)
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
def better_of(best, index, scores, offs_j):
    """The larger score, ties to the smaller index."""
    new_best = tl.max(scores, 0)
    new_index = tl.min(tl.where(scores == new_best, offs_j, NO_INDEX), 0)
    better = (new_best > best) | ((new_best == best) & (new_index < index))
    return tl.where(better, new_best, best), tl.where(better, new_index, index)


# One anchor a program; r[slot] is the second largest rounded score of a tile, v[slot], j[slot] the largest.
#
#   threshold = max v - 2 error - slack       (or, from the second rectangle on, the best so far - error)
#   best = the largest of exact(j[slot])      over the slots with v >= threshold > r
#   best = the largest of that and exact(all negatives of the tile) over the slots with r >= threshold
#
# work[0] counts the scores to compute; beyond `work_limit` this program and the others give up.
@triton.jit
def rescore_kernel(
    images_ptr, captions_ptr, image_ids_ptr, caption_ids_ptr, row_partial_ptr, column_partial_ptr,
    image_norms_ptr, caption_norms_ptr, image_bounds_ptr, caption_bounds_ptr, bounds_ptr,
    positive_ptr, score_ptr, index_ptr, work_ptr, work_limit,
    stride_images, stride_captions, row_start, num_rows, num_columns, row_slots,
    column_first, column_slots, num_pairs, num_images, num_captions,
    num_bounds, num_image_bounds, num_caption_bounds, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        if (tl.program_id(0) < num_rows) & (row_start + tl.program_id(0) < num_pairs):
            rescore_anchor(
                images_ptr, captions_ptr, image_ids_ptr, caption_ids_ptr, row_partial_ptr,
                image_norms_ptr, caption_bounds_ptr, bounds_ptr,
                positive_ptr, score_ptr, index_ptr, work_ptr, work_limit,
                stride_images, stride_captions, row_start + tl.program_id(0), tl.program_id(0),
                num_rows, num_images, 0, row_slots, 0, num_columns, True,
                num_bounds, num_caption_bounds, D, BLOCK_N, BLOCK_S, BLOCK_J, BLOCK_D,
            )  # fmt: skip
    else:
        if tl.program_id(0) < num_pairs:
            rescore_anchor(
                captions_ptr, images_ptr, caption_ids_ptr, image_ids_ptr, column_partial_ptr,
                caption_norms_ptr, image_bounds_ptr, bounds_ptr,
                positive_ptr, score_ptr + num_pairs, index_ptr + num_pairs, work_ptr, work_limit,
                stride_captions, stride_images, tl.program_id(0), tl.program_id(0),
                num_pairs, num_captions, 1, column_slots, row_start, row_start + num_rows,
                column_first == 1,
                num_bounds, num_image_bounds, D, BLOCK_M, BLOCK_S, BLOCK_J, BLOCK_D,
            )  # fmt: skip


@triton.jit
def rescore_anchor(
    anchors_ptr, others_ptr, anchor_ids_ptr, other_ids_ptr, partial_ptr,
    norms_ptr, other_bounds_ptr, bounds_ptr,
    positive_ptr, score_ptr, index_ptr, work_ptr, work_limit,
    stride_anchors, stride_others, k, position,
    num_positions, num_anchor_rows, first_slot, num_slots, origin, stop, is_first,
    num_bounds, num_other_bounds, D,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = (offs_s >= first_slot) & (offs_s < num_slots)
    first_plane = (offs_s * 3).to(tl.int64)
    none = -float("inf")
    partial_ptr += position
    value = tl.load(partial_ptr + first_plane * num_positions, mask=mask_s, other=none)
    winner = tl.load(partial_ptr + (first_plane + 1) * num_positions, mask=mask_s, other=0.0)
    winner = winner.to(tl.int32, bitcast=True)
    second = tl.load(partial_ptr + (first_plane + 2) * num_positions, mask=mask_s, other=none)

    best = tl.full((), -float("inf"), tl.float32)
    index = tl.full((), NO_INDEX, tl.int32)
    if is_first == 0:
        best = tl.load(score_ptr + k)
        index = tl.load(index_ptr + k).to(tl.int32)
        index = tl.where(index < 0, NO_INDEX, index)
    error, slack = score_bounds(
        norms_ptr, num_anchor_rows, k, other_bounds_ptr, num_other_bounds, D
    )
    threshold = tl.maximum(tl.max(value, 0) - 2 * error, best - error) - slack
    # Without a finite bound there is no certificate. An anchor without negatives needs none.
    unbounded = (error < float("inf")) == 0
    contender = (value >= threshold) & (value > -float("inf"))
    crowded = contender & (second >= threshold) & (second > -float("inf"))
    single = contender & (crowded == 0)
    num_single = tl.sum(single.to(tl.int32), 0)
    work = num_single + tl.sum(crowded.to(tl.int32), 0) * BLOCK
    work = tl.where(unbounded, work_limit + 1, work.to(tl.int64))
    poisoned = is_poisoned(bounds_ptr, num_bounds, D, "dot", tl.float32)
    work = tl.where(poisoned, 0, work)
    total = tl.atomic_add(work_ptr, work, sem="relaxed") + work

    if (total <= work_limit) & (poisoned == 0):
        anchor_ptr = anchors_ptr + k.to(tl.int64) * stride_anchors
        offs_j = tl.arange(0, BLOCK_J)
        rank = tl.cumsum(single.to(tl.int32), 0) - 1
        for base in tl.range(0, num_single, BLOCK_J):
            chosen = single[:, None] & (rank[:, None] == (base + offs_j)[None, :])
            j = tl.sum(tl.where(chosen, winner[:, None], 0), 0)
            scores = exact_scores(
                anchor_ptr, others_ptr, stride_others, j, base + offs_j < num_single, D,
                BLOCK_J, BLOCK_D,
            )  # fmt: skip
            best, index = better_of(best, index, scores, j)
        slot = tl.min(tl.where(crowded, offs_s, NO_INDEX), 0)
        while slot < NO_INDEX:
            first = origin + (slot - first_slot) * BLOCK
            for offset in tl.range(0, BLOCK, BLOCK_J):
                j = first + offset + offs_j
                mask_j = j < stop
                if anchor_ids_ptr is not None:
                    anchor_id = tl.load(anchor_ids_ptr + k)
                    mask_j &= tl.load(other_ids_ptr + j, mask=mask_j, other=0) != anchor_id
                else:
                    mask_j &= j != k
                scores = exact_scores(
                    anchor_ptr, others_ptr, stride_others, j, mask_j, D, BLOCK_J, BLOCK_D
                )
                best, index = better_of(best, index, scores, j)
            slot = tl.min(tl.where(crowded & (offs_s > slot), offs_s, NO_INDEX), 0)

    found = (best > -float("inf")) & (poisoned == 0)
    tl.store(score_ptr + k, tl.where(poisoned, float("nan"), best))
    tl.store(index_ptr + k, tl.where(found, index, -1).to(tl.int64))
    if poisoned:
        tl.store(positive_ptr + k, tl.full((), float("nan"), tl.float32))
