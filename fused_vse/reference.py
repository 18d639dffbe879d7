"""The oracle: every statistic in plain PyTorch, on the whole score matrix S = I Tᵀ.

It imports nothing of this package and derives no gradient by hand: PyTorch's autograd does. Memory is
O(N·M). 16-bit input is computed in float32, float64 in float64. The formulas are those of
"Contrastive Learning of Visual-Semantic Embeddings" (arXiv 2110.08872).

All functions take the batch as the ops do, and return what they return; ops.py explains both.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class _Scores(NamedTuple):
    matrix: Tensor  # S [N, M]
    negative: Tensor  # [N, M] bool
    poison: Tensor  # [], NaN if an entry that counts is not finite, else 0


class _Direction(NamedTuple):
    """The candidates of the row anchors [R, M], or of the column anchors [C, N]."""

    scores: Tensor
    negative: Tensor


def _without_autocast(function):
    @functools.wraps(function)
    def wrapper(images, *args):
        with torch.autocast(images.device.type, enabled=False):
            return function(images, *args)

    return wrapper


def _poison(*tensors: Tensor) -> Tensor:
    """NaN as soon as any entry is not finite, else 0: an excluded or losing entry would hide it."""
    return sum((tensor * 0).sum() for tensor in tensors)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _order_similarity(images: Tensor, captions: Tensor) -> Tensor:
    """-‖max(0, captions - images)‖₂ over the last dimension."""
    square = (captions - images).relu().square().sum(-1)
    # At the kink of the norm the gradient is 0; sqrt's infinite derivative would make it NaN.
    is_zero = square == 0
    return -square.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _scores(
    images, captions, image_ids, caption_ids, row_anchors, column_anchors,
    pair_row, pair_column, pair_count, similarity,
) -> _Scores:  # fmt: skip
    dtype = _accumulation_dtype(images.dtype)
    if captions is None:
        matrix = images.to(dtype)
        seen = torch.ones_like(matrix, dtype=torch.bool)
        seen[row_anchors:, column_anchors:] = False  # by no anchor
        matrix = matrix.where(seen, 0)
        poison = _poison(matrix)
    else:
        images, captions = images.to(dtype), captions.to(dtype)
        if similarity == 0:
            matrix = images @ captions.T
        else:  # by the [N, M, D] tensor of all differences
            matrix = _order_similarity(images[:, None], captions[None])
        poison = _poison(images, captions) + _poison(matrix)
    if image_ids is None:
        pair = torch.arange(matrix.shape[0], device=matrix.device)[:, None] - pair_row
        column = torch.arange(matrix.shape[1], device=matrix.device)[None] - pair_column
        negative = (pair != column) | (pair < 0) | (pair >= pair_count)
    else:
        negative = image_ids[:, None] != caption_ids[None, :]
    return _Scores(matrix, negative, poison)


def _directions(batch, ceiling: Tensor | None) -> tuple[list[_Direction], Tensor]:
    """Both directions, and the poison."""
    (scores, negative, poison), rows, columns = _scores(*batch), batch[4], batch[5]
    directions = [
        _Direction(scores[:rows], negative[:rows]),
        _Direction(scores[:, :columns].T, negative[:, :columns].T),
    ]
    if ceiling is not None:
        ceilings = ceiling[:rows, None], ceiling[rows:, None]
        directions = [
            _Direction(s, is_negative & (s.detach() <= c))
            for (s, is_negative), c in zip(directions, ceilings, strict=True)
        ]
    return directions, poison


def widened(batch):
    """The batch in the accumulation type. Taken once for all statistics of a loss, whose gradients are then
    rounded once, as a sum."""
    dtype = _accumulation_dtype(batch.images.dtype)
    captions = None if batch.captions is None else batch.captions.to(dtype)
    return batch._replace(images=batch.images.to(dtype), captions=captions)


@_without_autocast
def positive_scores(*batch) -> Tensor:
    images, captions, *_, row, column, count, similarity = batch
    dtype = _accumulation_dtype(images.dtype)
    if captions is None:
        return images[row : row + count, column : column + count].diagonal().to(dtype)
    images = images[row : row + count].to(dtype)
    captions = captions[column : column + count].to(dtype)
    return (images * captions).sum(1) if similarity == 0 else _order_similarity(images, captions)


@_without_autocast
def hardest_negatives(*arguments) -> tuple[Tensor, Tensor]:
    """Ties go to the smallest index, which alone receives the gradient."""
    *batch, ceiling = arguments
    directions, poison = _directions(batch, ceiling)
    best, best_index = [], []
    for s, is_negative in directions:
        value = s.masked_fill(~is_negative, -torch.inf).amax(1)
        # max() may return any of several equal entries; the rule is the first.
        ties = is_negative & ((s == value[:, None]) | (s.isnan() & value.isnan()[:, None]))
        index = ties.to(torch.int8).argmax(1)
        found = is_negative.any(1)
        value = s.gather(1, index[:, None])[:, 0]
        best.append(torch.where(found, value, -torch.inf) + poison)
        best_index.append(torch.where(found, index, -1))
    return torch.cat(best), torch.cat(best_index)


@_without_autocast
def negative_logsumexp(*arguments) -> tuple[Tensor, Tensor]:
    """The reference, a constant, and log Σ exp(scale · (s - reference)) in float64."""
    *batch, ceiling, scale = arguments
    directions, poison = _directions(batch, ceiling)
    references, sums = [], []
    for s, is_negative in directions:
        found = is_negative.any(1)
        excluded = ~is_negative
        largest = s.detach().masked_fill(excluded, -torch.inf).amax(1)
        reference = torch.where(found, largest, 0)
        # In float64, since autograd's exp(logit - lse) is off by the rounding of the lse. MPS has none.
        difference = (s if s.is_mps else s.double()) - reference[:, None]
        # The excluded entries are replaced before they meet the scale: 0 · inf would be NaN.
        logits = (scale * difference.masked_fill(excluded, 0)).masked_fill(excluded, -torch.inf)
        # A row of nothing but -inf has a NaN gradient; keep it out of logsumexp.
        total = logits.masked_fill(~found[:, None], 0).logsumexp(1)
        references.append(reference)
        sums.append(torch.where(found, total, -torch.inf) + poison)
    return torch.cat(references), torch.cat(sums)


@_without_autocast
def hinge_sum(*arguments) -> tuple[Tensor, Tensor]:
    *batch, ceiling, threshold = arguments
    directions, poison = _directions(batch, ceiling)
    thresholds = threshold[: batch[4], None], threshold[batch[4] :, None]
    sums, counts = [], []
    for (s, is_negative), of_anchor in zip(directions, thresholds, strict=True):
        hinge = (s - of_anchor).relu().masked_fill(~is_negative, 0)
        sums.append(hinge.sum(1) + poison)
        counts.append((hinge.detach() > 0).sum(1))
    return torch.cat(sums), torch.cat(counts)


@_without_autocast
def softplus_sum(*arguments) -> tuple[Tensor, Tensor]:
    """An entry counts for its row anchor, or where its row is none for its column anchor."""
    *batch, scale, bias, equal_positive = arguments
    directions, poison = _directions(batch, None)
    sums, slopes = [], []
    for (s, counts), first in zip(directions, (0, batch[4]), strict=True):
        s, counts = s[:, first:], counts[:, first:]
        sign = 1
        if equal_positive and batch[2] is not None:
            sign, counts = torch.where(counts, 1, -1), torch.ones_like(counts)
        x = sign * (scale * s + bias)
        sums.append(-logsigmoid(-x).masked_fill(~counts, 0).sum(1) + poison)
        slopes.append((sign * x.detach().sigmoid()).masked_fill(~counts, 0).sum(1))
    return torch.cat(sums), torch.cat(slopes)


@_without_autocast
def equal_sums(*batch) -> tuple[Tensor, Tensor]:
    """The sum of an anchor's scores with what has its id, and how many there are."""
    (scores, negative, poison), rows, columns = _scores(*batch), batch[4], batch[5]
    equal = scores.masked_fill(negative, 0)
    counts = [(~negative[:rows]).sum(1), (~negative[:, :columns]).sum(0)]
    return torch.cat([equal[:rows].sum(1), equal[:, :columns].sum(0)]) + poison, torch.cat(counts)
