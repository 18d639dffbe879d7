"""Which backend computes an op: one question, `choose`.

A backend is a module of `fused_vse.backends` with
    DEVICE: the type of device whose tensors it takes;
    unavailable(): why it cannot be used here and the remedy, or None;
    takes(op, batch): why it cannot compute this op of this batch, or None if it can;
    prefers(op, batch): whether "auto" is to take it, if it can;
    STATUS: optional, what `backends` says in place of "available";
and its ops under `torch.ops.fused_vse_<name>`, which ops.py documents. The reference is plain PyTorch,
takes any device and needs no ops.
"""

import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from .arguments import check_choice, check_string
from .backends import cpu, cuda, triton
from .ops import Batch

AUTO, REFERENCE = "auto", "reference"
# In the order in which "auto" asks them.
_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}


def backends() -> dict[str, str]:
    """Every backend's name with "available", or the reason why it is not and the remedy."""
    fused = {
        name: module.unavailable() or getattr(module, "STATUS", "available")
        for name, module in _BACKENDS.items()
    }
    return {REFERENCE: "available", **fused}


def choose(requested: str, op: str, batch: Batch) -> str:
    """The name of the backend that computes `op` of ops.py for the batch.

    REFERENCE for "small_loss", which is only a shorter way to a loss, means: compose the loss of its
    statistics.

    Raises:
        ValueError: the name is unknown, the backend does not take tensors of this device, or they hold no
            data.
        RuntimeError: the backend was asked for by name and is not available here, or does not take the batch;
            or a transform of torch.func is active.
    """
    check_string("backend must be 'auto' or a name listed by fused_vse.backends()", requested)
    check_choice("backend", requested, (AUTO, REFERENCE, *_BACKENDS))
    device, optional = batch.images.device, op == "small_loss"
    if requested == REFERENCE:
        _check_data(batch)
        return REFERENCE
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"backend={requested!r} does not work inside torch.func and torch.vmap, which cannot"
            " transform its kernels; use torch.autograd.grad, or backend='reference' inside"
        )
    if requested == AUTO:
        return _automatic(op, batch, optional)
    module = _BACKENDS[requested]
    reason = _unavailable(requested)
    if reason is not None:
        raise RuntimeError(f"backend={requested!r} is not available: {reason}")
    if module.DEVICE != device.type:
        raise ValueError(
            f"backend={requested!r} takes {module.DEVICE} tensors, got tensors on {device};"
            " move them or use backend='auto'"
        )
    reason = module.takes(op, batch)
    if reason is not None and not optional:
        others = [
            repr(name)
            for name, other in _BACKENDS.items()
            if other.DEVICE == module.DEVICE and not (_unavailable(name) or other.takes(op, batch))
        ]
        raise RuntimeError(
            f"backend={requested!r} {reason}; use backend={' or '.join([*others, repr(REFERENCE)])}"
        )
    return requested if reason is None else REFERENCE


def _unavailable(name: str) -> str | None:
    return _BACKENDS[name].unavailable()


# It may look at the hardware the first time: nothing for the compiler to trace. What
# torch.compiler.assume_constant_result does, without the two seconds that importing the compiler takes.
_unavailable._dynamo_marked_constant = True


def _automatic(op: str, batch: Batch, optional: bool) -> str:
    reasons, device = [], batch.images.device
    for name, module in _BACKENDS.items():
        if module.DEVICE == device.type:
            reason = _unavailable(name) or module.takes(op, batch)
            if reason is None and module.prefers(op, batch):
                return name
            reasons.append(f"{name}: {reason or getattr(module, 'STATUS', 'not for this batch')}")
    if optional:
        return REFERENCE
    _check_data(batch)
    if not torch.compiler.is_compiling():
        reason = "; ".join(reasons) or f"none takes {device.type} tensors"
        warnings.warn(
            f"no fused backend for {device.type} ({reason}); using plain PyTorch, which stores all of S",
            stacklevel=_users_line(),
        )
    return REFERENCE


def _users_line() -> int:
    """The stack level, for a warning of the caller, of the first frame outside of this package and torch."""
    inside = str(Path(__file__).parent), str(Path(torch.__file__).parent)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _check_data(batch: Batch) -> None:
    if batch.images.is_meta:
        name = "scores are" if batch.captions is None else "images and captions are"
        raise ValueError(
            f"{name} on meta, where tensors hold no data; materialise the model with .to_empty()"
        )
