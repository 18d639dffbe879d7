"""The statistics' ops under torch.ops.fused_vse_cuda.

Forward, 16-bit embeddings on Hopper go to the kernels of csrc/cuda/hopper_*; what those do not take (see
csrc/cuda/hopper_plan.h) goes to the Triton backend. Backward is the Triton backend's: a gather and a
scatter for the hardest negatives, and otherwise two library GEMMs of four beside the forward pass, so that
a kernel of our own could save a part of one GEMM only. Triton comes with every CUDA build of torch on Linux.
"""

import functools

import torch

from .. import ops

HOPPER = ("hardest_negatives", "negative_logsumexp", "hinge_sum")


def _op(name: str, *arguments):
    if name in HOPPER:
        width = len(ops.Batch._fields)
        batch, ceiling, options = (
            ops.Batch(*arguments[:width]),
            arguments[width],
            arguments[width + 1 :],
        )
        if ceiling is None and _takes(batch, save_scores=bool(options) and options[-1]):
            options = (*options[:-1], False) if options else ()
            hopper = getattr(torch.ops.fused_vse_cuda, f"hopper_{name}").default
            return hopper(*batch, ceiling, *options)
    return getattr(torch.ops.fused_vse_triton, name).default(*arguments)


def _takes(batch: ops.Batch, save_scores: bool) -> bool:
    if batch.captions is None or batch.similarity != ops.DOT:
        return False
    saves = save_scores and len(batch.images) * len(batch.captions) <= ops.MAX_SAVED_SCORES
    return not saves and torch.ops.fused_vse_cuda.hopper_takes(batch.images, batch.captions)


def register(library: torch.library.Library) -> torch.library.Library:
    """Implements the ops in `library`; the returned one, of the Hopper kernels, must be kept alive."""
    for name in ops.STATISTICS:
        library.impl(name, functools.partial(_op, name), "CUDA")
    hopper = ops.define("cuda", HOPPER, prefix="hopper_")
    hopper.define("hopper_takes(Tensor images, Tensor captions) -> bool")
    return hopper
