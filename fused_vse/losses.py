"""The losses: O(K) formulas on the statistics of one pass over S = I Tᵀ, of which nothing large is stored.

Notation: p_k = <I_k, T_k> is the score of pair k, s the scores of an anchor's negatives, h the largest
of them, τ the temperature, m the margin. Formulas 1 and 2 are those of "Contrastive Learning of
Visual-Semantic Embeddings" (Jain & Verma, arXiv 2110.08872); the hinges are those of VSE++ (arXiv
1707.05612).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_batch, check_flag
from .dispatch import REFERENCE, choose
from .distributed.peers import Peers, agree
from .distributed.reduction import OfAllRanks, shared_by_ranks
from .formulas import FORMULAS
from .ops import ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM, Batch
from .options import SIGMOID, Options, checked_options
from .small_loss import small_loss
from .statistics import HardestNegatives, hardest_statistic


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
    false_negative_margin: float | None = None,
    hardness: float = 0.0,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    equal_ids: str = "ignore",
    num_pairs: int | None = None,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "mean",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
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
        false_negative_margin: δ. A negative with s > p + δ is taken for a false one and left out, for that
            anchor alone, statistics included (Qwen3-Embedding, arXiv 2506.05176). The comparison has no
            gradient.
        hardness: β >= 0. The logits of the negatives get β stop_gradient(s), so that hard ones weigh more
            (LLaVE, arXiv 2503.04812).
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ, so that several captions of one image are not
            counted against it. Default: the row numbers.
        equal_ids: what the scores of equal ids beside the pairs are: "ignore", nothing; "positive",
            positives, too: LSE(s/τ over all of S) - mean(s/τ over the positives) per anchor (SupCon "out",
            arXiv 2004.11362), for which 16-bit embeddings are converted to float32.
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
        group: the batch is that of all ranks of this process group, each of which passes its own rows,
            pairs first: any number of them, with ids that mean the same on all ranks. Every rank calls, with
            the same options. The value is that of one process with the whole batch (with "none", the
            own pairs' part of it); gradients are such that DistributedDataParallel's or FSDP's average over
            the ranks is that of one process. Default: this process alone.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). An anchor without
        negatives contributes 0. Any NaN or infinity in the input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    inputs = images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    return _loss(
        ALL_NEGATIVES, inputs, backend, group, temperature=temperature, margin=margin,
        false_negative_margin=false_negative_margin, hardness=hardness, equal_ids=equal_ids,
        direction_weights=direction_weights, reduction=reduction, return_statistics=return_statistics,
    )  # fmt: skip


def hardest_negative_loss(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    margin: float = 0.2,
    smooth: bool = False,
    select: float | None = None,
    false_negative_margin: float | None = None,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "mean",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
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
    `all_negatives_loss`, or use `select`.

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
        select: ε. Where |p - h| < ε, as on the plateau, an anchor's loss is the mean of [m + s - p]₊ / τ
            over its negatives, whose gradient leaves it (selectively hard negatives of RVSE++). Anchors
            that need it cost a second pass, for all of them one.
        false_negative_margin: δ. A negative with s > p + δ is taken for a false one and left out, for that
            anchor alone, statistics included (Qwen3-Embedding, arXiv 2506.05176). The comparison has no
            gradient.
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
        group: the batch is that of all ranks of this process group, each of which passes its own rows,
            pairs first: any number of them, with ids that mean the same on all ranks. Every rank calls, with
            the same options. The value is that of one process with the whole batch (with "none", the
            own pairs' part of it); gradients are such that DistributedDataParallel's or FSDP's average over
            the ranks is that of one process. Default: this process alone.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). An anchor without
        negatives contributes 0. Any NaN or infinity in the input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    inputs = images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    return _loss(
        HARDEST, inputs, backend, group, switch=("smooth", smooth, HARDEST_SMOOTH),
        temperature=temperature, margin=margin, select=select,
        false_negative_margin=false_negative_margin, direction_weights=direction_weights,
        reduction=reduction, return_statistics=return_statistics,
    )  # fmt: skip


def hinge_loss(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    margin: float = 0.2,
    hardest: bool = False,
    false_negative_margin: float | None = None,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "sum",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
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
        hardest: only the hardest negative counts; with `false_negative_margin=0` semi-hard mining.
        false_negative_margin: δ. A negative with s > p + δ is taken for a false one and left out, for that
            anchor alone, statistics included (Qwen3-Embedding, arXiv 2506.05176). The comparison has no
            gradient.
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
        group: the batch is that of all ranks of this process group, each of which passes its own rows,
            pairs first: any number of them, with ids that mean the same on all ranks. Every rank calls, with
            the same options. The value is that of one process with the whole batch (with "none", the
            own pairs' part of it); gradients are such that DistributedDataParallel's or FSDP's average over
            the ranks is that of one process. Default: this process alone.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). An anchor without
        negatives contributes 0. Any NaN or infinity in the input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    inputs = images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    return _loss(
        HINGE_SUM, inputs, backend, group, switch=("hardest", hardest, HARDEST), margin=margin,
        false_negative_margin=false_negative_margin, direction_weights=direction_weights,
        reduction=reduction, return_statistics=return_statistics,
    )  # fmt: skip


def sigmoid_loss(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    equal_ids: str = "ignore",
    num_pairs: int | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    similarity: str = "dot",
    return_statistics: bool = False,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, LossStatistics]:
    """Pairwise sigmoid loss of SigLIP (arXiv 2303.15343): each entry of S is a yes or a no.

    Σ over the pairs of softplus(-(p/τ + b)) + Σ over the negatives of softplus(s/τ + b), divided by K.
    Without ids it equals

        labels = 2 * torch.eye(K) - 1
        -logsigmoid(labels * (images @ captions.T / temperature + bias)).sum() / K

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; usually L2-normalised.
        captions: [M, D] embeddings, same dtype and device (under autocast the dtypes may differ).
        scores: [N, M], a score matrix in place of images and captions, for models that compute one
            (cross-attention): it is read once forward, and its gradient written once backward. A score of
            -inf does not leave a pair out, it makes the loss NaN: give both the same id instead.
        temperature: τ from 1e-10 to 1e10, a float or a 0-d tensor, which gets its gradient if it requires
            one. One on a GPU or under torch.compile is not looked at: out of range makes the loss NaN.
        bias: b, a float or a 0-d tensor, likewise.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images (not of the captions): caption j is a
            negative of image i iff their ids differ. Default: the row numbers.
        equal_ids: what the scores of equal ids beside the pairs are: "ignore", nothing; "positive", a yes
            like the pairs' (a pair whose own ids differ is a no, then).
        num_pairs: K. Image k and caption k are a pair for k < K; later rows are extra negatives (a queue,
            another rank's shard), compared with the rows of pairs only. Default: N, and required if N != M.
        reduction: "mean" over the K pairs, "sum", or "none" for [K]: image k's scores, and those of the extra
            images with caption k.
        normalize: divide the rows by their L2 norm first: cosine similarity.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        return_statistics: also return `LossStatistics` (with margin 0), for one more pass over S.
        backend: "auto", or a name listed by `fused_vse.backends()`.
        group: the batch is that of all ranks of this process group; see `all_negatives_loss`.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStatistics). Any NaN or infinity in the
        input makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here, or does not take this batch.
    """
    inputs = images, captions, scores, image_ids, caption_ids, num_pairs, similarity, normalize
    return _loss(
        SIGMOID, inputs, backend, group, temperature=temperature, bias=bias, equal_ids=equal_ids,
        reduction=reduction, return_statistics=return_statistics,
    )  # fmt: skip


def _loss(
    kind: int | str,
    inputs: tuple,
    backend: str,
    group: "torch.distributed.ProcessGroup | None",
    switch: tuple[str, bool, int] | None = None,
    **options,
) -> Tensor | tuple[Tensor, LossStatistics]:
    """Every loss: checks, one statistic or one op for the whole, the formula of its kind, the reduction.

    `inputs` are those of `check_batch`, `options` those of `checked_options`; `switch` is a flag of the loss
    with the kind that it stands for.
    """

    def check() -> tuple[Batch, Options]:
        batch = check_batch(*inputs, least_pairs=1 if group is None else 0)
        name, flag, other = switch or ("", False, kind)
        return batch, checked_options(other if check_flag(name, flag) else kind, batch, **options)

    peers, batch, options = agree(group, check)
    if peers is not None:
        options = options._replace(
            inverse_temperature=shared_by_ranks(options.inverse_temperature, peers),
            bias=shared_by_ranks(options.bias, peers),
        )
    kind, reduction, _, scale, margin, weights, *_ = options
    small = REFERENCE
    if peers is None and reduction != "none" and options.has_whole_loss:
        small = choose(backend, "small_loss", batch)
    if small != REFERENCE:
        loss, hardest = small_loss(kind, batch, scale, margin, weights, reduction, small)
    else:
        loss, hardest = FORMULAS[kind](batch, options, backend, peers)
        loss = _reduce(loss, weights, reduction, peers)
    if not options.return_statistics:
        return loss
    if hardest is None:
        with torch.no_grad():
            hardest = hardest_statistic(batch, backend, peers, options.false_negative_margin)
    return loss, _loss_statistics(hardest, margin)


def _reduce(
    loss: Tensor, weights: tuple[float, float], reduction: str, peers: Peers | None
) -> Tensor:
    """[2, K] (of one direction [1, K]) to a scalar, unless reduction is "none"."""
    if peers is not None and reduction != "none":
        loss = OfAllRanks.apply(loss, peers)
    if weights != (1.0, 1.0):
        loss = torch.stack([loss[0] * weights[0], loss[1] * weights[1]])
    if reduction == "none":
        return loss if len(loss) == 2 else loss[0]
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
