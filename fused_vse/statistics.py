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
from .definitions import (
    EqualSum,
    Hardest,
    HingeSum,
    Logsumexp,
    OfOneProcess,
    SoftplusSum,
    parameters_of,
)
from .dispatch import REFERENCE, choose
from .distributed.peers import Peers, agree
from .distributed.reduction import shared_by_ranks
from .distributed.statistics import statistic_over_ranks
from .equal import equal_sums
from .ops import Batch


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


def hardest_statistic(
    batch: Batch,
    backend: str,
    peers: Peers | None = None,
    false_negative_margin: float | None = None,
) -> HardestNegatives:
    positive, *results = _taken(Hardest(false_negative_margin), batch, backend, peers)
    return HardestNegatives(positive, *results)


def logsumexp_statistic(
    batch: Batch,
    scale: float | Tensor,
    backend: str,
    peers: Peers | None = None,
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scores [K]; reference and log-sum [2, K], of which scale * reference + log-sum is
    log Σ exp(scale * s + hardness * s), where the second s is a constant to autograd. So is the reference;
    ops.py says why they are apart.

    `scale` = 1 / temperature, as `inverse_temperature` gives it.
    """
    if not hardness:
        statistic = Logsumexp(*_number_or_tensor(scale), false_negative_margin)
        return _taken(statistic, batch, backend, peers)
    # The same at scale + hardness. Its gradient by s is to be multiplied by scale alone, that by the scale to
    # stay.
    wider, share = scale + hardness, scale / (scale + hardness)
    if isinstance(scale, Tensor):
        share = share.detach()
        wider = _ScaledGradient.apply(wider, 1 / share)
    positive, constant, log_sum = logsumexp_statistic(
        batch, wider, backend, peers, false_negative_margin
    )
    return positive, constant, _ScaledGradient.apply(log_sum, share) + hardness * constant


class _ScaledGradient(torch.autograd.Function):
    """Identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def hinge_statistic(
    batch: Batch,
    margin: float,
    backend: str,
    peers: Peers | None = None,
    false_negative_margin: float | None = None,
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positive scores [K] and Σ [margin + s - p]₊ over the negatives [2, K], 0 for anchors not `inside`
    [2, K]."""
    inside = None if inside is None else inside.reshape(-1)
    statistic = HingeSum(margin, false_negative_margin, inside)
    return _taken(statistic, batch, backend, peers)[:2]


def softplus_statistic(
    batch: Batch,
    scale: float | Tensor,
    bias: Tensor,
    equal_positive: bool,
    backend: str,
    peers: Peers | None = None,
) -> tuple[Tensor, Tensor]:
    """Positive scores [K] and Σ log(1 + exp(x)) [2, K] over the entries with x = scale s + bias; ops.py says
    which."""
    statistic = SoftplusSum(*_number_or_tensor(scale), bias, equal_positive)
    return _taken(statistic, batch, backend, peers)[:2]


def equal_statistic(
    batch: Batch, backend: str, peers: Peers | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of an anchor's scores with everything that has its id, and how many that are [2, K]."""
    if peers is None and choose(backend, "positive_scores", batch) != REFERENCE:
        results = equal_sums(batch)  # no op: plain PyTorch that differentiates itself
        return results[0].view(2, -1), results[1].view(2, -1)
    return _taken(EqualSum(), batch, backend, peers)[1:]


def _taken(
    statistic: NamedTuple, batch: Batch, backend: str, peers: Peers | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scores [K], and both results [2, K]."""
    if peers is not None:
        positive, *results = statistic_over_ranks(statistic, batch, peers, backend)
    elif (backend := choose(backend, statistic.op, batch)) == REFERENCE:
        batch = reference.widened(batch)
        positive = reference.positive_scores(*batch)
        results = statistic.plain(*batch, *statistic.vectors(positive))
    else:
        tensors = parameters_of(statistic)
        save_scores = needs_grad(batch.images, batch.captions, *tensors)
        positive, *results = OfOneProcess.apply(statistic, backend, save_scores, *tensors, *batch)
    return positive, results[0].view(2, -1), results[1].view(2, -1)


def _number_or_tensor(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """As the ops take it."""
    return (0.0, scale) if isinstance(scale, Tensor) else (scale, None)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
