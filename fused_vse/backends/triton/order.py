"""Order similarity s_ij = -|max(0, T_j - I_i)|_2: tiles of S in registers, and what its gradient needs.

No tensor core subtracts: a tile takes its D differences one after the other from transposed copies of
the embeddings, so that nothing of the size N M D exists and every load is of neighbouring elements.
"""

import triton
import triton.language as tl

# Loads of so many steps are under way at a time; more would take registers that spill.
UNROLL = tl.constexpr(4)


@triton.jit
def order_score(square):
    """-sqrt, rounded to nearest: tl.sqrt of a float32 is an approximation that flushes small numbers."""
    if square.dtype == tl.float64:
        return -tl.sqrt(square)
    else:
        return -tl.sqrt_rn(square)


# acc[i, j] = -|max(0, T[column + j] - I[row + i])|_2
#
#   for k in blocks of D:
#       part = 0
#       for each k of the block:  part_ij += max(0, T^t[k, j] - I^t[k, i])^2
#       acc += part                           two levels: rounding errors grow with the root of D at most
@triton.jit
def order_tile(
    images_ptr, captions_ptr, stride_images, stride_captions, row, column, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pointers are to I^t [D, > N] and T^t [D, > M] as walk.order_operand makes them."""
    ACC: tl.constexpr = images_ptr.dtype.element_ty
    # Scalars that move on, so that a thread's elements are at fixed distances from one address.
    images_ptr += row
    captions_ptr += column
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in tl.range(0, D, BLOCK_K):
        part = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for _ in tl.range(0, BLOCK_K, loop_unroll_factor=UNROLL):
            image = tl.load(images_ptr + tl.arange(0, BLOCK_M))
            caption = tl.load(captions_ptr + tl.arange(0, BLOCK_N))
            excess = tl.maximum(caption[None, :] - image[:, None], 0.0)
            part += excess * excess
            images_ptr += stride_images
            captions_ptr += stride_captions
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


# weights[0, k] = d_positive[k] / |max(0, T_k - I_k)|
# weights[1, k] = d_score[0, k] / |max(0, T_index[0, k] - I_k)|
# weights[2, k] = d_score[1, k] / |max(0, T_k - I_index[1, k])|        0 where there is no index
#
# One program a weight; the second axis of the grid has 1 or 3 programs.
@triton.jit
def pair_weights_kernel(
    images_ptr, captions_ptr, d_positive_ptr, d_score_ptr, index_ptr, weights_ptr,
    stride_images, stride_captions, num_pairs, D,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    image, caption = k, k
    weight = tl.load(d_positive_ptr + k)
    if index_ptr is not None:
        position = tl.maximum(which - 1, 0) * num_pairs + k
        index = tl.load(index_ptr + position)
        d_score = tl.where(index >= 0, tl.load(d_score_ptr + position), 0.0)
        weight = tl.where(which == 0, weight, d_score)
        index = tl.maximum(index, 0)
        image = tl.where(which == 2, index, k)
        caption = tl.where(which == 1, index, k)
    square = tl.zeros((BLOCK_D,), ACC)
    for d in tl.range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(images_ptr + image * stride_images + offs_d, mask=offs_d < D, other=0.0)
        y = tl.load(captions_ptr + caption * stride_captions + offs_d, mask=offs_d < D, other=0.0)
        excess = tl.maximum(y.to(ACC) - x.to(ACC), 0.0)
        square += excess * excess
    weight = over_distance(weight.to(ACC), order_score(tl.sum(square, 0)))
    tl.store(weights_ptr + which * num_pairs + k, weight)


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
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
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
