"""The collectives of torch.distributed, by the names that every supported torch has."""

from torch import distributed

# torch 2.14 has new names, and warns of the old ones.
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)
