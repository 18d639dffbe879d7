"""Kernels over the rows of the embeddings: scores of the pairs, and bounds on the input."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .order import order_score
from .tiles import SURVEY_PROGRAMS, magnitude_bits


@triton.jit
def load_block(pointer, stride, offs_row, num_rows, offs_d, D, ACC: tl.constexpr):
    mask = (offs_row < num_rows)[:, None] & (offs_d < D)[None, :]
    pointers = pointer + offs_row.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


# positive[k] = <I[pair_row + k], T[pair_column + k]>, or if ORDER -|max(0, T[..] - I[..])|_2
@triton.jit
def pair_scores_kernel(
    images_ptr, captions_ptr, positive_ptr, stride_images, stride_captions, pair_count, D,
    ORDER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The embeddings begin with pair 0."""
    ACC: tl.constexpr = positive_ptr.dtype.element_ty
    offs = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for d in tl.range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        image = load_block(images_ptr, stride_images, offs, pair_count, offs_d, D, ACC)
        caption = load_block(captions_ptr, stride_captions, offs, pair_count, offs_d, D, ACC)
        if ORDER:
            excess = tl.maximum(caption - image, 0.0)
            total += excess * excess
        else:
            total += image * caption
    positive = tl.sum(total, 1)
    if ORDER:
        positive = order_score(positive)
    tl.store(positive_ptr + offs, positive, mask=offs < pair_count)


class Rows(NamedTuple):
    """One side of the batch; program (b, 0) surveys the images, (b, 1) the captions."""

    pointer: Any  # [rows, D]
    stride: int
    num_rows: int
    rounded: Any  # [rows, pitch] bfloat16, for the certified search, else None
    norms: Any  # [2, rows]
    pitch: int


# bounds[side, 0] = max |x|, bounds[side, 1] = max_r |x_r|^2 over the rows of each program. For the certified
# search also rounded[r] = bfloat16(x_r), norms[0, r] = |x_r|^2, norms[1, r] = |x_r - rounded[r]|^2 and
# bounds[side, 2] = max_r norms[1, r].
#
#   for rows in my share:
#       for d in blocks of D:  load x[rows, d]; update norms and maxima
@triton.jit
def survey_kernel(images, captions, bounds_ptr, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    if tl.program_id(1) == 0:
        survey(images, bounds_ptr, D, BLOCK_R, BLOCK_D)
    else:
        survey(captions, bounds_ptr + 3 * SURVEY_PROGRAMS, D, BLOCK_R, BLOCK_D)


@triton.jit
def survey(side, bounds_ptr, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    program = tl.program_id(0)
    BITS: tl.constexpr = bounds_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if BITS == tl.int64 else tl.float32
    largest = tl.zeros((BLOCK_R, BLOCK_D), BITS)
    largest_square = tl.zeros((BLOCK_R,), BITS)
    largest_error = tl.zeros((BLOCK_R,), BITS)
    for row in tl.range(program * BLOCK_R, side.num_rows, SURVEY_PROGRAMS * BLOCK_R):
        offs = row + tl.arange(0, BLOCK_R)
        squares = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        errors = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        for d in tl.range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            x = load_block(side.pointer, side.stride, offs, side.num_rows, offs_d, D, ACC)
            squares += x * x
            largest = tl.maximum(largest, magnitude_bits(x))
            if side.rounded is not None:
                rounded = x.to(tl.bfloat16)
                mask = (offs < side.num_rows)[:, None] & (offs_d < D)[None, :]
                pointers = side.rounded + offs.to(tl.int64)[:, None] * side.pitch
                tl.store(pointers + offs_d[None, :], rounded, mask=mask)
                error = x - rounded.to(ACC)
                errors += error * error
        square = tl.sum(squares, 1)
        largest_square = tl.maximum(largest_square, magnitude_bits(square))
        if side.rounded is not None:
            error = tl.sum(errors, 1)
            largest_error = tl.maximum(largest_error, magnitude_bits(error))
            tl.store(side.norms + offs, square, mask=offs < side.num_rows)
            tl.store(side.norms + side.num_rows + offs, error, mask=offs < side.num_rows)
    tl.store(bounds_ptr + program, tl.max(tl.max(largest, 1), 0))
    tl.store(bounds_ptr + SURVEY_PROGRAMS + program, tl.max(largest_square, 0))
    if side.rounded is not None:
        tl.store(bounds_ptr + 2 * SURVEY_PROGRAMS + program, tl.max(largest_error, 0))
