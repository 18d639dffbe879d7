"""A whole loss of a small batch as one op, where calls cost more than their arithmetic.

The losses composed of the statistics are the op's oracle, and take whatever it does not.
"""

import torch
from torch import Tensor

from .first_order import first_order_only
from .ops import Batch, ops_of
from .statistics import HardestNegatives, needs_grad


def small_loss(
    kind: int,
    batch: Batch,
    scale: float | Tensor,
    margin: float,
    weights: tuple[float, float],
    reduction: str,
    backend: str,
) -> tuple[Tensor, HardestNegatives]:
    """The reduced loss, and the detached statistics that came with it."""
    number, tensor = (0.0, scale) if isinstance(scale, Tensor) else (scale, None)
    loss, positive, score, index = _SmallLoss.apply(
        backend, needs_grad(batch.images), needs_grad(batch.captions), tensor,
        kind, number, margin, *weights, reduction == "mean", *batch[:4], batch.pair_count,
    )  # fmt: skip
    return loss, HardestNegatives(positive, score.view(2, -1), index.view(2, -1))


class _SmallLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, backend, need_images, need_captions, scale_tensor,
        kind, scale, margin, image_weight, caption_weight, mean, *batch,
    ):  # fmt: skip
        loss, positive, score, index, *saved = ops_of(backend).small_loss(
            *batch, kind, scale, scale_tensor, margin, image_weight, caption_weight, mean,
            need_images, need_captions,
        )  # fmt: skip
        ctx.backend = backend
        ctx.mark_non_differentiable(positive, score, index)
        ctx.save_for_backward(*batch[:2], index, *saved)
        return loss, positive, score, index

    @staticmethod
    def backward(ctx, d_loss, *_):
        needed = ctx.needs_input_grad[10:12]
        gradients = ops_of(ctx.backend).small_loss_backward(*ctx.saved_tensors, d_loss, *needed)
        needed = *needed, ctx.needs_input_grad[3]
        d_images, d_captions, d_scale = first_order_only(*gradients, needed=needed)
        return *(None,) * 3, d_scale, *(None,) * 6, d_images, d_captions, *(None,) * 3
