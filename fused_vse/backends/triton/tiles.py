"""What the kernels that walk over the tiles of S share: raster order, scores of a tile, negatives.

A kernel covers a rectangle of S, rows [row_start, row_stop) and columns [0, num_columns), with a
persistent grid: program b takes tiles b, b + grid, b + 2 grid, ... While one program of a
multiprocessor reduces its tile, the other one keeps the tensor cores busy, so that the reduction is
hidden as long as it is shorter than the tile's D / BLOCK_K matrix steps (benchmarks/NOTES.md).
"""

import triton
import triton.language as tl

from .order import order_tile

# The interpreter's bfloat16 tl.dot returns garbage (Triton 3.6 to 3.9), so it gets float32 operands.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile number -> (row tile, column tile), GROUP rows at a time so that operands stay in L2."""
    group_size = GROUP * column_tiles
    first_row = tile // group_size * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    within = tile % group_size
    return first_row + within % height, within // height


@triton.jit
def embedding_rows(pointer, stride, first, stop, BLOCK: tl.constexpr):
    """Pointers [BLOCK, 1] to rows first, first + 1, ...; rows from `stop` on repeat the last one."""
    offs = tl.minimum(first + tl.arange(0, BLOCK), stop - 1)
    return pointer + offs.to(tl.int64)[:, None] * stride


@triton.jit
def dot_tile(
    images_ptr, captions_ptr, stride_images, stride_captions,
    row, row_stop, column, num_columns, D,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[i, j] = sum_k I[row + i, k] T[column + j, k], in float32.

    D is a multiple of BLOCK_K; with TMA it need not be: the two pointers are then tensor descriptors,
    which fill what lies outside with zeros.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    if not TMA:
        image_ptrs = embedding_rows(images_ptr, stride_images, row, row_stop, BLOCK_M) + offs_k
        caption_ptrs = (
            embedding_rows(captions_ptr, stride_captions, column, num_columns, BLOCK_N) + offs_k
        )
    for k in tl.range(0, D, BLOCK_K):
        if TMA:
            a = images_ptr.load([row, k])
            b = captions_ptr.load([column, k])
        else:
            a = tl.load(image_ptrs)
            b = tl.load(caption_ptrs)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if not TMA:
            image_ptrs += BLOCK_K
            caption_ptrs += BLOCK_K
    return acc


# Where a kernel gets its scores from (SOURCE):
#
#   "dot"      computed with tl.dot from the embeddings, or their descriptors
#   "order"    computed with order_tile from the transposed embeddings
#   "stored"   read: torch.mm or the forward pass left them in memory
#   "given"    read: S is what the user passed, of any dtype and strides; nobody has looked at it before
@triton.jit
def score_tile(
    images_ptr, captions_ptr, scores_ptr, stride_images, stride_captions,
    stride_score_rows, stride_score_columns,
    row, row_start, row_stop, column, num_columns, D,
    SOURCE: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The scores [BLOCK_M, BLOCK_N] at (row, column).

    Row 0 of `scores` is row `row_start` of S. SAVE keeps computed scores there. What lies outside the
    rectangle holds 0 if read, anything if computed.
    """
    READ: tl.constexpr = SOURCE == "stored" or SOURCE == "given"
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if READ or SAVE:
        score_ptrs = (
            scores_ptr
            + (row - row_start + offs_m).to(tl.int64)[:, None] * stride_score_rows
            + (column + offs_n).to(tl.int64)[None, :] * stride_score_columns
        )
        inside = (row + offs_m < row_stop)[:, None] & (column + offs_n < num_columns)[None, :]
    if READ:
        acc = tl.load(score_ptrs, mask=inside, other=0.0)
        if acc.dtype != tl.float64:
            acc = acc.to(tl.float32)
    else:
        if SOURCE == "order":
            acc = order_tile(
                images_ptr, captions_ptr, stride_images, stride_captions, row, column, D,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc = dot_tile(
                images_ptr, captions_ptr, stride_images, stride_captions,
                row, row_stop, column, num_columns, D,
                PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if SAVE:
            tl.store(score_ptrs, acc, mask=inside)
    return acc


@triton.jit
def leave_bound(bounds_ptr, magnitudes):
    """bounds[program] = max |s| over the program's tiles and what it left for an earlier rectangle."""
    largest = tl.max(tl.max(magnitudes, 1), 0)
    pointer = bounds_ptr + tl.program_id(0)
    tl.store(pointer, tl.maximum(tl.load(pointer), largest))


@triton.jit
def column_halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc[:, : BLOCK_N // 2] and acc[:, BLOCK_N // 2 :].

    The gradients' epilogues take one half at a time: the vectors that belong to its columns are then
    half as many registers, and nothing spills.
    """
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def needs_mask(
    image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether the tile may hold anything but negatives: it crosses the rectangle's edge, or the ranges
    of its rows' and its columns' ids meet. Without ids, those are the row and column numbers."""
    ragged = (row + BLOCK_M > row_stop) | (column + BLOCK_N > num_columns)
    if image_ids_ptr is not None:
        row_ids = tl.load(image_ids_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), row_stop - 1))
        column_ids = tl.load(
            caption_ids_ptr + tl.minimum(column + tl.arange(0, BLOCK_N), num_columns - 1)
        )
        meet = (tl.min(row_ids, 0) <= tl.max(column_ids, 0)) & (
            tl.min(column_ids, 0) <= tl.max(row_ids, 0)
        )
    else:
        meet = crosses_diagonal(row, column, BLOCK_M, BLOCK_N)
    return ragged | meet


@triton.jit
def crosses_diagonal(row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return (row < column + BLOCK_N) & (column < row + BLOCK_M)


@triton.jit
def negatives(
    image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: the entry lies in the rectangle and its ids differ."""
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_m = offs_m < row_stop
    mask_n = offs_n < num_columns
    if image_ids_ptr is not None:
        row_ids = tl.load(image_ids_ptr + offs_m, mask=mask_m, other=0)
        column_ids = tl.load(caption_ids_ptr + offs_n, mask=mask_n, other=0)
        differ = row_ids[:, None] != column_ids[None, :]
    else:
        differ = offs_m[:, None] != offs_n[None, :]
    return differ & mask_m[:, None] & mask_n[None, :]


@triton.jit
def negative_scores(
    acc, image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile's scores with -inf for everything that is not a negative."""
    if needs_mask(
        image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns, BLOCK_M, BLOCK_N
    ):
        keep = negatives(
            image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns, BLOCK_M, BLOCK_N
        )
        acc = tl.where(keep, acc, -float("inf"))
    return acc


@triton.jit
def negative_gradient(
    gradient, image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile's gradient with 0 for everything that is not a negative."""
    if needs_mask(
        image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns, BLOCK_M, BLOCK_N
    ):
        keep = negatives(
            image_ids_ptr, caption_ids_ptr, row, row_stop, column, num_columns, BLOCK_M, BLOCK_N
        )
        gradient = tl.where(keep, gradient, 0.0)
    return gradient


@triton.jit
def store_gradient(
    gradient_ptr, stride_gradient, gradient, d_diagonal_ptr, factor,
    row, row_start, row_stop, column, num_columns, num_pairs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """G[rows, columns] = factor gradient, and G[k, k] += factor d_diagonal[k] for the pairs k < K.

    Row 0 of G is row `row_start` of S.
    """
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    dtype = gradient_ptr.dtype.element_ty
    row_ptrs = gradient_ptr + (offs_m - row_start).to(tl.int64) * stride_gradient
    inside = (offs_m < row_stop)[:, None] & (offs_n < num_columns)[None, :]
    tl.store(row_ptrs[:, None] + offs_n[None, :], (gradient * factor).to(dtype), mask=inside)
    if crosses_diagonal(row, column, BLOCK_M, BLOCK_N):
        # Another thread of this program may have stored the diagonal entry.
        tl.debug_barrier()
        mask = (offs_m >= column) & (offs_m < column + BLOCK_N) & (offs_m < row_stop)
        mask &= offs_m < num_pairs
        d_diagonal = tl.load(d_diagonal_ptr + offs_m, mask=mask, other=0.0) * factor
        entry = tl.load(row_ptrs + offs_m, mask=mask, other=0.0).to(d_diagonal.dtype)
        tl.store(row_ptrs + offs_m, (entry + d_diagonal).to(dtype), mask=mask)


# The partial results of a rectangle: [num_slots, PLANES, num_anchors], one slot a tile.


@triton.jit
def store_partial(
    pointer, plane: tl.constexpr, PLANES: tl.constexpr, slot, first, origin, num_anchors, num_pairs,
    value, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[slot, plane] = value, for the anchors first .. first + BLOCK; column 0 is `origin`."""
    offs = first + tl.arange(0, BLOCK)
    base = (slot * PLANES + plane).to(tl.int64) * num_anchors
    mask = (offs < num_pairs) & (offs - origin < num_anchors)
    tl.store(pointer + base + (offs - origin), value, mask=mask)


@triton.jit
def load_partials(
    pointer, plane: tl.constexpr, PLANES: tl.constexpr, offs_slot, num_slots, offs_anchor, num_anchors,
    other,
):  # fmt: skip
    """partial[offs_slot, plane, offs_anchor], `other` outside."""
    base = (offs_slot * PLANES + plane).to(tl.int64)[:, None] * num_anchors
    mask = (offs_slot < num_slots)[:, None] & (offs_anchor < num_anchors)[None, :]
    return tl.load(pointer + base + offs_anchor[None, :], mask=mask, other=other)
