"""Registers the ops of csrc/ops.h: torch.ops.fused_vse_triton, and with _order and _scores after it."""

import functools

import torch

from ..fakes import register_fakes, register_score_fakes, register_statistic_fakes
from . import backward, forward

NAMESPACE = "fused_vse_triton"

# The schemas of csrc/ops.h, which documents them; tests/test_triton_interpreter.py compares the two.
STATISTICS = (
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
)
NORMALIZATION = (
    "l2_normalize(Tensor rows) -> (Tensor normalized, Tensor inverse_norm)",
    "l2_normalize_backward(Tensor d_normalized, Tensor normalized, Tensor inverse_norm) -> Tensor",
)
SCORE_STATISTICS = (
    "hardest_negatives(Tensor scores, Tensor? image_ids, Tensor? caption_ids, SymInt num_pairs)"
    " -> (Tensor positive, Tensor score, Tensor index)",
    "hardest_negatives_backward(Tensor d_positive, Tensor d_score, Tensor positive, Tensor index,"
    " Tensor scores) -> Tensor d_scores",
    "negative_logsumexp(Tensor scores, Tensor? image_ids, Tensor? caption_ids, SymInt num_pairs,"
    " float scale, Tensor? scale_tensor) -> (Tensor positive, Tensor logsumexp)",
    "negative_logsumexp_backward(Tensor d_positive, Tensor d_logsumexp, Tensor logsumexp,"
    " Tensor scores, Tensor? image_ids, Tensor? caption_ids, float scale, Tensor? scale_tensor)"
    " -> (Tensor d_scores, Tensor d_scale)",
    "hinge_sum(Tensor scores, Tensor? image_ids, Tensor? caption_ids, SymInt num_pairs, float margin)"
    " -> (Tensor positive, Tensor hinge_sum, Tensor active)",
    "hinge_sum_backward(Tensor d_positive, Tensor d_hinge_sum, Tensor positive, Tensor active,"
    " Tensor scores, Tensor? image_ids, Tensor? caption_ids, float margin) -> Tensor d_scores",
)


def _on_own_device(op):
    """Kernels launch on the current device, which need not be the tensors'."""

    def wrapper(first, *args):
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return op(first, *args)
        with torch.cuda.device(first.device):
            return op(first, *args)

    return wrapper


def register(dispatch_key: str) -> list[torch.library.Library]:
    """Defines every op; the returned libraries must be kept alive."""
    libraries = [
        _library(dispatch_key, "", STATISTICS + NORMALIZATION, lambda name: name),
        _library(dispatch_key, "_order", STATISTICS, lambda name: name, family="order"),
        _library(dispatch_key, "_scores", SCORE_STATISTICS, _of_scores),
    ]
    register_fakes(NAMESPACE)
    register_statistic_fakes(f"{NAMESPACE}_order")
    register_score_fakes(f"{NAMESPACE}_scores")
    return libraries


def _of_scores(name: str) -> str:
    statistic, backward_, _ = name.partition("_backward")
    return f"{statistic}_of_scores{backward_}"


def _library(dispatch_key, suffix, schemas, function_name, **options) -> torch.library.Library:
    library = torch.library.Library(NAMESPACE + suffix, "DEF")
    for schema in schemas:
        name = schema.partition("(")[0]
        module = backward if name.endswith("_backward") else forward
        function = getattr(module, function_name(name))
        if options:
            function = functools.partial(function, **options)
        library.define(schema)
        library.impl(name, _on_own_device(function), dispatch_key)
    return library
