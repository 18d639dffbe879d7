// What comes before and after the pass over S:
//
//   survey      positive_k = <I_k, T_k>, and the maxima of |I|, |T|, |I_i|^2 and |T_j|^2
//   id_ranges   the smallest and the largest id of each tile's rows, and of its columns
//   finish      (score, index) of each anchor's key
//   merge       logsumexp, or (sum, active), of each anchor's partial results
//
//   survey:     a warp for a row number, for I and T:  8 elements a lane at a time; sums across the lanes
//   id_ranges:  a warp for a tile's rows, or columns:  an id a lane at a time
//   finish:     a thread for an anchor
//   merge:      a thread for an anchor:                for its tiles in ascending order: add
//
// Resources: at most 54 registers and 16 bytes of shared memory; bound by the memory's bandwidth.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper_statistics.h"

namespace fused_vse::hopper {

constexpr int ROW_THREADS = 256;

// PyTorch's build tools switch the implicit conversions off.
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename Element>
__device__ __forceinline__ void load_8(float (&x)[8], const Element* from, bool inside) {
  uint4 words = inside ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  Element elements[8];
  memcpy(elements, &words, sizeof words);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(elements[i]);
}

// NaN and infinity compare above everything that is finite.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
  return x;
}

// positive[k] = <I_k, T_k>; bounds = max |I|, max |T|, max_i |I_i|^2, max_j |T_j|^2 (zeros at first)
//
//   for each row number r, one warp:
//     for d in steps of 256:  8 elements a lane of I[r], T[r]: dot product, norms, maxima
//
// Rows begin on 16-byte boundaries and D is a multiple of 8 (hopper_plan.h).
template <typename Element>
__global__ void __launch_bounds__(ROW_THREADS)
    survey_kernel(const Element* images, int64_t image_stride, int64_t n, const Element* captions,
                  int64_t caption_stride, int64_t m, int64_t dimensions, int64_t num_pairs, float* positive,
                  Bounds* bounds) {
  __shared__ uint32_t block_top[4];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 4) block_top[threadIdx.x] = 0;
  __syncthreads();
  uint32_t top[4] = {0, 0, 0, 0};
  const int64_t rows = n > m ? n : m, warps = int64_t{gridDim.x} * (ROW_THREADS / 32);
  for (int64_t r = int64_t{blockIdx.x} * (ROW_THREADS / 32) + threadIdx.x / 32; r < rows; r += warps) {
    float dot = 0, image_square = 0, caption_square = 0;
    for (int64_t d = 8 * lane; d < dimensions; d += 256) {
      float a[8], b[8];
      load_8(a, images + r * image_stride + d, r < n);
      load_8(b, captions + r * caption_stride + d, r < m);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        dot += a[i] * b[i];
        image_square += a[i] * a[i];
        caption_square += b[i] * b[i];
        top[0] = max(top[0], magnitude(a[i]));
        top[1] = max(top[1], magnitude(b[i]));
      }
    }
    dot = warp_sum(dot);
    top[2] = max(top[2], magnitude(warp_sum(image_square)));
    top[3] = max(top[3], magnitude(warp_sum(caption_square)));
    if (lane == 0 && r < num_pairs) positive[r] = dot;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t warp_top = __reduce_max_sync(0xffffffff, top[i]);
    if (lane == 0) atomicMax(&block_top[i], warp_top);
  }
  __syncthreads();
  if (threadIdx.x < 4) atomicMax(&bounds->bits[threadIdx.x], block_top[threadIdx.x]);
}

// Of row tile b for b < row tiles, of column tile b - row tiles after that; a warp each.
__global__ void __launch_bounds__(32) id_ranges_kernel(const int64_t* image_ids, const int64_t* caption_ids,
                                                       Rectangle rectangle, IdRange* ranges) {
  const int b = blockIdx.x, row_tiles = rectangle.row_tiles();
  const bool is_row = b < row_tiles;
  const int begin = is_row ? Tile{b, 0}.row(rectangle) : Tile{0, b - row_tiles}.column();
  const int stop =
      min(begin + (is_row ? TILE_ROWS : TILE_COLS), is_row ? rectangle.row_stop : rectangle.num_columns);
  const int64_t* ids = is_row ? image_ids : caption_ids;
  IdRange range{INT64_MAX, INT64_MIN};
  for (int i = begin + static_cast<int>(threadIdx.x); i < stop; i += 32) {
    range.first = min(range.first, ids[i]);
    range.last = max(range.last, ids[i]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    range.first = min(range.first, __shfl_xor_sync(0xffffffff, range.first, mask));
    range.last = max(range.last, __shfl_xor_sync(0xffffffff, range.last, mask));
  }
  if (threadIdx.x == 0) ranges[b] = range;
}

// score, index [2, K] of the keys; NaN and -1 for poisoned input.
__global__ void __launch_bounds__(ROW_THREADS)
    hardest_finish_kernel(const unsigned long long* best, const Bounds* bounds, int64_t dimensions,
                          int64_t num_pairs, float* positive, float* score, int64_t* index) {
  const int64_t a = int64_t{blockIdx.x} * ROW_THREADS + threadIdx.x;
  if (a >= 2 * num_pairs) return;
  const bool poisoned = bounds->poisoned(dimensions);
  score[a] = poisoned ? NAN : Hardest::score(best[a]);
  index[a] = poisoned ? -1 : Hardest::index(best[a]);
  if (poisoned && a < num_pairs) positive[a] = NAN;
}

// What the merges of a rectangle's partial results share. blockIdx.y: 0 rows, 1 columns.
struct Merge {
  const Bounds* bounds;
  int64_t dimensions, num_pairs;
  Rectangle rectangle;
  bool first;  // of the rectangles: there is no total of the columns yet
  float *row_partial, *column_partial, *positive;

  __device__ __forceinline__ Slots slots() const {
    const int64_t anchor = int64_t{blockIdx.x} * ROW_THREADS + threadIdx.x;
    return slots_of(rectangle, num_pairs, first, blockIdx.y == 1, anchor);
  }
  __device__ __forceinline__ float* partial() const { return blockIdx.y == 1 ? column_partial : row_partial; }
  // The columns' total so far, for the next rectangle.
  __device__ __forceinline__ void carry(const Slots& slots, float plane_0, float plane_1) const {
    if (blockIdx.y == 0) return;
    column_partial[partial_at(0, 0, slots.anchors, slots.anchor)] = plane_0;
    column_partial[partial_at(0, 1, slots.anchors, slots.anchor)] = plane_1;
  }
  __device__ __forceinline__ bool poisoned(const Slots& slots) const {
    const bool is = bounds->poisoned(dimensions);
    if (is) positive[slots.pair] = NAN;
    return is;
  }
};

// logsumexp [2, K] = log 2 (reference + log2 total)
__global__ void __launch_bounds__(ROW_THREADS)
    logsumexp_merge_kernel(Merge merge, const Exponent* exponent, double* logsumexp) {
  const Slots slots = merge.slots();
  if (!slots.exists) return;
  const ScaledSum<double> sum = merge_logsumexp(merge.partial(), slots, *exponent);
  merge.carry(slots, static_cast<float>(sum.total), sum.reference);
  double value = sum.logsumexp();
  if (merge.poisoned(slots)) value = NAN;
  logsumexp[blockIdx.y * merge.num_pairs + slots.pair] = value;
}

// hinge_sum, active [2, K]
__global__ void __launch_bounds__(ROW_THREADS)
    hinge_merge_kernel(Merge merge, float* hinge_sum, int64_t* active) {
  const Slots slots = merge.slots();
  if (!slots.exists) return;
  const HingeTotal sum = merge_hinge(merge.partial(), slots);
  merge.carry(slots, static_cast<float>(sum.total), bits_as<float>(static_cast<int>(sum.active)));
  const int64_t at = blockIdx.y * merge.num_pairs + slots.pair;
  hinge_sum[at] = merge.poisoned(slots) ? NAN : static_cast<float>(sum.total);
  active[at] = sum.active;
}

}  // namespace fused_vse::hopper
