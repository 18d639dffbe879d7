"""The losses: O(K) formulas on the statistics of one pass over S = I Tᵀ, of which nothing large is stored.

Notation: p_k = <I_k, T_k> is the score of pair k, s the scores of an anchor's negatives, h the largest
of them, τ the temperature, m the margin. Formulas 1 and 2 are those of "Contrastive Learning of
Visual-Semantic Embeddings" (Jain & Verma, arXiv 2110.08872); the hinges are those of VSE++ (arXiv
1707.05612).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import arguments
from .arguments import check_batch, check_temperature, inverse_temperature
from .dispatch import REFERENCE, choose
from .ops import ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM, Batch
from .small_loss import small_loss
from .statistics import (
    HardestNegatives,
    hardest_statistic,
    hinge_statistic,
    logsumexp_statistic,
)

REDUCTIONS = ("mean", "sum", "none")


class LossStatistics(NamedTuple):
    """What a training loop wants to log, detached. Row 0: image anchors, row 1: caption anchors."""

    positive_scores: Tensor  # [K]
    hardest_scores: Tensor  # [2, K], -inf for an anchor without negatives
    hardest_indices: Tensor  # [2, K], -1 for an anchor without negatives
    active_share: Tensor  # [2], share of anchors with margin + h - p > 0
    recall_at_1: Tensor  # [2], share of anchors whose positive scores above every negative


def all_negatives_loss(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    margin: float = 0.0,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "mean",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStatistics]:
    """Contrastive loss over all in-batch negatives, loss 1 "ConVSE" of arXiv 2110.08872.

    Per anchor: -log( exp(p/τ) / (exp(p/τ) + Σ exp((s + m)/τ)) ), summed over both directions. With
    its defaults it equals

        logits, labels = images @ captions.T / temperature, torch.arange(K)
        cross_entropy(logits, labels) + cross_entropy(logits.T, labels)

    which is twice CLIP's loss; `direction_weights=(0.5, 0.5)` gives CLIP's.

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; usually L2-normalised (with
            unnormalised ones the scores, and the loss, grow as large as they).
        captions: [M, D] embeddings, same dtype and device (under autocast the dtypes may differ).
        scores: [N, M], a score matrix in place of images and captions, for models that compute one
            (cross-attention): it is read once forward, and its gradient written once backward. A score of
            -inf does not leave a pair out, it makes the loss NaN: give both the same id instead.
        temperature: τ from 1e-10 to 1e10, a float or a 0-d tensor, which gets its gradient if it requires
            one. One on a GPU or under torch.compile is not looked at: out of range makes the loss NaN.
        margin: m, added to the scores of the negatives.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ, so that several captions of one image are not
            counted against it. Default: the row numbers.
        num_pairs: K. Image k and caption k are a pair for k < K; later rows are extra negatives (a
            queue, another rank's shard) and never anchors. Default: N, and required if N != M.
        direction_weights: factors of the image direction and of the caption direction.
        reduction: "mean" over the K pairs, "sum", or "none" for [2, K].
        normalize: divide the rows by their L2 norm first: cosine similarity.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        return_statistics: also return `LossStatistics`, for which batches beyond the small ones
            take one more pass over S.
        backend: "auto", or a name listed by `fused_vse.backends()`.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). An anchor without
        negatives contributes 0. Any NaN or infinity in the input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    batch = check_batch(
        images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    )
    return _loss(
        ALL_NEGATIVES,
        batch,
        temperature,
        margin,
        direction_weights,
        reduction,
        return_statistics,
        backend,
    )


def hardest_negative_loss(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    margin: float = 0.2,
    smooth: bool = False,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "mean",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStatistics]:
    """Contrastive loss over the hardest in-batch negative, loss 2 "ConVSE++" of arXiv 2110.08872.

    Per anchor: [ -log( exp(p/τ) / exp((h + m)/τ) ) ]₊ = [m + h - p]₊ / τ, summed over both
    directions. Without ids it equals

        S, eye = images @ captions.T, torch.eye(K, dtype=bool)
        h = S.masked_fill(eye, -inf)
        p = S.diagonal()
        (((margin + h.amax(1) - p).relu() + (margin + h.amax(0) - p).relu()) / temperature).mean()

    except that a tie between negatives sends the gradient to the smallest index alone. Training from
    scratch can stick at the plateau 2m/τ, where all scores are equal: start with some epochs of
    `all_negatives_loss`.

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; usually L2-normalised (with
            unnormalised ones the scores, and the loss, grow as large as they).
        captions: [M, D] embeddings, same dtype and device (under autocast the dtypes may differ).
        scores: [N, M], a score matrix in place of images and captions, for models that compute one
            (cross-attention): it is read once forward, and its gradient written once backward. A score of
            -inf does not leave a pair out, it makes the loss NaN: give both the same id instead.
        temperature: τ from 1e-10 to 1e10, a float or a 0-d tensor, which gets its gradient if it requires
            one. One on a GPU or under torch.compile is not looked at: out of range makes the loss NaN.
        margin: m.
        smooth: softplus((m + h - p) / τ), the cross-entropy over {positive, hardest negative},
            instead of the hinge.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ, so that several captions of one image are not
            counted against it. Default: the row numbers.
        num_pairs: K. Image k and caption k are a pair for k < K; later rows are extra negatives (a
            queue, another rank's shard) and never anchors. Default: N, and required if N != M.
        direction_weights: factors of the image direction and of the caption direction.
        reduction: "mean" over the K pairs, "sum", or "none" for [2, K].
        normalize: divide the rows by their L2 norm first: cosine similarity.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        return_statistics: also return `LossStatistics`, which costs nothing extra here.
        backend: "auto", or a name listed by `fused_vse.backends()`.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). An anchor without
        negatives contributes 0. Any NaN or infinity in the input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    batch = check_batch(
        images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    )
    kind = HARDEST_SMOOTH if arguments.check_flag("smooth", smooth) else HARDEST
    return _loss(
        kind, batch, temperature, margin, direction_weights, reduction, return_statistics, backend
    )


def hinge_loss(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    margin: float = 0.2,
    hardest: bool = False,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "sum",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStatistics]:
    """Triplet hinge loss: VSE0's sum of hinges, or VSE++'s max of hinges (arXiv 1707.05612).

    Per anchor: Σ [m + s - p]₊, or with `hardest=True` [m + h - p]₊, summed over both directions and,
    by default, over the pairs. At a hinge's kink the gradient is 0.

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; usually L2-normalised (with
            unnormalised ones the scores, and the loss, grow as large as they).
        captions: [M, D] embeddings, same dtype and device (under autocast the dtypes may differ).
        scores: [N, M], a score matrix in place of images and captions, for models that compute one
            (cross-attention): it is read once forward, and its gradient written once backward. A score of
            -inf does not leave a pair out, it makes the loss NaN: give both the same id instead.
        margin: m.
        hardest: only the hardest negative counts.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ, so that several captions of one image are not
            counted against it. Default: the row numbers.
        num_pairs: K. Image k and caption k are a pair for k < K; later rows are extra negatives (a
            queue, another rank's shard) and never anchors. Default: N, and required if N != M.
        direction_weights: factors of the image direction and of the caption direction.
        reduction: "mean" over the K pairs, "sum", or "none" for [2, K].
        normalize: divide the rows by their L2 norm first: cosine similarity.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        return_statistics: also return `LossStatistics`, which costs nothing extra with `hardest=True`.
        backend: "auto", or a name listed by `fused_vse.backends()`.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). An anchor without
        negatives contributes 0. Any NaN or infinity in the input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    batch = check_batch(
        images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    )
    kind = HARDEST if arguments.check_flag("hardest", hardest) else HINGE_SUM
    return _loss(kind, batch, 1.0, margin, direction_weights, reduction, return_statistics, backend)


def _loss(
    kind: int,
    batch: Batch,
    temperature: float | Tensor,
    margin: float,
    direction_weights: tuple[float, float],
    reduction: str,
    return_statistics: bool,
    backend: str,
) -> Tensor | tuple[Tensor, LossStatistics]:
    """Every loss: checks, one statistic or one op for the whole, the formula of its kind, the reduction."""
    temperature = check_temperature(temperature, batch.images.device)
    margin = arguments.check_margin(margin, batch.images)
    weights = arguments.check_direction_weights(direction_weights, batch.images)
    arguments.check_choice("reduction", reduction, REDUCTIONS)
    return_statistics = arguments.check_flag("return_statistics", return_statistics)
    scale = inverse_temperature(temperature, batch.images)

    small = REFERENCE if reduction == "none" else choose(backend, "small_loss", batch)
    if small != REFERENCE:
        loss, hardest = small_loss(kind, batch, scale, margin, weights, reduction, small)
    else:
        loss, hardest = _FORMULAS[kind](batch, scale, margin, backend)
        loss = _reduce(loss, weights, reduction)
    if not return_statistics:
        return loss
    if hardest is None:
        with torch.no_grad():
            hardest = hardest_statistic(batch, backend)
    return loss, _loss_statistics(hardest, margin)


# The losses of single anchors [2, K], in the scores' dtype, and the hardest negatives if they are at hand.
# An anchor without negatives contributes 0 and receives no gradient: what would be 0 * inf is left out.


def _all_negatives(batch: Batch, scale: float | Tensor, margin: float, backend: str):
    """-log(e^αp / (e^αp + e^(lse + αm))) = softplus(lse + α(m - p)), whose terms nearly cancel."""
    positive, reference, log_sum = logsumexp_statistic(batch, scale, backend)
    difference = scale * (positive - reference - margin) - log_sum
    return -logsigmoid(difference).to(positive.dtype), None


def _hardest(batch: Batch, scale: float | Tensor, margin: float, backend: str):
    """α [m + h - p]₊"""
    hardest = hardest_statistic(batch, backend)
    return scale * (hardest.scores - hardest.positive_scores + margin).relu(), hardest


def _hardest_smooth(batch: Batch, scale: float | Tensor, margin: float, backend: str):
    """softplus(α (m + h - p))"""
    hardest = hardest_statistic(batch, backend)
    alone = hardest.scores == -torch.inf  # not by the index, which a NaN score lacks, too
    violation = torch.where(alone, 0, hardest.scores - hardest.positive_scores + margin)
    return torch.where(alone, 0, -logsigmoid(-scale * violation)), hardest


def _hinge_sum(batch: Batch, scale: float | Tensor, margin: float, backend: str):
    """Σ [m + s - p]₊"""
    return hinge_statistic(batch, margin, backend)[1], None


_FORMULAS = {
    ALL_NEGATIVES: _all_negatives,
    HARDEST: _hardest,
    HARDEST_SMOOTH: _hardest_smooth,
    HINGE_SUM: _hinge_sum,
}


def _reduce(loss: Tensor, weights: tuple[float, float], reduction: str) -> Tensor:
    """[2, K] to a scalar, unless reduction is "none"."""
    if weights != (1.0, 1.0):
        loss = torch.stack([loss[0] * weights[0], loss[1] * weights[1]])
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / loss.shape[1] if reduction == "mean" else total


def _loss_statistics(hardest: HardestNegatives, margin: float) -> LossStatistics:
    positive, scores, indices = (tensor.detach() for tensor in hardest)
    return LossStatistics(
        positive_scores=positive,
        hardest_scores=scores,
        hardest_indices=indices,
        active_share=(scores - positive + margin > 0).to(scores.dtype).mean(1),
        recall_at_1=(positive > scores).to(scores.dtype).mean(1),
    )
