// The three statistics as the kernel takes them: its arguments, and where the items of a tile go.
//
//   prepare()            what a block computes once, a Prepared
//   reduce_with(p, f)    calls f(statistic, sink) with what suits the input
#pragma once

#include "hopper_statistics.h"

namespace fused_vse::hopper {

struct HardestProblem {
  unsigned long long* best;  // [2, K] keys, 0 at first
  int64_t num_pairs;

  // Not worth reading the best key first: this is one instruction for 32 anchors that nobody waits for.
  __device__ __forceinline__ void store_row(Tile, int row, uint64_t key) const { atomicMax(best + row, key); }
  __device__ __forceinline__ void store_column(Tile, int column, uint64_t key) const {
    atomicMax(best + num_pairs + column, key);
  }
  struct Prepared {};
  __device__ __forceinline__ Prepared prepare() const { return {}; }
  template <typename F>
  __device__ __forceinline__ void reduce_with(Prepared, const F& f) const {
    f(Hardest{}, *this);
  }
};

// Partial results of a rectangle: a slot a tile. The second plane is not written where no one reads it.
struct Partials {
  float *rows, *columns;  // [column tiles, 2, rows], [1 + row tiles, 2, K]
  Rectangle rectangle;
  int64_t num_pairs;

  template <typename Item>
  __device__ __forceinline__ static void store(float* partial, int slot, int64_t anchors, int64_t anchor,
                                               Item item) {
    float words[sizeof(Item) / 4];
    memcpy(words, &item, sizeof item);
#pragma unroll
    for (int plane = 0; plane < static_cast<int>(sizeof(Item) / 4); ++plane)
      partial[partial_at(slot, plane, anchors, anchor)] = words[plane];
  }
  template <typename Item>
  __device__ __forceinline__ void store_row(Tile tile, int row, Item item) const {
    store(rows, tile.column_tile, rectangle.rows(), row - rectangle.row_start, item);
  }
  template <typename Item>
  __device__ __forceinline__ void store_column(Tile tile, int column, Item item) const {
    store(columns, tile.row_tile + 1, num_pairs, column, item);
  }
};

struct LogsumexpProblem {
  Partials partials;
  const Bounds* bounds;
  double scale;
  const double* scale_tensor;  // or null
  float anchors;
  Exponent* used;  // for the merge, which must not come to another decision

  using Prepared = Exponent;
  __device__ __forceinline__ Exponent prepare() const {
    const Exponent exponent = Exponent::make(scale_tensor ? scale * *scale_tensor : scale, *bounds, anchors);
    if (blockIdx.x == 0) *used = exponent;
    return exponent;
  }
  template <typename F>
  __device__ __forceinline__ void reduce_with(const Exponent& exponent, const F& f) const {
    if (exponent.one)
      f(LogsumexpOneExp{exponent}, partials);
    else
      f(LogsumexpTwoExp{exponent}, partials);
  }
};

struct HingeProblem {
  Partials partials;
  const float* positive;  // [K]
  float margin;

  struct Prepared {};
  __device__ __forceinline__ Prepared prepare() const { return {}; }
  template <typename F>
  __device__ __forceinline__ void reduce_with(Prepared, const F& f) const {
    f(Hinge{positive, margin, static_cast<int>(partials.num_pairs)}, partials);
  }
};

}  // namespace fused_vse::hopper
