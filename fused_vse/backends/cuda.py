"""The CUDA C++ backend for NVIDIA GPUs from Ampere (sm_80) on: loads csrc/cuda, describes its ops to the
compiler, and knows where it was measured to be ahead."""

import functools
from typing import NamedTuple

import torch

from . import native, triton
from .fakes import register_normalize_fakes, register_small_loss_fakes

DEVICE = "cuda"
NAMESPACE = "fused_vse_cuda"
FAMILIES = ("loss", "dot") if triton.INSTALLED else ("loss",)

# What the op small_loss takes; csrc/cuda/small_plan.h has the same numbers.
SMALL_ROWS, SMALL_DIM = 512, 1 << 16
SMALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Bucket(NamedTuple):
    """Where a measurement that is committed in benchmarks/results shows this backend ahead of Triton."""

    op: str  # "small_loss", or a statistic of csrc/ops.h with its backward pass
    capability: tuple[int, int]
    dtype: torch.dtype
    rows: tuple[int, int]  # fewest and most, of images and of captions
    dims: tuple[int, int]

    def __str__(self) -> str:
        (major, minor), dtype = self.capability, str(self.dtype).removeprefix("torch.")
        (fewest, most), (least, largest) = self.rows, self.dims
        return (
            f"{self.op} of {dtype}, {fewest} - {most} rows of {least} - {largest},"
            f" on compute capability {major}.{minor}"
        )


# All that backend="auto" looks at. Empty, because no kernel of this backend has run on a GPU yet.
MEASURED: tuple[Bucket, ...] = ()


def is_measured_ahead(op: str, images: torch.Tensor, captions: torch.Tensor) -> bool:
    """Whether "auto" is to take this backend's `op` for these embeddings."""
    if not MEASURED or images.device.type != DEVICE:
        return False
    for (fewest, most), (least, largest) in _sizes(op, images.dtype, images.device):
        in_range = (
            fewest <= images.shape[0] <= most
            and fewest <= captions.shape[0] <= most
            and least <= images.shape[1] <= largest
        )
        if in_range:
            return True
    return False


@torch.compiler.assume_constant_result
def _sizes(op: str, dtype: torch.dtype, device: torch.device) -> list[tuple]:
    """(rows, dims) of the buckets for this GPU, which need not be the only one."""
    if _unavailable():
        return []
    which = op, dtype, torch.cuda.get_device_capability(device)
    return [
        (bucket.rows, bucket.dims)
        for bucket in MEASURED
        if (bucket.op, bucket.dtype, bucket.capability) == which
    ]


def is_ahead_in_small_losses(images: torch.Tensor, captions: torch.Tensor) -> bool:
    """Whether "auto" is to take the whole-loss op for these embeddings, if it can."""
    return is_measured_ahead("small_loss", images, captions)


def _load() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA"
    return native.load("_cuda", "CUDA", "install the CUDA toolkit with nvcc, and install again")


_NOT_LOADED = _load()
if _NOT_LOADED is None:
    register_normalize_fakes(NAMESPACE)
    register_small_loss_fakes(NAMESPACE)
    if "dot" in FAMILIES:
        from . import cuda_statistics

        _library = cuda_statistics.register()


def __getattr__(name: str):
    # Late, because looking at the GPU initialises CUDA, which an import must not do.
    if name == "UNAVAILABLE":
        return _unavailable()
    if name == "ON_REQUEST":
        return _on_request()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _on_request() -> str:
    if not MEASURED:
        return "not chosen by auto: never measured on a GPU"
    return f"chosen by auto only for {'; '.join(map(str, MEASURED))}"


@functools.cache
def _unavailable() -> str | None:
    if _NOT_LOADED:
        return _NOT_LOADED
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible; it needs an NVIDIA GPU and its driver"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if all(device.major < 8 for device in devices):
        found = ", ".join(f"{d.name} with {d.major}.{d.minor}" for d in devices)
        return f"it needs a GPU of compute capability 8.0 or higher, found {found}"
    return None
