"""Host side of the forward ops: what each allocates and launches."""

from types import ModuleType

import torch
import triton
from torch import Tensor

from ...ops import MAX_SAVED_SCORES, ORDER, Batch, accumulation_dtype, check
from . import certified, configs, hardest, hinge, logsumexp, rows, softplus
from .plan import (
    Plan,
    device_of,
    plan,
    row_blocks,
    scale_of,
    survey,
    terms_of,
    unit_stride,
    with_operands,
)
from .tiles import Bounds, Partials, Piece, Terms
from .walk import NO_GUARD, Guard, merge_kernel, walk_kernel


def positive_scores(batch: Batch) -> Tensor:
    check(batch)
    images, captions = batch.images.detach(), batch.captions
    row, column, count = batch.pair_row, batch.pair_column, batch.pair_count
    dtype = accumulation_dtype(images.dtype)
    if captions is None:
        block = images[row : row + count, column : column + count]
        return block.diagonal().to(dtype, copy=True)
    images, captions = unit_stride(images)[row:], unit_stride(captions.detach())[column:]
    positive = images.new_empty(count, dtype=dtype)
    blocks = row_blocks(images.shape[1])
    if count > 0:
        rows.pair_scores_kernel[(triton.cdiv(count, blocks["BLOCK_R"]),)](
            images, captions, positive, images.stride(0), captions.stride(0), count,
            images.shape[1], ORDER=batch.similarity == ORDER, **blocks, num_warps=4,
        )  # fmt: skip
    return positive


def hardest_negatives(batch: Batch, ceiling: Tensor | None) -> tuple[Tensor, Tensor]:
    check(batch, ceiling=ceiling)
    walk, terms = plan(batch), terms_of(ceiling=ceiling)
    results = walk.new(walk.num_anchors), walk.new(walk.num_anchors, dtype=torch.int64)
    device = device_of(batch.images.device)
    shape = walk.num_rows, walk.num_columns
    if (
        (walk.source, batch.images.dtype, ceiling) == ("stored", torch.float32, None)
        and configs.search_pays(*shape, device)
    ):  # fmt: skip
        bounds, guard = _certified_search(walk, terms, results)
        exact = walk._replace(source="dot", tiles=configs.tiles_for("exact", *shape, device))
        _statistic(hardest, with_operands(exact), terms, bounds, results, guard=guard)
    else:
        _statistic(hardest, walk, terms, survey(walk)[0], results)
    return results


def negative_logsumexp(batch, ceiling, scale, scale_tensor, save_scores):
    check(batch, ceiling=ceiling, scale_tensor=scale_tensor)
    walk = plan(batch)
    terms = terms_of(ceiling=ceiling, scale=scale_of(scale, scale_tensor))
    results = walk.new(walk.num_anchors), walk.new(walk.num_anchors, dtype=torch.float64)
    kept = _kept(walk, save_scores)
    _statistic(logsumexp, walk, terms, survey(walk)[0], results, kept)
    return *results, kept


def hinge_sum(batch, ceiling, threshold, save_scores):
    check(batch, ceiling=ceiling, threshold=threshold)
    walk = plan(batch, crowded=ceiling is not None)
    terms = terms_of(ceiling=ceiling, threshold=threshold)
    results = walk.new(walk.num_anchors), walk.new(walk.num_anchors, dtype=torch.int64)
    kept = _kept(walk, save_scores)
    _statistic(hinge, walk, terms, survey(walk)[0], results, kept)
    return *results, kept


def softplus_sum(batch, scale, scale_tensor, bias, equal_positive, save_scores):
    check(batch, scale_tensor=scale_tensor, bias=bias)
    walk = plan(batch, equal_positive=equal_positive)
    terms = terms_of(scale=scale_of(scale, scale_tensor), bias=bias)
    results = walk.new(walk.num_anchors), walk.new(walk.num_anchors)
    kept = _kept(walk, save_scores)
    _statistic(softplus, walk, terms, survey(walk)[0], results, kept)
    return *results, kept


def _kept(walk: Plan, save_scores: bool) -> Tensor:
    numel = walk.num_rows * walk.num_columns
    is_kept = save_scores and not walk.given and numel <= MAX_SAVED_SCORES
    return walk.new(numel if is_kept else 0)


def _pieces(walk: Plan, planes: int, kept: Tensor | None = None) -> list[Piece]:
    """Those whose partial results, and scores where they are neither kept nor in registers, fit."""
    row_anchors, column_anchors = walk.batch[4:6]
    slots = triton.cdiv(walk.num_columns, walk.tiles.block_n)
    slots += triton.cdiv(column_anchors, walk.tiles.block_m)
    entries = planes * slots
    if walk.source == "stored" and (kept is None or kept.numel() == 0):
        entries += walk.num_columns
    return walk.pieces(entries * walk.accumulation.itemsize, row_anchors, column_anchors)


def _statistic(
    statistic: ModuleType,
    walk: Plan,
    terms: Terms,
    bounds: Bounds,
    results: tuple[Tensor, Tensor],
    kept: Tensor | None = None,
    guard: Guard = NO_GUARD,
) -> None:
    """Runs the walk over S, and after every piece the merge. `kept`: where to leave S, unless empty."""
    blocks = triton.cdiv(max(walk.batch[4:6]), configs.MERGE["BLOCK_A"])
    for piece, slots, *counts in _walk(statistic, walk, terms, bounds, 2, kept, guard):
        merge_kernel[(blocks, 2)](
            piece, terms, slots, *results, bounds, guard, *counts,
            CONSTANTS=statistic.constants, EMPTY=statistic.EMPTY, MERGE=statistic.merge,
            FINISH=statistic.finish, SOURCE=walk.source, **configs.MERGE,
        )  # fmt: skip


def _walk(statistic: ModuleType, walk: Plan, terms, bounds, planes: int, kept=None, guard=NO_GUARD):
    """The walk over one piece of S after the other.

    Yields:
        Each piece with its partial results and how many slots they have: of the rows, from where to where of
        the columns. The columns' carry over from one piece to the next in slot 0.
    """
    pieces = _pieces(walk, planes, kept)
    tiles = [walk.tile_counts(piece) for piece in pieces]
    heights = [piece.row_stop - piece.row_start for piece in pieces]
    base = max((n * height for (_, n), height in zip(tiles, heights, strict=True)), default=0)
    size = base + (max((n for n, _ in tiles), default=0) + 1) * walk.batch.column_anchors
    second = torch.int32 if isinstance(statistic.EMPTY[1], int) else None
    third = walk.new(size) if planes == 3 else None
    slots = Partials(walk.new(size), walk.new(size, dtype=second), third, base)
    for number, (piece, scores) in enumerate(walk.scores_of(pieces, kept)):
        if walk.source == "stored":
            walk.multiply(piece, scores)
        walk.launch(
            walk_kernel, piece, scores, terms, slots, bounds, guard,
            CONSTANTS=statistic.constants, PARTIALS=statistic.partials,
        )  # fmt: skip
        yield piece, slots, tiles[number][1], 0 if number else 1, tiles[number][0] + 1


def _certified_search(walk: Plan, terms: Terms, results) -> tuple[Bounds, Guard]:
    """Fills the results. Where the guard's work is beyond its limit afterwards, they hold nothing of use."""
    device = device_of(walk.batch.images.device)
    tiles = configs.tiles_for("bf16", walk.num_rows, walk.num_columns, device)
    bounds, images, captions = survey(walk, tiles.block_k)
    search = walk._replace(operands=(images.rounded, captions.rounded), tiles=tiles, source="dot")
    limit = configs.MAX_RESCORED_PER_ANCHOR * walk.num_anchors * len(_pieces(search, 3))
    guard = Guard(walk.batch.images.new_zeros(1, dtype=torch.int64), limit)
    for piece, slots, row_slots, column_first, column_slots in _walk(
        certified, search, terms, bounds, 3
    ):
        anchors = max(piece.row_stop - piece.row_start, piece.column_anchors)
        certified.rescore_kernel[(anchors, 2)](
            images, captions, walk.ids, piece, slots, *results, bounds, guard,
            row_slots, column_first, column_slots, TILES=tiles,
            BLOCK_S=triton.next_power_of_2(max(row_slots, column_slots)), **configs.RESCORE,
        )  # fmt: skip
    return bounds, guard
