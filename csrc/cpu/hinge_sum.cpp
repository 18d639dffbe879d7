// hinge_sum on the CPU (ops.h): for each tile of S, one GEMM and one pass over its strips in parallel.
// Backward: per tile, S again (or saved), G in place of it, and two GEMMs.
#include <cmath>
#include <tuple>

#include "../ops.h"
#include "gradients.h"
#include "thresholds.h"

namespace fused_vse {
namespace {

template <typename T>
void forward(const Problem<T>& problem, T margin, Scores<T>& scores, const T* positive, T* hinge_sum,
             int64_t* active) {
  const auto row_threshold = thresholds(problem.n, problem.k, positive, margin);
  const auto col_threshold = thresholds(problem.m, problem.k, positive, margin);
  std::vector<double> row_sum(problem.n), col_sum(problem.m);
  std::vector<int64_t> row_count(problem.n), col_count(problem.m);
  const int64_t width = std::min(TILE_COLS, problem.m), height = std::min(TILE_ROWS, problem.n);
  std::vector<T> strip_sum(TILE_ROWS / STRIP_ROWS * width), strip_count(strip_sum.size());
  std::vector<T> tile_sum(height), tile_count(height);

  for (const Tile& tile : tiles_of(problem.n, problem.m, problem.k)) {
    const auto block = scores.compute(tile);
    const int64_t strips = tile.strips();
    std::fill_n(strip_sum.begin(), strips * tile.cols, T(0));
    std::fill_n(strip_count.begin(), strips * tile.cols, T(0));
    parallel_each(strips, [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      scores.leave_out_excluded(tile, strip, block);
      kernels<T>().hinge_sums(block.s + begin * block.ld, count, tile.cols, block.ld,
                              &row_threshold[tile.row + begin], &col_threshold[tile.col], &tile_sum[begin],
                              &tile_count[begin], &strip_sum[strip * tile.cols],
                              &strip_count[strip * tile.cols]);
      for (int64_t r = begin; r < begin + count; ++r) {
        row_sum[tile.row + r] += double(tile_sum[r]);
        row_count[tile.row + r] += int64_t(tile_count[r]);
      }
    });
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t c = 0; c < tile.cols; ++c) {
        col_sum[tile.col + c] += double(strip_sum[strip * tile.cols + c]);
        col_count[tile.col + c] += int64_t(strip_count[strip * tile.cols + c]);
      }
  }
  for (int64_t i = 0; i < problem.k; ++i) {
    hinge_sum[i] = T(row_sum[i]);
    hinge_sum[problem.k + i] = T(col_sum[i]);
    active[i] = row_count[i];
    active[problem.k + i] = col_count[i];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hinge_sum(const Tensor& images, const Tensor& captions,
                                                     const OptionalTensor& image_ids,
                                                     const OptionalTensor& caption_ids, int64_t num_pairs,
                                                     double margin, bool save_scores) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor sums = empty({2, num_pairs}, SCALAR_TYPE<T>);
    Tensor active = empty({2, num_pairs}, ScalarType::Long);
    Tensor saved = saved_scores(problem, save_scores);
    if (problem.is_bounded()) {
      Scores<T> scores(problem, saved);
      problem.positive_scores(data<T>(positive));
      forward(problem, T(margin), scores, data<T>(positive), data<T>(sums), data<int64_t>(active));
    } else {
      fill(positive, NOT_A_NUMBER<T>);
      fill(sums, NOT_A_NUMBER<T>);
      fill(active, int64_t{0});
    }
    return std::make_tuple(positive, sums, active, saved);
  });
}

std::tuple<Tensor, Tensor> hinge_sum_backward(const Tensor& d_positive, const Tensor& d_hinge_sum,
                                              const Tensor& positive, const Tensor& active,
                                              const Tensor& saved, const Tensor& images,
                                              const Tensor& captions, const OptionalTensor& image_ids,
                                              const OptionalTensor& caption_ids, double margin,
                                              bool need_images, bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t num_pairs = positive.numel();
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Gradients<T> gradients(problem, need_images, need_captions);
    const T* p = data<T>(positive);
    if (std::isnan(p[0])) {
      gradients.fill_with_nan();
      return std::make_tuple(gradients.d_images(images.scalar_type()),
                             gradients.d_captions(captions.scalar_type()));
    }
    const Tensor upstream = contiguous_as(d_hinge_sum, SCALAR_TYPE<T>);
    const T *from_images = data<T>(upstream), *from_captions = from_images + num_pairs;
    const Tensor d_direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
    std::vector<T> weight(num_pairs);
    for (int64_t i = 0; i < num_pairs; ++i)
      weight[i] = data<T>(d_direct)[i] - T(data<int64_t>(active)[i]) * from_images[i] -
                  T(data<int64_t>(active)[num_pairs + i]) * from_captions[i];
    gradients.start_with_positives(weight.data());

    const auto row_threshold = thresholds(problem.n, num_pairs, p, T(margin));
    const auto col_threshold = thresholds(problem.m, num_pairs, p, T(margin));
    const auto d_row = padded(from_images, num_pairs, problem.n);
    const auto d_col = padded(from_captions, num_pairs, problem.m);
    Scores<T> scores(problem, saved);
    Tensor buffer = empty({std::min(TILE_ROWS, problem.n) * std::min(TILE_COLS, problem.m)}, SCALAR_TYPE<T>);
    for (const Tile& tile : tiles_of(problem.n, problem.m, num_pairs)) {
      const auto block = scores.recall(tile);
      Tensor g = torch::stable::view(rows_of(buffer, 0, tile.rows * tile.cols), {tile.rows, tile.cols});
      parallel_each(tile.strips(), [&](int64_t strip) {
        const int64_t begin = tile.strip_begin(strip);
        if (!scores.is_saved()) scores.leave_out_excluded(tile, strip, block);
        kernels<T>().hinge_gradient(block.s + begin * block.ld, tile.strip_rows(strip), tile.cols, block.ld,
                                    &row_threshold[tile.row + begin], &d_row[tile.row + begin],
                                    &col_threshold[tile.col], &d_col[tile.col],
                                    data<T>(g) + begin * tile.cols, tile.cols);
      });
      gradients.add_tile(tile, g, 1);
    }
    return std::make_tuple(gradients.d_images(images.scalar_type()),
                           gradients.d_captions(captions.scalar_type()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cpu, m) {
  m.def(HINGE_SUM_SCHEMA);
  m.def(HINGE_SUM_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("hinge_sum", TORCH_BOX(&hinge_sum));
  m.impl("hinge_sum_backward", TORCH_BOX(&hinge_sum_backward));
}

}  // namespace fused_vse
