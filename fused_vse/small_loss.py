"""A whole loss of a small batch as one op: statistics, loss and gradients in one launch (csrc/ops.h).

Its backward pass scales the gradients, which the forward pass left in float32, and rounds them to the
embeddings' dtype. Only the cuda backend has the op; the losses composed of the statistics are its oracle,
and take whatever it does not.
"""

import torch
from torch import Tensor

from .arguments import Batch, ScoreMatrix
from .backends import cuda
from .dispatch import select
from .statistics import HardestNegatives, first_order_only, l2_normalize, needs_grad

# The kinds of the op, by number.
ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM = range(4)


def takes(batch: Batch | ScoreMatrix, similarity: str, reduction: str, backend: str) -> bool:
    """Whether the loss is to be computed by the op.

    Raises:
        RuntimeError: the backend was asked for by name, and is missing or can not do that.
    """
    if backend not in ("auto", "cuda") or isinstance(batch, ScoreMatrix) or similarity != "dot":
        return False
    if backend == "auto":
        ahead = cuda.is_measured_ahead("small_loss", batch.images, batch.captions)
        return ahead and _unsupported(batch, reduction) is None
    select(backend, batch.images.device, "loss")
    reason = _unsupported(batch, reduction)
    if reason is not None and "dot" not in cuda.FAMILIES:
        raise RuntimeError(f"backend='cuda' {reason}; use backend='triton' or 'reference'")
    return reason is None


def _unsupported(batch: Batch, reduction: str) -> str | None:
    images, captions = batch.images, batch.captions
    if images.dtype not in cuda.SMALL_DTYPES:
        return f"takes float16, bfloat16 and float32 embeddings, got {images.dtype}"
    if max(images.shape[0], captions.shape[0]) > cuda.SMALL_ROWS:
        return (
            f"takes at most {cuda.SMALL_ROWS} images and captions,"
            f" got {images.shape[0]} and {captions.shape[0]}"
        )
    if images.shape[1] > cuda.SMALL_DIM:
        return f"takes embeddings of at most {cuda.SMALL_DIM} dimensions, got {images.shape[1]}"
    if reduction == "none":
        return "has no reduction='none'"
    return None


def small_loss(
    kind: int,
    batch: Batch,
    scale: float | Tensor,
    margin: float,
    weights: tuple[float, float],
    reduction: str,
    normalize: bool,
) -> tuple[Tensor, HardestNegatives]:
    """The reduced loss, and the detached statistics that came with it."""
    images, captions, *pairs = batch
    if normalize:
        images, captions = l2_normalize(images, "cuda"), l2_normalize(captions, "cuda")
    scale, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    need = needs_grad(images), needs_grad(captions)
    options = scale, scale_tensor, margin, *weights, reduction == "mean", *need
    loss, *_, positive, score, index = _SmallLoss.apply(images, captions, *pairs, kind, *options)
    return loss, HardestNegatives(positive, score, index)


class _SmallLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        loss, *rest = torch.ops.fused_vse_cuda.small_loss.default(*arguments)
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*rest[:3], arguments[0])  # for its dtype
        return loss, *rest

    @staticmethod
    def backward(ctx, d_loss, *_):
        need_images, need_captions, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 7))
        scale_gradients = torch.ops.fused_vse_cuda.scale_gradients.default
        d_images, d_captions, d_scale = scale_gradients(d_loss, *ctx.saved_tensors)
        d_images, d_captions, d_scale = first_order_only(
            d_images if need_images else None,
            d_captions if need_captions else None,
            d_scale if need_scale else None,
        )
        return d_images, d_captions, *(None,) * 5, d_scale, *(None,) * 6
