"""log Σ exp(a s) over every anchor's negatives: tile by tile, merge, and the gradient with respect to S."""

import triton
import triton.language as tl

from .order import over_distance
from .rows import is_poisoned, load_bound, magnitude_bits
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

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of anything in this range is a normal float32.
LARGEST_EXPONENT = tl.constexpr(120.0)


@triton.jit
def base2_scale(scale, scale_rest, scale_ptr, ACC: tl.constexpr):
    """c with exp(a s) = exp2(c s), for a = (scale + scale_rest) * scale_tensor, rounded once."""
    c = (tl.full((), LOG2_E, tl.float64) * scale) + (tl.full((), LOG2_E, tl.float64) * scale_rest)
    if scale_ptr is not None:
        c *= tl.load(scale_ptr).to(tl.float64)
    return c.to(ACC)


@triton.jit
def one_exp_shift(c, bounds_ptr, num_bounds, num_anchors, ACC: tl.constexpr):
    """(shift, safe): exp2(c s - shift) is the same for the row and the column sum of an entry.

    |c s| <= reach = c max|I_i| max|T_j| leaves exponents in [-2 reach + top, top]. `top` lifts them to
    normal numbers and is safe while the sum of `num_anchors` of them stays below the overflow.
    """
    image_norm = tl.sqrt(load_bound(bounds_ptr, 2, num_bounds, ACC))
    caption_norm = tl.sqrt(load_bound(bounds_ptr, 3, num_bounds, ACC))
    reach = tl.abs(c) * image_norm * caption_norm * 1.01
    top = tl.maximum(2 * reach - LARGEST_EXPONENT, 0.0)
    safe = top + tl.log2(tl.full((), 0.0, ACC) + num_anchors) <= LARGEST_EXPONENT
    return reach - top, safe


# Per tile, for the rows and for the columns: a reference m (in units of log 2) and sum exp2(c s - m).
#
#   for tile in my tiles:
#       s = I[rows] T[columns]^t, -inf where not a negative
#       one exp:   e = exp2(c s - shift);   partial = (shift, sum e)       if `shift` serves all of S
#       two exps:  m = max c s;             partial = (m, sum exp2(c s - m)), rows and columns each
@triton.jit
def logsumexp_kernel(
    images_ptr, captions_ptr, scores_ptr, image_ids_ptr, caption_ids_ptr,
    row_partial_ptr, column_partial_ptr, bounds_ptr, scale_ptr, scale, scale_rest,
    stride_images, stride_captions, stride_score_rows, stride_score_columns,
    row_start, row_stop, num_columns, num_pairs, D,
    num_anchors, num_bounds,
    ONE_EXP: tl.constexpr,
    SOURCE: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    c = base2_scale(scale, scale_rest, scale_ptr, ACC)
    if ONE_EXP:
        shift, one_exp = one_exp_shift(c, bounds_ptr, num_bounds, num_anchors, ACC)
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

        if ONE_EXP:
            if one_exp:
                exps = tl.exp2(acc * c - shift)
                row_sum, column_sum = tl.sum(exps, 1), tl.sum(exps, 0)
                row_max, column_max = row_sum * 0 + shift, column_sum * 0 + shift
            else:
                row_max, row_sum = sum_exp2(acc, c, 1)
                column_max, column_sum = sum_exp2(acc, c, 0)
        else:
            row_max, row_sum = sum_exp2(acc, c, 1)
            column_max, column_sum = sum_exp2(acc, c, 0)

        store_partial(
            row_partial_ptr, 0, 2, column_tile, row, row_start, num_rows, num_pairs,
            row_max, BLOCK_M,
        )  # fmt: skip
        store_partial(
            row_partial_ptr, 1, 2, column_tile, row, row_start, num_rows, num_pairs,
            row_sum, BLOCK_M,
        )  # fmt: skip
        store_partial(
            column_partial_ptr, 0, 2, row_tile + 1, column, 0, num_pairs, num_pairs,
            column_max, BLOCK_N,
        )  # fmt: skip
        store_partial(
            column_partial_ptr, 1, 2, row_tile + 1, column, 0, num_pairs, num_pairs,
            column_sum, BLOCK_N,
        )  # fmt: skip
    if SOURCE == "given":
        leave_bound(bounds_ptr, magnitudes)


@triton.jit
def sum_exp2(acc, c, AXIS: tl.constexpr):
    """m = max c s and sum exp2(c s - m) along AXIS; -inf and 0 where every entry is -inf."""
    logits = acc * c
    largest = tl.max(logits, AXIS)
    return largest, tl.sum(tl.exp2(logits - tl.expand_dims(finite(largest), AXIS)), AXIS)


@triton.jit
def finite(reference):
    """0 for -inf: the reference of an empty sum, which must not make -inf - -inf."""
    return tl.where(reference == -float("inf"), 0.0, reference)


# logsumexp = ln 2 (m + log2 sum), over the partial results (m, sum) of slots [first, stop).
#
#   for slots in blocks of BLOCK_S:
#       (m, sum) = (max(m, m[slots]), both sums rescaled to it)
@triton.jit
def logsumexp_merge_kernel(
    row_partial_ptr, column_partial_ptr, positive_ptr, logsumexp_ptr, bounds_ptr,
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

    largest = tl.full((BLOCK_A,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_A,), ACC)
    for slot in tl.range(first_slot, num_slots, BLOCK_S):
        offs_s = slot + tl.arange(0, BLOCK_S)
        reference = load_partials(
            pointer, 0, 2, offs_s, num_slots, offs_a, num_anchors, -float("inf")
        )
        sums = load_partials(pointer, 1, 2, offs_s, num_slots, offs_a, num_anchors, 0.0)
        new_largest = tl.maximum(largest, tl.max(reference, 0))
        total *= tl.exp2(largest - finite(new_largest))
        total += tl.sum(sums * tl.exp2(reference - finite(new_largest)[None, :]), 0)
        largest = new_largest

    mask = (offs_a < num_anchors) & (origin + offs_a < num_pairs)
    if is_column:
        tl.store(pointer + offs_a, largest, mask=mask)
        tl.store(pointer + num_anchors + offs_a, total, mask=mask)
    poisoned = is_poisoned(bounds_ptr, num_bounds, D, FAMILY, ACC)
    value = largest.to(tl.float64) + tl.log2(total.to(tl.float64))
    value = tl.where(total > 0, value * tl.full((), LN_2, tl.float64), -float("inf"))
    # Not poisoned, yet NaN: the scale is.
    value = tl.where(poisoned | (total != total), float("nan"), value)
    offs_k = origin + offs_a
    tl.store(logsumexp_ptr + is_column.to(tl.int64) * num_pairs + offs_k, value, mask=mask)
    if poisoned:
        nan = tl.full((BLOCK_A,), float("nan"), ACC)
        tl.store(positive_ptr + offs_k, nan, mask=mask)
        # Rows of an earlier rectangle, in which given scores had nothing wrong yet.
        tl.store(logsumexp_ptr + offs_k, nan.to(tl.float64), mask=mask)


# The gradient with respect to a rectangle of S, rounded to the dtype of the matrix products that follow:
#
#   for tile in my tiles:
#       w_ij = a (exp(a s_ij - lse_i) g_i + exp(a s_ij - lse_j) g_j)     for a negative, else 0
#       G_ij = gain (w_ij + [i == j < K] d_positive_i)
#       d_scale[tile] = sum_ij w_ij s_ij / a
#
# ORDER: w_ij in G is divided by the distance -s_ij, d_positive has been.
@triton.jit
def logsumexp_gradient_kernel(
    images_ptr, captions_ptr, scores_ptr, image_ids_ptr, caption_ids_ptr,
    logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr, gradient_ptr, d_scale_ptr, gain_ptr,
    scale_ptr, scale, scale_rest,
    stride_images, stride_captions, stride_score_rows, stride_score_columns, stride_gradient,
    row_start, row_stop, num_columns, num_pairs, D,
    SOURCE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVINGS: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = base2_scale(scale, scale_rest, scale_ptr, ACC)
    # Poisoned input: every logsumexp is NaN, and so becomes every entry.
    first = tl.load(logsumexp_ptr).to(ACC)
    poison = tl.where(first == first, 1.0, first)
    factor = poison
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

        d_scale = logsumexp_gradient_tile(
            acc, c, image_ids_ptr, caption_ids_ptr, logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column, num_columns, num_pairs, BLOCK_M, BLOCK_N, HALVINGS,
            d_scale_ptr is not None, ORDER,
        )  # fmt: skip
        if d_scale_ptr is not None:
            tl.store(d_scale_ptr + tile, d_scale * poison)


@triton.jit
def logsumexp_gradient_tile(
    acc, c, image_ids_ptr, caption_ids_ptr, logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr,
    gradient_ptr, stride_gradient, factor,
    row, row_start, row_stop, column, num_columns, num_pairs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVINGS: tl.constexpr, NEED_SCALE: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """Stores the tile's gradient, half of the columns at a time, and returns its share of d_scale."""
    if HALVINGS > 0:
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        d_scale = logsumexp_gradient_tile(
            left, c, image_ids_ptr, caption_ids_ptr, logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column, num_columns, num_pairs,
            BLOCK_M, BLOCK_N // 2, HALVINGS - 1, NEED_SCALE, ORDER,
        )  # fmt: skip
        d_scale += logsumexp_gradient_tile(
            right, c, image_ids_ptr, caption_ids_ptr, logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column + BLOCK_N // 2, num_columns, num_pairs,
            BLOCK_M, BLOCK_N // 2, HALVINGS - 1, NEED_SCALE, ORDER,
        )  # fmt: skip
    else:
        d_scale = logsumexp_gradient_part(
            acc, c, image_ids_ptr, caption_ids_ptr, logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr,
            gradient_ptr, stride_gradient, factor,
            row, row_start, row_stop, column, num_columns, num_pairs, BLOCK_M, BLOCK_N, NEED_SCALE,
            ORDER,
        )  # fmt: skip
    return d_scale


@triton.jit
def anchor_terms(logsumexp_ptr, d_logsumexp_ptr, offs, mask, c):
    """(l, w) with exp2(c s - l) w = a g exp(a s - lse): what rounding takes from l goes into w.

    exp2(-inf) = 0 for what is no anchor; an anchor without negatives has only excluded entries.
    """
    exact = tl.load(logsumexp_ptr + offs, mask=mask, other=float("inf"))
    exact *= tl.full((), LOG2_E, tl.float64)
    rounded = exact.to(c.dtype)
    rest = tl.where(tl.abs(exact) < float("inf"), exact - rounded.to(tl.float64), 0.0)
    g = tl.load(d_logsumexp_ptr + offs, mask=mask, other=0.0)
    a = c.to(tl.float64) * tl.full((), LN_2, tl.float64)
    weight = g * a * (1.0 - rest * tl.full((), LN_2, tl.float64))
    return rounded, weight.to(c.dtype)


@triton.jit
def logsumexp_gradient_part(
    acc, c, image_ids_ptr, caption_ids_ptr, logsumexp_ptr, d_logsumexp_ptr, d_positive_ptr,
    gradient_ptr, stride_gradient, factor,
    row, row_start, row_stop, column, num_columns, num_pairs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NEED_SCALE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_pairs, offs_n < num_pairs
    row_lse, row_g = anchor_terms(logsumexp_ptr, d_logsumexp_ptr, offs_m, mask_m, c)
    column_lse, column_g = anchor_terms(
        logsumexp_ptr + num_pairs, d_logsumexp_ptr + num_pairs, offs_n, mask_n, c
    )
    gradient = tl.exp2(acc * c - row_lse[:, None]) * row_g[:, None]
    gradient += tl.exp2(acc * c - column_lse[None, :]) * column_g[None, :]
    gradient = negative_gradient(
        gradient, image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    d_scale = tl.zeros((), acc.dtype)
    if NEED_SCALE:
        d_scale += tl.sum(tl.sum(gradient * acc, 1), 0) / (c * LN_2)
    if ORDER:
        gradient = over_distance(gradient, acc)
    store_gradient(
        gradient_ptr, stride_gradient, gradient, d_positive_ptr, factor,
        row, row_start, row_stop, column, num_columns, num_pairs, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    return d_scale
