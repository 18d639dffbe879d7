"""The differentiable statistics of one pass over S = I Tᵀ: everything expensive that a loss needs.

Each statistic is taken per anchor over its negatives, for image anchors (row 0 of a result) and for
caption anchors (row 1). A loss is O(K) arithmetic on them; autograd through them costs the fused
backward pass. Gradients follow the formulas of "Contrastive Learning of Visual-Semantic
Embeddings" (arXiv 2110.08872).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .arguments import check_batch, check_temperature, inverse_temperature
from .dispatch import REFERENCE, choose
from .distributed.peers import Peers, agree
from .distributed.reduction import shared_by_ranks
from .distributed.statistics import Hardest, HingeSum, Logsumexp, statistic_over_ranks
from .first_order import first_order_only
from .ops import Batch, ops_of


class HardestNegatives(NamedTuple):
    """Row 0 holds image anchors (negatives are captions), row 1 caption anchors; K pairs."""

    positive_scores: Tensor  # [K]
    scores: Tensor  # [2, K], -inf for an anchor without negatives
    indices: Tensor  # [2, K] int64, -1 for an anchor without negatives


class NegativeLogsumexp(NamedTuple):
    """Row 0 holds image anchors (negatives are captions), row 1 caption anchors; K pairs."""

    positive_scores: Tensor  # [K]
    logsumexp: Tensor  # [2, K], -inf for an anchor without negatives


def hardest_negatives(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    normalize: bool = False,
    similarity: str = "dot",
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> HardestNegatives:
    """The highest-scoring negative of every anchor, in both directions, without storing S.

    Equals, for a batch of pairs without ids:

        S = images @ captions.T
        S.masked_fill(torch.eye(K, dtype=bool), -inf).max(1)    # and .max(0)

    Ties go to the smallest index, which alone receives the gradient.

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; usually L2-normalised.
        captions: [M, D] embeddings, same dtype and device (under autocast the dtypes may differ).
        scores: [N, M], a score matrix in place of images and captions, for models that compute one
            (cross-attention): it is read once forward, and its gradient written once backward. A score of
            -inf does not leave a pair out, it makes the statistics NaN: give both the same id instead.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ, so that several captions of one image are not
            counted against it. Default: the row numbers.
        num_pairs: K. Image k and caption k are a pair for k < K; later rows are extra negatives (a
            queue, another rank's shard) and never anchors. Default: N, and required if N != M.
        normalize: divide the rows by their L2 norm first: cosine similarity.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        backend: "auto", or a name listed by `fused_vse.backends()`.
        group: the batch is that of all ranks of this process group, each of which passes its own rows; see
            `all_negatives_loss`. The results are those of the own pairs, indices count the pairs of all
            ranks, then their extra negatives, in the order of the ranks.

    Returns:
        Scores in float32 (float64 for float64 input), differentiable with respect to the embeddings. Any NaN
        or infinity in the input makes the statistic of every anchor NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    inputs = images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    batch, _, peers = checked(inputs, 1.0, group)
    return hardest_statistic(batch, backend, peers)


def negative_logsumexp(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    normalize: bool = False,
    similarity: str = "dot",
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> NegativeLogsumexp:
    """log Σ exp(s / temperature) over the negatives of every anchor, in both directions.

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; usually L2-normalised.
        captions: [M, D] embeddings, same dtype and device (under autocast the dtypes may differ).
        scores: [N, M], a score matrix in place of images and captions, for models that compute one
            (cross-attention): it is read once forward, and its gradient written once backward. A score of
            -inf does not leave a pair out, it makes the statistics NaN: give both the same id instead.
        temperature: τ from 1e-10 to 1e10, a float or a 0-d tensor, which gets its gradient if it requires
            one. One on a GPU or under torch.compile is not looked at: out of range makes the result NaN.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ, so that several captions of one image are not
            counted against it. Default: the row numbers.
        num_pairs: K. Image k and caption k are a pair for k < K; later rows are extra negatives (a
            queue, another rank's shard) and never anchors. Default: N, and required if N != M.
        normalize: divide the rows by their L2 norm first: cosine similarity.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        backend: "auto", or a name listed by `fused_vse.backends()`.
        group: the batch is that of all ranks of this process group, each of which passes its own rows; see
            `all_negatives_loss`. The results are those of the own pairs, indices count the pairs of all
            ranks, then their extra negatives, in the order of the ranks.

    Returns:
        Scores in float32 (float64 for float64 input), differentiable with respect to the embeddings
        and the temperature. Any NaN
        or infinity in the input makes the statistic of every anchor NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    inputs = images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    batch, scale, peers = checked(inputs, temperature, group)
    positive, reference, log_sum = logsumexp_statistic(batch, scale, backend, peers)
    return NegativeLogsumexp(positive, (scale * reference + log_sum).to(positive.dtype))


class _Scale(NamedTuple):
    inverse_temperature: float | Tensor


def checked(
    inputs: tuple, temperature: float | Tensor, group
) -> tuple[Batch, float | Tensor, Peers | None]:
    """The batch, 1 / temperature, and the other ranks."""

    def check() -> tuple[Batch, _Scale]:
        batch = check_batch(*inputs, least_pairs=1 if group is None else 0)
        checked = check_temperature(temperature, batch.images.device)
        return batch, _Scale(inverse_temperature(checked, batch.images))

    peers, batch, (scale,) = agree(group, check)
    return batch, shared_by_ranks(scale, peers), peers


def hardest_statistic(batch: Batch, backend: str, peers: Peers | None = None) -> HardestNegatives:
    if peers is not None:
        positive, score, index = statistic_over_ranks(Hardest(), batch, peers, backend)
        return HardestNegatives(positive, _two_rows(score), _two_rows(index))
    backend = choose(backend, "hardest_negatives", batch)
    if backend == REFERENCE:
        batch = reference.widened(batch)
        positive = reference.positive_scores(*batch)
        score, index = reference.hardest_negatives(*batch, None)
    else:
        positive, score, index = _HardestNegatives.apply(backend, None, *batch)
    return HardestNegatives(positive, _two_rows(score), _two_rows(index))


def logsumexp_statistic(
    batch: Batch, scale: float | Tensor, backend: str, peers: Peers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scores [K]; reference and log-sum [2, K], of which scale * reference + log-sum is
    log Σ exp(scale * s). The reference is a constant to autograd; ops.py says why they are apart.

    `scale` = 1 / temperature, as `inverse_temperature` gives it.
    """
    number, tensor = (0.0, scale) if isinstance(scale, Tensor) else (scale, None)
    if peers is not None:
        statistic = Logsumexp(number, tensor)
        positive, constant, log_sum = statistic_over_ranks(statistic, batch, peers, backend)
    elif (backend := choose(backend, "negative_logsumexp", batch)) == REFERENCE:
        batch = reference.widened(batch)
        positive = reference.positive_scores(*batch)
        constant, log_sum = reference.negative_logsumexp(*batch, None, scale)
    else:
        save_scores = needs_grad(batch.images, batch.captions, tensor)
        positive, constant, log_sum = _NegativeLogsumexp.apply(
            backend, save_scores, None, number, tensor, *batch
        )
    return positive, _two_rows(constant), _two_rows(log_sum)


def hinge_statistic(
    batch: Batch, margin: float, backend: str, peers: Peers | None = None
) -> tuple[Tensor, Tensor]:
    """Positive scores [K] and Σ [margin + s - p]₊ over the negatives [2, K]."""
    if peers is not None:
        positive, total, _ = statistic_over_ranks(HingeSum(margin), batch, peers, backend)
    elif (backend := choose(backend, "hinge_sum", batch)) == REFERENCE:
        batch = reference.widened(batch)
        positive = reference.positive_scores(*batch)
        threshold = (positive - margin).repeat(2)
        total, _ = reference.hinge_sum(*batch, None, threshold)
    else:
        save_scores = needs_grad(batch.images, batch.captions)
        positive, total = _HingeSum.apply(backend, save_scores, None, margin, *batch)
    return positive, _two_rows(total)


def _two_rows(statistic: Tensor) -> Tensor:
    return statistic.view(2, -1)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _save(ctx, batch: tuple, *others: Tensor | None) -> None:
    ctx.anchors = batch[4:]
    ctx.save_for_backward(*batch[:4], *others)


def _load(ctx) -> tuple[tuple, list[Tensor | None]]:
    """The batch, and what else was saved."""
    tensors = ctx.saved_tensors
    return (*tensors[:4], *ctx.anchors), list(tensors[4:])


_NONES = (None,) * (len(Batch._fields) - 2)


# The functions have no setup_context, for which torch inspects the signature in every call: some 40 µs.
class _HardestNegatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, ceiling, *batch):
        ops, ctx.backend = ops_of(backend), backend
        score, index = ops.hardest_negatives(*batch, ceiling)
        ctx.mark_non_differentiable(index)
        _save(ctx, batch, score, index)
        return ops.positive_scores(*batch), score, index

    @staticmethod
    def backward(ctx, d_positive, d_score, _):
        batch, saved = _load(ctx)
        needed = ctx.needs_input_grad[2:4]
        gradients = ops_of(ctx.backend).hardest_negatives_backward(
            *batch, *saved, d_positive, d_score, *needed, False
        )
        return None, None, *first_order_only(*gradients, needed=needed), *_NONES


class _NegativeLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, save_scores, ceiling, scale, scale_tensor, *batch):
        ops, ctx.backend, ctx.scale = ops_of(backend), backend, scale
        constant, log_sum, scores = ops.negative_logsumexp(
            *batch, ceiling, scale, scale_tensor, save_scores
        )
        ctx.mark_non_differentiable(constant)
        _save(ctx, batch, ceiling, scale_tensor, constant, log_sum, scores)
        return ops.positive_scores(*batch), constant, log_sum

    @staticmethod
    def backward(ctx, d_positive, _, d_log_sum):
        batch, (ceiling, scale_tensor, *saved) = _load(ctx)
        needed = ctx.needs_input_grad[5:7]
        gradients = ops_of(ctx.backend).negative_logsumexp_backward(
            *batch, ceiling, ctx.scale, scale_tensor, *saved, d_positive, d_log_sum, *needed, False
        )
        needed = *needed, ctx.needs_input_grad[4]
        d_images, d_captions, d_scale = first_order_only(*gradients, needed=needed)
        return None, None, None, None, d_scale, d_images, d_captions, *_NONES


class _HingeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, save_scores, ceiling, margin, *batch):
        ops, ctx.backend = ops_of(backend), backend
        positive = ops.positive_scores(*batch)
        threshold = (positive - margin).repeat(2)
        total, active, scores = ops.hinge_sum(*batch, ceiling, threshold, save_scores)
        _save(ctx, batch, ceiling, threshold, total, scores, active)
        return positive, total

    @staticmethod
    def backward(ctx, d_positive, d_total):
        batch, (*saved, active) = _load(ctx)
        needed = ctx.needs_input_grad[4:6]
        of_thresholds = (active * d_total).view(2, -1).sum(0)
        gradients = ops_of(ctx.backend).hinge_sum_backward(
            *batch, *saved, d_positive - of_thresholds, d_total, *needed, False
        )
        return None, None, None, None, *first_order_only(*gradients, needed=needed), *_NONES
