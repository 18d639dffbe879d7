"""What the kernels share that walk over the tiles of S: their arguments, raster order, scores of a tile,
negatives, and the bounds by which they know input that is not finite.

A kernel covers a piece of S, rows [row_start, row_stop) and columns [0, num_columns), with a
persistent grid: program b takes tiles b, b + grid, b + 2 grid, ... While one program of a
multiprocessor reduces its tile, the other one keeps the tensor cores busy, so that the reduction is
hidden as long as it is shorter than the tile's D / block_k matrix steps (benchmarks/NOTES.md).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .order import order_tile, zero_tile

# The interpreter's bfloat16 tl.dot returns garbage (Triton 3.6 to 3.9), so it gets float32 operands.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NO_INDEX = tl.constexpr(2**31 - 1)
# Programs of survey_kernel, each of which leaves one column of bounds: 4 for each of 132 SMs, rounded.
SURVEY_PROGRAMS = tl.constexpr(512)
OVERFLOW = tl.constexpr(3.0e38)
OVERFLOW_FLOAT64 = tl.constexpr(1.7e308)


# Arguments of the kernels. The embeddings are none of them: Triton 3.6 takes tensor descriptors only as
# arguments of their own. None becomes part of the code, which then holds nothing of what it stands for.


class Scores(NamedTuple):
    pointer: Any  # S of the piece: read, or where it is computed, kept; or None
    stride_rows: int
    stride_columns: int
    stride_images: int
    stride_captions: int
    D: int


class Ids(NamedTuple):
    images: Any  # [N] int64 or None
    captions: Any  # [M]
    pair_row: int
    pair_column: int
    pair_count: int
    # 1, part of the code: entries of equal ids are not left out, the statistic gives them a minus. Or None
    equal_positive: Any = None


class Piece(NamedTuple):
    row_start: int
    row_stop: int
    num_columns: int
    row_anchors: int  # R and C of the whole S
    column_anchors: int


class Bounds(NamedTuple):
    pointer: (
        Any  # [2, 3, SURVEY_PROGRAMS] of rows.survey_kernel, or [SURVEY_PROGRAMS] of leave_bound
    )
    num_programs: int
    num_candidates: int  # of any anchor, at most
    D: int


class Scale(NamedTuple):
    tensor: Any  # [], or None
    value: float  # in two parts, since Triton takes Python floats as float32
    rest: float


class Terms(NamedTuple):
    """What the statistics and their gradients need; tensors are [R + C]."""

    ceiling: Any = None
    threshold: Any = None
    scale: Any = None  # a Scale
    index: Any = None
    reference: Any = None
    log_sum: Any = None
    bias: Any = None  # []
    upstream: Any = None  # the derivatives by the statistic


class Partials(NamedTuple):
    """Results of tiles, [slots, anchors]: of the piece's rows with a slot for each tile of columns, then of
    the column anchors with a slot for each tile of rows, after slot 0, which carries over from the piece
    before."""

    first: Any
    second: Any
    third: Any  # for the certified search, else None
    column_base: int  # where those of the columns begin


class Tile(NamedTuple):
    """Made in the kernels: where a tile lies, and in what."""

    row: Any
    column: Any
    piece: Any
    ids: Any


@triton.jit
def tile_position(number, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile number -> (row tile, column tile), GROUP rows at a time so that operands stay in L2."""
    group_size = GROUP * column_tiles
    first_row = number // group_size * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    within = number % group_size
    return first_row + within % height, within // height


@triton.jit
def embedding_rows(pointer, stride, first, stop, BLOCK: tl.constexpr):
    """Pointers [BLOCK, 1] to rows first, first + 1, ...; rows from `stop` on repeat the last one."""
    offs = tl.minimum(first + tl.arange(0, BLOCK), stop - 1)
    return pointer + offs.to(tl.int64)[:, None] * stride


@triton.jit
def dot_tile(images, captions, scores, tile, TILES: tl.constexpr):
    """acc[i, j] = sum_k I[row + i, k] T[column + j, k], in float32.

    D is a multiple of block_k; with TMA it need not be: the embeddings are then tensor descriptors,
    which fill what lies outside with zeros.
    """
    row, column, piece, _ = tile
    acc = zero_tile(TILES, tl.float32)
    if not TILES.tma:
        offs_k = tl.arange(0, TILES.block_k)[None, :]
        image_ptrs = embedding_rows(
            images, scores.stride_images, row, piece.row_stop, TILES.block_m
        )
        caption_ptrs = embedding_rows(
            captions, scores.stride_captions, column, piece.num_columns, TILES.block_n
        )
        image_ptrs += offs_k
        caption_ptrs += offs_k
    for k in tl.range(0, scores.D, TILES.block_k):
        if TILES.tma:
            a = images.load([row, k])
            b = captions.load([column, k])
        else:
            a = tl.load(image_ptrs)
            b = tl.load(caption_ptrs)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=TILES.precision)
        if not TILES.tma:
            image_ptrs += TILES.block_k
            caption_ptrs += TILES.block_k
    return acc


# Where a kernel gets its scores from (SOURCE):
#
#   "dot"      computed with tl.dot from the embeddings, or their descriptors
#   "order"    computed with order_tile from the transposed embeddings
#   "stored"   read: torch.mm or the forward pass left them in memory
#   "given"    read: S is what the user passed, of any dtype and strides; nobody has looked at it before
#   "none"     nowhere: zeros, for a gradient that needs no scores
@triton.jit
def score_tile(images, captions, scores, tile, SOURCE: tl.constexpr, TILES: tl.constexpr):
    """The scores [block_m, block_n] of the tile. Computed ones are kept if there is room for them.

    What lies outside of the piece, or where no anchor looks, holds 0 if read, anything if computed.
    """
    row, column, piece, _ = tile
    READ: tl.constexpr = SOURCE == "stored" or SOURCE == "given"
    if SOURCE != "none" and scores.pointer is not None:
        offs_m = tl.arange(0, TILES.block_m)
        offs_n = column + tl.arange(0, TILES.block_n)
        pointers = (
            scores.pointer
            + (row - piece.row_start + offs_m).to(tl.int64)[:, None] * scores.stride_rows
            + offs_n.to(tl.int64)[None, :] * scores.stride_columns
        )
        seen = tl.minimum(piece.num_columns, piece.column_anchors)
        seen = tl.where(piece.row_start < piece.row_anchors, piece.num_columns, seen)
        inside = (row + offs_m < piece.row_stop)[:, None] & (offs_n < seen)[None, :]
    if READ:
        acc = tl.load(pointers, mask=inside, other=0.0)
        if acc.dtype != tl.float64:
            acc = acc.to(tl.float32)
    elif SOURCE == "none":
        acc = zero_tile(TILES, tl.float32)
    else:
        if SOURCE == "order":
            acc = order_tile(images, captions, scores, row, column, TILES)
        else:
            acc = dot_tile(images, captions, scores, tile, TILES)
        if scores.pointer is not None:
            tl.store(pointers, acc, mask=inside)
    return acc


@triton.jit
def crosses_pairs(acc, tile):
    """Whether the tile may hold the score of a pair."""
    ids = tile.ids
    row = tile.row - ids.pair_row
    column = tile.column - ids.pair_column
    crosses = (row < column + acc.shape[1]) & (column < row + acc.shape[0])
    return crosses & (row < ids.pair_count) & (row + acc.shape[0] > 0)


@triton.jit
def pairs_of(acc, tile):
    """[block_m]: which pair a row is, and the position of its partner in the tile; -1 for none."""
    ids = tile.ids
    pair = tile.row - ids.pair_row + tl.arange(0, acc.shape[0])
    is_pair = (pair >= 0) & (pair < ids.pair_count)
    partner = tl.where(is_pair, pair + ids.pair_column - tile.column, -1)
    return pair, partner


@triton.jit
def ids_of(acc, tile):
    """Those of the tile's rows and of its columns."""
    row, column, piece, ids = tile
    offs_m = tl.minimum(row + tl.arange(0, acc.shape[0]), piece.row_stop - 1)
    offs_n = tl.minimum(column + tl.arange(0, acc.shape[1]), piece.num_columns - 1)
    return tl.load(ids.images + offs_m), tl.load(ids.captions + offs_n)


@triton.jit
def negative_scores(acc, tile):
    """The tile's scores with -inf for everything that is not a negative in the piece.

    Most tiles hold nothing else: they lie inside, and the ranges of their rows' and their columns' ids do not
    meet. Without ids, those are pairs.
    """
    row, column, piece, ids = tile
    offs_m = row + tl.arange(0, acc.shape[0])
    offs_n = column + tl.arange(0, acc.shape[1])
    EXCLUDES: tl.constexpr = ids.equal_positive is None
    needs_mask = (row + acc.shape[0] > piece.row_stop) | (column + acc.shape[1] > piece.num_columns)
    if ids.images is not None:
        if EXCLUDES:
            row_ids, column_ids = ids_of(acc, tile)
            needs_mask |= (tl.min(row_ids, 0) <= tl.max(column_ids, 0)) & (
                tl.min(column_ids, 0) <= tl.max(row_ids, 0)
            )
    else:
        needs_mask |= crosses_pairs(acc, tile)
    if needs_mask:
        keep = (offs_m < piece.row_stop)[:, None] & (offs_n < piece.num_columns)[None, :]
        if ids.images is not None:
            if EXCLUDES:
                row_ids, column_ids = ids_of(acc, tile)
                keep &= row_ids[:, None] != column_ids[None, :]
        else:
            _, partner = pairs_of(acc, tile)
            keep &= partner[:, None] != tl.arange(0, acc.shape[1])[None, :]
        acc = tl.where(keep, acc, -float("inf"))
    return acc


@triton.jit
def column_halves(acc, tile):
    """acc[:, : block_n // 2], acc[:, block_n // 2 :] and the tile that the latter is.

    The vectors that belong to the columns of one half are half as many registers, so that nothing spills.
    """
    HALF: tl.constexpr = acc.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
    return left, right, Tile(tile.row, tile.column + HALF, tile.piece, tile.ids)


@triton.jit
def anchors(acc, tile, AXIS: tl.constexpr):
    """Positions in [R + C] of the anchors whose candidates lie along AXIS, and which of them there are."""
    if AXIS == 1:
        offs = tile.row + tl.arange(0, acc.shape[0])
        return offs, offs < tile.piece.row_anchors
    else:
        offs = tile.column + tl.arange(0, acc.shape[1])
        return tile.piece.row_anchors + offs, offs < tile.piece.column_anchors


@triton.jit
def candidates(acc, tile, AXIS: tl.constexpr):
    """The numbers of the columns, or of the rows, along AXIS."""
    if AXIS == 1:
        return tile.column + tl.arange(0, acc.shape[1])
    else:
        return tile.row + tl.arange(0, acc.shape[0])


@triton.jit
def below_ceiling(acc, tile, ceiling, AXIS: tl.constexpr):
    """-inf for what does not count for the anchors along AXIS."""
    if ceiling is not None:
        offs, mask = anchors(acc, tile, AXIS)
        limit = tl.load(ceiling + offs, mask=mask, other=float("inf"))
        acc = tl.where(acc <= tl.expand_dims(limit, AXIS), acc, -float("inf"))
    return acc


@triton.jit
def leave(out, acc, tile, AXIS: tl.constexpr, first, second, third=None):
    """Stores the results of the anchors along AXIS among the partial ones."""
    row, column, piece, _ = tile
    if AXIS == 1:
        num_rows = piece.row_stop - piece.row_start
        base = (column // acc.shape[1]).to(tl.int64) * num_rows
        offs = row - piece.row_start + tl.arange(0, acc.shape[0])
        mask = offs < tl.minimum(num_rows, piece.row_anchors - piece.row_start)
    else:
        slot = (row - piece.row_start) // acc.shape[0] + 1
        base = out.column_base + slot.to(tl.int64) * piece.column_anchors
        offs = column + tl.arange(0, acc.shape[1])
        mask = offs < piece.column_anchors
    # Not base + offs first, which takes twice the registers.
    tl.store(out.first + base + offs, first, mask=mask)
    tl.store(out.second + base + offs, second, mask=mask)
    if third is not None:
        tl.store(out.third + base + offs, third, mask=mask)


@triton.jit
def nothing(terms, bounds, SOURCE: tl.constexpr):
    """For a statistic that needs no constants."""
    return 0


@triton.jit
def magnitude_bits(x):
    """|x| as an integer, which orders like |x| with infinity and then NaN at the top."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def leave_bound(bounds, magnitudes):
    """bounds[program] = max |s| over the program's tiles and what it left for an earlier piece."""
    largest = tl.max(tl.max(magnitudes, 1), 0)
    pointer = bounds.pointer + tl.program_id(0)
    tl.store(pointer, tl.maximum(tl.load(pointer), largest))


@triton.jit
def load_bound(bounds, number: tl.constexpr):
    """The maximum over what the programs left in row `number` of the bounds."""
    offs = tl.arange(0, SURVEY_PROGRAMS)
    pointers = bounds.pointer + number * SURVEY_PROGRAMS + offs
    bits = tl.max(tl.load(pointers, mask=offs < bounds.num_programs, other=0), 0)
    if bits.dtype == tl.int64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_poisoned(bounds, SOURCE: tl.constexpr):
    """Whether anything in the input is not finite, or so large that a score might overflow.

    Of embeddings, max|I| and max|T| are known, with |score| <= D max|I| max|T|, or for the order similarity
    score^2 <= 2 D (max|I|^2 + max|T|^2); of given scores max|S|, whose differences must not overflow.
    """
    image = load_bound(bounds, 0)
    if SOURCE == "given":
        bound = 4 * image
    else:
        caption = load_bound(bounds, 3)
        if SOURCE == "order":
            bound = 4 * bounds.D * (image * image + caption * caption)
        else:
            bound = image * caption * bounds.D
    # NaN compares false; 0 times infinity is NaN.
    if bound.dtype == tl.float64:
        return (bound < OVERFLOW_FLOAT64) == 0
    else:
        return (bound < OVERFLOW) == 0


@triton.jit
def poison(statistic, num_row_anchors, num_anchors):
    """1, or NaN if the statistic of the first row anchor or of the first column anchor is."""
    first = tl.load(statistic, mask=num_anchors > 0, other=0.0)
    second = tl.load(statistic + num_row_anchors, mask=num_anchors > num_row_anchors, other=0.0)
    return tl.where((first == first) & (second == second), 1.0, float("nan"))
