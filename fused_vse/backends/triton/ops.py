"""Implements the ops of fused_vse/ops.py as torch.ops.fused_vse_triton."""

import torch

from ...ops import STATISTICS, Batch, define
from . import backward, forward


def _op(function):
    """Takes the batch in pieces. Kernels launch on the current device, which need not be the tensors'."""
    width = len(Batch._fields)

    def op(*values):
        batch, rest = Batch(*values[:width]), values[width:]
        device = batch.images.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(batch, *rest)
        with torch.cuda.device(device):
            return function(batch, *rest)

    return op


def register(dispatch_key: str) -> torch.library.Library:
    """Defines every op; the returned library must be kept alive."""
    library = define("triton", STATISTICS)
    for name in STATISTICS:
        module = backward if name.endswith("_backward") else forward
        library.impl(name, _op(getattr(module, name)), dispatch_key)
    return library
