"""Hardest negative of every anchor: arg-max over S tile by tile, merge, and the sparse backward pass."""

import triton
import triton.language as tl

from .order import pull
from .rows import is_poisoned, magnitude_bits
from .tiles import (
    NO_INDEX,
    crosses_diagonal,
    leave_bound,
    load_partials,
    negative_scores,
    score_tile,
    store_partial,
    tile_position,
)


@triton.jit
def argmax_tile(acc, offs, AXIS: tl.constexpr):
    """Maximum along AXIS and the smallest of `offs` (the indices along AXIS) that attains it."""
    best = tl.max(acc, AXIS)
    winners = acc == tl.expand_dims(best, AXIS)
    return best, tl.min(tl.where(winners, tl.expand_dims(offs, 1 - AXIS), NO_INDEX), AXIS)


@triton.jit
def runner_up_tile(acc, offs, index, AXIS: tl.constexpr):
    """Maximum along AXIS without the entry at `index`."""
    is_best = tl.expand_dims(offs, 1 - AXIS) == tl.expand_dims(index, AXIS)
    return tl.max(tl.where(is_best, -float("inf"), acc), AXIS)


@triton.jit
def index_bits(index, value):
    """An index in a float of the scores' width, so that one array holds scores and indices."""
    if value.dtype == tl.float64:
        return index.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return index.to(tl.float32, bitcast=True)


@triton.jit
def bits_index(value):
    if value.dtype == tl.float64:
        return value.to(tl.int64, bitcast=True).to(tl.int32)
    else:
        return value.to(tl.int32, bitcast=True)


# Per tile, for the rows and for the columns: the largest score of a negative and its smallest index.
#
#   for tile in my tiles:
#       s = I[rows] T[columns]^t, -inf where not a negative
#       row partial [column tile] = max_j s, argmax_j s      column partial [1 + row tile] = the same over i
#
# RUNNER_UP adds the second largest score (the certified search needs it). GUARDED returns at once unless
# work[0] > work_limit: an exact pass that is needed only when the certified search gave up.
@triton.jit
def hardest_kernel(
    images_ptr, captions_ptr, scores_ptr, image_ids_ptr, caption_ids_ptr,
    row_partial_ptr, column_partial_ptr, bounds_ptr, work_ptr, work_limit,
    stride_images, stride_captions, stride_score_rows, stride_score_columns,
    row_start, row_stop, num_columns, num_pairs, D,
    RUNNER_UP: tl.constexpr, GUARDED: tl.constexpr,
    SOURCE: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if GUARDED:
        if tl.load(work_ptr) <= work_limit:
            return
    PLANES: tl.constexpr = 3 if RUNNER_UP else 2
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

        offs_n = column + tl.arange(0, BLOCK_N)
        best, index = argmax_tile(acc, offs_n, 1)
        store_partial(
            row_partial_ptr, 0, PLANES, column_tile, row, row_start, num_rows, num_pairs,
            best, BLOCK_M,
        )  # fmt: skip
        store_partial(
            row_partial_ptr, 1, PLANES, column_tile, row, row_start, num_rows, num_pairs,
            index_bits(index, best), BLOCK_M,
        )  # fmt: skip
        if RUNNER_UP:
            second = runner_up_tile(acc, offs_n, index, 1)
            store_partial(
                row_partial_ptr, 2, PLANES, column_tile, row, row_start, num_rows, num_pairs,
                second, BLOCK_M,
            )  # fmt: skip

        offs_m = row + tl.arange(0, BLOCK_M)
        best, index = argmax_tile(acc, offs_m, 0)
        store_partial(
            column_partial_ptr, 0, PLANES, row_tile + 1, column, 0, num_pairs, num_pairs,
            best, BLOCK_N,
        )  # fmt: skip
        store_partial(
            column_partial_ptr, 1, PLANES, row_tile + 1, column, 0, num_pairs, num_pairs,
            index_bits(index, best), BLOCK_N,
        )  # fmt: skip
        if RUNNER_UP:
            second = runner_up_tile(acc, offs_m, index, 0)
            store_partial(
                column_partial_ptr, 2, PLANES, row_tile + 1, column, 0, num_pairs, num_pairs,
                second, BLOCK_N,
            )  # fmt: skip
    if SOURCE == "given":
        leave_bound(bounds_ptr, magnitudes)


# The best of the partial results in slots [first, stop) of each anchor, ties to the smallest index.
# Column results carry over from one rectangle to the next in slot 0.
#
#   for slots in blocks of BLOCK_S:
#       best, index = the larger of (best, index) and (max value[slots], its smallest index)
@triton.jit
def hardest_merge_kernel(
    row_partial_ptr, column_partial_ptr, positive_ptr, score_ptr, index_ptr, bounds_ptr,
    work_ptr, work_limit, row_start, num_rows, row_slots, column_first, column_slots,
    num_pairs, num_bounds, D, FAMILY: tl.constexpr,
    GUARDED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if GUARDED:
        if tl.load(work_ptr) <= work_limit:
            return
    is_column = tl.program_id(1) == 1
    pointer = row_partial_ptr
    if is_column:
        pointer = column_partial_ptr
    first_slot = tl.where(is_column, column_first, 0)
    num_slots = tl.where(is_column, column_slots, row_slots)
    num_anchors = tl.where(is_column, num_pairs, num_rows)
    origin = tl.where(is_column, 0, row_start)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)

    best = tl.full((BLOCK_A,), -float("inf"), ACC)
    index = tl.full((BLOCK_A,), NO_INDEX, tl.int32)
    for slot in tl.range(first_slot, num_slots, BLOCK_S):
        offs_s = slot + tl.arange(0, BLOCK_S)
        value = load_partials(pointer, 0, 2, offs_s, num_slots, offs_a, num_anchors, -float("inf"))
        where = load_partials(pointer, 1, 2, offs_s, num_slots, offs_a, num_anchors, 0.0)
        new_best = tl.max(value, 0)
        new_index = tl.min(tl.where(value == new_best[None, :], bits_index(where), NO_INDEX), 0)
        better = (new_best > best) | ((new_best == best) & (new_index < index))
        best = tl.where(better, new_best, best)
        index = tl.where(better, new_index, index)

    mask = (offs_a < num_anchors) & (origin + offs_a < num_pairs)
    if is_column:
        tl.store(pointer + offs_a, best, mask=mask)
        tl.store(pointer + num_anchors + offs_a, index_bits(index, best), mask=mask)
    finish_hardest(
        positive_ptr, score_ptr, index_ptr, bounds_ptr, is_column, origin + offs_a, mask, best, index,
        num_pairs, num_bounds, D, FAMILY, ACC,
    )  # fmt: skip


@triton.jit
def finish_hardest(
    positive_ptr, score_ptr, index_ptr, bounds_ptr, is_column, offs_k, mask, best, index,
    num_pairs, num_bounds, D, FAMILY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores score and index of the anchors offs_k; NaN and -1 if the input is poisoned."""
    poisoned = is_poisoned(bounds_ptr, num_bounds, D, FAMILY, ACC)
    found = (best > -float("inf")) & (poisoned == 0)
    offs = is_column.to(tl.int64) * num_pairs + offs_k
    tl.store(index_ptr + offs, tl.where(found, index, -1).to(tl.int64), mask=mask)
    tl.store(score_ptr + offs, tl.where(poisoned, float("nan"), best), mask=mask)
    if poisoned:
        nan = tl.full(offs.shape, float("nan"), ACC)
        tl.store(positive_ptr + offs_k, nan, mask=mask)
        # Rows of an earlier rectangle, in which given scores had nothing wrong yet.
        tl.store(score_ptr + offs_k, nan, mask=mask)
        tl.store(index_ptr + offs_k, tl.full(offs.shape, -1, tl.int64), mask=mask)


# keys[k] = N + index[0, k], keys[K + k] = index[1, k]: the row of [I; T] that anchor k of each direction
# points at; N + M for none.
@triton.jit
def target_keys_kernel(
    index_ptr, keys_ptr, num_images, num_captions, num_pairs, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < 2 * num_pairs
    index = tl.load(index_ptr + offs, mask=mask, other=-1)
    target = index + tl.where(offs < num_pairs, num_images, 0)
    key = tl.where(index >= 0, target, num_images + num_captions)
    tl.store(keys_ptr + offs, key.to(tl.int32), mask=mask)


# Row r of one side gets, with o the other side's embeddings (for the order similarity, what they pull at
# row r), g the upstream gradients of this side's anchors and h those of the other side's:
#
#   d[r] = d_positive[r] o[r] + g[r] o[index[r]]                                       if r < K
#        + sum of h[k] o[k] over the k with other_index[k] == r, in ascending order
#
# LISTED: those k are order[starts[r] : starts[r + 1]] - shift, from a stable sort. Otherwise, for at most
# BLOCK_K pairs, every program looks through other_index itself: one launch for the whole backward pass.
@triton.jit
def hardest_backward_kernel(
    own_ptr, others_ptr, d_own_ptr, d_positive_ptr, d_own_score_ptr, d_other_score_ptr,
    own_index_ptr, other_index_ptr, positive_ptr, order_ptr, starts_ptr,
    stride_own, stride_others, num_pairs, D, first_start, shift,
    SIDE: tl.constexpr, LISTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    own = own_ptr + row.to(tl.int64) * stride_own + offs_d
    if SIDE == "dot":
        own = 0.0
    else:
        own = tl.load(own, mask=mask_d, other=0.0).to(ACC)
    acc = tl.zeros((BLOCK_D,), ACC)
    if row < num_pairs:
        index = tl.load(own_index_ptr + row)
        weight = tl.where(index >= 0, tl.load(d_own_score_ptr + row), 0.0)
        hardest = others_ptr + tl.maximum(index, 0) * stride_others + offs_d
        pair = others_ptr + row.to(tl.int64) * stride_others + offs_d
        acc += weight * pull(tl.load(hardest, mask=mask_d, other=0.0).to(ACC), own, SIDE)
        pair = pull(tl.load(pair, mask=mask_d, other=0.0).to(ACC), own, SIDE)
        acc += tl.load(d_positive_ptr + row) * pair
    if LISTED:
        start = tl.load(starts_ptr + first_start + row)
        stop = tl.load(starts_ptr + first_start + row + 1)
        for position in tl.range(start, stop):
            k = tl.load(order_ptr + position) - shift
            other = others_ptr + k.to(tl.int64) * stride_others + offs_d
            other = pull(tl.load(other, mask=mask_d, other=0.0).to(ACC), own, SIDE)
            acc += tl.load(d_other_score_ptr + k) * other
    else:
        offs_k = tl.arange(0, BLOCK_K)
        chosen = tl.load(other_index_ptr + offs_k, mask=offs_k < num_pairs, other=-1) == row
        k = tl.min(tl.where(chosen, offs_k, NO_INDEX), 0)
        while k < NO_INDEX:
            other = others_ptr + k.to(tl.int64) * stride_others + offs_d
            other = pull(tl.load(other, mask=mask_d, other=0.0).to(ACC), own, SIDE)
            acc += tl.load(d_other_score_ptr + k) * other
            k = tl.min(tl.where(chosen & (offs_k > k), offs_k, NO_INDEX), 0)
    # Poisoned input: every positive score is NaN.
    positive = tl.load(positive_ptr)
    acc = tl.where(positive == positive, acc, positive)
    target = d_own_ptr + row.to(tl.int64) * D + offs_d
    tl.store(target, acc.to(d_own_ptr.dtype.element_ty), mask=mask_d)


# The same for given scores, one tile a program:
#
#   d_scores[i, j] = [i == j < K] d_positive[i] + [j == index[0, i]] g[0, i] + [i == index[1, j]] g[1, j]
@triton.jit
def hardest_scores_backward_kernel(
    d_scores_ptr, d_positive_ptr, d_score_ptr, positive_ptr, index_ptr,
    num_rows, num_columns, num_pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    row = tl.program_id(0) // column_tiles * BLOCK_M
    column = tl.program_id(0) % column_tiles * BLOCK_N
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_pairs, offs_n < num_pairs
    row_index = tl.load(index_ptr + offs_m, mask=mask_m, other=-1).to(tl.int32)
    column_index = tl.load(index_ptr + num_pairs + offs_n, mask=mask_n, other=-1).to(tl.int32)
    row_g = tl.load(d_score_ptr + offs_m, mask=mask_m, other=0.0)
    column_g = tl.load(d_score_ptr + num_pairs + offs_n, mask=mask_n, other=0.0)
    gradient = tl.where(row_index[:, None] == offs_n[None, :], row_g[:, None], 0.0)
    gradient += tl.where(column_index[None, :] == offs_m[:, None], column_g[None, :], 0.0)
    if crosses_diagonal(row, column, BLOCK_M, BLOCK_N):
        d_positive = tl.load(d_positive_ptr + offs_m, mask=mask_m, other=0.0)
        gradient += tl.where(offs_m[:, None] == offs_n[None, :], d_positive[:, None], 0.0)
    # Poisoned input: every positive score is NaN.
    positive = tl.load(positive_ptr)
    gradient = tl.where(positive == positive, gradient, positive)
    pointers = d_scores_ptr + offs_m.to(tl.int64)[:, None] * num_columns + offs_n[None, :]
    inside = (offs_m < num_rows)[:, None] & (offs_n < num_columns)[None, :]
    tl.store(pointers, gradient.to(d_scores_ptr.dtype.element_ty), mask=inside)
