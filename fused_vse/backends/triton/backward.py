"""Host side of the backward ops: what each allocates and launches."""

import torch
import triton
from torch import Tensor

from ...arguments import accumulation_dtype
from . import configs, hardest, hinge, logsumexp, rows
from .gradients import (
    gain_for,
    gradient_of_scores,
    gradient_pieces,
    gradients,
    needs_gain,
    on_diagonal,
    pair_weights,
    sums,
)
from .walk import (
    Rectangle,
    Walk,
    plan,
    plan_scores,
    row_blocks,
    scale_arguments,
    triton_accumulation,
    unit_stride,
)


def hardest_negatives_backward(
    d_positive, d_score, positive, index, images, captions, need_images, need_captions,
    family="dot",
):  # fmt: skip
    images, captions = unit_stride(images), unit_stride(captions)
    d_positive, d_score, index = d_positive.contiguous(), d_score.contiguous(), index.contiguous()
    sides = ("dot", "dot")
    if family == "order":
        sides = ("images", "captions")
        weights = pair_weights(images, captions, d_positive, d_score, index)
        d_positive, d_score = weights[0], weights[1:]
    entries = starts = None
    if index.shape[1] > configs.MAX_UNLISTED_PAIRS:
        entries, starts = _entries_by_target(index, len(images), len(captions))
    upstream = d_positive, d_score, positive, index, entries, starts
    d_images, d_captions = images.new_empty(0), captions.new_empty(0)
    if need_images:
        d_images = _gather(images, captions, 0, sides[0], *upstream)
    if need_captions:
        d_captions = _gather(captions, images, 1, sides[1], *upstream)
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
    own, others, number, side, d_positive, d_score, positive, index, entries, starts
) -> Tensor:
    """The gradient of side number 0 (images) or 1 (captions) out of the other side's embeddings."""
    num_rows, num_dimensions = own.shape
    num_pairs = index.shape[1]
    d_own = own.new_empty(own.shape)
    block_d = min(triton.next_power_of_2(num_dimensions), 512)
    hardest.hardest_backward_kernel[(num_rows, triton.cdiv(num_dimensions, block_d))](
        own, others, d_own, d_positive, d_score[number], d_score[1 - number],
        index[number], index[1 - number], positive, entries, starts,
        own.stride(0), others.stride(0), num_pairs, num_dimensions,
        first_start=len(others) if number else 0, shift=0 if number else num_pairs,
        SIDE=side, LISTED=entries is not None,
        BLOCK_K=triton.next_power_of_2(num_pairs) if entries is None else 1,
        BLOCK_D=block_d, ACC=triton_accumulation(others.dtype), num_warps=4,
    )  # fmt: skip
    return d_own


def hardest_negatives_of_scores_backward(d_positive, d_score, positive, index, scores):
    d_scores = scores.new_empty(scores.shape)
    tiles = configs.SPARSE_GRADIENT
    num_rows, num_columns = scores.shape
    num_tiles = triton.cdiv(num_rows, tiles["BLOCK_M"]) * triton.cdiv(num_columns, tiles["BLOCK_N"])
    hardest.hardest_scores_backward_kernel[(num_tiles,)](
        d_scores, d_positive.contiguous(), d_score.contiguous(), positive, index.contiguous(),
        num_rows, num_columns, index.shape[1], **tiles,
    )  # fmt: skip
    return d_scores


def negative_logsumexp_backward(
    d_positive, d_logsumexp, logsumexp_, scores, images, captions, image_ids, caption_ids,
    scale, scale_tensor, need_images, need_captions, family="dot",
):  # fmt: skip
    walk = _plan(family, images, captions, image_ids, caption_ids, len(d_positive), scores)
    d_positive, d_logsumexp = d_positive.contiguous(), d_logsumexp.contiguous()
    gain = None
    if needs_gain(walk):
        factor = scale if scale_tensor is None else scale * scale_tensor.detach()
        gain = gain_for(d_positive.abs().max() + (d_logsumexp.abs().amax(1).sum() * factor).float())
    pieces = gradient_pieces(walk, scores)
    d_scale, own = _d_scale(walk, pieces, scale_tensor)
    each = gradients(
        logsumexp.logsumexp_gradient_kernel, walk, pieces, scores, gain, own=own,
        d_positive_ptr=on_diagonal(walk, d_positive),
        **_logsumexp_arguments(walk, logsumexp_, d_logsumexp, scale, scale_tensor),
    )  # fmt: skip
    d_images, d_captions = sums(walk, pieces, each, gain, need_images, need_captions)
    return d_images, d_captions, d_scale if scale_tensor is None else scale * d_scale.sum()


def negative_logsumexp_of_scores_backward(
    d_positive, d_logsumexp, logsumexp_, scores, image_ids, caption_ids, scale, scale_tensor
):
    walk = plan_scores(scores, image_ids, caption_ids, len(d_positive))
    pieces = gradient_pieces(walk)
    d_scale, own = _d_scale(walk, pieces, scale_tensor)
    d_scores = gradient_of_scores(
        logsumexp.logsumexp_gradient_kernel, walk, pieces, logsumexp_, own=own,
        d_positive_ptr=d_positive.contiguous(),
        **_logsumexp_arguments(walk, logsumexp_, d_logsumexp.contiguous(), scale, scale_tensor),
    )  # fmt: skip
    return d_scores, d_scale if scale_tensor is None else scale * d_scale.sum()


def _logsumexp_arguments(walk, logsumexp_, d_logsumexp, scale, scale_tensor) -> dict:
    return {
        "logsumexp_ptr": logsumexp_,
        "d_logsumexp_ptr": d_logsumexp,
        "ACC": triton_accumulation(walk.images.dtype),
        **scale_arguments(scale, scale_tensor),
    }


def _d_scale(walk: Walk, pieces: list[Rectangle], scale_tensor) -> tuple[Tensor, list[dict]]:
    """d_scale / scale by tiles, with the kernel arguments that leave them there; 0 without scale_tensor."""
    dtype = accumulation_dtype(walk.images.dtype)
    if scale_tensor is None:
        return walk.images.new_zeros((), dtype=dtype), [{"d_scale_ptr": None}] * len(pieces)
    num_tiles = [walk.num_tiles(piece) for piece in pieces]
    d_scale = walk.images.new_empty(sum(num_tiles), dtype=dtype)
    return d_scale, [{"d_scale_ptr": part} for part in d_scale.split(num_tiles)]


def hinge_sum_backward(
    d_positive, d_hinge_sum, positive, active, scores, images, captions, image_ids, caption_ids,
    margin, need_images, need_captions, family="dot",
):  # fmt: skip
    walk = _plan(family, images, captions, image_ids, caption_ids, len(d_positive), scores)
    d_hinge_sum = d_hinge_sum.contiguous()
    d_diagonal = d_positive - (active * d_hinge_sum).sum(0)
    gain = None
    if needs_gain(walk):
        gain = gain_for(d_diagonal.abs().max() + d_hinge_sum.abs().amax(1).sum())
    pieces = gradient_pieces(walk, scores)
    each = gradients(
        hinge.hinge_gradient_kernel, walk, pieces, scores, gain, own=[{}] * len(pieces),
        positive_ptr=positive, threshold_ptr=positive - margin, d_sum_ptr=d_hinge_sum,
        d_diagonal_ptr=on_diagonal(walk, d_diagonal),
    )  # fmt: skip
    return sums(walk, pieces, each, gain, need_images, need_captions)


def hinge_sum_of_scores_backward(
    d_positive, d_hinge_sum, positive, active, scores, image_ids, caption_ids, margin
):
    walk = plan_scores(scores, image_ids, caption_ids, len(d_positive))
    pieces = gradient_pieces(walk)
    d_hinge_sum = d_hinge_sum.contiguous()
    return gradient_of_scores(
        hinge.hinge_gradient_kernel, walk, pieces, positive, own=[{}] * len(pieces),
        positive_ptr=positive, threshold_ptr=positive - margin, d_sum_ptr=d_hinge_sum,
        d_diagonal_ptr=d_positive - (active * d_hinge_sum).sum(0),
    )  # fmt: skip


def _plan(family, images, captions, image_ids, caption_ids, num_pairs, scores) -> Walk:
    return plan(
        family, images, captions, image_ids, caption_ids, num_pairs,
        saved_scores=scores.numel() > 0,
    )  # fmt: skip


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
