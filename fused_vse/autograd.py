"""The ops as differentiable functions, for one process."""

import torch
from torch import Tensor

from .first_order import first_order_only
from .ops import Batch, ceiling_of, ops_of, threshold_of


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _save(ctx, batch: tuple, *others: Tensor | None) -> None:
    ctx.anchors = batch[4:]
    ctx.save_for_backward(*batch[:4], *others)


def _load(ctx) -> tuple[tuple, list[Tensor | None]]:
    """The batch, and what else was saved."""
    tensors = ctx.saved_tensors
    return (*tensors[:4], *ctx.anchors), list(tensors[4:])


_NONES = (None,) * (len(Batch._fields) - 2)


# The functions have no setup_context, for which torch inspects the signature in every call: some 40 µs.
class HardestNegativesOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, false_negative_margin, *batch):
        ops, ctx.backend = ops_of(backend), backend
        positive = ops.positive_scores(*batch)
        ceiling = ceiling_of(positive, false_negative_margin)
        score, index = ops.hardest_negatives(*batch, ceiling)
        ctx.mark_non_differentiable(index)
        _save(ctx, batch, score, index)
        return positive, score, index

    @staticmethod
    def backward(ctx, d_positive, d_score, _):
        batch, saved = _load(ctx)
        needed = ctx.needs_input_grad[2:4]
        gradients = ops_of(ctx.backend).hardest_negatives_backward(
            *batch, *saved, d_positive, d_score, *needed, False
        )
        return None, None, *first_order_only(*gradients, needed=needed), *_NONES


class NegativeLogsumexpOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, save_scores, false_negative_margin, scale, scale_tensor, *batch):
        ops, ctx.backend, ctx.scale = ops_of(backend), backend, scale
        positive = ops.positive_scores(*batch)
        ceiling = ceiling_of(positive, false_negative_margin)
        constant, log_sum, scores = ops.negative_logsumexp(
            *batch, ceiling, scale, scale_tensor, save_scores
        )
        ctx.mark_non_differentiable(constant)
        _save(ctx, batch, ceiling, scale_tensor, constant, log_sum, scores)
        return positive, constant, log_sum

    @staticmethod
    def backward(ctx, d_positive, _, d_log_sum):
        batch, (ceiling, scale_tensor, *saved) = _load(ctx)
        needed = ctx.needs_input_grad[5:7]
        gradients = ops_of(ctx.backend).negative_logsumexp_backward(
            *batch, ceiling, ctx.scale, scale_tensor, *saved, d_positive, d_log_sum, *needed, False
        )
        needed = *needed, ctx.needs_input_grad[4]
        d_images, d_captions, d_scale = first_order_only(*gradients, needed=needed)
        return *(None,) * 4, d_scale, d_images, d_captions, *_NONES


class HingeSumOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, save_scores, false_negative_margin, margin, inside, *batch):
        ops, ctx.backend = ops_of(backend), backend
        positive = ops.positive_scores(*batch)
        ceiling = ceiling_of(positive, false_negative_margin)
        threshold = threshold_of(positive, margin, inside)
        total, active, scores = ops.hinge_sum(*batch, ceiling, threshold, save_scores)
        _save(ctx, batch, ceiling, threshold, total, scores, active)
        return positive, total

    @staticmethod
    def backward(ctx, d_positive, d_total):
        batch, (*saved, active) = _load(ctx)
        needed = ctx.needs_input_grad[5:7]
        of_thresholds = (active * d_total).view(2, -1).sum(0)
        gradients = ops_of(ctx.backend).hinge_sum_backward(
            *batch, *saved, d_positive - of_thresholds, d_total, *needed, False
        )
        return *(None,) * 5, *first_order_only(*gradients, needed=needed), *_NONES


class SoftplusSumOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, save_scores, scale, scale_tensor, bias, equal_positive, *batch):
        ops, ctx.backend = ops_of(backend), backend
        ctx.scale, ctx.equal_positive = scale, equal_positive
        total, slope, scores = ops.softplus_sum(
            *batch, scale, scale_tensor, bias, equal_positive, save_scores
        )
        _save(ctx, batch, scale_tensor, bias, total, scores, slope)
        return ops.positive_scores(*batch), total

    @staticmethod
    def backward(ctx, d_positive, d_total):
        batch, (scale_tensor, bias, *saved, slope) = _load(ctx)
        needed = ctx.needs_input_grad[6:8]
        gradients = ops_of(ctx.backend).softplus_sum_backward(
            *batch, ctx.scale, scale_tensor, bias, ctx.equal_positive, *saved, d_positive, d_total,
            *needed, False,
        )  # fmt: skip
        needed = *needed, *ctx.needs_input_grad[3:5]
        gradients = first_order_only(*gradients, (slope * d_total).sum(), needed=needed)
        d_images, d_captions, d_scale, d_bias = gradients
        return *(None,) * 3, d_scale, d_bias, None, d_images, d_captions, *_NONES
