"""From the gradient of S to what the backward ops return: its pieces, their products, d_scores."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ...arguments import accumulation_dtype
from . import configs, order
from .walk import (
    Rectangle,
    Walk,
    matrix_of,
    multiply,
    piece_scores,
    product,
    row_blocks,
    score_scratch,
    triton_accumulation,
)

# A float16 gradient of S is lifted to at most 2^15, half of what overflows.
LARGEST_GRADIENT_EXPONENT = 15


def gain_for(bound: Tensor) -> Tensor:
    """[2]: the power of two that lifts a gradient of S of size `bound` to 2^14 .. 2^15, and its inverse.

    Without it, a float16 gradient underflows as soon as 1 / N is folded in. With it, entries below 2^-39
    of the bound vanish: unless the bound is beyond 2^15, less than the smallest float16.
    """
    exponent = (LARGEST_GRADIENT_EXPONENT - bound.log2().ceil()).clamp(-100, 100)
    return torch.stack([exponent, -exponent]).exp2()


def needs_gain(walk: Walk) -> bool:
    return walk.family == "dot" and walk.images.dtype == torch.float16


def _gradient_dtype(walk: Walk) -> torch.dtype:
    """That of the matrix products to follow; the weights over distances of `order` may be of any size."""
    dtype = walk.images.dtype
    return accumulation_dtype(dtype) if walk.family == "order" else dtype


def gradient_pieces(walk: Walk, scores: Tensor | None = None) -> list[Rectangle]:
    """Rectangles of S whose gradient, and scores unless saved, fit into the workspace."""
    if walk.family == "scores":
        return list(walk.rectangles(bytes_per_row=1))  # in place: nothing to fit
    entry_bytes = _gradient_dtype(walk).itemsize
    if walk.source == "stored" and scores.numel() == 0:
        entry_bytes *= 2
    return list(walk.rectangles(entry_bytes * (len(walk.captions) + 15)))


def gradients(
    kernel, walk: Walk, pieces: list[Rectangle], saved: Tensor, gain, own: list[dict], **arguments
) -> Iterator[tuple[Rectangle, Tensor]]:
    """The gradient of one rectangle of S after the other, all in the same buffer.

    `own` holds further kernel arguments for each of the rectangles.
    """
    at_hand = matrix_of(walk, saved)
    scratch = score_scratch(walk, pieces, at_hand)
    # Rows begin on 16-byte boundaries, for wide stores and fast matrix products.
    buffer = walk.images.new_empty(
        max((p.row_stop - p.row_start) * _pitch(p) for p in pieces), dtype=_gradient_dtype(walk)
    )
    for piece, of_piece in zip(pieces, own, strict=True):
        height, width = piece.row_stop - piece.row_start, piece.num_columns
        scores = piece_scores(piece, at_hand, scratch)
        if walk.source == "stored" and at_hand is None:
            multiply(walk, piece, scores)
        pitch = _pitch(piece)
        gradient = buffer[: height * pitch].view(height, pitch)[:, :width]
        walk.launch(
            kernel, piece, scores, gradient_ptr=gradient, stride_gradient=pitch, gain_ptr=gain,
            HALVINGS=walk.tiles.halvings, ORDER=walk.family == "order", **of_piece, **arguments,
        )  # fmt: skip
        yield piece, gradient


def _pitch(piece: Rectangle) -> int:
    return triton.cdiv(piece.num_columns, 16) * 16


def gradient_of_scores(
    kernel, walk: Walk, pieces: list[Rectangle], statistic: Tensor, own: list[dict], **arguments
) -> Tensor:
    """d_scores [N, M], each entry written once. Any entry of `statistic` is NaN if S is poisoned."""
    scores, num_pairs = walk.images, walk.num_pairs
    d_scores = scores.new_empty(scores.shape)
    for piece, of_piece in zip(pieces, own, strict=True):
        walk.launch(
            kernel, piece, piece_scores(piece, scores, None),
            gradient_ptr=d_scores[piece.row_start :], stride_gradient=scores.shape[1],
            gain_ptr=None, HALVINGS=walk.tiles.halvings, ORDER=False, **of_piece, **arguments,
        )  # fmt: skip
    unseen = d_scores[num_pairs:, num_pairs:]
    if unseen.numel() > 0:
        first = statistic.flatten()[0]
        unseen.copy_(first.where(first.isnan(), 0))
    return d_scores


def sums(
    walk: Walk, pieces: list[Rectangle], each, gain, need_images: bool, need_captions: bool
) -> tuple[Tensor, Tensor]:
    """d_images and d_captions from `each` rectangle's gradient, summed in float32.

    For the dot product they are G T and G^t I.
    """
    images, captions = walk.images, walk.captions
    d_images = images.new_empty(images.shape if need_images else 0)
    d_captions = captions.new_empty(captions.shape if need_captions else 0)
    wide = accumulation_dtype(images.dtype)
    total = d_captions
    if need_captions and (len(pieces) > 1 or gain is not None) and d_captions.dtype != wide:
        total = torch.empty_like(d_captions, dtype=wide)
    for number, (piece, gradient) in enumerate(each):
        chunk, seen = slice(piece.row_start, piece.row_stop), slice(piece.num_columns)
        if walk.family == "order":
            if need_images:
                _order_sums("images", gradient, images[chunk], captions[seen], d_images[chunk])
            if need_captions:
                _order_sums(
                    "captions", gradient.t(), captions[seen], images[chunk], total[seen], number > 0
                )
            continue
        if need_images and gain is None:
            product(gradient, captions[seen], d_images[chunk])
        elif need_images:
            lifted = torch.empty_like(d_images[chunk], dtype=wide)
            product(gradient, captions[seen], lifted)
            torch.mul(lifted, gain[1], out=d_images[chunk])
        if need_captions:
            product(gradient.t(), images[chunk], total[seen], accumulate=number > 0)
    if total is not d_captions:
        d_captions.copy_(total) if gain is None else torch.mul(total, gain[1], out=d_captions)
    return d_images, d_captions


def _order_sums(side, weights, own, others, total, accumulate: bool = False) -> None:
    """total [own rows, D] = or, if `accumulate`, += what `others` pull at `own`, weighted."""
    dtype = accumulation_dtype(own.dtype)
    blocks = configs.ORDER_SUMS_FLOAT64 if dtype == torch.float64 else configs.ORDER_SUMS
    num_rows, num_dimensions = own.shape
    grid = triton.cdiv(num_rows, blocks["BLOCK_R"]), triton.cdiv(num_dimensions, blocks["BLOCK_D"])
    order.order_sums_kernel[grid](
        own, others, weights, total, own.stride(0), others.stride(0), *weights.stride(),
        num_rows, len(others), num_dimensions,
        SIDE=side, CARRY=accumulate, ACC=triton_accumulation(dtype), **blocks,
    )  # fmt: skip


def pair_weights(images, captions, d_positive, d_score=None, index=None) -> Tensor:
    """[1, K], or with d_score and index [3, K]: see order.pair_weights_kernel."""
    num_pairs, num_dimensions = len(d_positive), images.shape[1]
    weights = d_positive.new_empty(1 if index is None else 3, num_pairs)
    order.pair_weights_kernel[(num_pairs, len(weights))](
        images, captions, d_positive, d_score, index, weights, images.stride(0), captions.stride(0),
        num_pairs, num_dimensions, BLOCK_D=row_blocks(num_dimensions)["BLOCK_D"],
        ACC=triton_accumulation(images.dtype), num_warps=4,
    )  # fmt: skip
    return weights


def on_diagonal(walk: Walk, d_positive: Tensor) -> Tensor:
    """What the gradient kernels add on the diagonal."""
    if walk.family == "order":
        return pair_weights(walk.images, walk.captions, d_positive)[0]
    return d_positive
