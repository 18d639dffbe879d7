"""The Triton backend for CUDA tensors of NVIDIA GPUs from Ampere (sm_80) on.

    tiles.py      the walk over tiles of S         hardest.py, logsumexp.py, hinge.py   one statistic each
    order.py      the order similarity             configs.py   tile shapes, each with its reason
    rows.py       kernels over embeddings' rows    certified.py  float32 maxima from a bfloat16 product
    walk.py       launches, workspace, operands    forward.py, gradients.py, backward.py, ops.py  the ops

With TRITON_INTERPRET=1 in the environment when this is imported, the same code takes CPU tensors and
runs in Triton's interpreter: slow, for tests only.
"""

import functools

import torch

try:
    import triton
except ImportError as error:
    triton = None
    _MISSING = f"Triton does not import ({error}); install it with `pip install triton`"

if triton is not None:
    from .ops import register
    from .tiles import INTERPRETED
    from .walk import set_workspace_bytes, workspace_bytes

    DEVICE = "cpu" if INTERPRETED.value else "cuda"
    _libraries = register(DEVICE.upper())
else:
    DEVICE = "cuda"

FAMILIES = ("dot", "order", "scores")
INSTALLED = triton is not None

__all__ = [
    "DEVICE",
    "FAMILIES",
    "INSTALLED",
    "UNAVAILABLE",
    "set_workspace_bytes",
    "workspace_bytes",
]


def __getattr__(name: str):
    # Late, because looking at the GPU initialises CUDA, which an import must not do.
    if name == "UNAVAILABLE":
        return _unavailable()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _unavailable() -> str | None:
    if triton is None:
        return _MISSING
    if DEVICE == "cpu":
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA GPU is visible; it needs an NVIDIA GPU, its driver and a CUDA build of torch"
        )
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if all(device.major < 8 for device in devices):
        found = ", ".join(f"{d.name} with {d.major}.{d.minor}" for d in devices)
        return (
            f"it needs a GPU of compute capability 8.0 or higher, found {found};"
            " use backend='reference'"
        )
    return _compile_failure(next(i for i, device in enumerate(devices) if device.major >= 8))


def _compile_failure(device: int) -> str | None:
    """Runs the smallest kernel: Triton needs a C compiler and a ptxas that knows the GPU."""
    try:
        with torch.cuda.device(device):
            torch.ops.fused_vse_triton.l2_normalize(torch.ones(1, 1, device=device))
    except Exception as error:  # noqa: BLE001 - whatever the compiler or the driver raises
        return (
            f"Triton {triton.__version__} does not compile here ({type(error).__name__}: {error});"
            " it needs a C compiler (set CC), Python's headers and a driver for its CUDA version"
        )
    return None
