// One row of l2_normalize and of its backward pass, by a thread block (formula and budget: l2_normalize.cu).
#pragma once

#include <cmath>

#include "simt.h"

namespace fused_vse::normalize {

constexpr float MIN_NORM = 1e-12f;
// From here on, squares might overflow; a power of two takes such a row, of whatever length, near 1.
constexpr float HUGE_SQUARES = 0x1p100f, SHRINK = 0x1p-80f;

// The sum over the block's threads, on every thread; the order does not depend on anything.
SIMT float block_sum(float* partial, PerThread<float>& x) {
  block_sync();  // the sum before has been read
  for_each_thread([&](int thread) { partial[thread] = x[thread]; });
  for (int width = THREADS / 2; width > 0; width /= 2) {
    block_sync();
    for_each_thread([&](int thread) {
      if (thread < width) partial[thread] += partial[thread + width];
    });
  }
  block_sync();
  return partial[0];
}

// term(d) of the row's entries, summed.
template <typename F>
SIMT float row_sum(float* partial, int64_t dim, const F& term) {
  PerThread<float> sums;
  for_each_thread([&](int thread) {
    float sum = 0;
    for (int64_t d = thread; d < dim; d += THREADS) sum += term(d);
    sums[thread] = sum;
  });
  return block_sum(partial, sums);
}

template <typename T>
SIMT void forward(float* partial, const T* x, int64_t dim, T* y, float* inverse_norm) {
  const auto squares_of = [&](float scale) {
    return row_sum(partial, dim, [&](int64_t d) {
      const float scaled = float(x[d]) * scale;
      return scaled * scaled;
    });
  };
  float scale = 1, squares = squares_of(1);
  if (squares > HUGE_SQUARES) {
    scale = SHRINK;
    squares = squares_of(SHRINK);
  }
  const float norm = sqrtf(squares);
  // A comparison that a NaN passes, so that it stays one.
  const float inverse = 1 / (norm < MIN_NORM ? MIN_NORM : norm);
  for_each_thread([&](int thread) {
    if (thread == 0) *inverse_norm = scale * inverse;
    for (int64_t d = thread; d < dim; d += THREADS) y[d] = T(float(x[d]) * scale * inverse);
  });
}

template <typename T>
SIMT void backward(float* partial, const T* dy, const T* y, float inverse_norm, int64_t dim, T* dx) {
  float along = 0;
  if (inverse_norm < 1 / MIN_NORM)
    along = row_sum(partial, dim, [&](int64_t d) { return float(dy[d]) * float(y[d]); });
  for_each_thread([&](int thread) {
    for (int64_t d = thread; d < dim; d += THREADS)
      dx[d] = T((float(dy[d]) - along * float(y[d])) * inverse_norm);
  });
}

}  // namespace fused_vse::normalize
