"""The CUDA C++ backend for NVIDIA GPUs from Ampere (sm_80) on: loads csrc/cuda, and knows what it takes."""

import functools
from importlib.util import find_spec

import torch

from .. import ops
from . import cuda_statistics, native

DEVICE = "cuda"
STATUS = "available on request; not chosen by auto: never measured on a GPU"

# What the op small_loss takes; csrc/cuda/small_plan.h has the same numbers.
SMALL_ROWS, SMALL_DIM = 512, 1 << 16
SMALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_HAS_TRITON = find_spec("triton") is not None


def _load() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    return native.load("_cuda", "CUDA", "install the CUDA toolkit with nvcc, and install again")


_NOT_LOADED = _load()
_library = ops.define("cuda")
_hopper = cuda_statistics.register(_library)


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot be used here and the remedy, or None. Initialises CUDA: not asked at import."""
    if _NOT_LOADED:
        return _NOT_LOADED
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible; it needs an NVIDIA GPU and its driver"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if all(device.major < 8 for device in devices):
        found = ", ".join(f"{d.name} with {d.major}.{d.minor}" for d in devices)
        return f"it needs a GPU of compute capability 8.0 or higher, found {found}"
    return None


def takes(op: str, batch: ops.Batch) -> str | None:
    """None, or what `op` takes instead of the batch: what follows the backend's name in a sentence.

    Says no size of the batch, of which torch.compile would make a constant.
    """
    if op != "small_loss":
        # The Hopper kernels are forward passes; everything else is Triton's (cuda_statistics.py).
        return (
            None
            if _HAS_TRITON
            else f"has no {op} without Triton; install it with `pip install triton`"
        )
    if batch.captions is None or batch.similarity != ops.DOT:
        return "has small_loss for the dot product of embeddings"
    if batch.images.dtype not in SMALL_DTYPES:
        return "takes float16, bfloat16 and float32 embeddings"
    if max(batch.images.shape[0], batch.captions.shape[0]) > SMALL_ROWS:
        return f"takes at most {SMALL_ROWS} images and captions"
    if batch.images.shape[1] > SMALL_DIM:
        return f"takes embeddings of at most {SMALL_DIM} dimensions"
    pairs = batch.pair_count
    if (batch.row_anchors, batch.column_anchors, batch.pair_row, batch.pair_column) != (
        pairs,
        pairs,
        0,
        0,
    ):
        return "has small_loss for the pairs of one process"
    return None


def prefers(op: str, batch: ops.Batch) -> bool:
    """Whether "auto" is to take this backend's `op` for the batch: never, until a measurement committed in
    benchmarks/results shows it ahead of Triton. No kernel of this backend has run on a GPU yet."""
    return False
