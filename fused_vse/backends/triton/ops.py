"""Registers the ops of csrc/ops.h under torch.ops.fused_vse_triton."""

import torch

from ..fakes import register_fakes
from . import backward, forward

NAMESPACE = "fused_vse_triton"

# The schemas of csrc/ops.h, which documents them; tests/test_triton_interpreter.py compares the two.
SCHEMAS = (
    "hardest_negatives(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids,"
    " SymInt num_pairs) -> (Tensor positive, Tensor score, Tensor index)",
    "hardest_negatives_backward(Tensor d_positive, Tensor d_score, Tensor positive, Tensor index,"
    " Tensor images, Tensor captions, bool need_images, bool need_captions)"
    " -> (Tensor d_images, Tensor d_captions)",
    "negative_logsumexp(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids,"
    " SymInt num_pairs, float scale, Tensor? scale_tensor, bool save_scores)"
    " -> (Tensor positive, Tensor logsumexp, Tensor scores)",
    "negative_logsumexp_backward(Tensor d_positive, Tensor d_logsumexp, Tensor logsumexp,"
    " Tensor scores, Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids,"
    " float scale, Tensor? scale_tensor, bool need_images, bool need_captions)"
    " -> (Tensor d_images, Tensor d_captions, Tensor d_scale)",
    "hinge_sum(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids,"
    " SymInt num_pairs, float margin, bool save_scores)"
    " -> (Tensor positive, Tensor hinge_sum, Tensor active, Tensor scores)",
    "hinge_sum_backward(Tensor d_positive, Tensor d_hinge_sum, Tensor positive, Tensor active,"
    " Tensor scores, Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids,"
    " float margin, bool need_images, bool need_captions) -> (Tensor d_images, Tensor d_captions)",
    "l2_normalize(Tensor rows) -> (Tensor normalized, Tensor inverse_norm)",
    "l2_normalize_backward(Tensor d_normalized, Tensor normalized, Tensor inverse_norm) -> Tensor",
)


def _on_own_device(op):
    """Kernels launch on the current device, which need not be the tensors'."""

    def wrapper(first, *args):
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return op(first, *args)
        with torch.cuda.device(first.device):
            return op(first, *args)

    return wrapper


def register(dispatch_key: str) -> torch.library.Library:
    """Defines every op; the returned library must be kept alive."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        module = backward if name.endswith("_backward") else forward
        library.define(schema)
        library.impl(name, _on_own_device(getattr(module, name)), dispatch_key)
    register_fakes(NAMESPACE)
    return library
