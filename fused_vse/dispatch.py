"""Which backend computes the statistics: names, availability with reasons, and the choice of "auto".

A backend is a module of `fused_vse.backends` with
    UNAVAILABLE: the reason why it cannot be used here together with the remedy, or None;
    DEVICE: the type of device whose tensors it takes;
    FAMILIES: optional, which families of ops it has: "dot" (default), "order", "scores", "loss";
    ON_REQUEST: optional, why "auto" does not choose it for all tensors of DEVICE;
and, registered under `torch.ops.fused_vse_<name>`, the ops that csrc/ops.h documents. The
reference is plain PyTorch, takes any device and needs no ops.
"""

import warnings
from types import ModuleType

import torch

from .arguments import check_choice
from .backends import cpu, cuda, triton

AUTO, REFERENCE = "auto", "reference"
FAMILY_NAMES = {
    "dot": "statistics of the dot product",
    "order": "order similarity",
    "scores": "score-matrix losses",
    "loss": "whole losses",
}
# In the order in which "auto" tries them; of cuda it takes only what `select_for_op` finds.
_FUSED: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "cuda": cuda}


def backends() -> dict[str, str]:
    """Every backend's name with "available", or the reason why it is not and the remedy."""
    return {REFERENCE: "available", **{name: _status(name) for name in _FUSED}}


def _status(name: str) -> str:
    return _reason(_FUSED[name]) or (
        f"available on request; {_NEVER_MEASURED}" if name == "cuda" else "available"
    )


_NEVER_MEASURED = "not chosen by auto: never measured on a GPU"


def _reason(module: ModuleType) -> str | None:
    return module.unavailable() if hasattr(module, "unavailable") else module.UNAVAILABLE


def select(backend: str, device: torch.device, family: str = "dot") -> str:
    """Returns the name of the backend to use for tensors on `device`.

    `family` is "dot" or "order", the similarity of embeddings, "scores" for a score matrix, or "loss" for
    a loss of embeddings as one op.

    Raises:
        ValueError: the name is unknown, or the backend does not take tensors of this device.
        RuntimeError: the backend was asked for by name and is not available here.
    """
    check_choice("backend", backend, (AUTO, REFERENCE, *_FUSED))
    if backend == REFERENCE:
        return backend
    if backend == AUTO:
        return _automatic(device, family)
    module = _FUSED[backend]
    reason = _unavailable(backend, family)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    if module.DEVICE != device.type:
        raise ValueError(
            f"backend={backend!r} takes {module.DEVICE} tensors, got tensors on {device};"
            " move them or use backend='auto'"
        )
    return backend


def is_left_to_ops(requested: str, selected: str) -> bool:
    """Whether `select_for_op` is to choose the backend of each op, rather than `select` that of all."""
    return False


def select_for_op(op: str, images: torch.Tensor, captions: torch.Tensor) -> str:
    """What "auto" takes for one statistic of the dot product: cuda only in place of Triton, which it needs
    for the backward pass."""
    return "triton"


@torch.compiler.assume_constant_result
def _unavailable(name: str, family: str = "dot") -> str | None:
    # A backend may look at the hardware the first time: nothing for the compiler to trace.
    module = _FUSED[name]
    if _reason(module) is None and family not in _families(module):
        others = [
            repr(other)
            for other, candidate in _FUSED.items()
            if candidate.DEVICE == module.DEVICE and family in _families(candidate)
        ]
        return f"it has no {FAMILY_NAMES[family]} yet; use backend={' or '.join([*others, repr(REFERENCE)])}"
    return _reason(module)


@torch.compiler.assume_constant_result
def _why_not_automatic(name: str, family: str) -> str | None:
    return _NEVER_MEASURED if name == "cuda" else _unavailable(name, family)


def _families(module: ModuleType) -> tuple[str, ...]:
    return getattr(module, "FAMILIES", ("loss",))


def _automatic(device: torch.device, family: str) -> str:
    reasons = []
    for name, module in _FUSED.items():
        if module.DEVICE == device.type:
            reason = _why_not_automatic(name, family)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
    if not torch.compiler.is_compiling():
        reason = "; ".join(reasons) or f"none takes {device.type} tensors"
        warnings.warn(
            f"no fused backend for {device.type} ({reason}); using plain PyTorch, which stores all of S",
            stacklevel=5,
        )
    return REFERENCE
