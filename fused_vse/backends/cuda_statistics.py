"""The statistics' ops of csrc/ops.h under torch.ops.fused_vse_cuda.

Forward, 16-bit embeddings on Hopper go to the kernels of csrc/cuda/hopper_*; what those do not take (see
csrc/cuda/hopper_plan.h) goes to the Triton backend. Backward is the Triton backend's: a gather and a
scatter for the hardest negatives, and otherwise two library GEMMs of four beside the forward pass, so that
a kernel of our own could save a part of one GEMM only. Triton comes with every CUDA build of torch on Linux.
"""

import torch

from .fakes import MAX_SAVED_SCORES, register_statistic_fakes
from .triton import ops as triton_ops

NAMESPACE = "fused_vse_cuda"


def _native():
    return torch.ops.fused_vse_cuda


def _triton():
    return torch.ops.fused_vse_triton


def _saves_scores(images, captions, save_scores: bool) -> bool:
    return save_scores and images.shape[0] * captions.shape[0] <= MAX_SAVED_SCORES


def hardest_negatives(images, captions, image_ids, caption_ids, num_pairs):
    arguments = images, captions, image_ids, caption_ids, num_pairs
    if _native().hopper_takes(images, captions):
        return _native().hopper_hardest_negatives(*arguments)
    return _triton().hardest_negatives(*arguments)


def negative_logsumexp(
    images, captions, image_ids, caption_ids, num_pairs, scale, scale_tensor, save_scores
):
    arguments = images, captions, image_ids, caption_ids, num_pairs, scale, scale_tensor
    if not _saves_scores(images, captions, save_scores) and _native().hopper_takes(
        images, captions
    ):
        no_scores = images.new_empty(0, dtype=torch.float32)
        return *_native().hopper_negative_logsumexp(*arguments), no_scores
    return _triton().negative_logsumexp(*arguments, save_scores)


def hinge_sum(images, captions, image_ids, caption_ids, num_pairs, margin, save_scores):
    arguments = images, captions, image_ids, caption_ids, num_pairs, margin
    if not _saves_scores(images, captions, save_scores) and _native().hopper_takes(
        images, captions
    ):
        no_scores = images.new_empty(0, dtype=torch.float32)
        return *_native().hopper_hinge_sum(*arguments), no_scores
    return _triton().hinge_sum(*arguments, save_scores)


_FORWARD = (hardest_negatives, negative_logsumexp, hinge_sum)


def register() -> torch.library.Library:
    """Defines the six ops; the returned library must be kept alive."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    forward = {op.__name__: op for op in _FORWARD}
    for schema in triton_ops.STATISTICS:
        name = schema.partition("(")[0]
        library.define(schema)
        op = forward.get(name) or getattr(_triton(), name)
        library.impl(name, op, "CUDA")
    register_statistic_fakes(NAMESPACE)
    return library
