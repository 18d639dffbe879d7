"""Host side of the backward ops: what each allocates and launches."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...ops import ORDER, check, new_gradients
from . import configs, hardest, hinge, logsumexp, order, softplus
from .forward import positive_scores
from .plan import Plan, plan, product, scale_of, terms_of, unit_stride
from .tiles import Piece, Terms
from .walk import Gradient, gradient_kernel

# A float16 gradient of S is lifted to at most 2^15, half of what overflows.
LARGEST_GRADIENT_EXPONENT = 15


class Wanted(NamedTuple):
    images: bool
    captions: bool
    accumulate: bool  # in the accumulation type


def hardest_negatives_backward(batch, score, index, d_positive, d_score, *wanted):
    check(batch, score=score, index=index, d_positive=d_positive, d_score=d_score)
    wanted = Wanted(*wanted)
    if batch.captions is None:
        walk, terms = plan(batch, "none"), terms_of(index=index, upstream=d_score)
        return _gradients(hardest, walk, terms, score, d_positive, None, None, wanted)[:2]
    images, captions = (unit_stride(x.detach()) for x in batch[:2])
    row_anchors, column_anchors = batch.row_anchors, batch.column_anchors
    positive = positive_scores(batch) if batch.similarity == ORDER else None
    index = index.contiguous()
    anchors = d_positive.contiguous(), positive, d_score.contiguous(), score.contiguous(), index
    order, starts = None, (None, None)
    if max(row_anchors, column_anchors) > configs.MAX_UNLISTED_ANCHORS:
        order, starts = _anchors_by_target(index, row_anchors, len(images), len(captions))
        starts = starts, starts[len(images) :]
    sides = (
        hardest.Side(images, images.stride(0), 0, row_anchors, batch.pair_row),
        hardest.Side(captions, captions.stride(0), row_anchors, column_anchors, batch.pair_column),
    )
    results = new_gradients(batch, *wanted)
    for number, result in enumerate(results):
        if not wanted[number]:
            continue
        others = sides[1 - number]
        num_rows, num_dimensions = result.shape
        block_d = min(triton.next_power_of_2(num_dimensions), 512)
        hardest.hardest_backward_kernel[(num_rows, triton.cdiv(num_dimensions, block_d))](
            sides[number], others, result, *anchors, order, starts[number],
            batch.pair_count, row_anchors, len(index), num_dimensions,
            SIDE=("images", "captions")[number] if batch.similarity == ORDER else "dot",
            BLOCK_A=triton.next_power_of_2(max(others.num_anchors, 1)) if order is None else 1,
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return results


def _anchors_by_target(index: Tensor, row_anchors: int, num_images: int, num_captions: int):
    """Stable counting sort of the anchors by the row of [I; T] that they point at.

    Returns:
        order: positions in [R + C], first those that point at row 0, in ascending order.
        starts: where those of each row begin in it.
    """
    keys = torch.empty_like(index, dtype=torch.int32)
    hardest.target_keys_kernel[(triton.cdiv(len(index), 1024),)](
        index, keys, num_images, num_captions, row_anchors, len(index), BLOCK=1024, num_warps=4
    )
    keys, order = torch.sort(keys, stable=True)
    boundaries = torch.arange(num_images + num_captions + 1, dtype=torch.int32, device=keys.device)
    return order, torch.searchsorted(keys, boundaries)


def negative_logsumexp_backward(
    batch, ceiling, scale, scale_tensor, reference, log_sum, scores, d_positive, d_log_sum, *wanted
):
    check(
        batch, ceiling=ceiling, scale_tensor=scale_tensor, reference=reference, log_sum=log_sum,
        scores=scores, d_positive=d_positive, d_log_sum=d_log_sum,
    )  # fmt: skip
    walk = plan(batch, "stored" if scores.numel() > 0 else None)
    terms = terms_of(
        ceiling=ceiling, scale=scale_of(scale, scale_tensor), reference=reference, log_sum=log_sum,
        upstream=d_log_sum,
    )  # fmt: skip
    factor = scale if scale_tensor is None else scale_tensor.detach()
    gain = _gain(walk, d_positive, d_log_sum, factor)
    *results, d_scale = _gradients(
        logsumexp, walk, terms, log_sum, d_positive, scores, gain, Wanted(*wanted)
    )
    return *results, d_scale.sum() / factor


def hinge_sum_backward(
    batch, ceiling, threshold, hinge_sum, scores, d_positive, d_hinge_sum, *wanted
):
    check(
        batch, ceiling=ceiling, threshold=threshold, hinge_sum=hinge_sum, scores=scores,
        d_positive=d_positive, d_hinge_sum=d_hinge_sum,
    )  # fmt: skip
    walk = plan(batch, "stored" if scores.numel() > 0 else None)
    terms = terms_of(ceiling=ceiling, threshold=threshold, upstream=d_hinge_sum)
    gain, wanted = _gain(walk, d_positive, d_hinge_sum), Wanted(*wanted)
    return _gradients(hinge, walk, terms, hinge_sum, d_positive, scores, gain, wanted)[:2]


def softplus_sum_backward(
    batch, scale, scale_tensor, bias, equal_positive, softplus_sum, scores, d_positive,
    d_softplus_sum, *wanted,
):  # fmt: skip
    check(
        batch, scale_tensor=scale_tensor, bias=bias, softplus_sum=softplus_sum, scores=scores,
        d_positive=d_positive, d_softplus_sum=d_softplus_sum,
    )  # fmt: skip
    walk = plan(batch, "stored" if scores.numel() > 0 else None, equal_positive=equal_positive)
    terms = terms_of(scale=scale_of(scale, scale_tensor), bias=bias, upstream=d_softplus_sum)
    factor = scale if scale_tensor is None else scale_tensor.detach()
    gain, wanted = _gain(walk, d_positive, d_softplus_sum, factor), Wanted(*wanted)
    *results, d_scale = _gradients(
        softplus, walk, terms, softplus_sum, d_positive, scores, gain, wanted
    )
    return *results, d_scale.sum() / factor


def _gain(walk: Plan, d_positive, upstream, factor: float | Tensor = 1.0) -> Tensor | None:
    """[2]: the power of two that lifts a float16 gradient of S to 2^14 .. 2^15, and its inverse.

    Without it, the gradient underflows as soon as 1 / N is folded in. With it, entries below 2^-39 of the
    largest possible one vanish: unless that is beyond 2^15, less than the smallest float16.
    """
    if walk.given or walk.order or walk.batch.images.dtype != torch.float16:
        return None
    parts = d_positive, *(upstream * factor).split(walk.batch[4:6])
    bound = sum(x.abs().amax().float() for x in parts if x.numel() > 0)
    bound = torch.as_tensor(bound, dtype=torch.float32, device=d_positive.device)
    exponent = (LARGEST_GRADIENT_EXPONENT - bound.log2().ceil()).clamp(-100, 100)
    return torch.stack([exponent, -exponent]).exp2()


def _gradients(
    statistic: ModuleType,
    walk: Plan,
    terms: Terms,
    values: Tensor,
    d_positive: Tensor,
    kept: Tensor | None,
    gain: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d_images and d_captions, by way of the gradient of S; with a scale, the tiles' shares of d_scale.

    Args:
        values: the statistic, NaN where the input is poisoned.
        kept: S from the forward pass, unless that is empty.
    """
    pieces = _pieces(walk, kept)
    values, d_positive = values.contiguous(), d_positive.contiguous()
    # Rows begin on 16-byte boundaries, for wide stores and fast matrix products.
    pitches = [triton.cdiv(piece.num_columns, 16) * 16 for piece in pieces]
    heights = [piece.row_stop - piece.row_start for piece in pieces]
    num_tiles = [math.prod(walk.tile_counts(piece)) for piece in pieces]
    d_scale = walk.new(sum(num_tiles)) if terms.scale is not None else None
    shares = [None] * len(pieces) if d_scale is None else d_scale.split(num_tiles)
    if walk.given:
        buffer = walk.batch.images.new_empty(walk.batch.images.shape)
    else:
        largest = max(a * b for a, b in zip(heights, pitches, strict=True))
        buffer = walk.new(largest, dtype=_gradient_dtype(walk))

    def each() -> Iterator[tuple[Piece, Tensor]]:
        """The gradient of one piece of S after the other."""
        for number, (piece, scores) in enumerate(walk.scores_of(pieces, kept)):
            if walk.source == "stored" and kept.numel() == 0:
                walk.multiply(piece, scores)
            gradient = buffer[piece.row_start :]
            if not walk.given:
                height, pitch = heights[number], pitches[number]
                gradient = buffer[: height * pitch].view(height, pitch)[:, : piece.num_columns]
            target = Gradient(gradient, gradient.stride(0), d_positive, gain)
            walk.launch(
                gradient_kernel, piece, scores, terms, values, target, shares[number],
                CONSTANTS=statistic.constants, WEIGHTS=statistic.weights, ORDER=walk.order,
            )  # fmt: skip
            yield piece, gradient

    d_images, d_captions = new_gradients(walk.batch, *wanted)
    if not walk.given:
        _add_products(walk, each(), len(pieces), gain, d_images, d_captions)
        return d_images, d_captions, d_scale
    for _ in each():
        pass
    return (buffer if wanted.images else d_images), d_captions, d_scale


def _gradient_dtype(walk: Plan) -> torch.dtype:
    """That of the matrix products to follow; the weights over distances of `order` may be of any size."""
    return walk.accumulation if walk.order else walk.batch.images.dtype


def _add_products(walk: Plan, each, num_pieces: int, gain, d_images, d_captions) -> None:
    """d_images and d_captions, where they are not empty, from `each` piece's gradient, summed in the
    accumulation type. For the dot product they are G T and G^t I."""
    images, captions = walk.batch[:2]
    total = d_captions
    if (num_pieces > 1 or gain is not None) and d_captions.dtype != walk.accumulation:
        total = torch.empty_like(d_captions, dtype=walk.accumulation)
    for number, (piece, gradient) in enumerate(each):
        chunk, seen = slice(piece.row_start, piece.row_stop), slice(piece.num_columns)
        if walk.order:
            if d_images.numel() > 0:
                _order_sums("images", gradient, images[chunk], captions[seen], d_images[chunk])
            if total.numel() > 0:
                _order_sums(
                    "captions", gradient.t(), captions[seen], images[chunk], total[seen], number > 0
                )
            continue
        if d_images.numel() > 0 and gain is None:
            product(gradient, captions[seen], d_images[chunk])
        elif d_images.numel() > 0:
            lifted = torch.empty_like(d_images[chunk], dtype=walk.accumulation)
            product(gradient, captions[seen], lifted)
            torch.mul(lifted, gain[1], out=d_images[chunk])
        if total.numel() > 0:
            product(gradient.t(), images[chunk], total[seen], accumulate=number > 0)
    if gain is not None:
        torch.mul(total, gain[1], out=d_captions)
    elif total is not d_captions:
        d_captions.copy_(total)


def _order_sums(side, weights, own, others, total, accumulate: bool = False) -> None:
    """total [own rows, D] = or, if `accumulate`, += what `others` pull at `own`, weighted."""
    is_double = weights.dtype == torch.float64
    blocks = configs.ORDER_SUMS_FLOAT64 if is_double else configs.ORDER_SUMS
    num_rows, num_dimensions = own.shape
    grid = triton.cdiv(num_rows, blocks["BLOCK_R"]), triton.cdiv(num_dimensions, blocks["BLOCK_D"])
    order.order_sums_kernel[grid](
        own, others, weights, total, own.stride(0), others.stride(0), *weights.stride(),
        num_rows, len(others), num_dimensions, SIDE=side, CARRY=accumulate, **blocks,
    )  # fmt: skip


def _pieces(walk: Plan, kept: Tensor | None) -> list[Piece]:
    """Those whose gradient, and scores unless they are at hand, fit. No row and no column is in none: at
    least one column goes with each row, and one row with each column."""
    batch = walk.batch
    row_anchors = max(batch.row_anchors, 1)
    if walk.given:
        return walk.pieces(1, row_anchors, walk.num_columns)  # in place: nothing to fit
    entry_bytes = _gradient_dtype(walk).itemsize
    if walk.source == "stored" and kept.numel() == 0:
        entry_bytes *= 2
    columns = max(batch.column_anchors, 1)
    if batch.pair_row + batch.pair_count > row_anchors:
        columns = max(columns, batch.pair_column + batch.pair_count)
    return walk.pieces(entry_bytes * (walk.num_columns + 15), row_anchors, columns)
