"""The differentiable statistics of one pass over S = I Tᵀ: everything expensive that a loss needs.

Each statistic is taken per anchor over its negatives, for image anchors (row 0 of a result) and for
caption anchors (row 1). A loss is O(K) arithmetic on them; autograd through them costs the fused
backward pass. Gradients follow the formulas of "Contrastive Learning of Visual-Semantic
Embeddings" (arXiv 2110.08872).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .arguments import (
    Batch,
    ScoreMatrix,
    check_batch,
    check_choice,
    check_flag,
    check_string,
    check_temperature,
    inverse_temperature,
)
from .dispatch import AUTO, REFERENCE, is_left_to_ops, select, select_for_op

SIMILARITIES = ("dot", "order")


class HardestNegatives(NamedTuple):
    """Row 0 holds image anchors (negatives are captions), row 1 caption anchors; K pairs."""

    positive_scores: Tensor  # [K]
    scores: Tensor  # [2, K], -inf for an anchor without negatives
    indices: Tensor  # [2, K] int64, -1 for an anchor without negatives


class NegativeLogsumexp(NamedTuple):
    """Row 0 holds image anchors (negatives are captions), row 1 caption anchors; K pairs."""

    positive_scores: Tensor  # [K]
    logsumexp: Tensor  # [2, K], -inf for an anchor without negatives


def hardest_negatives(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    normalize: bool = False,
    similarity: str = "dot",
    backend: str = "auto",
) -> HardestNegatives:
    """The highest-scoring negative of every anchor, in both directions, without storing S.

    Equals, for a batch of pairs without ids:

        S = images @ captions.T
        S.masked_fill(torch.eye(K, dtype=bool), -inf).max(1)    # and .max(0)

    Ties go to the smallest index, which alone receives the gradient.

    Args:
        images: [N, D] floating point. Used as they are: normalise them, or pass `normalize`.
        captions: [M, D], same dtype and device.
        scores: [N, M], a score matrix in place of images and captions: it is read once forward, and
            its gradient written once backward.
        image_ids: [N] integers and
        caption_ids: [M] integers, the ids of the captions' images: caption j is a negative of image i
            iff their ids differ. Default: the row numbers.
        num_pairs: K. Image k and caption k are a pair for k < K, later rows are extra negatives.
            Default: N, if N = M.
        normalize: divide the rows by their L2 norm first.
        similarity: "dot", or "order" for -‖max(0, caption - image)‖₂ (order embeddings, arXiv
            1511.06361), whose gradient is 0 where the difference has no positive part.
        backend: "auto", or a name listed by `fused_vse.backends()`.

    Returns:
        Scores in float32 (float64 for float64 input). Differentiable with respect to both embeddings.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        RuntimeError: the named backend is not available here.
    """
    batch = check_batch(images, captions, image_ids, caption_ids, num_pairs, scores)
    check_options(normalize, similarity, backend)
    batch, backend = prepare(batch, normalize, similarity, backend)
    return hardest_statistic(batch, backend)


def negative_logsumexp(
    images: Tensor | None = None,
    captions: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    num_pairs: int | None = None,
    normalize: bool = False,
    similarity: str = "dot",
    backend: str = "auto",
) -> NegativeLogsumexp:
    """log Σ exp(s / temperature) over the negatives of every anchor, in both directions.

    Args:
        temperature: from 1e-10 to 1e10, a float or a 0-d tensor, which gets its gradient if it requires one.
        For the others, the results and the errors raised: see `hardest_negatives`.
    """
    batch = check_batch(images, captions, image_ids, caption_ids, num_pairs, scores)
    temperature = check_temperature(temperature, batch[0].device)
    check_options(normalize, similarity, backend)
    batch, backend = prepare(batch, normalize, similarity, backend)
    scale = inverse_temperature(temperature, batch[0])
    positive, logsumexp = logsumexp_statistic(batch, scale, backend)
    return NegativeLogsumexp(positive, logsumexp.to(positive.dtype))


def check_options(normalize: object, similarity: object, backend: object) -> None:
    check_flag("normalize", normalize)
    check_choice("similarity", similarity, SIMILARITIES)
    # `select` knows the names and the reasons.
    check_string("backend must be 'auto' or a name listed by fused_vse.backends()", backend)


def prepare(
    batch: Batch | ScoreMatrix, normalize: bool, similarity: str, backend: str
) -> tuple[Batch | ScoreMatrix, str]:
    """Chooses the backend, or its family of ops, and normalises the embeddings if asked to.

    The backend stays "auto" where the functions below choose one for each statistic.
    """
    if batch[0].is_meta and backend in (AUTO, REFERENCE):
        name = "scores are" if isinstance(batch, ScoreMatrix) else "images and captions are"
        raise ValueError(
            f"{name} on meta, where tensors hold no data; materialise the model with .to_empty()"
        )
    if isinstance(batch, ScoreMatrix):
        if normalize or similarity != "dot":
            raise ValueError(
                "normalize and similarity do not apply to given scores; leave them out"
            )
        backend = select(backend, batch[0].device, "scores")
        return batch, backend if backend == REFERENCE else f"{backend}_scores"
    requested, backend = backend, select(backend, batch[0].device, similarity)
    if normalize:
        batch = batch._replace(
            images=l2_normalize(batch.images, backend),
            captions=l2_normalize(batch.captions, backend),
        )
    if similarity == "dot":
        return batch, AUTO if is_left_to_ops(requested, backend) else backend
    if backend == REFERENCE:
        images, captions, *pairs = batch
        return ScoreMatrix(reference.order_similarity(images, captions), *pairs), backend
    return batch, f"{backend}_{similarity}"


def hardest_statistic(batch: Batch | ScoreMatrix, backend: str) -> HardestNegatives:
    if backend == REFERENCE:
        return HardestNegatives(*reference.hardest_negatives(*_embeddings(batch)))
    if isinstance(batch, ScoreMatrix):
        return HardestNegatives(*_ScoresHardestNegatives.apply(*batch, backend))
    backend = _backend_of("hardest_negatives", batch, backend)
    return HardestNegatives(*_HardestNegatives.apply(*batch, backend))


def _backend_of(op: str, batch: Batch, backend: str) -> str:
    return select_for_op(op, batch.images, batch.captions) if backend == AUTO else backend


def _embeddings(batch: Batch | ScoreMatrix) -> tuple:
    """As the reference takes them."""
    return (batch.scores, None, *batch[1:]) if isinstance(batch, ScoreMatrix) else batch


def logsumexp_statistic(
    batch: Batch | ScoreMatrix, scale: float | Tensor, backend: str
) -> NegativeLogsumexp:
    """`scale` = 1 / temperature, as `inverse_temperature` gives it. The sum is float64 (ops.h)."""
    if backend == REFERENCE:
        return NegativeLogsumexp(*reference.negative_logsumexp(*_embeddings(batch), scale))
    scale, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    if isinstance(batch, ScoreMatrix):
        return NegativeLogsumexp(
            *_ScoresNegativeLogsumexp.apply(*batch, scale, scale_tensor, backend)
        )
    backend = _backend_of("negative_logsumexp", batch, backend)
    save_scores = needs_grad(batch.images, batch.captions, scale_tensor)
    return NegativeLogsumexp(
        *_NegativeLogsumexp.apply(*batch, scale, scale_tensor, save_scores, backend)
    )


def hinge_statistic(
    batch: Batch | ScoreMatrix, margin: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scores [K], Σ [margin + s - p]₊ over the negatives [2, K], how many are active [2, K]."""
    if backend == REFERENCE:
        return reference.hinge_sum(*_embeddings(batch), margin)
    if isinstance(batch, ScoreMatrix):
        return _ScoresHingeSum.apply(*batch, margin, backend)
    backend = _backend_of("hinge_sum", batch, backend)
    save_scores = needs_grad(batch.images, batch.captions)
    return _HingeSum.apply(*batch, margin, save_scores, backend)


def l2_normalize(rows: Tensor, backend: str) -> Tensor:
    if backend == REFERENCE:
        return reference.l2_normalize(rows)
    return _L2Normalize.apply(rows, backend)[0]


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def ops_of(backend: str):
    return getattr(torch.ops, f"fused_vse_{backend}")


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on gradients that refuses to be differentiated: the ops' backward is not differentiable."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fused_vse does not support double backward (gradients of gradients);"
            " use backend='reference', which does"
        )


def first_order_only(
    *gradients: Tensor | None, inputs: tuple[Tensor, ...] = ()
) -> tuple[Tensor | None, ...]:
    """`inputs`: what the gradients depend on without the graph knowing."""
    # The engine enables grad mode in a backward pass exactly when create_graph=True.
    if not torch.is_grad_enabled():
        return gradients
    tensors = [g.requires_grad_() for g in gradients if g is not None]
    guarded = iter(_FirstOrderOnly.apply(len(tensors), *tensors, *inputs))
    return tuple(None if g is None else next(guarded) for g in gradients)


# The functions have no setup_context, for which torch inspects the signature in every call: some 40 µs.
class _HardestNegatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, captions, image_ids, caption_ids, num_pairs, backend):
        ctx.backend = backend
        positive, score, index = ops_of(backend).hardest_negatives(
            images, captions, image_ids, caption_ids, num_pairs
        )
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(positive, index, images, captions)
        return positive, score, index

    @staticmethod
    def backward(ctx, d_positive, d_score, _):
        need_images, need_captions = ctx.needs_input_grad[:2]
        d_images, d_captions = ops_of(ctx.backend).hardest_negatives_backward(
            d_positive, d_score, *ctx.saved_tensors, need_images, need_captions
        )
        gradients = d_images if need_images else None, d_captions if need_captions else None
        return *first_order_only(*gradients), None, None, None, None


class _NegativeLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, captions, image_ids, caption_ids, num_pairs, *options):
        ctx.scale, scale_tensor, _, ctx.backend = options
        positive, logsumexp, scores = ops_of(ctx.backend).negative_logsumexp(
            images, captions, image_ids, caption_ids, num_pairs, *options[:3]
        )
        ctx.save_for_backward(
            logsumexp, scores, images, captions, image_ids, caption_ids, scale_tensor
        )
        return positive, logsumexp

    @staticmethod
    def backward(ctx, d_positive, d_logsumexp):
        *tensors, scale_tensor = ctx.saved_tensors
        need_images, need_captions, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 6))
        d_images, d_captions, d_scale = ops_of(ctx.backend).negative_logsumexp_backward(
            d_positive, d_logsumexp, *tensors, ctx.scale, scale_tensor, need_images, need_captions
        )
        d_images, d_captions, d_scale = first_order_only(
            d_images if need_images else None,
            d_captions if need_captions else None,
            d_scale if need_scale else None,
        )
        return d_images, d_captions, None, None, None, None, d_scale, None, None


class _HingeSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, images, captions, image_ids, caption_ids, num_pairs, margin, save_scores, backend
    ):
        ctx.margin, ctx.backend = margin, backend
        positive, total, active, scores = ops_of(backend).hinge_sum(
            images, captions, image_ids, caption_ids, num_pairs, margin, save_scores
        )
        ctx.mark_non_differentiable(active)
        ctx.save_for_backward(positive, active, scores, images, captions, image_ids, caption_ids)
        return positive, total, active

    @staticmethod
    def backward(ctx, d_positive, d_hinge_sum, _):
        need_images, need_captions = ctx.needs_input_grad[:2]
        d_images, d_captions = ops_of(ctx.backend).hinge_sum_backward(
            d_positive, d_hinge_sum, *ctx.saved_tensors, ctx.margin, need_images, need_captions
        )
        gradients = d_images if need_images else None, d_captions if need_captions else None
        return *first_order_only(*gradients), None, None, None, None, None, None


class _ScoresHardestNegatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, image_ids, caption_ids, num_pairs, backend):
        ctx.backend = backend
        positive, score, index = ops_of(backend).hardest_negatives(
            scores, image_ids, caption_ids, num_pairs
        )
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(positive, index, scores)
        return positive, score, index

    @staticmethod
    def backward(ctx, d_positive, d_score, _):
        d_scores = ops_of(ctx.backend).hardest_negatives_backward(
            d_positive, d_score, *ctx.saved_tensors
        )
        return *first_order_only(d_scores), None, None, None, None


class _ScoresNegativeLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, image_ids, caption_ids, num_pairs, scale, scale_tensor, backend):
        ctx.scale, ctx.backend = scale, backend
        positive, logsumexp = ops_of(backend).negative_logsumexp(
            scores, image_ids, caption_ids, num_pairs, scale, scale_tensor
        )
        ctx.save_for_backward(logsumexp, scores, image_ids, caption_ids, scale_tensor)
        return positive, logsumexp

    @staticmethod
    def backward(ctx, d_positive, d_logsumexp):
        *tensors, scale_tensor = ctx.saved_tensors
        d_scores, d_scale = ops_of(ctx.backend).negative_logsumexp_backward(
            d_positive, d_logsumexp, *tensors, ctx.scale, scale_tensor
        )
        d_scores, d_scale = first_order_only(
            d_scores if ctx.needs_input_grad[0] else None,
            d_scale if ctx.needs_input_grad[5] else None,
        )
        return d_scores, None, None, None, None, d_scale, None


class _ScoresHingeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, image_ids, caption_ids, num_pairs, margin, backend):
        ctx.margin, ctx.backend = margin, backend
        positive, total, active = ops_of(backend).hinge_sum(
            scores, image_ids, caption_ids, num_pairs, margin
        )
        ctx.mark_non_differentiable(active)
        ctx.save_for_backward(positive, active, scores, image_ids, caption_ids)
        return positive, total, active

    @staticmethod
    def backward(ctx, d_positive, d_hinge_sum, _):
        d_scores = ops_of(ctx.backend).hinge_sum_backward(
            d_positive, d_hinge_sum, *ctx.saved_tensors, ctx.margin
        )
        return *first_order_only(d_scores), None, None, None, None, None


class _L2Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, backend):
        ctx.backend = backend
        normalized, inverse_norm = ops_of(backend).l2_normalize(rows)
        ctx.mark_non_differentiable(inverse_norm)
        ctx.save_for_backward(normalized, inverse_norm)
        return normalized, inverse_norm

    @staticmethod
    def backward(ctx, d_normalized, _):
        d_rows = ops_of(ctx.backend).l2_normalize_backward(d_normalized, *ctx.saved_tensors)
        return *first_order_only(d_rows), None
