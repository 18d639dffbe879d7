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


def all_negatives(images, captions, ids, num_pairs, temperature=0.1, margin=0.0) -> Tensor:
    """[2, K]"""
    losses = []
    for p, row, is_negative in negatives_of(images, captions, *ids, num_pairs):
        terms = torch.cat([p[None], row[is_negative] + margin]) / temperature
        losses.append(terms.logsumexp(0) - p / temperature)
    return torch.stack(losses).view(2, num_pairs)


def hardest_negative(
    images, captions, ids, num_pairs, temperature=0.1, margin=0.2, smooth=False
) -> Tensor:
    """[2, K]"""
    losses = []
    for p, row, is_negative in negatives_of(images, captions, *ids, num_pairs):
        if not is_negative.any():
            losses.append(p * 0 / temperature)
            continue
        violation = first_maximum(row[is_negative]) + margin - p
        losses.append(
            (violation / temperature).exp().log1p() if smooth else violation.relu() / temperature
        )
    return torch.stack(losses).view(2, num_pairs)


def hinge(images, captions, ids, num_pairs, margin=0.2, hardest=False) -> Tensor:
    """[2, K]"""
    losses = []
    for p, row, is_negative in negatives_of(images, captions, *ids, num_pairs):
        hinges = (row[is_negative] + margin - p).relu()
        if not is_negative.any():
            losses.append(p * 0)
        else:
            losses.append(first_maximum(hinges) if hardest else hinges.sum())
    return torch.stack(losses).view(2, num_pairs)


def reduced(losses: Tensor, direction_weights=(1.0, 1.0), reduction="mean") -> Tensor:
    weighted = losses * torch.tensor(direction_weights, dtype=losses.dtype)[:, None]
    if reduction == "none":
        return weighted
    return weighted.sum() / (losses.shape[1] if reduction == "mean" else 1)
