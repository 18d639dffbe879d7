"""L2 normalisation of embeddings' rows, in plain PyTorch: it is no part of the pass over S."""

import torch
from torch import Tensor

from .ops import accumulation_dtype


def l2_normalize(rows: Tensor) -> Tensor:
    """rows / max(‖rows‖₂, 1e-12) [N, D], computed in float32 or float64, in the input's dtype."""
    with torch.autocast(rows.device.type, enabled=False):
        dtype = accumulation_dtype(rows.dtype)
        x = rows.to(dtype)
        # The squares of a huge row would overflow, and the row become 0: a power of two takes it near 1.
        huge = 2.0**500 if dtype is torch.float64 else 2.0**50
        largest = torch.linalg.vector_norm(x.detach(), torch.inf, 1, keepdim=True)
        x = x * torch.ones_like(largest).masked_fill(largest > huge, 2.0**-30 / huge)
        return torch.nn.functional.normalize(x, dim=1).to(rows.dtype)
