"""The collectives of torch.distributed, by the names that every supported torch has."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 has new names, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start(collective: Callable, received: Tensor, sent: Tensor, group) -> Callable[[], object]:
    """Starts it; the result waits for it. torch.compile, which orders them itself, takes no other kind."""
    if not torch.compiler.is_compiling():
        return collective(received, sent, group=group, async_op=True).wait
    collective(received, sent, group=group)
    return lambda: None
