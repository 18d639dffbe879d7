"""Negatives from all ranks, with the gradients of one process.

    images, captions = gather_rows(own_images), gather_rows(own_captions)
    loss = all_negatives_loss(images, captions, num_pairs=len(own_images))

Every rank takes its own pairs as anchors and compares them with the rows of all ranks, in memory that
grows with the global batch and not with its square. Its value is the mean over its own pairs; averaged
over the ranks, as DistributedDataParallel does with gradients, value and gradient are those of one
process with the whole batch.
"""

import torch
from torch import Tensor, distributed

from ..arguments import describe


def gather_rows(rows: Tensor, group: "distributed.ProcessGroup | None" = None) -> Tensor:
    """Returns the rows of all ranks, this rank's first: [B, ...] to [W * B, ...].

    In the backward pass every rank's gradient comes back to the rank that the row is from. Ids are
    gathered likewise. Without an initialised process group, or with one rank, returns `rows`.

    Args:
        rows: [B, ...] of any dtype, with the same B on every rank (`drop_last=True`).
        group: default: all ranks.

    Raises:
        TypeError: `rows` is no tensor, or a scalar.
    """
    if not isinstance(rows, Tensor) or rows.dim() == 0:
        raise TypeError(f"rows must be a tensor of shape [B, ...], got {describe(rows)}")
    if not distributed.is_available() or not distributed.is_initialized():
        return rows
    if distributed.get_world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows.contiguous(), group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):
        ctx.group, own = group, distributed.get_rank(group)
        ranks = [torch.empty_like(rows) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(ranks, rows, group)
        return torch.cat([*ranks[own:], *ranks[:own]])

    @staticmethod
    def backward(ctx, gradient):
        own, size = distributed.get_rank(ctx.group), distributed.get_world_size(ctx.group)
        parts = gradient.contiguous().chunk(size)  # this rank's first
        result = torch.empty_like(parts[0])
        of_ranks = [*parts[size - own :], *parts[: size - own]]
        distributed.reduce_scatter(result, of_ranks, group=ctx.group)
        return result, None
