"""What the ops of fused_vse/ops.py compute, written out on the whole matrix S in float64.

It shares nothing with the package; gradients by the embeddings come from autograd through S alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    s: Tensor  # [N, M] float64, attached to the graph of the embeddings
    counts: tuple[Tensor, Tensor]  # [N, M] bool: is a negative of the row's, of the column's anchor


def scores_of(batch, ceiling: Tensor | None = None) -> Scores:
    (
        images,
        captions,
        image_ids,
        caption_ids,
        r,
        c,
        pair_row,
        pair_column,
        pair_count,
        similarity,
    ) = batch
    if captions is None:
        s = images.double()
    elif similarity == 0:
        s = images.double() @ captions.double().T
    else:
        square = (captions.double()[None] - images.double()[:, None]).relu().square().sum(2)
        s = torch.where(square > 0, -torch.where(square > 0, square, 1.0).sqrt(), 0.0)
    if image_ids is not None:
        negative = image_ids[:, None] != caption_ids[None, :]
    else:
        negative = torch.ones_like(s, dtype=torch.bool)
        pair = torch.arange(pair_count)
        negative[pair_row + pair, pair_column + pair] = False
    of_rows, of_columns = negative.clone(), negative.clone()
    of_rows[r:] = False
    of_columns[:, c:] = False
    if ceiling is not None:
        of_rows[:r] &= s[:r] <= ceiling[:r].double()[:, None]
        of_columns[:, :c] &= s[:, :c] <= ceiling[r:].double()[None, :]
    return Scores(s, (of_rows, of_columns))


def anchors_of(batch, s: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [N, M] as [R, M] and [C, N]: the candidates of every anchor."""
    return s[: batch[4]], s[:, : batch[5]].T


def hardest_negatives(batch, ceiling=None) -> tuple[Tensor, Tensor]:
    scores = scores_of(batch, ceiling)
    best, where = [], []
    for s, counts in _directions(batch, scores):
        masked = s.detach().masked_fill(~counts, -torch.inf)
        value = masked.amax(1)
        index = (masked == value[:, None]).to(torch.int8).argmax(1)  # the first
        best.append(value)
        where.append(torch.where(value > -torch.inf, index, -1))
    return torch.cat(best), torch.cat(where)


def logsumexp(batch, ceiling, scale) -> Tensor:
    scores = scores_of(batch, ceiling)
    masked = [
        (scale * s).masked_fill(~counts, -torch.inf) for s, counts in _directions(batch, scores)
    ]
    return torch.cat([x.logsumexp(1) for x in masked])


def hinge_sum(batch, ceiling, threshold) -> tuple[Tensor, Tensor]:
    scores, r = scores_of(batch, ceiling), batch[4]
    sums, active = [], []
    thresholds = threshold.double()[:r], threshold.double()[r:]
    for (s, counts), t in zip(_directions(batch, scores), thresholds, strict=True):
        hinge = (s - t[:, None]).relu().masked_fill(~counts, 0)
        sums.append(hinge.sum(1))
        active.append((hinge > 0).sum(1))
    return torch.cat(sums), torch.cat(active)


def softplus_sum(batch, scale, bias, equal_positive) -> Tensor:
    """An entry counts for its row anchor, or where its row is none for its column anchor."""
    scores, r = scores_of(batch), batch[4]
    sums = []
    for (s, counts), first in zip(_directions(batch, scores), (0, r), strict=True):
        x, counts = (scale * s + bias)[:, first:], counts[:, first:]
        if equal_positive and batch[2] is not None:
            x, counts = torch.where(counts, x, -x), torch.ones_like(counts)
        sums.append(torch.logaddexp(x, torch.zeros_like(x)).masked_fill(~counts, 0).sum(1))
    return torch.cat(sums)


def positive_scores(batch) -> Tensor:
    row, column, count = batch[6:9]
    return scores_of(batch).s[row : row + count, column : column + count].diagonal()


def _directions(batch, scores: Scores):
    rows, columns = anchors_of(batch, scores.s)
    return (
        (rows, anchors_of(batch, scores.counts[0])[0]),
        (columns, anchors_of(batch, scores.counts[1])[1]),
    )


def gradients(batch, objective) -> tuple[Tensor, Tensor | None]:
    """d_images and d_captions [..] float64 of objective(batch with float64 leaves)."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in batch[:2]]
    value = objective((*leaves, *batch[2:]))
    wanted = [x for x in leaves if x is not None]
    got = torch.autograd.grad(value, wanted, allow_unused=True)
    got = [torch.zeros_like(x) if g is None else g for g, x in zip(got, wanted, strict=True)]
    return (got[0], got[1] if len(got) > 1 else None)
