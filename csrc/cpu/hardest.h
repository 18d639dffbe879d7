// The two ways of finding the hardest negatives. Both decide by the same scores of embeddings, those of
// Kernels::dots, and so return the same values and the same indices.
#pragma once

#include "embeddings.h"

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
  void offer(int64_t i, const Best& other, int64_t at) {
    if (other.index[at] >= 0) offer(i, other.score[at], other.index[at]);
  }
  void forget(int64_t i) {
    score[i] = EXCLUDED<T>;
    index[i] = -1;
  }

  std::vector<T> score;
  std::vector<int64_t> index;
};

// The hardest negatives of the anchors of both sides.
template <typename T>
struct BestOfSides {
  explicit BestOfSides(const Batch& batch) : rows(batch.row_anchors), cols(batch.column_anchors) {}

  void report(T* score, int64_t* index) const {
    for (const Best<T>* side : {&rows, &cols})
      for (size_t a = 0; a < side->index.size(); ++a) {
        *score++ = side->index[a] < 0 ? -INFINITE<T> : side->score[a];
        *index++ = side->index[a];
      }
  }

  Best<T> rows, cols;
};

// Scores every pair that an anchor sees. False, with nothing to be used, if a score is not finite.
template <typename T, typename Source>
bool search_everything(const Pass<T>& pass, Source& source, BestOfSides<T>* best) {
  std::vector<Best<T>> group_cols(pass.groups(), Best<T>(pass.batch.m()));
  Best<T> panel_rows(pass.row_slots());
  const int64_t num_rows = pass.batch.row_anchors;

  const auto task = [&](const Strip<T>& strip) {
    const StripScores<T>& s = strip.scores;
    T row_max[STRIP_ROWS], col_max[PANEL];
    T* const score = &group_cols[strip.group].score[strip.col()];
    int64_t* const index = &group_cols[strip.group].index[strip.col()];
    std::copy_n(score, s.cols, col_max);
    kernels<T>().maxima(s, row_max, col_max);
    for (int64_t c = 0; c < s.cols; ++c) {
      if (col_max[c] == score[c]) continue;
      int64_t r = 0;
      while (s.row(r)[c] != col_max[c]) ++r;
      score[c] = col_max[c];
      index[c] = strip.row() + r;
    }
    for (int64_t r = 0; r < s.rows && strip.row() + r < num_rows; ++r)
      if (row_max[r] > best->rows.score[strip.row() + r])
        panel_rows.offer(pass.row_slot(strip.panel, strip.row_in_tile + r), row_max[r],
                         strip.col() + (std::find(s.row(r), s.row(r) + s.cols, row_max[r]) - s.row(r)));
  };
  const auto finish = [&](const Tile& tile) {
    for (int64_t panel = 0; panel < tile.panels(); ++panel)
      for (int64_t r = 0; r < std::min(tile.rows, num_rows - tile.row); ++r) {
        const int64_t at = pass.row_slot(panel, r);
        best->rows.offer(tile.row + r, panel_rows, at);
        panel_rows.forget(at);
      }
  };
  if (!pass.run(source, task, finish)) return false;
  for (const Best<T>& group : group_cols)
    for (int64_t c = 0; c < pass.batch.column_anchors; ++c) best->cols.offer(c, group, c);
  return true;
}

// One side's part in the gradient of the hardest negatives.
template <typename T>
struct Choice {
  int64_t size, anchors, pair;  // rows of this side; the first `anchors` of them; where the pairs begin
  const T* d_score;             // [anchors]
  const int64_t* index;         // [anchors], rows of the other side

  void check(int64_t other_size) const {
    for (int64_t a = 0; a < anchors; ++a)
      STD_TORCH_CHECK(index[a] < other_size, "index is out of range at ", a, ": ", index[a]);
  }
};

// For every row of this side: which anchors of the other side have it as their hardest negative.
class Choosers {
 public:
  template <typename T>
  Choosers(const Choice<T>& theirs, int64_t size) : begin_(size + 1), anchor_(theirs.anchors) {
    for (int64_t a = 0; a < theirs.anchors; ++a)
      if (theirs.index[a] >= 0) ++begin_[theirs.index[a] + 1];
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    for (int64_t a = 0; a < theirs.anchors; ++a)
      if (theirs.index[a] >= 0) anchor_[next[theirs.index[a]]++] = a;
  }
  const int64_t* begin(int64_t row) const { return anchor_.data() + begin_[row]; }
  const int64_t* end(int64_t row) const { return anchor_.data() + begin_[row + 1]; }

 private:
  std::vector<int64_t> begin_, anchor_;
};

// For every row i of this side, in parallel: sum(i, weights, others), what the backward pass of the
// hardest negatives adds up for it. `others` are rows of the other side: i's own positive and hardest
// negative, and every anchor there whose hardest negative i is, each once. Weights of 0 are left out.
template <typename T, typename Sum>
void gather(const Choice<T>& own, const Choice<T>& theirs, const T* d_positive, int64_t pair_count,
            const Sum& sum) {
  const Choosers choosers(theirs, own.size);
  torch::stable::parallel_for(0, own.size, GRAIN, [&](int64_t begin, int64_t end) {
    std::vector<T> weights;
    std::vector<int64_t> others;
    for (int64_t i = begin; i < end; ++i) {
      weights.clear();
      others.clear();
      const auto add = [&](T weight, int64_t row) {
        if (weight == 0) return;
        // Choosers differ from each other: a repetition is among the first two.
        for (size_t a = 0; a < std::min(others.size(), size_t{2}); ++a)
          if (others[a] == row) {
            weights[a] += weight;
            return;
          }
        weights.push_back(weight);
        others.push_back(row);
      };
      const int64_t k = i - own.pair;
      if (0 <= k && k < pair_count) add(d_positive[k], theirs.pair + k);
      if (i < own.anchors && own.index[i] >= 0) add(own.d_score[i], own.index[i]);
      for (const int64_t* a = choosers.begin(i); a != choosers.end(i); ++a) add(theirs.d_score[*a], *a);
      sum(i, weights, others);
    }
  });
}

// The same for the dot product: out[i] is the weighted sum of the rows of `others`.
template <typename T>
void gather_rows(const Choice<T>& own, const Choice<T>& theirs, const T* d_positive, int64_t pair_count,
                 const Tensor& others, T* out) {
  const int64_t d = others.size(1);
  const T* const rows = data<T>(others);
  gather(own, theirs, d_positive, pair_count,
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
bool search_certified(const Batch& batch, const Embeddings<float>& e, std::optional<ScalarType> precision,
                      BestOfSides<float>* best);

}  // namespace fused_vse
