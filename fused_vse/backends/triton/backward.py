"""Host side of the backward ops: what each allocates and launches."""

import torch
import triton
from torch import Tensor

from . import configs, hardest, hinge, logsumexp, rows
from .walk import (
    Rectangle,
    Walk,
    accumulation,
    multiply,
    piece_scores,
    plan,
    product,
    row_blocks,
    scale_arguments,
    score_scratch,
    triton_accumulation,
    unit_stride,
)

# A float16 gradient of S is lifted to at most 2^14: the largest sum of its terms stays below 65504.
LARGEST_GRADIENT_EXPONENT = 14
# How often a gradient's tile is halved before its entries are computed: what
# tests/test_triton_compile.py needs to see no spills.
HALVINGS = 2


def hardest_negatives_backward(
    d_positive, d_score, positive, index, images, captions, need_images, need_captions
):
    images, captions = unit_stride(images), unit_stride(captions)
    d_positive, d_score, index = d_positive.contiguous(), d_score.contiguous(), index.contiguous()
    order = starts = None
    if index.shape[1] > configs.MAX_UNLISTED_PAIRS:
        order, starts = _entries_by_target(index, len(images), len(captions))
    d_images, d_captions = images.new_empty(0), captions.new_empty(0)
    if need_images:
        d_images = images.new_empty(images.shape)
        _gather(d_images, captions, 0, d_positive, d_score, positive, index, order, starts)
    if need_captions:
        d_captions = captions.new_empty(captions.shape)
        _gather(d_captions, images, 1, d_positive, d_score, positive, index, order, starts)
    return d_images, d_captions


def _entries_by_target(index: Tensor, num_images: int, num_captions: int) -> tuple[Tensor, Tensor]:
    """Stable counting sort of the anchors by the row of [I; T] that they point at.

    Returns:
        order: the anchors 0 .. 2 K, first those that point at row 0, in ascending order.
        starts: where the anchors of each row begin in it.
    """
    num_pairs = index.shape[1]
    keys = index.new_empty(2 * num_pairs, dtype=torch.int32)
    hardest.target_keys_kernel[(triton.cdiv(2 * num_pairs, 1024),)](
        index, keys, num_images, num_captions, num_pairs, BLOCK=1024, num_warps=4
    )
    keys, order = torch.sort(keys, stable=True)
    boundaries = torch.arange(num_images + num_captions + 1, dtype=torch.int32, device=keys.device)
    return order, torch.searchsorted(keys, boundaries)


def _gather(
    d_embeddings, others, side, d_positive, d_score, positive, index, order, starts
) -> None:
    """d_embeddings of side 0 (images) or 1 (captions) out of the other side's embeddings."""
    num_rows, num_dimensions = d_embeddings.shape
    num_pairs = index.shape[1]
    block_d = min(triton.next_power_of_2(num_dimensions), 512)
    hardest.hardest_backward_kernel[(num_rows, triton.cdiv(num_dimensions, block_d))](
        others, d_embeddings, d_positive, d_score[side], d_score[1 - side],
        index[side], index[1 - side], positive, order, starts,
        others.stride(0), num_pairs, num_dimensions,
        first_start=0 if side == 0 else len(others), shift=num_pairs if side == 0 else 0,
        LISTED=order is not None, BLOCK_K=triton.next_power_of_2(num_pairs) if order is None else 1,
        BLOCK_D=block_d, ACC=triton_accumulation(others.dtype), num_warps=4,
    )  # fmt: skip


def negative_logsumexp_backward(
    d_positive, d_logsumexp, logsumexp_, scores, images, captions, image_ids, caption_ids,
    scale, scale_tensor, need_images, need_captions,
):  # fmt: skip
    walk = _plan(images, captions, image_ids, caption_ids, len(d_positive), scores)
    d_positive, d_logsumexp = d_positive.contiguous(), d_logsumexp.contiguous()
    gain = None
    if images.dtype == torch.float16:
        factor = scale if scale_tensor is None else scale * scale_tensor.detach()
        gain = _gain(d_positive.abs().max() + (d_logsumexp.abs().amax(1).sum() * factor).float())
    pieces = _pieces(walk, scores)
    num_tiles = [walk.num_tiles(piece) for piece in pieces]
    if scale_tensor is None:
        d_scale, parts = d_positive.new_zeros(()), [None] * len(pieces)
    else:
        d_scale = d_positive.new_empty(sum(num_tiles))
        parts = d_scale.split(num_tiles)
    d_images, d_captions = _products(
        logsumexp.logsumexp_gradient_kernel, walk, pieces, scores, gain, need_images, need_captions,
        each=[{"d_scale_ptr": part} for part in parts],
        logsumexp_ptr=logsumexp_, d_logsumexp_ptr=d_logsumexp, d_positive_ptr=d_positive,
        ACC=triton_accumulation(images.dtype), **scale_arguments(scale, scale_tensor),
    )  # fmt: skip
    return d_images, d_captions, d_scale if scale_tensor is None else scale * d_scale.sum()


def hinge_sum_backward(
    d_positive, d_hinge_sum, positive, active, scores, images, captions, image_ids, caption_ids,
    margin, need_images, need_captions,
):  # fmt: skip
    walk = _plan(images, captions, image_ids, caption_ids, len(d_positive), scores)
    d_hinge_sum = d_hinge_sum.contiguous()
    d_diagonal = d_positive - (active * d_hinge_sum).sum(0)
    gain = None
    if images.dtype == torch.float16:
        gain = _gain(d_diagonal.abs().max() + d_hinge_sum.abs().amax(1).sum())
    pieces = _pieces(walk, scores)
    return _products(
        hinge.hinge_gradient_kernel, walk, pieces, scores, gain, need_images, need_captions,
        each=[{}] * len(pieces),
        positive_ptr=positive, threshold_ptr=positive - margin, d_sum_ptr=d_hinge_sum,
        d_diagonal_ptr=d_diagonal,
    )  # fmt: skip


def _plan(images, captions, image_ids, caption_ids, num_pairs, scores) -> Walk:
    return plan(
        images, captions, image_ids, caption_ids, num_pairs, saved_scores=scores.numel() > 0
    )


def _gain(bound: Tensor) -> Tensor:
    """[2]: the power of two that lifts a gradient of S of size `bound` to 2^13 .. 2^14, and its inverse.

    Without it, a float16 gradient underflows as soon as 1 / N is folded in.
    """
    exponent = (LARGEST_GRADIENT_EXPONENT - bound.log2().ceil()).clamp(-100, 100)
    return torch.stack([exponent, -exponent]).exp2()


def _pieces(walk: Walk, scores: Tensor) -> list:
    """Rectangles of S whose gradient, and scores unless saved, fit into the workspace."""
    entry_bytes = walk.images.element_size()
    if walk.stored and scores.numel() == 0:
        entry_bytes *= 2
    return list(walk.rectangles(entry_bytes * (len(walk.captions) + 15)))


def _products(
    kernel, walk: Walk, pieces, saved, gain, need_images, need_captions, each, **arguments
) -> tuple[Tensor, Tensor]:
    """d_images = G T and d_captions = G^t I, one rectangle of G at a time, summed in float32.

    `each` holds further kernel arguments for each of the rectangles.
    """
    images, captions = walk.images, walk.captions
    d_images = images.new_empty(images.shape if need_images else 0)
    d_captions = captions.new_empty(captions.shape if need_captions else 0)
    wide = accumulation(images.dtype)
    total = d_captions
    if need_captions and (len(pieces) > 1 or gain is not None):
        total = d_captions if d_captions.dtype == wide else torch.empty_like(d_captions, dtype=wide)
    saved = saved.view(len(images), -1) if saved.numel() > 0 else None
    scratch = score_scratch(walk, pieces, saved)
    # Rows begin on 16-byte boundaries, for wide stores and fast matrix products.
    buffer = images.new_empty(max((p.row_stop - p.row_start) * _pitch(p) for p in pieces))
    for number, (piece, own) in enumerate(zip(pieces, each, strict=True)):
        chunk = slice(piece.row_start, piece.row_stop)
        height, width = piece.row_stop - piece.row_start, piece.num_columns
        scores = piece_scores(walk, piece, saved, scratch)
        if walk.stored and saved is None:
            multiply(walk, piece, scores)
        pitch = _pitch(piece)
        gradient = buffer[: height * pitch].view(height, pitch)[:, :width]
        walk.launch(
            kernel, piece, scores, gradient_ptr=gradient, stride_gradient=pitch,
            gain_ptr=gain, HALVINGS=HALVINGS, **own, **arguments,
        )  # fmt: skip
        if need_images and gain is None:
            product(gradient, captions[:width], d_images[chunk])
        elif need_images:
            lifted = torch.empty_like(d_images[chunk], dtype=wide)
            product(gradient, captions[:width], lifted)
            torch.mul(lifted, gain[1], out=d_images[chunk])
        if need_captions:
            product(gradient.t(), images[chunk], total[:width], accumulate=number > 0)
    if total is not d_captions:
        d_captions.copy_(total) if gain is None else torch.mul(total, gain[1], out=d_captions)
    return d_images, d_captions


def _pitch(piece: Rectangle) -> int:
    return triton.cdiv(piece.num_columns, 16) * 16


def l2_normalize_backward(d_normalized, normalized, inverse_norm):
    d_normalized, normalized = unit_stride(d_normalized), unit_stride(normalized)
    num_rows, num_dimensions = normalized.shape
    d_rows = normalized.new_empty(normalized.shape)
    blocks = row_blocks(num_dimensions)
    rows.l2_normalize_backward_kernel[(triton.cdiv(num_rows, blocks["BLOCK_R"]),)](
        d_normalized, normalized, inverse_norm, d_rows, d_normalized.stride(0), normalized.stride(0),
        num_rows, num_dimensions,
        **blocks, ACC=triton_accumulation(normalized.dtype), num_warps=4,
    )  # fmt: skip
    return d_rows
