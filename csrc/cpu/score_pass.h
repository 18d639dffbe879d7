// One pass over scores that exist already (score_matrix.cpp), or whose row blocks are computed without a
// GEMM (order.cpp).
//
//   for each block of rows:                               source.block()
//     for each panel of columns, in parallel:
//       for each strip of the panel:                      into a buffer, excluded pairs left out
//         task(strip)
//     finish(block)
//
// A strip is read from memory once and stays in the core's cache. What a task keeps for columns is owned
// by its group, what it keeps for rows by its panel; both are merged in ascending order, whatever the
// number of threads.
#pragma once

#include <cmath>

#include "hardest.h"
#include "running_sums.h"
#include "thresholds.h"
#include "tiles.h"

namespace fused_vse {

template <typename T>
struct ScoreBlock {
  const T* s;  // [rows, cols], the columns from 0
  int64_t ld;
  int64_t row, rows, cols;
};

template <typename T>
struct Strip {
  const T* s;  // [rows, cols], excluded entries hold EXCLUDED
  int64_t ld;
  int64_t row, rows, col, cols;
  int64_t row_in_block, group, panel;
};

// N, M, K and what is excluded.
struct Pairing {
  Pairing(int64_t n, int64_t m, int64_t k, const OptionalTensor& image_ids, const OptionalTensor& caption_ids)
      : n(n), m(m), k(k), excluded(image_ids, caption_ids, n, m) {}
  int64_t n, m, k;
  ExcludedPairs excluded;
};

class ScorePass {
 public:
  static constexpr int64_t PANEL = 1024;  // columns: a strip is 128 KiB in float32
  static constexpr int64_t BLOCK_ROWS = 512;
  static constexpr int64_t BLOCK_SCORES = 1 << 22;  // 16 MiB in float32, for the blocks that are computed

  explicit ScorePass(const Pairing& pairing)
      : p_(pairing),
        panels((pairing.m + PANEL - 1) / PANEL),
        // Enough tasks for a few cores where there are few panels.
        groups(std::max(int64_t{1}, 8 / panels)),
        block_rows(std::clamp(BLOCK_SCORES / pairing.m / STRIP_ROWS * STRIP_ROWS, STRIP_ROWS, BLOCK_ROWS)) {}

  // False, with nothing to be used, if a score is not finite or so large that differences could overflow.
  template <typename T, typename Source, typename Task, typename Finish>
  bool run(Source& source, const Task& task, const Finish& finish) const {
    bool bounded = true;
    const auto rows = [&](int64_t begin, int64_t end, int64_t cols) {
      for (int64_t row = begin; row < end && bounded; row += block_rows) {
        const ScoreBlock<T> block = source.block(row, std::min(block_rows, end - row), cols);
        bounded = run_block<T>(block, task);
        finish(block);
      }
    };
    rows(0, p_.k, p_.m);
    rows(p_.k, p_.n, p_.k);
    return bounded;
  }

 private:
  const Pairing& p_;

 public:
  const int64_t panels, groups, block_rows;

 private:
  template <typename T, typename Task>
  bool run_block(const ScoreBlock<T>& block, const Task& task) const {
    const int64_t width = (block.cols + PANEL - 1) / PANEL;
    const int64_t strips = (block.rows + STRIP_ROWS - 1) / STRIP_ROWS;
    const int64_t strips_of_group = (strips + groups - 1) / groups;
    std::vector<char> bounded(groups * width, 1);
    parallel_each(groups * width, [&](int64_t id) {
      const int64_t group = id / width, panel = id % width;
      const int64_t col = panel * PANEL, cols = std::min(PANEL, block.cols - col);
      const int64_t end = std::min(block.rows, (group + 1) * strips_of_group * STRIP_ROWS);
      std::vector<T> buffer(STRIP_ROWS * cols);
      for (int64_t r = group * strips_of_group * STRIP_ROWS; r < end; r += STRIP_ROWS) {
        const int64_t count = std::min(STRIP_ROWS, end - r);
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(block.s + (r + i) * block.ld + col, cols, &buffer[i * cols]);
        if (!(kernels<T>().max_abs(buffer.data(), count * cols) < std::numeric_limits<T>::max() / 4)) {
          bounded[id] = 0;
          return;
        }
        for (int64_t i = 0; i < count; ++i)
          p_.excluded.for_each(block.row + r + i, col, col + cols,
                               [&](int64_t c) { buffer[i * cols + c - col] = EXCLUDED<T>; });
        task(Strip<T>{buffer.data(), cols, block.row + r, count, col, cols, r, group, panel});
      }
    });
    return std::find(bounded.begin(), bounded.end(), 0) == bounded.end();
  }
};

// hardest_negatives (ops.h) of every anchor. False: see ScorePass::run.
template <typename T, typename Source>
bool hardest_of_scores(const Pairing& p, Source& source, T* score, int64_t* index) {
  const ScorePass pass(p);
  Best<T> rows(p.k), cols(p.k);
  std::vector<Best<T>> group_cols(pass.groups, Best<T>(p.m));
  std::vector<Best<T>> panel_rows(pass.panels, Best<T>(pass.block_rows));

  const auto task = [&](const Strip<T>& strip) {
    T row_max[STRIP_ROWS], col_max[ScorePass::PANEL];
    T* const best = &group_cols[strip.group].score[strip.col];
    int64_t* const where = &group_cols[strip.group].index[strip.col];
    std::copy_n(best, strip.cols, col_max);
    kernels<T>().maxima(strip.s, strip.rows, strip.cols, strip.ld, row_max, col_max);
    for (int64_t c = 0; c < strip.cols; ++c) {
      if (col_max[c] == best[c]) continue;
      int64_t r = 0;
      while (strip.s[r * strip.ld + c] != col_max[c]) ++r;
      best[c] = col_max[c];
      where[c] = strip.row + r;
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      if (row_max[r] == EXCLUDED<T>) continue;
      const T* const row = strip.s + r * strip.ld;
      panel_rows[strip.panel].offer(strip.row_in_block + r, row_max[r],
                                    strip.col + (std::find(row, row + strip.cols, row_max[r]) - row));
    }
  };
  const auto finish = [&](const ScoreBlock<T>& block) {
    for (Best<T>& panel : panel_rows) {
      for (int64_t r = 0; r < block.rows && block.row + r < p.k; ++r)
        if (panel.index[r] >= 0) rows.offer(block.row + r, panel.score[r], panel.index[r]);
      panel = Best<T>(pass.block_rows);
    }
  };
  if (!pass.run<T>(source, task, finish)) return false;
  for (const Best<T>& group : group_cols)
    for (int64_t c = 0; c < p.k; ++c)
      if (group.index[c] >= 0) cols.offer(c, group.score[c], group.index[c]);

  const auto put = [&](const Best<T>& best, int64_t at) {
    for (int64_t i = 0; i < p.k; ++i) {
      score[at + i] = best.index[i] < 0 ? -std::numeric_limits<T>::infinity() : best.score[i];
      index[at + i] = best.index[i];
    }
  };
  put(rows, 0);
  put(cols, p.k);
  return true;
}

// negative_logsumexp (ops.h) of every anchor. False: see ScorePass::run.
template <typename T, typename Source>
bool logsumexp_of_scores(const Pairing& p, Source& source, T scale, double* logsumexp) {
  const ScorePass pass(p);
  RunningSums<T> rows(p.k), cols(p.m);
  std::vector<RunningSums<T>> group_cols(pass.groups, RunningSums<T>(p.m));
  const int64_t partials = pass.panels * pass.block_rows;
  std::vector<T> row_max(partials, EXCLUDED<T>), row_sum(partials);

  const auto task = [&](const Strip<T>& strip) {
    RunningSums<T>& sums = group_cols[strip.group];
    T* const maxima = &row_max[strip.panel * pass.block_rows + strip.row_in_block];
    T reference[STRIP_ROWS], of_cols[ScorePass::PANEL];
    std::fill_n(of_cols, strip.cols, EXCLUDED<T>);
    kernels<T>().maxima(strip.s, strip.rows, strip.cols, strip.ld, maxima, of_cols);
    for (int64_t c = 0; c < strip.cols; ++c) sums.raise(strip.col + c, of_cols[c], scale);
    for (int64_t r = 0; r < strip.rows; ++r) reference[r] = maxima[r] == EXCLUDED<T> ? 0 : maxima[r];
    std::fill_n(of_cols, strip.cols, T(0));
    kernels<T>().exp_sums(strip.s, strip.rows, strip.cols, strip.ld, scale, reference,
                          sums.reference() + strip.col,
                          &row_sum[strip.panel * pass.block_rows + strip.row_in_block], of_cols);
    for (int64_t c = 0; c < strip.cols; ++c) sums.add(strip.col + c, of_cols[c]);
  };
  const auto finish = [&](const ScoreBlock<T>& block) {
    for (int64_t panel = 0; panel * ScorePass::PANEL < block.cols; ++panel)
      for (int64_t r = 0; r < block.rows && block.row + r < p.k; ++r) {
        const int64_t at = panel * pass.block_rows + r;
        rows.merge(block.row + r, row_max[at], row_sum[at], scale);
      }
  };
  if (!pass.run<T>(source, task, finish)) return false;
  for (const RunningSums<T>& group : group_cols) cols.merge(group, scale);
  rows.logsumexp(p.k, scale, logsumexp);
  cols.logsumexp(p.k, scale, logsumexp + p.k);
  return true;
}

// hinge_sum (ops.h) of every anchor. False: see ScorePass::run.
template <typename T, typename Source>
bool hinge_of_scores(const Pairing& p, Source& source, T margin, const T* positive, T* hinge_sum,
                     int64_t* active) {
  const ScorePass pass(p);
  const auto row_threshold = thresholds(p.n, p.k, positive, margin);
  const auto col_threshold = thresholds(p.m, p.k, positive, margin);
  std::vector<double> row_sum(p.n), col_sum(pass.groups * p.m);
  std::vector<int64_t> row_count(p.n), col_count(pass.groups * p.m);
  const int64_t partials = pass.panels * pass.block_rows;
  std::vector<T> panel_sum(partials), panel_count(partials);

  const auto task = [&](const Strip<T>& strip) {
    T sum[ScorePass::PANEL] = {}, count[ScorePass::PANEL] = {};
    const int64_t at = strip.panel * pass.block_rows + strip.row_in_block;
    kernels<T>().hinge_sums(strip.s, strip.rows, strip.cols, strip.ld, &row_threshold[strip.row],
                            &col_threshold[strip.col], &panel_sum[at], &panel_count[at], sum, count);
    const int64_t col = strip.group * p.m + strip.col;
    for (int64_t c = 0; c < strip.cols; ++c) {
      col_sum[col + c] += double(sum[c]);
      col_count[col + c] += int64_t(count[c]);
    }
  };
  const auto finish = [&](const ScoreBlock<T>& block) {
    for (int64_t panel = 0; panel * ScorePass::PANEL < block.cols; ++panel)
      for (int64_t r = 0; r < block.rows; ++r) {
        row_sum[block.row + r] += double(panel_sum[panel * pass.block_rows + r]);
        row_count[block.row + r] += int64_t(panel_count[panel * pass.block_rows + r]);
      }
  };
  if (!pass.run<T>(source, task, finish)) return false;
  for (int64_t i = 0; i < p.k; ++i) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t group = 0; group < pass.groups; ++group) {
      sum += col_sum[group * p.m + i];
      count += col_count[group * p.m + i];
    }
    hinge_sum[i] = T(row_sum[i]);
    hinge_sum[p.k + i] = T(sum);
    active[i] = row_count[i];
    active[p.k + i] = count;
  }
  return true;
}

// Where the gradient of a strip goes.
template <typename T>
struct GradientTile {
  T* g;
  int64_t ld;
};

// dL/ds of every score that an anchor sees, by way of negative_logsumexp: weights of the anchors' upstream
// times `scale`. tile_of(strip) says where a strip's gradient goes; then(strip, tile) and finish(block) see
// it written. Returns sum_ij G_ij s_ij.
template <typename T, typename Source, typename TileOf, typename Then, typename Finish>
double logsumexp_gradient(const Pairing& p, Source& source, T scale, const double* logsumexp,
                          const T* upstream, const TileOf& tile_of, const Then& then, const Finish& finish) {
  const ScorePass pass(p);
  Anchors<T> rows(p.n, p.k, scale, logsumexp, upstream);
  Anchors<T> cols(p.m, p.k, scale, logsumexp + p.k, upstream + p.k);
  for (T& weight : rows.weight) weight *= scale;
  for (T& weight : cols.weight) weight *= scale;
  std::vector<double> totals(pass.groups * pass.panels);
  pass.run<T>(
      source,
      [&](const Strip<T>& strip) {
        const GradientTile<T> tile = tile_of(strip);
        totals[strip.group * pass.panels + strip.panel] += kernels<T>().exp_gradient(
            strip.s, strip.rows, strip.cols, strip.ld, scale, &rows.reference[strip.row],
            &rows.weight[strip.row], &cols.reference[strip.col], &cols.weight[strip.col], tile.g, tile.ld);
        then(strip, tile);
      },
      finish);
  return std::accumulate(totals.begin(), totals.end(), 0.0);
}

// The same by way of hinge_sum.
template <typename T, typename Source, typename TileOf, typename Then, typename Finish>
void hinge_gradient(const Pairing& p, Source& source, T margin, const T* positive, const T* upstream,
                    const TileOf& tile_of, const Then& then, const Finish& finish) {
  const auto row_threshold = thresholds(p.n, p.k, positive, margin);
  const auto col_threshold = thresholds(p.m, p.k, positive, margin);
  const auto d_row = padded(upstream, p.k, p.n), d_col = padded(upstream + p.k, p.k, p.m);
  ScorePass(p).run<T>(
      source,
      [&](const Strip<T>& strip) {
        const GradientTile<T> tile = tile_of(strip);
        kernels<T>().hinge_gradient(strip.s, strip.rows, strip.cols, strip.ld, &row_threshold[strip.row],
                                    &d_row[strip.row], &col_threshold[strip.col], &d_col[strip.col], tile.g,
                                    tile.ld);
        then(strip, tile);
      },
      finish);
}

// What the hinges' positives receive besides their direct gradient: -active * g from their own anchors.
template <typename T>
std::vector<T> hinge_positive_gradient(int64_t k, const T* d_positive, const int64_t* active,
                                       const T* upstream) {
  std::vector<T> weight(k);
  for (int64_t i = 0; i < k; ++i)
    weight[i] = d_positive[i] - T(active[i]) * upstream[i] - T(active[k + i]) * upstream[k + i];
  return weight;
}

}  // namespace fused_vse
