"""The walk over S: one kernel forward, one that merges its partial results, and one for the gradient of S.

A statistic is a module of functions that these kernels call (hardest.py, logsumexp.py, hinge.py,
softplus.py):

    constants    what is the same for all tiles
    partials     leaves two results for each row and column of a tile
    EMPTY        the two results where there is nothing
    merge        the two results of two sets of candidates
    finish       from them to what the op returns
    weights      the gradient of a tile, and its share of d_scale
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .order import over_distance, zero_tile
from .tiles import (
    Tile,
    below_ceiling,
    column_halves,
    crosses_pairs,
    is_poisoned,
    leave_bound,
    magnitude_bits,
    negative_scores,
    pairs_of,
    poison,
    score_tile,
    tile_position,
)


class Guard(NamedTuple):
    """A launch does nothing unless work[0] > limit: a pass that only those need whom the certified search
    gave up. NO_GUARD: all do."""

    work: Any
    limit: Any


NO_GUARD = Guard(None, None)


# For each tile, for its rows and for its columns: the two (or three) partial results of the statistic.
#
#   for tile in my tiles:
#       s = I[rows] T[columns]^t, -inf where not a negative
#       row partials [column tile] = statistic over j of s_ij     column partials [1 + row tile] = over i
@triton.jit
def walk_kernel(
    images, captions, scores, ids, piece, terms, partials, bounds, guard,
    CONSTANTS: tl.constexpr, PARTIALS: tl.constexpr, SOURCE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    if guard.work is not None:
        if tl.load(guard.work) <= guard.limit:
            return
    constants = CONSTANTS(terms, bounds, SOURCE)
    row_tiles = tl.cdiv(piece.row_stop - piece.row_start, TILES.block_m)
    column_tiles = tl.cdiv(piece.num_columns, TILES.block_n)
    if SOURCE == "given":
        magnitudes = zero_tile(TILES, bounds.pointer.dtype.element_ty)
    for number in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=False
    ):
        row_tile, column_tile = tile_position(number, row_tiles, column_tiles, TILES.group)
        row = piece.row_start + row_tile * TILES.block_m
        tile = Tile(row, column_tile * TILES.block_n, piece, ids)
        acc = score_tile(images, captions, scores, tile, SOURCE, TILES)
        if SOURCE == "given":
            magnitudes = tl.maximum(magnitudes, magnitude_bits(acc))
        PARTIALS(negative_scores(acc, tile), tile, terms, constants, partials)
    if SOURCE == "given":
        leave_bound(bounds, magnitudes)


# The results of each anchor over all tiles, in ascending order of blocks. Program (b, 0) takes row anchors,
# (b, 1) column anchors.
#
#   for slots in blocks of BLOCK_S:
#       first, second = merge((first, second), partials[slots])
#
# Poisoned input makes every statistic NaN. Of given scores that may show only in a later piece than that of
# a row: the rows of all pieces get it.
@triton.jit
def merge_kernel(
    piece, terms, partials, first_ptr, second_ptr, bounds, guard,
    row_slots, column_first, column_slots,
    CONSTANTS: tl.constexpr, EMPTY: tl.constexpr, MERGE: tl.constexpr, FINISH: tl.constexpr,
    SOURCE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    if guard.work is not None:
        if tl.load(guard.work) <= guard.limit:
            return
    constants = CONSTANTS(terms, bounds, SOURCE)
    is_column = tl.program_id(1) == 1
    num_anchors = tl.where(is_column, piece.column_anchors, piece.row_anchors)
    start = tl.where(is_column, 0, piece.row_start)
    stop = tl.where(is_column, num_anchors, tl.minimum(num_anchors, piece.row_stop))
    width = tl.where(is_column, num_anchors, piece.row_stop - piece.row_start)
    offs = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (offs >= start) & (offs < stop)
    base = tl.where(is_column, partials.column_base, 0) - start
    first_slot = tl.where(is_column, column_first, 0)
    num_slots = tl.where(is_column, column_slots, row_slots)
    # Nothing to do for rows of other pieces.
    num_slots = tl.where(tl.max(mask.to(tl.int32), 0) > 0, num_slots, 0)

    first = tl.full((BLOCK_A,), EMPTY[0], partials.first.dtype.element_ty)
    second = tl.full((BLOCK_A,), EMPTY[1], partials.second.dtype.element_ty)
    for slot in tl.range(first_slot, num_slots, BLOCK_S):
        offs_s = slot + tl.arange(0, BLOCK_S)
        positions = base + offs_s.to(tl.int64)[:, None] * width + offs[None, :]
        there = (offs_s < num_slots)[:, None] & mask[None, :]
        new_first = tl.load(partials.first + positions, mask=there, other=EMPTY[0])
        new_second = tl.load(partials.second + positions, mask=there, other=EMPTY[1])
        first, second = MERGE(first, second, new_first, new_second, constants)

    if is_column:
        tl.store(partials.first + base + offs, first, mask=mask)
        tl.store(partials.second + base + offs, second, mask=mask)
    poisoned = is_poisoned(bounds, SOURCE)
    first, second = FINISH(first, second, poisoned, constants)
    mask |= poisoned & (offs < num_anchors)
    offs += tl.where(is_column, piece.row_anchors, 0)
    tl.store(first_ptr + offs, first, mask=mask)
    tl.store(second_ptr + offs, second, mask=mask)


class Gradient(NamedTuple):
    pointer: Any  # [rows of the piece, >= num_columns]
    stride: int
    d_positive: Any  # [pair_count]
    factor: Any  # of all entries: the gain [2], or None; in the functions below the number


# The gradient by a piece of S, rounded to the dtype of the matrix products that follow:
#
#   for tile in my tiles:
#       w_ij = weights of row anchor i + weights of column anchor j      for a negative, else 0
#       G_ij = gain (w_ij + [i and j are pair k] d_positive_k)
#       d_scale[tile] = what the weights give of it
#
# ORDER: G_ij is divided by the distance -s_ij. Poisoned input makes all of it NaN.
@triton.jit
def gradient_kernel(
    images, captions, scores, ids, piece, terms, statistic, target, d_scale,
    CONSTANTS: tl.constexpr, WEIGHTS: tl.constexpr, SOURCE: tl.constexpr, ORDER: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    constants = CONSTANTS(terms, None, SOURCE)
    num_anchors = piece.row_anchors + piece.column_anchors
    nan_or_one = poison(statistic, piece.row_anchors, num_anchors)
    factor = nan_or_one
    if target.factor is not None:
        factor *= tl.load(target.factor)
    target = Gradient(target.pointer, target.stride, target.d_positive, factor)
    row_tiles = tl.cdiv(piece.row_stop - piece.row_start, TILES.block_m)
    column_tiles = tl.cdiv(piece.num_columns, TILES.block_n)
    for number in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=False
    ):
        row_tile, column_tile = tile_position(number, row_tiles, column_tiles, TILES.group)
        row = piece.row_start + row_tile * TILES.block_m
        tile = Tile(row, column_tile * TILES.block_n, piece, ids)
        acc = score_tile(images, captions, scores, tile, SOURCE, TILES)
        HALVINGS: tl.constexpr = TILES.halvings + (acc.dtype == tl.float64)
        share = gradient_tile(
            acc, tile, terms, target, constants, WEIGHTS, ORDER, d_scale is not None, HALVINGS
        )  # fmt: skip
        if d_scale is not None:
            tl.store(d_scale + number, share * nan_or_one)


@triton.jit
def gradient_tile(
    acc, tile, terms, target, constants,
    WEIGHTS: tl.constexpr, ORDER: tl.constexpr, NEED_SCALE: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a tile, half of the columns at a time, and returns its share of d_scale."""
    if HALVINGS > 0:
        left, right, right_tile = column_halves(acc, tile)
        share = gradient_tile(
            left, tile, terms, target, constants, WEIGHTS, ORDER, NEED_SCALE, HALVINGS - 1
        )
        share += gradient_tile(
            right, right_tile, terms, target, constants, WEIGHTS, ORDER, NEED_SCALE, HALVINGS - 1
        )  # fmt: skip
    else:
        share = gradient_part(acc, tile, terms, target, constants, WEIGHTS, ORDER, NEED_SCALE)
    return share


@triton.jit
def gradient_part(
    acc, tile, terms, target, constants,
    WEIGHTS: tl.constexpr, ORDER: tl.constexpr, NEED_SCALE: tl.constexpr,
):  # fmt: skip
    scores = negative_scores(acc, tile)
    of_rows = below_ceiling(scores, tile, terms.ceiling, 1)
    of_columns = below_ceiling(scores, tile, terms.ceiling, 0)
    gradient, row_shares = WEIGHTS(of_rows, tile, terms, constants, 1)
    column_gradient, column_shares = WEIGHTS(of_columns, tile, terms, constants, 0)
    gradient += column_gradient
    share = tl.zeros((), acc.dtype)
    if NEED_SCALE:
        share += tl.sum(tl.sum(row_shares + column_shares, 1), 0)
    if crosses_pairs(acc, tile):
        pair, partner = pairs_of(acc, tile)
        d_pair = tl.load(target.d_positive + pair, mask=partner >= 0, other=0.0)
        is_pair = partner[:, None] == tl.arange(0, acc.shape[1])[None, :]
        gradient += tl.where(is_pair, d_pair[:, None], 0.0)
    if ORDER:
        gradient = over_distance(gradient, acc)
    row, column, piece, _ = tile
    offs_m = row + tl.arange(0, acc.shape[0])
    offs_n = column + tl.arange(0, acc.shape[1])
    pointers = target.pointer + (offs_m - piece.row_start).to(tl.int64)[:, None] * target.stride
    inside = (offs_m < piece.row_stop)[:, None] & (offs_n < piece.num_columns)[None, :]
    gradient = (gradient * target.factor).to(target.pointer.dtype.element_ty)
    tl.store(pointers + offs_n[None, :], gradient, mask=inside)
    return share
