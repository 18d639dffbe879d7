"""Kernels over the rows of the embeddings: positive scores, bounds on the input, L2 normalisation."""

import triton
import triton.language as tl

from .order import order_score

# Programs of survey_kernel, each of which leaves one column of bounds: 4 for each of 132 SMs, rounded.
SURVEY_PROGRAMS = tl.constexpr(512)
OVERFLOW = tl.constexpr(3.0e38)
OVERFLOW_FLOAT64 = tl.constexpr(1.7e308)
EPSILON = tl.constexpr(1e-12)
# Just under 1 / EPSILON, whatever the rounding: a row with this inverse norm was clamped.
LARGEST_INVERSE = tl.constexpr(0.9999e12)
# From here on squares might overflow; a power of two takes such a row, of whatever length, near 1.
HUGE_SQUARES, SHRINK = tl.constexpr(2.0**100), tl.constexpr(2.0**-80)
HUGE_SQUARES_FLOAT64, SHRINK_FLOAT64 = tl.constexpr(2.0**1000), tl.constexpr(2.0**-530)


@triton.jit
def magnitude_bits(x):
    """|x| as an integer, which orders like |x| with infinity and then NaN at the top."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def load_block(pointer, stride, offs_row, num_rows, offs_d, D, ACC: tl.constexpr):
    mask = (offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
    pointers = pointer + offs_row.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


# positive[k] = sum_d I[k, d] T[k, d], or if ORDER -|max(0, T[k] - I[k])|_2
# bounds[0] = max |I|, bounds[1] = max |T|, bounds[2] = max_i |I_i|^2, bounds[3] = max_j |T_j|^2
#
#   for rows in my share of 0 .. max(N, M):
#       for d in blocks of D:  load I[rows, d], T[rows, d]; update the dot product, norms and maxima
@triton.jit
def survey_kernel(
    images_ptr, captions_ptr, positive_ptr, bounds_ptr,
    stride_images, stride_captions, num_images, num_captions, num_pairs, D,
    ORDER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    BITS: tl.constexpr = tl.int64 if ACC == tl.float64 else tl.int32
    max_image = tl.zeros((BLOCK_R, BLOCK_D), BITS)
    max_caption = tl.zeros((BLOCK_R, BLOCK_D), BITS)
    max_image_norm = tl.zeros((BLOCK_R,), BITS)
    max_caption_norm = tl.zeros((BLOCK_R,), BITS)
    num_rows = tl.maximum(num_images, num_captions)
    for row in tl.range(program * BLOCK_R, num_rows, SURVEY_PROGRAMS * BLOCK_R):
        offs_row = row + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        image_square = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        caption_square = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        for d in tl.range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            image = load_block(images_ptr, stride_images, offs_row, num_images, offs_d, D, ACC)
            caption = load_block(
                captions_ptr, stride_captions, offs_row, num_captions, offs_d, D, ACC
            )
            if ORDER:
                excess = tl.maximum(caption - image, 0.0)
                total += excess * excess
            else:
                total += image * caption
            image_square += image * image
            caption_square += caption * caption
            max_image = tl.maximum(max_image, magnitude_bits(image))
            max_caption = tl.maximum(max_caption, magnitude_bits(caption))
        positive = tl.sum(total, 1)
        if ORDER:
            positive = order_score(positive)
        tl.store(positive_ptr + offs_row, positive, mask=offs_row < num_pairs)
        max_image_norm = tl.maximum(max_image_norm, magnitude_bits(tl.sum(image_square, 1)))
        max_caption_norm = tl.maximum(max_caption_norm, magnitude_bits(tl.sum(caption_square, 1)))
    tl.store(bounds_ptr + program, tl.max(tl.max(max_image, 1), 0))
    tl.store(bounds_ptr + SURVEY_PROGRAMS + program, tl.max(tl.max(max_caption, 1), 0))
    tl.store(bounds_ptr + 2 * SURVEY_PROGRAMS + program, tl.max(max_image_norm, 0))
    tl.store(bounds_ptr + 3 * SURVEY_PROGRAMS + program, tl.max(max_caption_norm, 0))


@triton.jit
def load_bound(bounds_ptr, which: tl.constexpr, num_bounds, ACC: tl.constexpr):
    """The maximum over what the programs of survey_kernel left in bounds[which]."""
    offs = tl.arange(0, SURVEY_PROGRAMS)
    bits = tl.load(bounds_ptr + which * SURVEY_PROGRAMS + offs, mask=offs < num_bounds, other=0)
    return tl.max(bits, 0).to(ACC, bitcast=True)


@triton.jit
def is_poisoned(bounds_ptr, num_bounds, D, FAMILY: tl.constexpr, ACC: tl.constexpr):
    """Whether anything in the input is not finite, or so large that a score might overflow.

    FAMILY "dot" and "order": the bounds of survey_kernel, with |score| <= D max|I| max|T| and
    score^2 <= 2 D (max|I|^2 + max|T|^2). "scores": max|S| of leave_bound; differences must not overflow.
    """
    limit: tl.constexpr = OVERFLOW_FLOAT64 if ACC == tl.float64 else OVERFLOW
    bound = load_bound(bounds_ptr, 0, num_bounds, ACC)
    if FAMILY == "scores":
        bound = 4 * bound
    elif FAMILY == "order":
        caption = load_bound(bounds_ptr, 1, num_bounds, ACC)
        bound = 4 * D * (bound * bound + caption * caption)
    else:
        bound = bound * load_bound(bounds_ptr, 1, num_bounds, ACC) * D
    # NaN compares false; 0 times infinity is NaN.
    return (bound < limit) == 0


# normalized[r] = rows[r] * inverse_norm[r], inverse_norm[r] = 1 / max(|rows[r]|, 1e-12)
#
#   for d in blocks of D:  squares += rows[r, d]^2, and of the shrunk entries
#   scale = 1, or what shrinks a huge row
#   for d in blocks of D:  normalized[r, d] = scale rows[r, d] / norm of the scaled row
@triton.jit
def l2_normalize_kernel(
    rows_ptr, normalized_ptr, inverse_norm_ptr, stride_rows, num_rows, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    IS_DOUBLE: tl.constexpr = ACC == tl.float64
    shrink: tl.constexpr = SHRINK_FLOAT64 if IS_DOUBLE else SHRINK
    squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    shrunk_squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for d in tl.range(0, D, BLOCK_D):
        x = load_block(rows_ptr, stride_rows, offs_row, num_rows, d + tl.arange(0, BLOCK_D), D, ACC)
        squares += x * x
        shrunk_squares += (x * shrink) * (x * shrink)
    square = tl.sum(squares, 1)
    is_huge = square > (HUGE_SQUARES_FLOAT64 if IS_DOUBLE else HUGE_SQUARES)
    scale = tl.where(is_huge, shrink, 1.0).to(ACC)
    norm = tl.sqrt(tl.where(is_huge, tl.sum(shrunk_squares, 1), square))
    inverse = 1.0 / tl.where(norm < EPSILON, EPSILON, norm)
    tl.store(inverse_norm_ptr + offs_row, scale * inverse, mask=offs_row < num_rows)
    for d in tl.range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = load_block(rows_ptr, stride_rows, offs_row, num_rows, offs_d, D, ACC)
        y = x * scale[:, None] * inverse[:, None]
        store_block(normalized_ptr, offs_row, num_rows, offs_d, D, y)


@triton.jit
def store_block(pointer, offs_row, num_rows, offs_d, D, value):
    """Stores to a contiguous [num_rows, D]."""
    mask = (offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
    pointers = pointer + offs_row.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


# d_rows[r] = inverse_norm[r] (d[r] - y[r] <y[r], d[r]>); without the projection where the norm was
# below 1e-12, since there it is a constant.
@triton.jit
def l2_normalize_backward_kernel(
    d_normalized_ptr, normalized_ptr, inverse_norm_ptr, d_rows_ptr, stride_d, stride_normalized,
    num_rows, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inverse = tl.load(inverse_norm_ptr + offs_row, mask=offs_row < num_rows, other=0.0)
    products = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for k in tl.range(0, D, BLOCK_D):
        offs_d = k + tl.arange(0, BLOCK_D)
        d = load_block(d_normalized_ptr, stride_d, offs_row, num_rows, offs_d, D, ACC)
        y = load_block(normalized_ptr, stride_normalized, offs_row, num_rows, offs_d, D, ACC)
        products += d * y
    projection = tl.where(inverse < LARGEST_INVERSE, tl.sum(products, 1), 0.0)
    # NaN rows stay NaN.
    projection = tl.where(inverse == inverse, projection, inverse)
    for k in tl.range(0, D, BLOCK_D):
        offs_d = k + tl.arange(0, BLOCK_D)
        d = load_block(d_normalized_ptr, stride_d, offs_row, num_rows, offs_d, D, ACC)
        y = load_block(normalized_ptr, stride_normalized, offs_row, num_rows, offs_d, D, ACC)
        d_rows = inverse[:, None] * (d - y * projection[:, None])
        store_block(d_rows_ptr, offs_row, num_rows, offs_d, D, d_rows)
