"""The statistics, each once: the op that computes it, of which vectors, how parts merge, its gradient.

A definition is a NamedTuple of the op's numbers with

    op: its name in ops.py
    differentiable: which of its two results [R + C] has a gradient
    counts_once: an entry counts for its row anchor, and where its row is none for its column anchor
    vectors(positive): arguments of the op with one number an anchor, from the pairs' scores
    forward(ops, batch, vectors, save_scores): both results, and the kept scores
    plain(*batch, *vectors): both results by the reference
    backward(ops, batch, vectors, results, scores, d_positive, d, needs): d_images, d_captions, d_scale
    of_parameters(results, d, d_positive): d_positive with the derivatives by thresholds, and d_bias
    merge(parts): both results from those of several parts of the candidates
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .equal import equal_sums, equal_sums_backward
from .first_order import first_order_only
from .ops import ops_of


def _no_parameters(self, results: tuple[Tensor, Tensor], d: Tensor, d_positive: Tensor):
    return d_positive, None


def _sums(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    one, other = (torch.stack(x) for x in zip(*parts, strict=True))
    return one.sum(0), other.sum(0)


class Hardest(NamedTuple):
    false_negative_margin: float | None = None
    op: str = "hardest_negatives"
    differentiable, counts_once, of_parameters = 0, False, _no_parameters

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return [ceiling_of(positive, self.false_negative_margin)]

    def forward(self, ops, batch: tuple, vectors: list, save_scores: bool) -> tuple:
        return *ops.hardest_negatives(*batch, *vectors), None

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The larger score, and of equal ones the smaller number; NaN wins."""
        best, where = parts[0]
        for score, number in parts[1:]:
            wins = (score > best) | score.isnan() | ((score == best) & (number < where))
            best, where = torch.where(wins, score, best), torch.where(wins, number, where)
        return best, where

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        return reference.hardest_negatives(*arguments)

    def backward(self, ops, batch, vectors, results, scores, d_positive, d, needs):
        return *ops.hardest_negatives_backward(*batch, *results, d_positive, d, *needs), None


class Logsumexp(NamedTuple):
    scale: float
    scale_tensor: Tensor | None
    false_negative_margin: float | None = None
    op: str = "negative_logsumexp"
    differentiable, counts_once, of_parameters = 1, False, _no_parameters

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return [ceiling_of(positive, self.false_negative_margin)]

    def forward(self, ops, batch: tuple, vectors: list, save_scores: bool) -> tuple:
        options = *vectors, self.scale, self.scale_tensor, save_scores
        return ops.negative_logsumexp(*batch, *options)

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

    def backward(self, ops, batch, vectors, results, scores, d_positive, d, needs):
        options = *vectors, self.scale, self.scale_tensor, *results, scores
        return ops.negative_logsumexp_backward(*batch, *options, d_positive, d, *needs)


class HingeSum(NamedTuple):
    margin: float
    false_negative_margin: float | None = None
    inside: Tensor | None = None
    op: str = "hinge_sum"
    differentiable, counts_once, merge = 0, False, _sums

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        ceiling = ceiling_of(positive, self.false_negative_margin)
        return [ceiling, threshold_of(positive, self.margin, self.inside)]

    def forward(self, ops, batch: tuple, vectors: list, save_scores: bool) -> tuple:
        return ops.hinge_sum(*batch, *vectors, save_scores)

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        return reference.hinge_sum(*arguments)

    def backward(self, ops, batch, vectors, results, scores, d_positive, d, needs):
        options = *vectors, results[0], scores
        return *ops.hinge_sum_backward(*batch, *options, d_positive, d, *needs), None

    def of_parameters(self, results: tuple[Tensor, Tensor], d: Tensor, d_positive: Tensor):
        return d_positive - (results[1] * d).view(2, -1).sum(0), None


class SoftplusSum(NamedTuple):
    scale: float
    scale_tensor: Tensor | None
    bias: Tensor
    equal_positive: bool
    op: str = "softplus_sum"
    differentiable, counts_once, merge = 0, True, _sums

    @property
    def entries(self) -> tuple:
        return self.scale, self.scale_tensor, self.bias, self.equal_positive

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return []

    def forward(self, ops, batch: tuple, vectors: list, save_scores: bool) -> tuple:
        return ops.softplus_sum(*batch, *self.entries, save_scores)

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        scale = self.scale if self.scale_tensor is None else self.scale_tensor
        return reference.softplus_sum(*arguments, scale, self.bias, self.equal_positive)

    def backward(self, ops, batch, vectors, results, scores, d_positive, d, needs):
        options = *self.entries, results[0], scores
        return ops.softplus_sum_backward(*batch, *options, d_positive, d, *needs)

    def of_parameters(self, results: tuple[Tensor, Tensor], d: Tensor, d_positive: Tensor):
        return d_positive, (results[1] * d).sum()


class EqualSum(NamedTuple):
    """Of the scores of equal ids, and their number. No op: the positive scores are not to be used."""

    op: str = "positive_scores"
    differentiable, counts_once, of_parameters, merge = 0, False, _no_parameters, _sums

    def vectors(self, positive: Tensor) -> list[Tensor | None]:
        return []

    def forward(self, ops, batch: tuple, vectors: list, save_scores: bool) -> tuple:
        return *equal_sums(batch), None

    def plain(self, *arguments) -> tuple[Tensor, Tensor]:
        return reference.equal_sums(*arguments)

    def backward(self, ops, batch, vectors, results, scores, d_positive, d, needs):
        return *equal_sums_backward(batch, d), None


def ceiling_of(positive: Tensor, false_negative_margin: float | None) -> Tensor | None:
    """[2 K]: above it, a negative is taken for a false one."""
    if false_negative_margin is None:
        return None
    return (positive.detach() + false_negative_margin).repeat(2)


def threshold_of(positive: Tensor, margin: float, inside: Tensor | None) -> Tensor:
    """[2 K]: where hinges begin; for an anchor that is not `inside` [2 K] nowhere."""
    threshold = (positive - margin).repeat(2)
    return threshold if inside is None else threshold.where(inside, torch.inf)


class OfOneProcess(torch.autograd.Function):
    """The positive scores [K], and both results [2 K] of a statistic, by a fused backend."""

    # No setup_context, for which torch inspects the signature in every call: some 40 µs.
    @staticmethod
    def forward(ctx, statistic, backend, save_scores, scale_tensor, bias, *batch):
        # The tensors of the statistic are arguments, too, for autograd to see.
        ops = ops_of(backend)
        positive = ops.positive_scores(*batch)
        vectors = statistic.vectors(positive)
        *results, scores = statistic.forward(ops, batch, vectors, save_scores)
        ctx.mark_non_differentiable(results[1 - statistic.differentiable])
        ctx.statistic, ctx.backend, ctx.anchors = statistic, backend, batch[4:]
        ctx.save_for_backward(*batch[:4], *results, scores, *vectors)
        return positive, *results

    @staticmethod
    def backward(ctx, d_positive, *d_results):
        *tensors, one, other, scores = ctx.saved_tensors[:7]
        vectors, statistic = ctx.saved_tensors[7:], ctx.statistic
        d, results = d_results[statistic.differentiable], (one, other)
        needed = ctx.needs_input_grad[5:7]
        d_positive, d_bias = statistic.of_parameters(results, d, d_positive)
        *gradients, d_scale = statistic.backward(
            ops_of(ctx.backend), (*tensors, *ctx.anchors), vectors, results, scores,
            d_positive, d, (*needed, False),
        )  # fmt: skip
        needed = *needed, *ctx.needs_input_grad[3:5]
        d_images, d_captions, d_scale, d_bias = first_order_only(
            *gradients, d_scale, d_bias, needed=needed
        )
        return None, None, None, d_scale, d_bias, d_images, d_captions, *(None,) * 8


def parameters_of(statistic: NamedTuple) -> tuple[Tensor | None, Tensor | None]:
    """Its scale_tensor and its bias."""
    return getattr(statistic, "scale_tensor", None), getattr(statistic, "bias", None)
