"""The oracle: every statistic in plain PyTorch, on the whole score matrix S = I Tᵀ.

It imports nothing of this package and derives no gradient by hand: PyTorch's autograd does. Memory is
O(N·M). 16-bit input is computed in float32, float64 in float64. The formulas are those of
"Contrastive Learning of Visual-Semantic Embeddings" (arXiv 2110.08872).

Arguments of all functions, checked by the caller:
    images: [N, D] and captions: [M, D], one floating dtype; or the score matrix [N, M] and None.
    image_ids: [N] and caption_ids: [M] integers, or both None for the row numbers. Column j is a
        negative of row i iff the ids differ.
    num_pairs: K; row k and column k are a pair for k < K; later rows and columns are never anchors.
Results have K columns and, where there are two rows, row 0 is for image anchors, row 1 for captions.
"""

import functools

import torch
from torch import Tensor

from .arguments import accumulation_dtype


def _without_autocast(function):
    @functools.wraps(function)
    def wrapper(images, *args):
        with torch.autocast(images.device.type, enabled=False):
            return function(images, *args)

    return wrapper


def _scores(images, captions, image_ids, caption_ids, num_pairs):
    """S [N, M], which entries are negatives [N, M], and the scores of the pairs [K]."""
    dtype = accumulation_dtype(images.dtype)
    if captions is None:
        scores = images.to(dtype)
        seen = torch.ones_like(scores, dtype=torch.bool)
        seen[num_pairs:, num_pairs:] = False  # by no anchor
        scores = scores.where(seen, 0)
        scores = scores + _poison(scores)
        positive = scores.diagonal()[:num_pairs]
    else:
        images, captions = images.to(dtype), captions.to(dtype)
        poison = _poison(images, captions)
        scores = images @ captions.T + poison
        positive = (images[:num_pairs] * captions[:num_pairs]).sum(1) + poison
    if image_ids is None:
        image_ids = torch.arange(scores.shape[0], device=scores.device)
        caption_ids = torch.arange(scores.shape[1], device=scores.device)
    negative = image_ids[:, None] != caption_ids[None, :]
    return scores, negative, positive


def _poison(*tensors):
    """NaN as soon as any entry is not finite, else 0: an excluded or losing entry would hide it."""
    return sum((tensor * 0).sum() for tensor in tensors)


@_without_autocast
def order_similarity(images: Tensor, captions: Tensor) -> Tensor:
    """-‖max(0, captions[j] - images[i])‖₂ [N, M], by the [N, M, D] tensor of all differences.

    Where a difference has no positive part, at the kink of the norm, the gradient is 0.
    """
    dtype = accumulation_dtype(images.dtype)
    images, captions = images.to(dtype), captions.to(dtype)
    square = (captions[None] - images[:, None]).relu().square().sum(2) + _poison(images, captions)
    # The infinite derivative of sqrt at 0 would turn a gradient of 0 into NaN.
    is_zero = square == 0
    return -square.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _both_directions(matrix: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """The candidates of image anchors [K, M] and of caption anchors [K, N]."""
    return matrix[:num_pairs], matrix[:, :num_pairs].T


@_without_autocast
def hardest_negatives(images, captions, image_ids, caption_ids, num_pairs):
    """Positive score [K]; hardest negative's score [2, K] (-inf: none) and index [2, K] (-1: none).

    Ties go to the smallest index, which alone receives the gradient.
    """
    scores, negative, positive = _scores(images, captions, image_ids, caption_ids, num_pairs)
    best, best_index = [], []
    for s, is_negative in zip(
        _both_directions(scores, num_pairs), _both_directions(negative, num_pairs), strict=True
    ):
        value, index = s.masked_fill(~is_negative, -torch.inf).max(1)
        # max() may return any of several equal entries; the rule is the first.
        ties = is_negative & ((s == value[:, None]) | (s.isnan() & value.isnan()[:, None]))
        index = ties.to(torch.int8).argmax(1)
        found = is_negative.any(1)
        value = s.gather(1, index[:, None])[:, 0]
        # Where all negatives are excluded, only the positive still carries a NaN.
        best.append(torch.where(found, value, -torch.inf) + positive.detach() * 0)
        best_index.append(torch.where(found, index, -1))
    return positive, torch.stack(best), torch.stack(best_index)


@_without_autocast
def negative_logsumexp(images, captions, image_ids, caption_ids, num_pairs, scale):
    """Positive score [K]; log Σ exp(scale · s) over the negatives [2, K] (-inf: none),
    in float64."""
    scores, negative, positive = _scores(images, captions, image_ids, caption_ids, num_pairs)
    sums = []
    for s, is_negative in zip(
        _both_directions(scores, num_pairs), _both_directions(negative, num_pairs), strict=True
    ):
        # In float64, since autograd's exp(logit - lse) is off by the rounding of logits of 1/τ. MPS has none.
        s = s if s.is_mps else s.double()
        # The excluded entries are replaced before they meet the scale: 0 · inf would be NaN.
        logits = (scale * s.masked_fill(~is_negative, 0)).masked_fill(~is_negative, -torch.inf)
        found = is_negative.any(1)
        # A row of nothing but -inf has a NaN gradient; keep it out of logsumexp.
        total = logits.masked_fill(~found[:, None], 0).logsumexp(1)
        sums.append(torch.where(found, total, -torch.inf))
    return positive, torch.stack(sums)


@_without_autocast
def hinge_sum(images, captions, image_ids, caption_ids, num_pairs, margin):
    """Positive score [K]; Σ [s - (p - margin)]₊ over the negatives [2, K]; how many are active [2, K]."""
    scores, negative, positive = _scores(images, captions, image_ids, caption_ids, num_pairs)
    sums, counts = [], []
    for s, is_negative in zip(
        _both_directions(scores, num_pairs), _both_directions(negative, num_pairs), strict=True
    ):
        hinge = (s - (positive - margin)[:, None]).relu().masked_fill(~is_negative, 0)
        sums.append(hinge.sum(1))
        counts.append((hinge.detach() > 0).sum(1))
    # As in hardest_negatives: all excluded must not hide a NaN.
    return positive, torch.stack(sums) + positive.detach() * 0, torch.stack(counts)


@_without_autocast
def l2_normalize(rows: Tensor) -> Tensor:
    """rows / max(‖rows‖₂, 1e-12) [N, D], computed in float32 or float64, in the input's dtype."""
    dtype = accumulation_dtype(rows.dtype)
    x = rows.to(dtype)
    # The squares of a huge row would overflow, and the row become 0: a power of two takes it near 1.
    huge = 2.0**500 if dtype is torch.float64 else 2.0**50
    is_huge = x.detach().abs().amax(1, keepdim=True) > huge
    x = x * torch.ones_like(x[:, :1]).masked_fill(is_huge, 2.0**-30 / huge)
    return torch.nn.functional.normalize(x, dim=1).to(rows.dtype)
