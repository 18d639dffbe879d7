"""The statistics over the batch of all ranks of a process group, exact, each score computed once.

Every rank compares its own rows with the captions of all ranks; images stay where they are:

    for chunk c of the captions of every rank:        gathered while the chunk before is computed
        row[c], column[c] = op(own images, captions[c])           [K + C], a statistic of ops.py
    own rows' statistic    = merge of row[c] over the chunks
    own columns' statistic = merge of column[.] over the ranks, in their order

Backward, the merged statistics of all columns come back (16 bytes a column), and the op's backward pass
gives d_images of the own rows and a part of d_captions of all columns, which a reduce-scatter sums in the
accumulation type. So B images and captions a rank cost B * W B scores, and the captions travel once
forward and once back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..dispatch import REFERENCE, choose
from ..equal import equal_sums, equal_sums_backward
from ..first_order import first_order_only
from ..ops import Batch, accumulation_dtype, ceiling_of, ops_of, threshold_of
from .exchange import Exchange
from .peers import Peers
from .plain import statistic_of_rows

# A statistic as the exchange needs it: the op, how results of several parts merge, the op's backward pass.
# Results are pairs of tensors with one number an anchor; `vectors`, arguments of the ops, have one likewise.
# `counts_once`: an entry counts for its row anchor, and where its row is none for its column anchor.


class Hardest(NamedTuple):
    false_negative_margin: float | None = None
    op: str = "hardest_negatives"
    counts_once = False

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return [ceiling_of(positive, self.false_negative_margin)]

    def forward(self, ops, batch: Batch, ceiling: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.hardest_negatives(*batch, ceiling)

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The larger score, and of equal ones the smaller number; NaN wins."""
        best, where = parts[0]
        for score, number in parts[1:]:
            wins = (score > best) | score.isnan() | ((score == best) & (number < where))
            best, where = torch.where(wins, score, best), torch.where(wins, number, where)
        return best, where

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        return reference.hardest_negatives(*arguments)

    def backward(self, ops, batch, vectors, merged, d_positive, d, needs):
        return *ops.hardest_negatives_backward(*batch, *merged, d_positive, d, *needs), None


class Logsumexp(NamedTuple):
    scale: float
    scale_tensor: Tensor | None
    false_negative_margin: float | None = None
    op: str = "negative_logsumexp"
    counts_once = False

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return [ceiling_of(positive, self.false_negative_margin)]

    def forward(self, ops, batch: Batch, ceiling: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.negative_logsumexp(*batch, ceiling, self.scale, self.scale_tensor, False)[:2]

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        scale = self.scale if self.scale_tensor is None else self.scale_tensor
        references, log_sums = (torch.stack(x) for x in zip(*parts, strict=True))
        found = log_sums != -torch.inf
        reference = references.where(found, -torch.inf).amax(0)
        reference = reference.where(found.any(0), 0)
        terms = scale * (references - reference) + log_sums
        return reference, terms.where(found, -torch.inf).logsumexp(0)

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        scale = self.scale if self.scale_tensor is None else self.scale_tensor
        return reference.negative_logsumexp(*arguments, scale)

    def backward(self, ops, batch, vectors, merged, d_positive, d, needs):
        options = *vectors, self.scale, self.scale_tensor, *merged, merged[0].new_empty(0)
        return ops.negative_logsumexp_backward(*batch, *options, d_positive, d, *needs)


class HingeSum(NamedTuple):
    margin: float
    false_negative_margin: float | None = None
    inside: Tensor | None = None
    op: str = "hinge_sum"
    counts_once = False

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        ceiling = ceiling_of(positive, self.false_negative_margin)
        return [ceiling, threshold_of(positive, self.margin, self.inside)]

    def forward(self, ops, batch: Batch, ceiling, threshold) -> tuple[Tensor, Tensor]:
        return ops.hinge_sum(*batch, ceiling, threshold, False)[:2]

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return _sums(parts)

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        return reference.hinge_sum(*arguments)

    def backward(self, ops, batch, vectors, merged, d_positive, d, needs):
        options = *vectors, merged[0], merged[0].new_empty(0)
        return *ops.hinge_sum_backward(*batch, *options, d_positive, d, *needs), None


class SoftplusSum(NamedTuple):
    scale: float
    scale_tensor: Tensor | None
    bias: Tensor
    equal_positive: bool
    op: str = "softplus_sum"
    counts_once = True

    @property
    def entries(self) -> tuple:
        return self.scale, self.scale_tensor, self.bias, self.equal_positive

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return []

    def forward(self, ops, batch: Batch) -> tuple[Tensor, Tensor]:
        return ops.softplus_sum(*batch, *self.entries, False)[:2]

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return _sums(parts)

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        scale = self.scale if self.scale_tensor is None else self.scale_tensor
        return reference.softplus_sum(*arguments, scale, self.bias, self.equal_positive)

    def backward(self, ops, batch, vectors, merged, d_positive, d, needs):
        options = *self.entries, merged[0], merged[0].new_empty(0)
        return ops.softplus_sum_backward(*batch, *options, d_positive, d, *needs)


class EqualSum(NamedTuple):
    """Of the scores of equal ids, and their number. No op: the positive scores are not to be used."""

    op: str = "positive_scores"
    counts_once = False

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return []

    def forward(self, ops, batch: Batch) -> tuple[Tensor, Tensor]:
        return equal_sums(batch)

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return _sums(parts)

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        return reference.equal_sums(*arguments)

    def backward(self, ops, batch, vectors, merged, d_positive, d, needs):
        return *equal_sums_backward(batch, d), None


def _sums(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    one, other = (torch.stack(x) for x in zip(*parts, strict=True))
    return one.sum(0), other.sum(0)


class _OverRanks(torch.autograd.Function):
    """The positive scores [K] of the own pairs, and a statistic [2 K] of them over the batch of all ranks."""

    @staticmethod
    def forward(ctx, statistic, peers, ops, scale_tensor, bias, *fields):
        # The tensors of the statistic are arguments, too, for autograd to see.
        own = Batch(*fields)
        ctx.statistic, ctx.ops = statistic, ops
        ctx.exchange = exchange = Exchange(peers, own.captions)
        positive = ops.positive_scores(*own)
        ctx.vectors = statistic.vectors(positive)
        calls = exchange.calls(own, ctx.vectors)
        if exchange.kept:
            ctx.calls = calls = list(calls)
        k, rows, columns = exchange.pairs, [], []
        for chunk, batch, vectors in calls:
            one, other = statistic.forward(ops, batch, *vectors)
            if isinstance(statistic, Hardest):
                other = exchange.to_numbers(chunk, other)
            rows.append((one[:k], other[:k]))
            if chunk.are_pairs:
                columns.append((one[k:], other[k:]))
        received = [exchange.to_owners(x) for x in zip(*columns, strict=True)]
        of_rows = statistic.merge(rows)
        of_columns = statistic.merge(list(zip(*received, strict=True)))
        merged = [torch.cat(x) for x in zip(of_rows, of_columns, strict=True)]
        ctx.mark_non_differentiable(merged[0 if isinstance(statistic, Logsumexp) else 1])
        ctx.anchors = fields[4:]
        ctx.save_for_backward(*fields[:4], *merged)
        return positive, *merged

    @staticmethod
    def backward(ctx, d_positive, d_one, d_other):
        *tensors, one, other = ctx.saved_tensors
        own, statistic, exchange = Batch(*tensors, *ctx.anchors), ctx.statistic, ctx.exchange
        k, merged, d_bias = exchange.pairs, (one, other), None
        d = d_other if isinstance(statistic, Logsumexp) else d_one
        if isinstance(statistic, HingeSum):
            d_positive = d_positive - (other * d).view(2, k).sum(0)
        if isinstance(statistic, SoftplusSum):
            d_bias = (other * d).sum()
        vectors = *merged, d
        of_pairs = [exchange.of_pairs(x[k:]) for x in vectors]
        needs = ctx.needs_input_grad[5:7]
        dtype = accumulation_dtype(own.images.dtype)
        d_images, d_captions = (torch.zeros_like(x, dtype=dtype) for x in own[:2])
        d_scale, finish = 0, lambda: None
        calls = getattr(ctx, "calls", None) or exchange.calls(own, ctx.vectors)
        for chunk, batch, of_anchors in calls:
            one, other, d = (
                exchange.anchors(chunk, x[:k], parts)
                for x, parts in zip(vectors, of_pairs, strict=True)
            )
            if isinstance(statistic, Hardest):
                other = exchange.to_positions(chunk, other)
            of_chunk = d_positive[batch.pair_row : batch.pair_row + batch.pair_count]
            to_images, to_captions, to_scale = statistic.backward(
                ctx.ops, batch, of_anchors, (one, other), of_chunk, d, (*needs, True)
            )
            if needs[0]:
                d_images += to_images
            if needs[1]:
                started = exchange.reduce(chunk, to_captions, d_captions)
                finish()  # of the chunk before, whose memory is free then
                finish = started
            if to_scale is not None:
                d_scale = d_scale + to_scale
        finish()
        gradients = first_order_only(
            d_images.to(own.images.dtype), d_captions.to(own.captions.dtype), d_scale, d_bias,
            needed=(*needs, *ctx.needs_input_grad[3:5]),
        )  # fmt: skip
        d_images, d_captions, d_scale, d_bias = gradients
        return None, None, None, d_scale, d_bias, d_images, d_captions, *(None,) * 8


def statistic_over_ranks(
    statistic: NamedTuple, batch: Batch, peers: Peers, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scores [K] of the own pairs, and a statistic [2 K] of them over the batch of all ranks."""
    backend = choose(backend, statistic.op, batch)
    if backend == REFERENCE:
        return statistic_of_rows(statistic, batch, peers)
    tensors = (getattr(statistic, name, None) for name in ("scale_tensor", "bias"))
    return _OverRanks.apply(statistic, peers, ops_of(backend), *tensors, *batch)
