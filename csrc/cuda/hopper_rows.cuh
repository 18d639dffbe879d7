// What comes before and after the pass over S:
//
//   survey      the maxima of |I|, |T|, |I_i|^2 and |T_j|^2
//   id_ranges   the smallest and the largest id of each tile's rows, and of its columns
//   finish      (score, index) of each anchor's key
//   merge       (reference, log_sum), or (sum, active), of each anchor's partial results
//
//   survey:     a warp for a row of I or T:            8 elements a lane at a time; sum across the lanes
//   id_ranges:  a warp for a tile's rows, or columns:  an id a lane at a time
//   finish:     a thread for an anchor
//   merge:      a thread for an anchor:                for its tiles in ascending order: add
//
// Resources: at most 54 registers and 8 bytes of shared memory; bound by the memory's bandwidth.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper_statistics.cuh"

namespace fused_vse::hopper {

constexpr int ROW_THREADS = 256;

// PyTorch's build tools switch the implicit conversions off.
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(__half x) { return __half2float(x); }

// NaN and infinity compare above everything that is finite.
DEVICE uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// One side's embeddings. Rows begin on 16-byte boundaries and D is a multiple of 8 (hopper_plan.h).
template <typename Element>
struct Rows {
  const Element* data;
  int64_t count, stride;
};

// bounds = max |I|, max |T|, max_i |I_i|^2, max_j |T_j|^2 (zeros at first); blockIdx.y: 0 for I, 1 for T
template <typename Element>
__global__ void __launch_bounds__(ROW_THREADS)
    survey_kernel(Rows<Element> images, Rows<Element> captions, int64_t dimensions, Bounds* bounds) {
  __shared__ uint32_t block_top[2];
  if (threadIdx.x < 2) block_top[threadIdx.x] = 0;
  __syncthreads();
  const Rows<Element> rows = blockIdx.y ? captions : images;
  const int lane = threadIdx.x % 32;
  uint32_t top[2] = {0, 0};
  const int64_t warps = int64_t{gridDim.x} * (ROW_THREADS / 32);
  for (int64_t r = int64_t{blockIdx.x} * (ROW_THREADS / 32) + threadIdx.x / 32; r < rows.count; r += warps) {
    float square = 0;
    for (int64_t d = 8 * lane; d < dimensions; d += 256) {
      const uint4 words = *reinterpret_cast<const uint4*>(rows.data + r * rows.stride + d);
      Element elements[8];
      memcpy(elements, &words, sizeof words);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float x = to_float(elements[i]);
        square += x * x;
        top[0] = max(top[0], magnitude(x));
      }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) square += __shfl_xor_sync(0xffffffff, square, mask);
    top[1] = max(top[1], magnitude(square));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t warp_top = __reduce_max_sync(0xffffffff, top[i]);
    if (lane == 0) atomicMax(&block_top[i], warp_top);
  }
  __syncthreads();
  if (threadIdx.x < 2) atomicMax(&bounds->bits[2 * threadIdx.x + blockIdx.y], block_top[threadIdx.x]);
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

// score, index [R + C] of the keys; NaN and -1 for poisoned input.
__global__ void __launch_bounds__(ROW_THREADS)
    hardest_finish_kernel(const unsigned long long* best, const Bounds* bounds, int64_t dimensions,
                          int64_t anchors, float* score, int64_t* index) {
  const int64_t a = int64_t{blockIdx.x} * ROW_THREADS + threadIdx.x;
  if (a >= anchors) return;
  const bool poisoned = bounds->poisoned(dimensions);
  score[a] = poisoned ? NAN : Hardest::score(best[a]);
  index[a] = poisoned ? -1 : Hardest::index(best[a]);
}

// What the merges of a rectangle's partial results share. blockIdx.y: 0 rows, 1 columns.
struct Merge {
  const Bounds* bounds;
  int64_t dimensions;
  Partials partials;
  bool first;  // of the rectangles

  DEVICE Slots slots() const {
    return partials.slots(blockIdx.y == 1, first, int64_t{blockIdx.x} * ROW_THREADS + threadIdx.x);
  }
};

// reference, log_sum [R + C]
__global__ void __launch_bounds__(ROW_THREADS)
    logsumexp_merge_kernel(Merge merge, const Exponent* used, float* reference, double* log_sums) {
  const Slots slots = merge.slots();
  if (!slots.exists) return;
  const Exponent exponent = *used;
  const ScaledSum<double> sum = merge_logsumexp(slots, exponent);
  const bool poisoned = merge.bounds->poisoned(merge.dimensions) || !exponent.valid();
  reference[slots.number] = poisoned ? NAN : finite(sum.reference);
  log_sums[slots.number] = poisoned ? NAN : log_sum(sum, exponent);
}

// hinge_sum, active [R + C]
__global__ void __launch_bounds__(ROW_THREADS)
    hinge_merge_kernel(Merge merge, float* hinge_sum, int64_t* active) {
  const Slots slots = merge.slots();
  if (!slots.exists) return;
  const HingeTotal sum = merge_hinge(slots);
  const bool poisoned = merge.bounds->poisoned(merge.dimensions);
  hinge_sum[slots.number] = poisoned ? NAN : static_cast<float>(sum.total);
  active[slots.number] = poisoned ? 0 : sum.active;
}

}  // namespace fused_vse::hopper
