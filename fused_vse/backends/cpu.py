"""The C++ backend for CPU tensors: loads csrc/cpu and describes its ops to the compiler."""

import torch

from . import native
from .fakes import (
    register_fakes,
    register_one_tile_loss_fakes,
    register_score_fakes,
    register_statistic_fakes,
)

DEVICE = "cpu"
NAMESPACE = "fused_vse_cpu"
FAMILIES = ("dot", "order", "scores", "loss")

# What the op one_tile_loss takes: above, its one tile of S leaves the cache, and the search pays.
SMALL_ROWS, SMALL_DIM = 256, 1 << 16
SMALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

UNAVAILABLE = native.load("_cpu", "C++", "install a C++17 compiler, and install again")
if UNAVAILABLE is None:
    register_fakes(NAMESPACE)
    register_one_tile_loss_fakes(NAMESPACE)
    register_statistic_fakes(f"{NAMESPACE}_order")
    register_score_fakes(f"{NAMESPACE}_scores")


def is_ahead_in_small_losses(images: torch.Tensor, captions: torch.Tensor) -> bool:
    """Whether "auto" is to take the whole-loss op for these embeddings, if it can."""
    return UNAVAILABLE is None
