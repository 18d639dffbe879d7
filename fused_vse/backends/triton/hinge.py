"""Σ [s - (p - margin)]₊ over every anchor's negatives: tile by tile, merge, and the gradient of S."""

import triton
import triton.language as tl

from .hardest import bits_index, index_bits
from .order import over_distance
from .rows import is_poisoned, magnitude_bits
from .tiles import (
    column_halves,
    leave_bound,
    load_partials,
    negative_gradient,
    negative_scores,
    score_tile,
    store_gradient,
    store_partial,
    tile_position,
)


@triton.jit
def add_both(total, active, other_total, other_active):
    return total + other_total, active + other_active


@triton.jit
def hinge_tile(acc, threshold, AXIS: tl.constexpr):
    """Sum of [s - threshold]+ along AXIS, and how many are above 0."""
    excess = acc - tl.expand_dims(threshold, AXIS)
    active = excess > 0
    # One reduction of both: two would need the tile twice, for which there are no registers.
    return tl.reduce((tl.where(active, excess, 0.0), active.to(tl.int32)), AXIS, add_both)


# Per tile, for the rows and for the columns: the sum of hinges and the number of active ones.
#
#   for tile in my tiles:
#       s = I[rows] T[columns]^t, -inf where not a negative
#       row partial [column tile] = sum_j [s - threshold_i]+, count      column partial [1 + row tile] alike
#
# threshold [K] = positive - margin.
@triton.jit
def hinge_kernel(
    images_ptr, captions_ptr, scores_ptr, image_ids_ptr, caption_ids_ptr,
    row_partial_ptr, column_partial_ptr, bounds_ptr, threshold_ptr,
    stride_images, stride_captions, stride_score_rows, stride_score_columns,
    row_start, row_stop, num_columns, num_pairs, D,
    SOURCE: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(row_stop - row_start, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    num_rows = row_stop - row_start
    if SOURCE == "given":
        magnitudes = tl.zeros((BLOCK_M, BLOCK_N), bounds_ptr.dtype.element_ty)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=False
    ):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        row = row_start + row_tile * BLOCK_M
        column = column_tile * BLOCK_N
        acc = score_tile(
            images_ptr, captions_ptr, scores_ptr, stride_images, stride_captions,
            stride_score_rows, stride_score_columns,
            row, row_start, row_stop, column, num_columns, D,
            SOURCE, SAVE, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if SOURCE == "given":
            magnitudes = tl.maximum(magnitudes, magnitude_bits(acc))
        acc = negative_scores(
            acc, image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip

        offs_m = row + tl.arange(0, BLOCK_M)
        threshold = tl.load(threshold_ptr + offs_m, mask=offs_m < num_pairs, other=0.0)
        total, active = hinge_tile(acc, threshold, 1)
        store_partial(
            row_partial_ptr, 0, 2, column_tile, row, row_start, num_rows, num_pairs,
            total, BLOCK_M,
        )  # fmt: skip
        store_partial(
            row_partial_ptr, 1, 2, column_tile, row, row_start, num_rows, num_pairs,
            index_bits(active, total), BLOCK_M,
        )  # fmt: skip

        offs_n = column + tl.arange(0, BLOCK_N)
        threshold = tl.load(threshold_ptr + offs_n, mask=offs_n < num_pairs, other=0.0)
        total, active = hinge_tile(acc, threshold, 0)
        store_partial(
            column_partial_ptr, 0, 2, row_tile + 1, column, 0, num_pairs, num_pairs,
            total, BLOCK_N,
        )  # fmt: skip
        store_partial(
            column_partial_ptr, 1, 2, row_tile + 1, column, 0, num_pairs, num_pairs,
            index_bits(active, total), BLOCK_N,
        )  # fmt: skip
    if SOURCE == "given":
        leave_bound(bounds_ptr, magnitudes)


# The sums over the partial results of slots [first, stop), in ascending order of blocks.
@triton.jit
def hinge_merge_kernel(
    row_partial_ptr, column_partial_ptr, positive_ptr, sum_ptr, active_ptr, bounds_ptr,
    row_start, num_rows, row_slots, column_first, column_slots, num_pairs, num_bounds, D,
    FAMILY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    is_column = tl.program_id(1) == 1
    pointer = row_partial_ptr
    if is_column:
        pointer = column_partial_ptr
    first_slot = tl.where(is_column, column_first, 0)
    num_slots = tl.where(is_column, column_slots, row_slots)
    num_anchors = tl.where(is_column, num_pairs, num_rows)
    origin = tl.where(is_column, 0, row_start)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)

    total = tl.zeros((BLOCK_A,), ACC)
    active = tl.zeros((BLOCK_A,), tl.int32)
    for slot in tl.range(first_slot, num_slots, BLOCK_S):
        offs_s = slot + tl.arange(0, BLOCK_S)
        total += tl.sum(
            load_partials(pointer, 0, 2, offs_s, num_slots, offs_a, num_anchors, 0.0), 0
        )
        counts = load_partials(pointer, 1, 2, offs_s, num_slots, offs_a, num_anchors, 0.0)
        active += tl.sum(bits_index(counts), 0)

    mask = (offs_a < num_anchors) & (origin + offs_a < num_pairs)
    if is_column:
        tl.store(pointer + offs_a, total, mask=mask)
        tl.store(pointer + num_anchors + offs_a, index_bits(active, total), mask=mask)
    poisoned = is_poisoned(bounds_ptr, num_bounds, D, FAMILY, ACC)
    offs_k = origin + offs_a
    offs = is_column.to(tl.int64) * num_pairs + offs_k
    tl.store(sum_ptr + offs, tl.where(poisoned, float("nan"), total), mask=mask)
    tl.store(active_ptr + offs, tl.where(poisoned, 0, active).to(tl.int64), mask=mask)
    if poisoned:
        nan = tl.full((BLOCK_A,), float("nan"), ACC)
        tl.store(positive_ptr + offs_k, nan, mask=mask)
        # Rows of an earlier rectangle, in which given scores had nothing wrong yet.
        tl.store(sum_ptr + offs_k, nan, mask=mask)
        tl.store(active_ptr + offs_k, tl.zeros((BLOCK_A,), tl.int64), mask=mask)


# The gradient with respect to a rectangle of S, rounded to the dtype of the matrix products that follow:
#
#   for tile in my tiles:
#       w_ij = [s_ij > threshold_i] g_i + [s_ij > threshold_j] g_j     for a negative, else 0
#       G_ij = gain (w_ij + [i == j < K] d_diagonal_i)
#
# d_diagonal [K] = d_positive - sum over both directions of active g. ORDER: w_ij is divided by the
# distance -s_ij, d_diagonal has been.
@triton.jit
def hinge_gradient_kernel(
    images_ptr, captions_ptr, scores_ptr, image_ids_ptr, caption_ids_ptr,
    positive_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr, gradient_ptr, gain_ptr,
    stride_images, stride_captions, stride_score_rows, stride_score_columns, stride_gradient,
    row_start, row_stop, num_columns, num_pairs, D,
    SOURCE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVINGS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    # Poisoned input: every positive score is NaN, and so becomes every entry.
    first = tl.load(positive_ptr)
    factor = tl.where(first == first, 1.0, first)
    if gain_ptr is not None:
        factor *= tl.load(gain_ptr)
    row_tiles = tl.cdiv(row_stop - row_start, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=False
    ):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        row = row_start + row_tile * BLOCK_M
        column = column_tile * BLOCK_N
        acc = score_tile(
            images_ptr, captions_ptr, scores_ptr, stride_images, stride_captions,
            stride_score_rows, stride_score_columns,
            row, row_start, row_stop, column, num_columns, D,
            SOURCE, False, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip

        hinge_gradient_tile(
            acc, image_ids_ptr, caption_ids_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column, num_columns, num_pairs, BLOCK_M, BLOCK_N, HALVINGS, ORDER,
        )  # fmt: skip


@triton.jit
def hinge_gradient_tile(
    acc, image_ids_ptr, caption_ids_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr,
    gradient_ptr, stride_gradient, factor,
    row, row_start, row_stop, column, num_columns, num_pairs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVINGS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Stores the tile's gradient, half of the columns at a time."""
    if HALVINGS > 0:
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        hinge_gradient_tile(
            left, image_ids_ptr, caption_ids_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column, num_columns, num_pairs,
            BLOCK_M, BLOCK_N // 2, HALVINGS - 1, ORDER,
        )  # fmt: skip
        hinge_gradient_tile(
            right, image_ids_ptr, caption_ids_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column + BLOCK_N // 2, num_columns, num_pairs,
            BLOCK_M, BLOCK_N // 2, HALVINGS - 1, ORDER,
        )  # fmt: skip
    else:
        hinge_gradient_part(
            acc, image_ids_ptr, caption_ids_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column, num_columns, num_pairs, BLOCK_M, BLOCK_N, ORDER,
        )  # fmt: skip


@triton.jit
def hinge_gradient_part(
    acc, image_ids_ptr, caption_ids_ptr, threshold_ptr, d_sum_ptr, d_diagonal_ptr,
    gradient_ptr, stride_gradient, factor,
    row, row_start, row_stop, column, num_columns, num_pairs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_pairs, offs_n < num_pairs
    row_threshold = tl.load(threshold_ptr + offs_m, mask=mask_m, other=float("inf"))
    column_threshold = tl.load(threshold_ptr + offs_n, mask=mask_n, other=float("inf"))
    row_g = tl.load(d_sum_ptr + offs_m, mask=mask_m, other=0.0)
    column_g = tl.load(d_sum_ptr + num_pairs + offs_n, mask=mask_n, other=0.0)
    gradient = tl.where(acc > row_threshold[:, None], row_g[:, None], 0.0)
    gradient += tl.where(acc > column_threshold[None, :], column_g[None, :], 0.0)
    gradient = negative_gradient(
        gradient, image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if ORDER:
        gradient = over_distance(gradient, acc)
    store_gradient(
        gradient_ptr, stride_gradient, gradient, d_diagonal_ptr, factor,
        row, row_start, row_stop, column, num_columns, num_pairs, BLOCK_M, BLOCK_N,
    )  # fmt: skip
