"""Order similarity s_ij = -|max(0, T_j - I_i)|_2: tiles of S in registers, and what its gradient needs.

No tensor core subtracts: a tile takes its D differences one after the other from transposed copies of
the embeddings, so that nothing of the size N M D exists and every load is of neighbouring elements.
"""

import triton
import triton.language as tl

# Loads of so many steps are under way at a time; more would take registers that spill.
UNROLL, UNROLL_FLOAT64 = tl.constexpr(4), tl.constexpr(2)


@triton.jit
def order_score(square):
    """-sqrt, rounded to nearest: tl.sqrt of a float32 is an approximation that flushes small numbers."""
    if square.dtype == tl.float64:
        return -tl.sqrt(square)
    else:
        return -tl.sqrt_rn(square)


@triton.jit
def zero_tile(TILES: tl.constexpr, dtype: tl.constexpr):
    """[block_m, block_n] zeros. To Triton 3.6 an attribute is a plain number, of which it makes no shape."""
    BLOCK_M: tl.constexpr = TILES.block_m
    BLOCK_N: tl.constexpr = TILES.block_n
    return tl.zeros((BLOCK_M, BLOCK_N), dtype)


# acc[i, j] = -|max(0, T[column + j] - I[row + i])|_2
#
#   for k in blocks of D:
#       part = 0
#       for each k of the block:  part_ij += max(0, T^t[k, j] - I^t[k, i])^2
#       acc += part                           two levels: rounding errors grow with the root of D at most
@triton.jit
def order_tile(images, captions, scores, row, column, TILES: tl.constexpr):
    """The embeddings are I^t [D, > N] and T^t [D, > M] as plan.order_operand makes them."""
    ACC: tl.constexpr = images.dtype.element_ty
    STEPS: tl.constexpr = UNROLL_FLOAT64 if ACC == tl.float64 else UNROLL
    # Scalars that move on, so that a thread's elements are at fixed distances from one address.
    images += row
    captions += column
    acc = zero_tile(TILES, ACC)
    for _ in tl.range(0, scores.D, TILES.block_k):
        part = zero_tile(TILES, ACC)
        for _ in tl.range(0, TILES.block_k, loop_unroll_factor=STEPS):
            image = tl.load(images + tl.arange(0, TILES.block_m))
            caption = tl.load(captions + tl.arange(0, TILES.block_n))
            excess = tl.maximum(caption[None, :] - image[:, None], 0.0)
            part += excess * excess
            images += scores.stride_images
            captions += scores.stride_captions
        acc += part
    return order_score(acc)


@triton.jit
def over_distance(gradient, scores):
    """gradient / |max(0, T_j - I_i)|, and 0 where the difference has no positive part."""
    return tl.where(scores < 0, gradient / tl.where(scores < 0, -scores, 1.0), 0.0)


@triton.jit
def pull(other, own, SIDE: tl.constexpr):
    """What a row receives from another one for each unit of weight.

    SIDE is "dot" for the dot product; for the order similarity, with weights over the distance, the side
    of `own`: "images" or "captions".
    """
    if SIDE == "images":
        return tl.maximum(other - own, 0.0)
    elif SIDE == "captions":
        return tl.minimum(other - own, 0.0)
    else:
        return other


# total[r] = (total[r] if CARRY) + sum_j weights[r, j] pull(others[j], own[r])
#
#   for j in blocks of the others:
#       part = 0
#       for each j of the block:  part_rd += weights[r, j] max(0, others[j, d] - own[r, d])     (or min)
#       total += part
@triton.jit
def order_sums_kernel(
    own_ptr, others_ptr, weights_ptr, total_ptr, stride_own, stride_others,
    stride_weights_own, stride_weights_others, num_own, num_others, D,
    SIDE: tl.constexpr, CARRY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_r < num_own)[:, None] & (offs_d < D)[None, :]
    rows = offs_r.to(tl.int64)
    own = tl.load(own_ptr + rows[:, None] * stride_own + offs_d[None, :], mask=mask, other=0.0)
    own = own.to(ACC)
    total_ptrs = total_ptr + rows[:, None] * D + offs_d[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    if CARRY:
        acc += tl.load(total_ptrs, mask=mask, other=0.0)
    # Scalars move on, as in order_tile: vectors of pointers would fix a layout that is not that of `own`.
    for first in tl.range(0, num_others, BLOCK_J):
        part = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        for step in tl.range(0, BLOCK_J, loop_unroll_factor=UNROLL):
            there = tl.where(first + step < num_others, 1, 0)
            weight = tl.load(
                weights_ptr + rows * stride_weights_own, mask=offs_r < there * num_own, other=0.0
            )
            other = tl.load(others_ptr + offs_d, mask=offs_d < there * D, other=0.0)
            part += weight[:, None] * pull(other.to(ACC)[None, :], own, SIDE)
            weights_ptr += stride_weights_others
            others_ptr += stride_others
        acc += part
    tl.store(total_ptrs, acc.to(total_ptr.dtype.element_ty), mask=mask)
