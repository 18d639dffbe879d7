"""The losses of single anchors: O(K) arithmetic on the statistics, and its derivative.

The reference takes the formulas, and autograd differentiates them. The other backends take the functions,
which have the derivative at hand: one node of the graph in place of ten.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .dispatch import REFERENCE
from .statistics import HardestNegatives, NegativeLogsumexp, first_order_only


def all_negatives(
    statistic: NegativeLogsumexp, scale: float | Tensor, margin: float, backend: str
) -> Tensor:
    """-log(e^αp / (e^αp + e^(lse + αm))) [2, K], in the scores' dtype."""
    if backend != REFERENCE:
        return _AllNegatives.apply(*statistic, scale, margin)
    positive, logsumexp = statistic
    # = softplus(lse + α(m - p)), whose terms nearly cancel
    difference = scale * (positive.to(logsumexp.dtype) - margin) - logsumexp
    return -logsigmoid(difference).to(positive.dtype)


def hardest_negative(
    statistic: HardestNegatives, scale: float | Tensor, margin: float, smooth: bool, backend: str
) -> Tensor:
    """α [m + h - p]₊, or softplus(α (m + h - p)), [2, K]; 0 for an anchor without negatives."""
    positive, scores, _ = statistic
    if backend != REFERENCE:
        return _HardestNegative.apply(positive, scores, scale, margin, smooth)
    alone = scores == -torch.inf  # not by the index, which a NaN score lacks, too
    violation = torch.where(alone, 0, scores - positive + margin)  # -inf would make NaN gradients
    if smooth:
        return torch.where(alone, 0, -logsigmoid(-scale * violation))
    return scale * violation.relu()


class _AllNegatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positive, logsumexp, scale, margin):
        score = positive.to(logsumexp.dtype) - margin
        difference = scale * score - logsumexp
        ctx.scale = scale
        ctx.save_for_backward(score, torch.sigmoid(-difference))
        return -logsigmoid(difference).to(positive.dtype)

    @staticmethod
    def backward(ctx, d_loss):
        score, slope = ctx.saved_tensors
        d_logsumexp = d_loss * slope
        d_score = -d_logsumexp.sum(0)
        d_scale = (d_score * score).sum() if ctx.needs_input_grad[2] else None
        gradients = d_score * ctx.scale, d_logsumexp, d_scale
        return *first_order_only(*gradients), None


class _HardestNegative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positive, scores, scale, margin, smooth):
        violation = scores - positive + margin  # -inf for an anchor without negatives
        if smooth:
            slope, loss = torch.sigmoid(scale * violation), -logsigmoid(-scale * violation)
        else:
            slope, loss = violation > 0, scale * violation.relu()
        ctx.scale = scale
        ctx.save_for_backward(violation, slope, positive, scores)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        violation, slope, *inputs = ctx.saved_tensors
        d_logit = d_loss * slope
        d_scale = None
        if ctx.needs_input_grad[2]:
            finite = violation.clamp(min=torch.finfo(violation.dtype).min)  # 0 * -inf would be NaN
            d_scale = (d_logit * finite).sum()
        d_scores = d_logit * ctx.scale
        gradients = -d_scores.sum(0), d_scores, d_scale
        return *first_order_only(*gradients, inputs=inputs), None, None
