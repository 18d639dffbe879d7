"""The Triton backend for CUDA tensors of NVIDIA GPUs from Ampere (sm_80) on. It compiles for AMD's CDNA, too.

    walk.py       the walk over S, its merge and the gradient of S: three kernels for all statistics
    hardest.py, logsumexp.py, hinge.py, softplus.py   what they call for one statistic each
    tiles.py      arguments of the kernels, scores of a tile, negatives
    order.py      the order similarity             configs.py   tile shapes, each with its reason
    rows.py       kernels over embeddings' rows    certified.py  float32 maxima from a bfloat16 product
    plan.py       launches, workspace, operands    forward.py, backward.py, ops.py  the ops

With TRITON_INTERPRET=1 in the environment when this is imported, the same code takes CPU tensors and
runs in Triton's interpreter: slow, for tests only.
"""

import functools

import torch

from ...ops import DOT, STATISTICS, Batch

try:
    import triton
except ImportError as error:
    triton = None
    _MISSING = f"Triton does not import ({error}); install it with `pip install triton`"

if triton is not None:
    from .ops import register
    from .plan import set_workspace_bytes, workspace_bytes
    from .tiles import INTERPRETED

    DEVICE = "cpu" if INTERPRETED.value else "cuda"
    _library = register(DEVICE.upper())
else:
    DEVICE = "cuda"

AMD = torch.version.hip is not None
STATUS = "available"
if AMD:
    STATUS += " on request; not chosen by auto: compiled for AMD GPUs, never run on one"

__all__ = ["DEVICE", "STATUS", "set_workspace_bytes", "workspace_bytes"]


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot be used here, with the remedy, or None."""
    if triton is None:
        return _MISSING
    if DEVICE == "cpu":
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA GPU is visible; it needs an NVIDIA GPU, its driver and a CUDA build of torch (or an AMD"
            " GPU and a ROCm build)"
        )
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not AMD and all(device.major < 8 for device in devices):
        found = ", ".join(f"{d.name} with {d.major}.{d.minor}" for d in devices)
        return (
            f"it needs a GPU of compute capability 8.0 or higher, found {found};"
            " use backend='reference'"
        )
    return _compile_failure(next(i for i, device in enumerate(devices) if AMD or device.major >= 8))


def takes(op: str, batch: Batch) -> str | None:
    """None, or what follows the backend's name in a sentence that says why it does not compute `op`."""
    return None if op in STATISTICS else f"has no {op}"


def prefers(op: str, batch: Batch) -> bool:
    """Whether "auto" is to take it: wherever it can and has been looked at."""
    return not AMD


def _compile_failure(device: int) -> str | None:
    """Runs a small kernel: Triton needs a C compiler and a ptxas that knows the GPU."""
    try:
        with torch.cuda.device(device):
            one = torch.ones(1, 1, device=device)
            torch.ops.fused_vse_triton.positive_scores(one, one, None, None, 1, 1, 0, 0, 1, DOT)
    except Exception as error:  # noqa: BLE001 - whatever the compiler or the driver raises
        return (
            f"Triton {triton.__version__} does not compile here ({type(error).__name__}: {error});"
            " it needs a C compiler (set CC), Python's headers and a driver for its CUDA version"
        )
    return None
