"""From the losses of own anchors to one objective of all ranks.

The objective is the average over the group's ranks of the scalars on which backward is called: what
DistributedDataParallel and FSDP average.
"""

import torch
from torch import Tensor, distributed

from .collectives import all_gather
from .exchange import padded
from .peers import Peers


class _AverageOverRanks(torch.autograd.Function):
    """Identity, whose gradient is averaged: that of a number which all ranks share."""

    @staticmethod
    def forward(ctx, number, group):
        ctx.group = group
        return number.view_as(number)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient / ctx.group.size(), None


def shared_by_ranks(number: float | Tensor, peers: Peers | None) -> float | Tensor:
    """The gradient of a tensor is averaged over the ranks, with DistributedDataParallel and without."""
    if peers is None or not isinstance(number, Tensor):
        return number
    return _AverageOverRanks.apply(number, peers.group)


class OfAllRanks(torch.autograd.Function):
    """[.., K] of the own pairs to [.., K] of the pairs of all ranks, in the order of one process.

    The gradient is that of W times the own columns: DistributedDataParallel averages over the W ranks.
    """

    @staticmethod
    def forward(ctx, own, peers):
        ctx.peers = peers
        longest = max(peers.pairs)
        gathered = own.new_empty(peers.size * longest, own.shape[0])
        all_gather(gathered, padded(own.T, longest), peers.group)
        parts = gathered.unflatten(0, (-1, longest))
        return torch.cat([part[:k] for part, k in zip(parts, peers.pairs, strict=True)]).T

    @staticmethod
    def backward(ctx, gradient):
        own = gradient.split(ctx.peers.pairs, 1)[ctx.peers.rank]
        return own * ctx.peers.size, None


def anywhere(flags: Tensor, peers: Peers | None) -> bool:
    """Whether any is set, on any rank. True where that must not be waited for."""
    if torch.compiler.is_compiling() or (
        flags.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return True
    some = flags.any().to(torch.int32)
    if peers is not None:
        distributed.all_reduce(some, distributed.ReduceOp.MAX, peers.group)
    return bool(some)
