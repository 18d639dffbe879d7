"""Rows of all ranks, with the gradients of one process.

    images, captions = gather_rows(own_images), gather_rows(own_captions)
    loss = all_negatives_loss(images, captions, num_pairs=len(own_images))

Every rank takes its own pairs as anchors and compares them with the rows of all ranks, in memory that
grows with the global batch and not with its square. Its value is the mean over its own pairs; averaged
over the ranks, as DistributedDataParallel does with gradients, value and gradient are those of one
process with the whole batch. The losses' `group=` gives the same with half of the scores and of the traffic;
`gather_rows` is for whatever else needs the rows.
"""

import torch
from torch import Tensor, distributed

from ..arguments import describe
from ..ops import accumulation_dtype
from .collectives import all_gather, reduce_scatter
from .peers import texts_of_ranks


def gather_rows(rows: Tensor, group: "distributed.ProcessGroup | None" = None) -> Tensor:
    """Returns the rows of all ranks, this rank's first: [B, ...] to [W * B, ...].

    In the backward pass every rank's gradient comes back to the rank that the row is from, summed in float32
    (float64). Ids are gathered likewise. Without an initialised process group, or with one rank, returns
    `rows`. Every call first compares what the ranks pass.

    Args:
        rows: [B, ...] of any dtype, with the same shape on every rank (`drop_last=True`).
        group: default: all ranks.

    Raises:
        TypeError: `rows` is no tensor, or a scalar.
        ValueError: shape or dtype differ between ranks; the same error on all of them.
    """
    if not isinstance(rows, Tensor) or rows.dim() == 0:
        raise TypeError(f"rows must be a tensor of shape [B, ...], got {describe(rows)}")
    if not distributed.is_available() or not distributed.is_initialized():
        return rows
    group = group or distributed.group.WORLD
    if group.size() == 1:
        return rows
    found = texts_of_ranks(group, describe(rows))
    if len(set(found)) > 1:
        raise ValueError(
            f"rows must have the same shape and dtype on all ranks, got {', '.join(found)}; drop what is left"
            " over (drop_last=True), or pass group= to the loss, which takes batches of any size"
        )
    return _Gather.apply(rows, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):
        ctx.group, own = group, group.rank() * rows.shape[0]
        rows = rows.contiguous()
        gathered = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
        # As bytes, since not every backend moves every dtype.
        all_gather(_bytes(gathered), _bytes(rows), group)
        return torch.cat([gathered[own:], gathered[:own]])

    @staticmethod
    def backward(ctx, gradient):
        return _Reduce.apply(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    """The transpose of _Gather, as it is of this."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        size, own = rows.shape[0] // group.size(), group.rank()
        wide = rows.roll(own * size, 0).to(accumulation_dtype(rows.dtype))
        total = wide.new_empty(size, *rows.shape[1:])
        reduce_scatter(total, wide, group=group)
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return _Gather.apply(gradient, ctx.group), None


def _bytes(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)
