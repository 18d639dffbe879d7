"""Host side of the forward ops: what each allocates and launches."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...arguments import accumulation_dtype
from ..fakes import MAX_SAVED_SCORES
from . import certified, configs, hardest, hinge, logsumexp, rows
from .walk import (
    Survey,
    Walk,
    device_of,
    dot_operand,
    matrix_of,
    multiply,
    piece_scores,
    plan,
    plan_scores,
    row_blocks,
    scale_arguments,
    score_scratch,
    survey,
    triton_accumulation,
    unit_stride,
)


def hardest_negatives(images, captions, image_ids, caption_ids, num_pairs, family="dot"):
    walk = plan(family, images, captions, image_ids, caption_ids, num_pairs)
    seen = survey(walk)
    score, index = _hardest_results(seen)
    device = device_of(images.device)
    if (
        images.dtype == torch.float32
        and walk.source == "stored"
        and configs.search_pays(len(images), len(captions), device)
    ):
        work, work_limit = _certified_search(walk, seen, score, index)
        tiles = configs.tiles_for("exact", len(images), len(captions), device)
        operands = dot_operand(walk.images, tiles), dot_operand(walk.captions, tiles)
        walk = walk._replace(operands=operands, tiles=tiles, source="dot")
        _hardest(walk, seen, score, index, work, work_limit)
    else:
        _hardest(walk, seen, score, index)
    return seen.positive, score, index


def hardest_negatives_of_scores(scores, image_ids, caption_ids, num_pairs):
    walk = plan_scores(scores, image_ids, caption_ids, num_pairs)
    seen = survey(walk)
    score, index = _hardest_results(seen)
    _hardest(walk, seen, score, index, given=scores)
    return seen.positive, score, index


def _hardest_results(seen: Survey) -> tuple[Tensor, Tensor]:
    score = seen.positive.new_empty(2, len(seen.positive))
    return score, score.new_empty(score.shape, dtype=torch.int64)


def _hardest(walk, seen, score, index, work=None, work_limit=None, given=None) -> None:
    """With `work`, only if the certified search went beyond `work_limit`."""
    guard = {"work_ptr": work, "work_limit": work_limit, "GUARDED": work is not None}
    merge = functools.partial(
        _merge, hardest.hardest_merge_kernel, walk, seen, score_ptr=score, index_ptr=index, **guard
    )
    _forward(hardest.hardest_kernel, merge, walk, seen, given, RUNNER_UP=False, **guard)


def _certified_search(walk: Walk, seen: Survey, score: Tensor, index: Tensor) -> tuple[Tensor, int]:
    """Fills score and index. Where work[0] > work_limit afterwards, they hold nothing of use."""
    device = device_of(score.device)
    tiles = configs.tiles_for("bf16", len(walk.images), len(walk.captions), device)
    images, captions = (
        _quantize(walk.images, tiles.block_k),
        _quantize(walk.captions, tiles.block_k),
    )
    search = walk._replace(operands=(images.rounded, captions.rounded), tiles=tiles, source="dot")
    work = torch.zeros(1, dtype=torch.int64, device=score.device)
    pieces = sum(1 for _ in search.rectangles(_partial_bytes(search, planes=3)))
    work_limit = configs.MAX_RESCORED_PER_ANCHOR * 2 * walk.num_pairs * pieces

    def rescore(num_rows, num_columns, row_slots, column_slots, **arguments):
        block_s = triton.next_power_of_2(max(row_slots, column_slots))
        certified.rescore_kernel[(max(num_rows, walk.num_pairs), 2)](
            images_ptr=walk.images, captions_ptr=walk.captions,
            image_ids_ptr=walk.image_ids, caption_ids_ptr=walk.caption_ids,
            image_norms_ptr=images.norms, caption_norms_ptr=captions.norms,
            image_bounds_ptr=images.bounds, caption_bounds_ptr=captions.bounds,
            bounds_ptr=seen.bounds, positive_ptr=seen.positive, score_ptr=score, index_ptr=index,
            work_ptr=work, work_limit=work_limit,
            stride_images=walk.images.stride(0), stride_captions=walk.captions.stride(0),
            num_rows=num_rows, num_columns=num_columns, row_slots=row_slots, column_slots=column_slots,
            num_pairs=walk.num_pairs, num_images=len(walk.images), num_captions=len(walk.captions),
            num_bounds=seen.num_bounds, num_image_bounds=images.num_bounds,
            num_caption_bounds=captions.num_bounds, D=walk.images.shape[1],
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_S=block_s,
            **arguments, **configs.RESCORE,
        )  # fmt: skip

    _forward(
        hardest.hardest_kernel, rescore, search, seen, None,
        work_ptr=None, work_limit=None, RUNNER_UP=True, GUARDED=False,
    )  # fmt: skip
    return work, work_limit


class _Quantized(NamedTuple):
    rounded: Tensor  # [rows, D] bfloat16, with zeros up to a multiple of the tiles' BLOCK_K
    norms: Tensor  # [2, rows] squared norms of the rows and of what the rounding took
    bounds: Tensor  # [2, SURVEY_PROGRAMS] int32, maxima of norms
    num_bounds: int


def _quantize(embeddings: Tensor, block_k: int) -> _Quantized:
    num_rows, num_dimensions = embeddings.shape
    pitch = triton.cdiv(num_dimensions, block_k) * block_k
    rounded = embeddings.new_zeros((num_rows, pitch), dtype=torch.bfloat16)
    norms = embeddings.new_empty(2, num_rows)
    programs = rows.SURVEY_PROGRAMS.value
    bounds = embeddings.new_empty((2, programs), dtype=torch.int32)
    blocks = row_blocks(num_dimensions)
    num_bounds = min(triton.cdiv(num_rows, blocks["BLOCK_R"]), programs)
    certified.quantize_kernel[(num_bounds,)](
        embeddings, rounded, norms, bounds, embeddings.stride(0), pitch, num_rows, num_dimensions,
        **blocks, num_warps=4,
    )  # fmt: skip
    return _Quantized(rounded, norms, bounds, num_bounds)


def negative_logsumexp(
    images, captions, image_ids, caption_ids, num_pairs, scale, scale_tensor, save_scores,
    family="dot",
):  # fmt: skip
    walk = plan(family, images, captions, image_ids, caption_ids, num_pairs)
    scores = _saved_scores(walk, save_scores)
    return *_logsumexp(walk, scores, scale, scale_tensor), scores


def negative_logsumexp_of_scores(scores, image_ids, caption_ids, num_pairs, scale, scale_tensor):
    walk = plan_scores(scores, image_ids, caption_ids, num_pairs)
    return _logsumexp(walk, scores, scale, scale_tensor)


def _logsumexp(walk, scores, scale, scale_tensor) -> tuple[Tensor, Tensor]:
    seen = survey(walk)
    result = seen.positive.new_empty((2, walk.num_pairs), dtype=torch.float64)
    merge = functools.partial(
        _merge, logsumexp.logsumexp_merge_kernel, walk, seen, logsumexp_ptr=result
    )
    _forward(
        logsumexp.logsumexp_kernel, merge, walk, seen, scores,
        num_bounds=seen.num_bounds, **scale_arguments(scale, scale_tensor),
        # The bounds that one exp needs are those of the dot product.
        num_anchors=max(len(walk.images), len(walk.captions)), ONE_EXP=walk.source == "dot",
        ACC=triton_accumulation(walk.images.dtype),
    )  # fmt: skip
    return seen.positive, result


def hinge_sum(
    images, captions, image_ids, caption_ids, num_pairs, margin, save_scores, family="dot"
):
    walk = plan(family, images, captions, image_ids, caption_ids, num_pairs)
    scores = _saved_scores(walk, save_scores)
    return *_hinge(walk, scores, margin), scores


def hinge_sum_of_scores(scores, image_ids, caption_ids, num_pairs, margin):
    return _hinge(plan_scores(scores, image_ids, caption_ids, num_pairs), scores, margin)


def _hinge(walk, scores, margin) -> tuple[Tensor, Tensor, Tensor]:
    seen = survey(walk)
    total = seen.positive.new_empty(2, walk.num_pairs)
    active = total.new_empty(total.shape, dtype=torch.int64)
    merge = functools.partial(
        _merge, hinge.hinge_merge_kernel, walk, seen, sum_ptr=total, active_ptr=active
    )
    threshold = seen.positive - margin
    _forward(hinge.hinge_kernel, merge, walk, seen, scores, threshold_ptr=threshold)
    return seen.positive, total, active


def _saved_scores(walk: Walk, save_scores: bool) -> Tensor:
    numel = len(walk.images) * len(walk.captions)
    if not save_scores or numel > MAX_SAVED_SCORES:
        numel = 0
    return walk.images.new_empty(numel, dtype=accumulation_dtype(walk.images.dtype))


def _forward(kernel, merge, walk: Walk, seen: Survey, scores: Tensor | None, **arguments) -> None:
    """Runs `kernel` over S and `merge` after every rectangle.

    `scores` is S where it is given; else where to leave it, unless that is empty or None. The partial
    results of the columns carry over from one rectangle to the next in slot 0.
    """
    dtype = accumulation_dtype(walk.images.dtype)
    planes = 3 if arguments.get("RUNNER_UP") else 2
    bytes_per_row = _partial_bytes(walk, planes)
    at_hand = matrix_of(walk, scores)
    if walk.source == "stored" and at_hand is None:
        bytes_per_row += len(walk.captions) * dtype.itemsize
    pieces = list(walk.rectangles(bytes_per_row))
    row_partial = walk.images.new_empty(
        max(walk.column_tiles(p) * (p.row_stop - p.row_start) for p in pieces) * planes, dtype=dtype
    )
    column_partial = walk.images.new_empty(
        (max(walk.row_tiles(p) for p in pieces) + 1) * planes * walk.num_pairs, dtype=dtype
    )
    scratch = score_scratch(walk, pieces, at_hand)
    for number, piece in enumerate(pieces):
        part = piece_scores(piece, at_hand, scratch)
        if walk.source == "stored":
            multiply(walk, piece, part)
        walk.launch(
            kernel, piece, part,
            row_partial_ptr=row_partial, column_partial_ptr=column_partial, bounds_ptr=seen.bounds,
            SAVE=at_hand is not None and walk.source in ("dot", "order"), **arguments,
        )  # fmt: skip
        merge(
            row_partial_ptr=row_partial, column_partial_ptr=column_partial,
            row_start=piece.row_start, num_rows=piece.row_stop - piece.row_start,
            num_columns=piece.num_columns, row_slots=walk.column_tiles(piece),
            column_first=0 if number else 1, column_slots=walk.row_tiles(piece) + 1,
        )  # fmt: skip


def _partial_bytes(walk: Walk, planes: int) -> int:
    """Memory for partial results that each row of a rectangle takes."""
    row_slots = triton.cdiv(len(walk.captions), walk.tiles.block_n)
    column_slots = triton.cdiv(walk.num_pairs, walk.tiles.block_m)
    return planes * accumulation_dtype(walk.images.dtype).itemsize * (row_slots + column_slots)


def _merge(kernel, walk: Walk, seen: Survey, num_columns: int, **arguments) -> None:
    row_start, num_rows = arguments["row_start"], arguments["num_rows"]
    num_anchors = max(walk.num_pairs, num_rows if row_start < walk.num_pairs else 0)
    kernel[(triton.cdiv(num_anchors, configs.MERGE["BLOCK_A"]), 2)](
        positive_ptr=seen.positive, bounds_ptr=seen.bounds, num_bounds=seen.num_bounds,
        num_pairs=walk.num_pairs, D=walk.images.shape[1],
        FAMILY=walk.family, ACC=triton_accumulation(walk.images.dtype), **arguments,
        **configs.MERGE,
    )  # fmt: skip


def l2_normalize(embeddings):
    embeddings = unit_stride(embeddings)
    num_rows, num_dimensions = embeddings.shape
    normalized = embeddings.new_empty(embeddings.shape)
    inverse_norm = embeddings.new_empty(num_rows, dtype=accumulation_dtype(embeddings.dtype))
    blocks = row_blocks(num_dimensions)
    rows.l2_normalize_kernel[(triton.cdiv(num_rows, blocks["BLOCK_R"]),)](
        embeddings, normalized, inverse_norm, embeddings.stride(0), num_rows, num_dimensions,
        **blocks, ACC=triton_accumulation(embeddings.dtype), num_warps=4,
    )  # fmt: skip
    return normalized, inverse_norm
