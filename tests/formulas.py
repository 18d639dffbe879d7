"""The losses written out anchor by anchor from their definitions, sharing nothing with the package.

Slow and plain on purpose: one Python loop over the anchors, autograd for the gradients.
"""

import torch
from torch import Tensor


def negatives_of(images, captions, image_ids, caption_ids, num_pairs):
    """For both directions and every anchor k: p_k and the scores of its negatives."""
    scores = images @ captions.T
    if image_ids is None:
        image_ids, caption_ids = torch.arange(len(images)), torch.arange(len(captions))
    positives = scores.diagonal().unbind()
    for p, row, own_id in zip(positives[:num_pairs], scores.unbind(), image_ids, strict=False):
        yield p, row, caption_ids != own_id
    for p, column, own_id in zip(
        positives[:num_pairs], scores.T.unbind(), caption_ids, strict=False
    ):
        yield p, column, image_ids != own_id


def first_maximum(values: Tensor) -> Tensor:
    return values[int((values == values.max()).nonzero()[0])]


def kept(p, row, is_negative, false_negative_margin):
    """The negatives without those that score too high."""
    if false_negative_margin is None:
        return is_negative
    return is_negative & (row.detach() <= p.detach() + false_negative_margin)


def all_negatives(
    images, captions, ids, num_pairs, temperature=0.1, margin=0.0, false_negative_margin=None,
    hardness=0.0, equal_ids="ignore",
) -> Tensor:  # fmt: skip
    """[2, K]"""
    losses = []
    for p, row, is_negative in negatives_of(images, captions, *ids, num_pairs):
        if equal_ids == "positive" and ids[0] is not None:
            logits, positives = row / temperature, row[~is_negative] / temperature
            losses.append(logits.logsumexp(0) - positives.mean() if len(positives) else p * 0)
            continue
        s = row[kept(p, row, is_negative, false_negative_margin)]
        logits = (s + margin) / temperature + hardness * s.detach()
        losses.append(torch.cat([p[None] / temperature, logits]).logsumexp(0) - p / temperature)
    return torch.stack(losses).view(2, num_pairs)


def hardest_negative(
    images, captions, ids, num_pairs, temperature=0.1, margin=0.2, smooth=False, select=None,
    false_negative_margin=None,
) -> Tensor:  # fmt: skip
    """[2, K]"""
    losses = []
    for p, row, is_negative in negatives_of(images, captions, *ids, num_pairs):
        s = row[kept(p, row, is_negative, false_negative_margin)]
        if not len(s):
            losses.append(p * 0 / temperature)
            continue
        h = first_maximum(s)
        violation = h + margin - p
        if select is not None and (p - h).abs() < select:
            losses.append((s + margin - p).relu().mean() / temperature)
            continue
        losses.append(
            (violation / temperature).exp().log1p() if smooth else violation.relu() / temperature
        )
    return torch.stack(losses).view(2, num_pairs)


def hinge(
    images, captions, ids, num_pairs, margin=0.2, hardest=False, false_negative_margin=None
) -> Tensor:
    """[2, K]"""
    losses = []
    for p, row, is_negative in negatives_of(images, captions, *ids, num_pairs):
        hinges = (row[kept(p, row, is_negative, false_negative_margin)] + margin - p).relu()
        if not len(hinges):
            losses.append(p * 0)
        else:
            losses.append(first_maximum(hinges) if hardest else hinges.sum())
    return torch.stack(losses).view(2, num_pairs)


def sigmoid(
    images, captions, ids, num_pairs, temperature=0.1, bias=-10.0, equal_ids="ignore"
) -> Tensor:
    """[K]: entry (i, j) belongs to pair i, or where that is none, to pair j."""
    logits = images @ captions.T / temperature + bias
    pair = torch.zeros_like(logits, dtype=torch.bool)
    pair.diagonal()[:num_pairs] = True
    if ids[0] is None:
        terms = softplus(torch.where(pair, -logits, logits))
    else:
        same = ids[0][:, None] == ids[1][None, :]
        if equal_ids == "positive":
            terms = softplus(torch.where(same, -logits, logits))
        else:  # a pair of different ids is both
            terms = softplus(logits) * ~same + softplus(-logits) * pair
    return terms[:num_pairs].sum(1) + terms[num_pairs:, :num_pairs].sum(0)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def reduced(losses: Tensor, direction_weights=(1.0, 1.0), reduction="mean") -> Tensor:
    weighted = losses * torch.tensor(direction_weights, dtype=losses.dtype)[:, None]
    if reduction == "none":
        return weighted
    return weighted.sum() / (losses.shape[1] if reduction == "mean" else 1)
