// What a pass over the tiles of S keeps for log sum exp, and what the backward pass needs of it.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace fused_vse {

// The running maximum and sum of exp(scale (s - maximum)) of every row, or of every column.
template <typename T>
class RunningSums {
 public:
  explicit RunningSums(int64_t size) : maximum_(size, EXCLUDED<T>), reference_(size, 0), sum_(size, 0) {}

  // Raises the maximum of one element and rescales its sum.
  void raise(int64_t i, T maximum, T scale) {
    if (maximum <= maximum_[i]) return;
    const double old = maximum_[i];
    maximum_[i] = reference_[i] = maximum;
    sum_[i] *= std::exp(double(scale) * (old - double(maximum)));
  }

  void add(int64_t i, T sum) { sum_[i] += double(sum); }

  // Adds a sum that was taken relative to another maximum.
  void merge(int64_t i, T maximum, double sum, T scale) {
    if (maximum == EXCLUDED<T>) return;
    raise(i, maximum, scale);
    sum_[i] += sum * std::exp(double(scale) * (double(maximum) - double(maximum_[i])));
  }
  void merge(const RunningSums& other, T scale) {
    for (size_t i = 0; i < sum_.size(); ++i) merge(i, other.maximum_[i], other.sum_[i], scale);
  }

  // What to subtract from the scores: the maximum, or 0 where nothing but excluded pairs was seen.
  const T* reference() const { return reference_.data(); }

  void logsumexp(int64_t count, T scale, double* out) const {
    for (int64_t i = 0; i < count; ++i)
      out[i] = maximum_[i] == EXCLUDED<T> ? -std::numeric_limits<double>::infinity()
                                          : double(scale) * double(maximum_[i]) + std::log(sum_[i]);
  }

 private:
  std::vector<T> maximum_, reference_;
  std::vector<double> sum_;
};

template <typename T>
inline T effective_scale(double scale, const OptionalTensor& scale_tensor) {
  if (!scale_tensor) return T(scale);
  return T(scale * double(*data<T>(contiguous_as(*scale_tensor, SCALAR_TYPE<T>))));
}

// What exp_gradient needs of one side's anchors: exp(scale s - lse) gradient = exp(scale (s - reference))
// weight. The reference is lse / scale as far as T can hold it, the weight makes up for the rest. Where
// there is no anchor or no negative, the reference is so high that the exponential vanishes.
template <typename T>
struct Anchors {
  Anchors(int64_t size, int64_t k, T scale, const double* logsumexp, const T* gradient)
      : reference(size, std::numeric_limits<T>::max()), weight(size, 0) {
    for (int64_t i = 0; i < k; ++i) {
      if (!std::isfinite(logsumexp[i])) continue;
      reference[i] = T(logsumexp[i] / double(scale));
      weight[i] = T(double(gradient[i]) * std::exp(double(scale) * double(reference[i]) - logsumexp[i]));
    }
  }
  std::vector<T> reference, weight;
};

}  // namespace fused_vse
