// hardest_negatives on the CPU (ops.h): the certified search, or every score where it does not apply.
//
// Backward: a gather and a scatter, written as one sum per output row, so that no two threads write one
// row: image i receives its own positive and hardest caption, and every caption whose hardest image it is.
#include "hardest.h"

#include <cmath>
#include <tuple>

#include "../ops.h"

namespace fused_vse {

template <typename T>
void search_exactly(const Problem<T>& problem, const std::vector<int64_t>& rows,
                    const std::vector<int64_t>& cols, Best<T>* best_of_rows, Best<T>* best_of_cols) {
  if (rows.empty() || cols.empty()) return;
  const Kernels<T>& k = kernels<T>();
  const int64_t num_rows = rows.size(), num_cols = cols.size();
  const int64_t width = std::min(TILE_COLS, num_cols);
  std::vector<T> strip_cols(TILE_ROWS / STRIP_ROWS * width);
  std::vector<const T*> a(num_rows), b(num_cols);
  for (int64_t r = 0; r < num_rows; ++r) a[r] = problem.image(rows[r]);
  for (int64_t c = 0; c < num_cols; ++c) b[c] = problem.caption(cols[c]);
  const Tensor buffer = empty({std::min(TILE_ROWS, num_rows) * width}, SCALAR_TYPE<T>);
  T* const s = data<T>(buffer);

  for (const Tile& tile : tiles_of(num_rows, num_cols, num_rows)) {
    const int64_t* const tile_cols = &cols[tile.col];
    std::fill_n(strip_cols.begin(), tile.strips() * tile.cols, EXCLUDED<T>);
    parallel_each(tile.strips(), [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      T* const strip_s = s + begin * tile.cols;
      k.dots(&a[tile.row + begin], count, &b[tile.col], tile.cols, problem.d, strip_s, tile.cols);
      for (int64_t r = 0; r < count; ++r)
        problem.excluded.for_each(rows[tile.row + begin + r], tile_cols[0], tile_cols[tile.cols - 1] + 1,
                                  [&](int64_t c) {
                                    const int64_t* at = std::lower_bound(tile_cols, tile_cols + tile.cols, c);
                                    if (*at == c) strip_s[r * tile.cols + (at - tile_cols)] = EXCLUDED<T>;
                                  });
      T row_max[STRIP_ROWS];
      k.maxima(strip_s, count, tile.cols, tile.cols, row_max, &strip_cols[strip * tile.cols]);
      if (!best_of_rows) return;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = rows[tile.row + begin + r];
        if (row_max[r] <= best_of_rows->score[i]) continue;
        const T* const row = strip_s + r * tile.cols;
        best_of_rows->offer(i, row_max[r], tile_cols[std::find(row, row + tile.cols, row_max[r]) - row]);
      }
    });
    if (!best_of_cols) continue;
    for (int64_t strip = 0; strip < tile.strips(); ++strip)
      for (int64_t c = 0; c < tile.cols; ++c) {
        const T top = strip_cols[strip * tile.cols + c];
        if (top <= best_of_cols->score[tile_cols[c]]) continue;
        int64_t r = tile.strip_begin(strip);
        while (s[r * tile.cols + c] != top) ++r;
        best_of_cols->offer(tile_cols[c], top, rows[tile.row + r]);
      }
  }
}

template void search_exactly(const Problem<float>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                             Best<float>*, Best<float>*);

namespace {

std::vector<int64_t> range(int64_t begin, int64_t end) {
  std::vector<int64_t> values(end - begin);
  std::iota(values.begin(), values.end(), begin);
  return values;
}

template <typename T>
void search_everything(const Problem<T>& problem, Best<T>* rows, Best<T>* cols) {
  const int64_t k = problem.k;
  search_exactly(problem, range(0, k), range(0, problem.m), rows, cols);
  search_exactly(problem, range(k, problem.n), range(0, k), static_cast<Best<T>*>(nullptr), cols);
}

enum class Search { AUTO, EXACT, IN_FLOAT32, IN_BFLOAT16 };

template <Search search>
std::tuple<Tensor, Tensor, Tensor> hardest_negatives(const Tensor& images, const Tensor& captions,
                                                     const OptionalTensor& image_ids,
                                                     const OptionalTensor& caption_ids, int64_t num_pairs) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor score = empty({2, num_pairs}, SCALAR_TYPE<T>);
    Tensor index = empty({2, num_pairs}, ScalarType::Long);
    if (!problem.is_bounded()) {
      fill(positive, NOT_A_NUMBER<T>);
      fill(score, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
      return std::make_tuple(positive, score, index);
    }
    problem.positive_scores(data<T>(positive));
    Best<T> rows(problem.n), cols(problem.m);
    bool done = false;
    if constexpr (std::is_same_v<T, float>) {
      if constexpr (search == Search::AUTO) {
        if (problem.n * problem.m >= MIN_SEARCHED_SCORES)
          done = search_certified(problem, std::nullopt, &rows, &cols);
      } else if constexpr (search != Search::EXACT) {
        const auto precision = search == Search::IN_FLOAT32 ? ScalarType::Float : ScalarType::BFloat16;
        done = search_certified(problem, precision, &rows, &cols);
        STD_TORCH_CHECK(done, "the certified search is not available");
      }
    }
    if (!done) {
      rows = Best<T>(problem.n);
      cols = Best<T>(problem.m);
      search_everything(problem, &rows, &cols);
    }
    for (int64_t i = 0; i < num_pairs; ++i) {
      const auto put = [&](const Best<T>& best, int64_t at) {
        data<T>(score)[at] = best.index[i] < 0 ? -std::numeric_limits<T>::infinity() : best.score[i];
        data<int64_t>(index)[at] = best.index[i];
      };
      put(rows, i);
      put(cols, num_pairs + i);
    }
    return std::make_tuple(positive, score, index);
  });
}

std::tuple<Tensor, Tensor> hardest_negatives_backward(const Tensor& d_positive, const Tensor& d_score,
                                                      const Tensor& positive, const Tensor& index,
                                                      const Tensor& images, const Tensor& captions,
                                                      bool need_images, bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t k = positive.numel(), d = images.size(1);
    const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
    const Tensor upstream = contiguous_as(d_score, SCALAR_TYPE<T>);
    const bool poisoned = std::isnan(data<T>(positive)[0]);
    const auto gradient = [&](bool needed, const Tensor& self, const Tensor& other, int64_t own_row) {
      if (!needed) return empty({0}, self.scalar_type());
      Tensor result;
      if (poisoned) {
        result = empty({self.size(0), d}, SCALAR_TYPE<T>);
        fill(result, NOT_A_NUMBER<T>);
      } else {
        const int64_t own = own_row * k, theirs = (1 - own_row) * k;
        const Tensor rows = contiguous_as(other, SCALAR_TYPE<T>);
        result = empty({self.size(0), d}, SCALAR_TYPE<T>);
        gather_rows<T>(self.size(0), k, data<T>(direct), data<T>(upstream) + own, data<int64_t>(index) + own,
                       data<T>(upstream) + theirs, data<int64_t>(index) + theirs, rows, data<T>(result));
      }
      return converted(result, self.scalar_type());
    };
    return std::make_tuple(gradient(need_images, images, captions, 0),
                           gradient(need_captions, captions, images, 1));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_vse_cpu, m) {
  m.def(HARDEST_NEGATIVES_SCHEMA);
  m.def(HARDEST_NEGATIVES_BACKWARD_SCHEMA);
  // For tests and benchmarks: the searches by themselves.
  m.def("hardest_negatives_exact" HARDEST_NEGATIVES_ARGUMENTS);
  m.def("hardest_negatives_in_float32" HARDEST_NEGATIVES_ARGUMENTS);
  m.def("hardest_negatives_in_bfloat16" HARDEST_NEGATIVES_ARGUMENTS);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("hardest_negatives", TORCH_BOX(&hardest_negatives<Search::AUTO>));
  m.impl("hardest_negatives_exact", TORCH_BOX(&hardest_negatives<Search::EXACT>));
  m.impl("hardest_negatives_in_float32", TORCH_BOX(&hardest_negatives<Search::IN_FLOAT32>));
  m.impl("hardest_negatives_in_bfloat16", TORCH_BOX(&hardest_negatives<Search::IN_BFLOAT16>));
  m.impl("hardest_negatives_backward", TORCH_BOX(&hardest_negatives_backward));
}

}  // namespace fused_vse
