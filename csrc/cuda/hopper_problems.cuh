// The three statistics as the kernel takes them: its arguments, and where the items of a tile go.
//
//   prepare()            what a block computes once, a Prepared
//   reduce_with(p, f)    calls f(statistic, sink) with what suits the input
#pragma once

#include "hopper_statistics.cuh"

namespace fused_vse::hopper {

struct HardestProblem {
  unsigned long long* best;  // [R + C] keys, 0 at first
  int64_t row_anchors;

  // Not worth reading the best key first: this is one instruction for 32 anchors that nobody waits for.
  DEVICE void store_row(Tile, int row, uint64_t key) const { atomicMax(best + row, key); }
  DEVICE void store_column(Tile, int column, uint64_t key) const {
    atomicMax(best + row_anchors + column, key);
  }
  struct Prepared {};
  DEVICE Prepared prepare() const { return {}; }
  template <typename F>
  DEVICE void reduce_with(Prepared, const F& f) const {
    f(Hardest{}, *this);
  }
};

struct LogsumexpProblem {
  Partials partials;
  const Bounds* bounds;
  double scale;
  const double* scale_tensor;  // [] in place of scale, or null
  float anchors;
  Exponent* used;  // for the merge, which must not come to another decision

  using Prepared = Exponent;
  DEVICE Exponent prepare() const {
    const Exponent exponent = Exponent::make(scale_tensor ? *scale_tensor : scale, *bounds, anchors);
    if (blockIdx.x == 0) *used = exponent;
    return exponent;
  }
  template <typename F>
  DEVICE void reduce_with(const Exponent& exponent, const F& f) const {
    if (exponent.one)
      f(LogsumexpOneExp{exponent}, partials);
    else
      f(LogsumexpTwoExp{exponent}, partials);
  }
};

struct HingeProblem {
  Partials partials;
  Hinge hinge;

  struct Prepared {};
  DEVICE Prepared prepare() const { return {}; }
  template <typename F>
  DEVICE void reduce_with(Prepared, const F& f) const {
    f(hinge, partials);
  }
};

}  // namespace fused_vse::hopper
