// The two ways of finding the hardest negatives. Both decide by the same scores, those of
// Kernels::dots, and so return the same values and the same indices.
#pragma once

#include "tiles.h"

namespace fused_vse {

// The best score so far of every row or column, and where: ties keep the smaller index.
template <typename T>
struct Best {
  explicit Best(int64_t size) : score(size, EXCLUDED<T>), index(size, -1) {}

  void offer(int64_t i, T s, int64_t where) {
    if (s > score[i] || (s == score[i] && where < index[i])) {
      score[i] = s;
      index[i] = where;
    }
  }

  std::vector<T> score;
  std::vector<int64_t> index;
};

// Scores every pair of the listed rows and columns (ascending); a null Best is not asked for.
template <typename T>
void search_exactly(const Problem<T>& problem, const std::vector<int64_t>& rows,
                    const std::vector<int64_t>& cols, Best<T>* best_of_rows, Best<T>* best_of_cols);

// For every row of this side: which anchors of the other side have it as their hardest negative.
class Choosers {
 public:
  Choosers(const int64_t* chosen, int64_t num_anchors, int64_t size)
      : begin_(size + 1), anchor_(num_anchors) {
    for (int64_t a = 0; a < num_anchors; ++a)
      if (chosen[a] >= 0) ++begin_[chosen[a] + 1];
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    for (int64_t a = 0; a < num_anchors; ++a)
      if (chosen[a] >= 0) anchor_[next[chosen[a]]++] = a;
  }
  const int64_t* begin(int64_t row) const { return anchor_.data() + begin_[row]; }
  const int64_t* end(int64_t row) const { return anchor_.data() + begin_[row + 1]; }

 private:
  std::vector<int64_t> begin_, anchor_;
};

// For every row i of this side, in parallel: sum(i, weights, others), what the backward pass of the
// hardest negatives adds up for it. `others` are rows of the other side: i's own positive and hardest
// negative, and every anchor there whose hardest negative i is. Weights of 0 are left out.
template <typename T, typename Sum>
void gather(int64_t size, int64_t k, const T* d_positive, const T* d_own, const int64_t* own,
            const T* d_theirs, const int64_t* theirs, const Sum& sum) {
  const Choosers choosers(theirs, k, size);
  torch::stable::parallel_for(0, size, Problem<T>::GRAIN, [&](int64_t begin, int64_t end) {
    std::vector<T> weights;
    std::vector<int64_t> others;
    for (int64_t i = begin; i < end; ++i) {
      weights.clear();
      others.clear();
      const auto add = [&](T weight, int64_t row) {
        if (weight == 0) return;
        weights.push_back(weight);
        others.push_back(row);
      };
      if (i < k) {
        add(d_positive[i], i);
        if (own[i] >= 0) add(d_own[i], own[i]);
      }
      for (const int64_t* a = choosers.begin(i); a != choosers.end(i); ++a) add(d_theirs[*a], *a);
      sum(i, weights, others);
    }
  });
}

// The same where what is added up are the rows of `others` themselves: out[i] is their weighted sum.
template <typename T>
void gather_rows(int64_t size, int64_t k, const T* d_positive, const T* d_own, const int64_t* own,
                 const T* d_theirs, const int64_t* theirs, const Tensor& others, T* out) {
  const int64_t d = others.size(1);
  const T* const rows = data<T>(others);
  gather<T>(size, k, d_positive, d_own, own, d_theirs, theirs,
            [&](int64_t i, const std::vector<T>& weights, const std::vector<int64_t>& chosen) {
              std::vector<const T*> sources;
              for (int64_t j : chosen) sources.push_back(rows + j * d);
              kernels<T>().weighted_sum(weights.data(), sources.data(), sources.size(), d, out + i * d);
            });
}

// Below this size the search costs more than it saves.
constexpr int64_t MIN_SEARCHED_SCORES = 256 * 256;

// Scores only what a library GEMM in `precision` (BFloat16 or Float; none: the faster one here) cannot
// rule out. False, with nothing decided, where the CPU lacks it or almost nothing can be ruled out.
bool search_certified(const Problem<float>& problem, std::optional<ScalarType> precision,
                      Best<float>* best_of_rows, Best<float>* best_of_cols);

}  // namespace fused_vse
