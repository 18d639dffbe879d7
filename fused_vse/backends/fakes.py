"""Shapes and dtypes of the ops' results, for torch.compile; one description for every backend.

csrc/ops.h documents the ops themselves.
"""

import torch
from torch import Tensor

from ..arguments import accumulation_dtype

# S is kept from the forward to the backward pass when it has at most this many entries: that saves one
# GEMM of four and stays a fixed workspace (16 MiB in float32). csrc/cpu/tiles.h has the same number.
MAX_SAVED_SCORES = 1 << 22


def _statistic(images: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(images.dtype)
    return images.new_empty(num_pairs, dtype=dtype), images.new_empty((2, num_pairs), dtype=dtype)


def _logsumexp(images: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    positive, logsumexp = _statistic(images, num_pairs)
    return positive, logsumexp.double()


def _saved_scores(images: Tensor, captions: Tensor, save_scores: bool) -> Tensor:
    numel = images.shape[0] * captions.shape[0]
    if not save_scores or numel > MAX_SAVED_SCORES:
        numel = 0
    return images.new_empty(numel, dtype=accumulation_dtype(images.dtype))


def _indices(images: Tensor, num_pairs: int) -> Tensor:
    return images.new_empty((2, num_pairs), dtype=torch.int64)


def _gradients(images, captions, need_images, need_captions) -> tuple[Tensor, Tensor]:
    return (
        images.new_empty(images.shape if need_images else 0),
        captions.new_empty(captions.shape if need_captions else 0),
    )


def _hardest_negatives(images, captions, image_ids, caption_ids, num_pairs):
    return *_statistic(images, num_pairs), _indices(images, num_pairs)


def _hardest_negatives_backward(
    d_positive, d_score, positive, index, images, captions, need_images, need_captions
):
    return _gradients(images, captions, need_images, need_captions)


def _negative_logsumexp(
    images, captions, image_ids, caption_ids, num_pairs, scale, scale_tensor, save_scores
):
    return *_logsumexp(images, num_pairs), _saved_scores(images, captions, save_scores)


def _negative_logsumexp_backward(
    d_positive, d_logsumexp, logsumexp, scores, images, captions, image_ids, caption_ids,
    scale, scale_tensor, need_images, need_captions,
):  # fmt: skip
    d_scale = images.new_empty((), dtype=accumulation_dtype(images.dtype))
    return *_gradients(images, captions, need_images, need_captions), d_scale


def _hinge_sum(images, captions, image_ids, caption_ids, num_pairs, margin, save_scores):
    return (
        *_statistic(images, num_pairs),
        _indices(images, num_pairs),
        _saved_scores(images, captions, save_scores),
    )


def _hinge_sum_backward(
    d_positive, d_hinge_sum, positive, active, scores, images, captions, image_ids, caption_ids,
    margin, need_images, need_captions,
):  # fmt: skip
    return _gradients(images, captions, need_images, need_captions)


def _l2_normalize(rows):
    return rows.new_empty(rows.shape), rows.new_empty(
        rows.shape[0], dtype=accumulation_dtype(rows.dtype)
    )


def _l2_normalize_backward(d_normalized, normalized, inverse_norm):
    return torch.empty_like(normalized)


def _small_loss(
    images, captions, image_ids, caption_ids, num_pairs, kind, scale, scale_tensor, margin,
    image_weight, caption_weight, mean, need_images, need_captions,
):  # fmt: skip
    scalars = [images.new_empty((), dtype=torch.float32) for _ in range(2)]
    gradients = [x.float() for x in _gradients(images, captions, need_images, need_captions)]
    positive, score = _statistic(images, num_pairs)
    return scalars[0], *gradients, scalars[1], positive, score, _indices(images, num_pairs)


def _one_tile_loss(
    images, captions, image_ids, caption_ids, num_pairs, kind, scale, scale_tensor, margin,
    image_weight, caption_weight, mean,
):  # fmt: skip
    dtype = accumulation_dtype(images.dtype)
    hardest = kind in (1, 2)
    scores = (0, 0) if hardest else (images.shape[0], captions.shape[0])
    listed = num_pairs if hardest else 0
    shapes = (), scores, (listed,), (2, listed), ()
    results = [images.new_empty(shape, dtype=dtype) for shape in shapes]
    return *results, *_statistic(images, num_pairs), _indices(images, num_pairs)


def _one_tile_loss_backward(upstream, d_scores, images, captions, need_images, need_captions):
    return _gradients(images, captions, need_images, need_captions)


def _scale_gradients(upstream, d_images, d_captions, d_scale, like):
    gradients = [torch.empty_like(x, dtype=like.dtype) for x in (d_images, d_captions)]
    return *gradients, torch.empty_like(d_scale)


def _scores_hardest_negatives(scores, image_ids, caption_ids, num_pairs):
    return *_statistic(scores, num_pairs), _indices(scores, num_pairs)


def _scores_hardest_negatives_backward(d_positive, d_score, positive, index, scores):
    return scores.new_empty(scores.shape)


def _scores_negative_logsumexp(scores, image_ids, caption_ids, num_pairs, scale, scale_tensor):
    return _logsumexp(scores, num_pairs)


def _scores_negative_logsumexp_backward(
    d_positive, d_logsumexp, logsumexp, scores, image_ids, caption_ids, scale, scale_tensor
):
    d_scale = scores.new_empty((), dtype=accumulation_dtype(scores.dtype))
    return scores.new_empty(scores.shape), d_scale


def _scores_hinge_sum(scores, image_ids, caption_ids, num_pairs, margin):
    return *_statistic(scores, num_pairs), _indices(scores, num_pairs)


def _scores_hinge_sum_backward(
    d_positive, d_hinge_sum, positive, active, scores, image_ids, caption_ids, margin
):
    return scores.new_empty(scores.shape)


_STATISTICS = (
    _hardest_negatives,
    _hardest_negatives_backward,
    _negative_logsumexp,
    _negative_logsumexp_backward,
    _hinge_sum,
    _hinge_sum_backward,
)
_SCORE_STATISTICS = (
    _scores_hardest_negatives,
    _scores_hardest_negatives_backward,
    _scores_negative_logsumexp,
    _scores_negative_logsumexp_backward,
    _scores_hinge_sum,
    _scores_hinge_sum_backward,
)


def _register(namespace: str, fakes: tuple, prefix: str = "_") -> None:
    for fake in fakes:
        torch.library.register_fake(f"{namespace}::{fake.__name__.removeprefix(prefix)}", fake)


def register_fakes(namespace: str) -> None:
    """Gives every op of `torch.ops.<namespace>` its fake implementation."""
    register_statistic_fakes(namespace)
    register_normalize_fakes(namespace)


def register_normalize_fakes(namespace: str) -> None:
    """The same for the normalisation alone."""
    _register(namespace, (_l2_normalize, _l2_normalize_backward))


def register_statistic_fakes(namespace: str) -> None:
    """The same where there are only statistics, as for another similarity."""
    _register(namespace, _STATISTICS)


def register_small_loss_fakes(namespace: str) -> None:
    """The same for a whole loss of a small batch."""
    _register(namespace, (_small_loss, _scale_gradients))


def register_one_tile_loss_fakes(namespace: str) -> None:
    """The same for one that stores the gradient of the scores."""
    _register(namespace, (_one_tile_loss, _one_tile_loss_backward))


def register_score_fakes(namespace: str) -> None:
    """The same for the statistics of a score matrix."""
    _register(namespace, _SCORE_STATISTICS, "_scores_")
