// negative_logsumexp on the CPU (ops.h).
//
//   for each tile of S:                          one GEMM
//     for each strip of it, in parallel:         maxima of the tile's rows and columns
//     raise the running maxima
//     for each strip of it, in parallel:         sums of exp(a (s - maximum)), rows and columns
//     rescale the running sums and add
//
// Backward: per tile, S again (or saved), G in place of it, and two GEMMs.
#include <tuple>

#include "../ops.h"
#include "gradients.h"
#include "running_sums.h"

namespace fused_vse {
namespace {

template <typename T>
void forward(const Problem<T>& problem, T scale, Scores<T>& scores, double* logsumexp) {
  RunningSums<T> rows(problem.n), cols(problem.m);
  std::vector<T> strip_cols(TILE_ROWS / STRIP_ROWS * std::min(TILE_COLS, problem.m));
  std::vector<T> row_values(std::min(TILE_ROWS, problem.n));
  const Kernels<T>& k = kernels<T>();

  for (const Tile& tile : tiles_of(problem.n, problem.m, problem.k)) {
    const auto block = scores.compute(tile);
    const int64_t strips = tile.strips();

    std::fill_n(strip_cols.begin(), strips * tile.cols, EXCLUDED<T>);
    parallel_each(strips, [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      scores.leave_out_excluded(tile, strip, block);
      k.maxima(block.s + begin * block.ld, count, tile.cols, block.ld, &row_values[begin],
               &strip_cols[strip * tile.cols]);
      for (int64_t r = begin; r < begin + count; ++r) rows.raise(tile.row + r, row_values[r], scale);
    });
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t c = 0; c < tile.cols; ++c)
        cols.raise(tile.col + c, strip_cols[strip * tile.cols + c], scale);

    std::fill_n(strip_cols.begin(), strips * tile.cols, T(0));
    parallel_each(strips, [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      k.exp_sums(block.s + begin * block.ld, count, tile.cols, block.ld, scale,
                 rows.reference() + tile.row + begin, cols.reference() + tile.col, &row_values[begin],
                 &strip_cols[strip * tile.cols]);
      for (int64_t r = begin; r < begin + count; ++r) rows.add(tile.row + r, row_values[r]);
    });
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t c = 0; c < tile.cols; ++c) cols.add(tile.col + c, strip_cols[strip * tile.cols + c]);
  }
  rows.logsumexp(problem.k, scale, logsumexp);
  cols.logsumexp(problem.k, scale, logsumexp + problem.k);
}

std::tuple<Tensor, Tensor, Tensor> negative_logsumexp(const Tensor& images, const Tensor& captions,
                                                      const OptionalTensor& image_ids,
                                                      const OptionalTensor& caption_ids, int64_t num_pairs,
                                                      double scale, const OptionalTensor& scale_tensor,
                                                      bool save_scores) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor logsumexp = empty({2, num_pairs}, ScalarType::Double);
    Tensor saved = saved_scores(problem, save_scores);
    const T a = effective_scale<T>(scale, scale_tensor);
    if (problem.is_bounded() && a > 0 && std::isfinite(a)) {
      Scores<T> scores(problem, saved);
      problem.positive_scores(data<T>(positive));
      forward(problem, a, scores, data<double>(logsumexp));
    } else {
      fill(positive, NOT_A_NUMBER<T>);
      fill(logsumexp, NOT_A_NUMBER<double>);
    }
    return std::make_tuple(positive, logsumexp, saved);
  });
}

std::tuple<Tensor, Tensor, Tensor> negative_logsumexp_backward(
    const Tensor& d_positive, const Tensor& d_logsumexp, const Tensor& logsumexp, const Tensor& saved,
    const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
    const OptionalTensor& caption_ids, double scale, const OptionalTensor& scale_tensor, bool need_images,
    bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t num_pairs = logsumexp.size(1);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Gradients<T> gradients(problem, need_images, need_captions);
    Tensor d_scale = empty({}, SCALAR_TYPE<T>);
    const T a = effective_scale<T>(scale, scale_tensor);

    const double* lse = data<double>(logsumexp);
    if (std::isnan(lse[0])) {
      gradients.fill_with_nan();
      fill(d_scale, NOT_A_NUMBER<T>);
      return std::make_tuple(gradients.d_images(images.scalar_type()),
                             gradients.d_captions(captions.scalar_type()), d_scale);
    }
    const Tensor upstream = contiguous_as(d_logsumexp, SCALAR_TYPE<T>);
    const Anchors<T> rows(problem.n, num_pairs, a, lse, data<T>(upstream));
    const Anchors<T> cols(problem.m, num_pairs, a, lse + num_pairs, data<T>(upstream) + num_pairs);
    gradients.start_with_positives(data<T>(contiguous_as(d_positive, SCALAR_TYPE<T>)));

    Scores<T> scores(problem, saved);
    Tensor buffer = empty({std::min(TILE_ROWS, problem.n) * std::min(TILE_COLS, problem.m)}, SCALAR_TYPE<T>);
    double total = 0;
    for (const Tile& tile : tiles_of(problem.n, problem.m, num_pairs)) {
      const auto block = scores.recall(tile);
      Tensor g = torch::stable::view(rows_of(buffer, 0, tile.rows * tile.cols), {tile.rows, tile.cols});
      std::vector<double> strip_total(tile.strips());
      parallel_each(tile.strips(), [&](int64_t strip) {
        const int64_t begin = tile.strip_begin(strip);
        if (!scores.is_saved()) scores.leave_out_excluded(tile, strip, block);
        strip_total[strip] = kernels<T>().exp_gradient(
            block.s + begin * block.ld, tile.strip_rows(strip), tile.cols, block.ld, a,
            &rows.reference[tile.row + begin], &rows.weight[tile.row + begin], &cols.reference[tile.col],
            &cols.weight[tile.col], data<T>(g) + begin * tile.cols, tile.cols);
      });
      for (double x : strip_total) total += x;
      gradients.add_tile(tile, g, a);
    }
    fill(d_scale, T(scale * total));
    return std::make_tuple(gradients.d_images(images.scalar_type()),
                           gradients.d_captions(captions.scalar_type()), d_scale);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cpu, m) {
  m.def(NEGATIVE_LOGSUMEXP_SCHEMA);
  m.def(NEGATIVE_LOGSUMEXP_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("negative_logsumexp", TORCH_BOX(&negative_logsumexp));
  m.impl("negative_logsumexp_backward", TORCH_BOX(&negative_logsumexp_backward));
}

}  // namespace fused_vse
