// Per-anchor numbers, spread over all rows or columns, as the hinge kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace fused_vse {

// The score above which a negative is active, of every row or column; never for what is no anchor.
template <typename T>
std::vector<T> thresholds(int64_t size, int64_t k, const T* positive, T margin) {
  std::vector<T> threshold(size, std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < k; ++i) threshold[i] = positive[i] - margin;
  return threshold;
}

// Zero for what is no anchor.
template <typename T>
std::vector<T> padded(const T* values, int64_t k, int64_t size) {
  std::vector<T> result(size, 0);
  std::copy_n(values, k, result.begin());
  return result;
}

}  // namespace fused_vse
