"""The formulas of the losses: O(K) arithmetic on the statistics of one pass.

A formula gives the losses of single anchors [2, K] in the scores' dtype, and the hardest negatives if they
are at hand. An anchor without negatives contributes 0 and receives no gradient: what would be 0 * inf is
left out. Notation: losses.py; α = 1 / τ.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .distributed.peers import Peers
from .distributed.plain import gather_side
from .distributed.reduction import anywhere
from .equal import count_equal
from .ops import ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM, Batch, accumulation_dtype
from .options import SIGMOID, Options
from .reference import widened
from .statistics import (
    equal_statistic,
    hardest_statistic,
    hinge_statistic,
    logsumexp_statistic,
    softplus_statistic,
)


def all_negatives(batch: Batch, options: Options, backend: str, peers: Peers | None):
    """-log(e^αp / (e^αp + e^(lse + αm))) = softplus(lse + α(m - p)), whose terms nearly cancel."""
    scale = options.inverse_temperature
    if options.equal_positive:
        return _all_negatives_of_several(batch, scale, backend, peers), None
    positive, reference, log_sum = logsumexp_statistic(
        batch, scale, backend, peers, options.false_negative_margin, options.hardness
    )
    difference = scale * (positive - reference - options.margin) - log_sum
    return -logsigmoid(difference).to(positive.dtype), None


def _all_negatives_of_several(
    batch: Batch, scale: float | Tensor, backend: str, peers: Peers | None
) -> Tensor:
    """LSE(α s over everything) - α mean(s over the positives): every id is that of a negative, or of a
    positive."""
    # The gradients of both terms nearly cancel: not to be rounded one by one.
    batch = widened(batch)
    everything = batch._replace(
        image_ids=torch.zeros_like(batch.image_ids), caption_ids=torch.ones_like(batch.caption_ids)
    )
    positive, reference, log_sum = logsumexp_statistic(everything, scale, backend, peers)
    total, count = equal_statistic(batch, backend, peers)
    mean = total / count.clamp(min=1)
    loss = (scale * (reference - mean) + log_sum).to(positive.dtype)
    return loss.where((count > 0) | loss.isnan(), 0)


def hardest(batch: Batch, options: Options, backend: str, peers: Peers | None):
    """α [m + h - p]₊; with `select`, where |p - h| is smaller, α mean([m + s - p]₊)"""
    scale, margin, false = (
        options.inverse_temperature,
        options.margin,
        options.false_negative_margin,
    )
    hardest = hardest_statistic(batch, backend, peers, false)
    positive, scores, _ = hardest
    loss = (scores - positive + margin).relu()
    if options.select is not None:
        inside = ((positive - scores).abs() < options.select).detach()
        if anywhere(inside, peers):
            _, total = hinge_statistic(batch, margin, backend, peers, inside=inside)
            loss = torch.where(inside, total / _negative_counts(batch, peers).clamp(min=1), loss)
    return scale * loss, hardest


def _negative_counts(batch: Batch, peers: Peers | None) -> Tensor:
    """How many negatives the anchors have, [2, K] or [2, 1]."""
    images, captions, image_ids, caption_ids = batch[:4]
    rows, columns = images.shape[0], images.shape[1] if captions is None else captions.shape[0]
    if peers is not None:
        rows, columns = sum(peers.images), sum(peers.captions)
    everything = torch.tensor([[columns], [rows]], device=images.device)
    if image_ids is None:
        return everything - 1
    k, all_images, all_captions = batch.pair_count, image_ids, caption_ids
    if peers is not None:
        all_images = gather_side(image_ids, peers, peers.images)
        all_captions = gather_side(caption_ids, peers, peers.captions)
    equal = count_equal(all_captions, image_ids[:k]), count_equal(all_images, caption_ids[:k])
    return everything - torch.stack(equal)


def hardest_smooth(batch: Batch, options: Options, backend: str, peers: Peers | None):
    """softplus(α (m + h - p))"""
    scale, false = options.inverse_temperature, options.false_negative_margin
    hardest = hardest_statistic(batch, backend, peers, false)
    alone = hardest.scores == -torch.inf  # not by the index, which a NaN score lacks, too
    violation = torch.where(alone, 0, hardest.scores - hardest.positive_scores + options.margin)
    return torch.where(alone, 0, -logsigmoid(-scale * violation)), hardest


def hinge_sum(batch: Batch, options: Options, backend: str, peers: Peers | None):
    """Σ [m + s - p]₊"""
    false = options.false_negative_margin
    return hinge_statistic(batch, options.margin, backend, peers, false)[1], None


def sigmoid(batch: Batch, options: Options, backend: str, peers: Peers | None):
    """softplus(-(αp + b)) + Σ softplus(αs + b) of the entries of S, each once. [1, K]"""
    scale, bias = options.inverse_temperature, options.bias
    bias = torch.as_tensor(
        bias, dtype=accumulation_dtype(batch.images.dtype), device=batch.images.device
    )
    positive, total = softplus_statistic(batch, scale, bias, options.equal_positive, backend, peers)
    loss = total.sum(0, keepdim=True)
    if not options.equal_positive:  # else the pairs are among them
        loss = loss - logsigmoid(scale * positive + bias)
    return loss, None


FORMULAS = {
    ALL_NEGATIVES: all_negatives,
    HARDEST: hardest,
    HARDEST_SMOOTH: hardest_smooth,
    HINGE_SUM: hinge_sum,
    SIGMOID: sigmoid,
}
