"""A whole loss of a small batch as one op (csrc/ops.h), where calls cost more than their arithmetic.

On a GPU one launch computes statistics, loss and gradients; the backward pass scales the gradients and
rounds them to the embeddings' dtype. On a CPU a launch costs nothing, and the op leaves the gradient of the
scores. The losses composed of the statistics are the ops' oracle, and take whatever they do not.
"""

from types import ModuleType

import torch
from torch import Tensor

from .arguments import Batch, ScoreMatrix
from .backends import cpu, cuda
from .dispatch import select
from .statistics import HardestNegatives, first_order_only, l2_normalize, needs_grad

# The kinds of the op, by number.
ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM = range(4)

_BACKENDS = {"cpu": cpu, "cuda": cuda}  # named as their devices


def backend_for(
    batch: Batch | ScoreMatrix, similarity: str, reduction: str, backend: str
) -> str | None:
    """The backend whose op is to compute the loss; None where it is to be composed of the statistics.

    Raises:
        RuntimeError: the backend was asked for by name, and is missing or can not do that.
    """
    name = batch[0].device.type if backend == "auto" else backend
    if name not in _BACKENDS or isinstance(batch, ScoreMatrix) or similarity != "dot":
        return None
    module = _BACKENDS[name]
    if backend == "auto":
        ahead = name == "cpu" and module.is_ahead_in_small_losses(batch.images, batch.captions)
        return name if ahead and _unsupported(module, batch, reduction) is None else None
    select(backend, batch.images.device, "loss")
    reason = _unsupported(module, batch, reduction)
    if reason is not None and name == "cuda":
        shapes = f"{list(batch.images.shape)} and {list(batch.captions.shape)}"
        raise RuntimeError(
            f"backend={name!r} {reason}, got {batch.images.dtype} of shapes {shapes} and"
            f" reduction={reduction!r}; use backend='triton' or 'reference'"
        )
    return name if reason is None else None


def _unsupported(module: ModuleType, batch: Batch, reduction: str) -> str | None:
    """What the op takes instead. Says no size of the batch, of which torch.compile would make a constant."""
    images, captions = batch.images, batch.captions
    if images.dtype not in module.SMALL_DTYPES:
        return "takes float16, bfloat16 and float32 embeddings"
    if max(images.shape[0], captions.shape[0]) > module.SMALL_ROWS:
        return f"takes at most {module.SMALL_ROWS} images and captions"
    if images.shape[1] > module.SMALL_DIM:
        return f"takes embeddings of at most {module.SMALL_DIM} dimensions"
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
    backend: str,
) -> tuple[Tensor, HardestNegatives]:
    """The reduced loss, and the detached statistics that came with it."""
    images, captions, *pairs = batch
    if normalize:
        if backend == "cpu":
            images, captions = l2_normalize(images, backend), l2_normalize(captions, backend)
        else:
            normalize = torch.nn.functional.normalize
            images, captions = (
                normalize(x.float(), eps=1e-12).to(x.dtype) for x in (images, captions)
            )
    scale, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    arguments = images, captions, *pairs, kind, scale, scale_tensor, margin, *weights
    mean = reduction == "mean"
    if backend == "cpu":
        loss, *hardest = _OneTileLoss.apply(*arguments, mean)
    else:
        need = needs_grad(images), needs_grad(captions)
        loss, *hardest = _SmallLoss.apply(*arguments, mean, *need)
    return loss, HardestNegatives(*hardest)


class _SmallLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        loss, positive, score, index, *unit = torch.ops.fused_vse_cuda.small_loss.default(
            *arguments
        )
        ctx.mark_non_differentiable(positive, score, index)
        ctx.save_for_backward(*arguments[:2], index, *unit)
        return loss, positive, score.view(2, -1), index.view(2, -1)

    @staticmethod
    def backward(ctx, d_loss, *_):
        gradients = torch.ops.fused_vse_cuda.small_loss_backward.default(
            *ctx.saved_tensors, d_loss, *ctx.needs_input_grad[:2]
        )
        return *_first_order(ctx, gradients), None, None


class _OneTileLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, captions, *arguments):
        loss, *unit, positive, score, index = torch.ops.fused_vse_cpu.one_tile_loss.default(
            images, captions, *arguments
        )
        ctx.mark_non_differentiable(positive, score, index)
        ctx.save_for_backward(images, captions, *unit, positive, index)
        return loss, positive, score, index

    @staticmethod
    def backward(ctx, d_loss, *_):
        images, captions, d_scores, d_positive, d_score, d_scale, positive, index = (
            ctx.saved_tensors
        )
        rest = images, captions, *ctx.needs_input_grad[:2]
        ops = torch.ops.fused_vse_cpu
        if d_scores.numel() == 0:
            upstream = d_positive * d_loss, d_score * d_loss
            gradients = ops.hardest_negatives_backward.default(*upstream, positive, index, *rest)
        else:
            gradients = ops.one_tile_loss_backward.default(d_loss, d_scores, *rest)
        return _first_order(ctx, (*gradients, d_scale * d_loss))


def _first_order(ctx, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of images, captions and scale_tensor, where those of all arguments belong."""
    needed = (ctx.needs_input_grad[i] for i in (0, 1, 7))
    d_images, d_captions, d_scale = first_order_only(
        *[gradient if need else None for need, gradient in zip(needed, gradients, strict=True)]
    )
    return d_images, d_captions, *(None,) * 5, d_scale, *(None,) * 4
