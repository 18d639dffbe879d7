"""Gradients that refuse to be differentiated again: the ops' backward passes have no derivative."""

import torch
from torch import Tensor


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on gradients that refuses to be differentiated: the ops' backward is not differentiable."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fused_vse does not support double backward (gradients of gradients);"
            " use backend='reference', which does"
        )


def first_order_only(
    *gradients: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, and None in place of the others."""
    gradients = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    # The engine enables grad mode in a backward pass exactly when create_graph=True.
    if not torch.is_grad_enabled():
        return tuple(gradients)
    tensors = [g.requires_grad_() for g in gradients if g is not None]
    guarded = iter(_FirstOrderOnly.apply(len(tensors), *tensors))
    return tuple(None if g is None else next(guarded) for g in gradients)
