"""The C++ backend for CPU tensors: csrc/cpu implements the ops."""

import torch

from .. import ops
from . import native

DEVICE = "cpu"
NAMESPACE = "fused_vse_cpu"
FAMILIES = ("dot", "order", "scores", "loss")

# What is given to small_loss: above, its one tile of S leaves the cache, and the search pays.
SMALL_ROWS, SMALL_DIM = 256, 1 << 16
SMALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# With the searches by themselves, for tests and benchmarks.
_SEARCHES = ("exact_", "float32_", "bfloat16_")
_libraries = [ops.define("cpu"), *(ops.define("cpu", ["hardest_negatives"], x) for x in _SEARCHES)]
UNAVAILABLE = native.load("_cpu", "C++", "install a C++17 compiler, and install again")


def unavailable() -> str | None:
    """Why this backend cannot be used here and the remedy, or None."""
    return UNAVAILABLE


def takes(op: str, batch: ops.Batch) -> str | None:
    """None if `op` takes the batch, else why not."""
    if batch.images.device.type != DEVICE:
        return f"takes {DEVICE} tensors"
    if op != "small_loss":
        return None
    if batch.captions is None or batch.similarity != ops.DOT:
        return "takes dot products of embeddings"
    if max(batch.images.shape[0], batch.captions.shape[0]) > SMALL_ROWS:
        return f"takes at most {SMALL_ROWS} images and captions"
    if batch.images.shape[1] > SMALL_DIM:
        return f"takes embeddings of at most {SMALL_DIM} dimensions"
    return None


def prefers(op: str, batch: ops.Batch) -> bool:
    """Whether "auto" is to choose this backend for what it takes."""
    return True


def is_ahead_in_small_losses(images: torch.Tensor, captions: torch.Tensor) -> bool:
    """Whether "auto" is to take the whole-loss op for these embeddings, if it can."""
    return UNAVAILABLE is None
