// S in tiles: which tiles there are, and a tile's scores with the excluded pairs left out.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace fused_vse {

// A tile is computed by one library GEMM into a reused buffer: large enough for the GEMM to be near its
// peak, 16 MiB in float32. Its strips are the unit of parallel work and stay in a core's cache.
constexpr int64_t TILE_ROWS = 1024;
constexpr int64_t TILE_COLS = 4096;
constexpr int64_t STRIP_ROWS = 32;
// S is kept for the backward pass up to this size: it saves one GEMM of four. fakes.py has it, too.
constexpr int64_t MAX_SAVED_SCORES = TILE_ROWS * TILE_COLS;

struct Tile {
  int64_t row, rows, col, cols;
  int64_t strips() const { return (rows + STRIP_ROWS - 1) / STRIP_ROWS; }
  int64_t strip_begin(int64_t strip) const { return strip * STRIP_ROWS; }
  int64_t strip_rows(int64_t strip) const { return std::min(STRIP_ROWS, rows - strip_begin(strip)); }
};

// The tiles of S that some anchor sees: all columns for rows < k, columns < k for the other rows.
inline std::vector<Tile> tiles_of(int64_t n, int64_t m, int64_t k) {
  std::vector<Tile> tiles;
  const auto add_rows = [&](int64_t begin, int64_t end, int64_t cols) {
    for (int64_t row = begin; row < end; row += TILE_ROWS)
      for (int64_t col = 0; col < cols; col += TILE_COLS)
        tiles.push_back({row, std::min(TILE_ROWS, end - row), col, std::min(TILE_COLS, cols - col)});
  };
  add_rows(0, k, m);
  add_rows(k, n, k);
  return tiles;
}

// The largest of some Kernels::max_abs; infinity for NaN.
template <typename T>
T largest(const std::vector<T>& partial) {
  T top = 0;
  for (T x : partial)
    if (!(x <= top)) top = x != x ? std::numeric_limits<T>::infinity() : x;
  return top;
}

// Which columns are no negatives of a row: those of an equal id, or the one of equal number.
class ExcludedPairs {
 public:
  ExcludedPairs(const OptionalTensor& image_ids, const OptionalTensor& caption_ids, int64_t n, int64_t m)
      : m_(m), by_number_(!image_ids.has_value()) {
    if (by_number_) return;
    const Tensor rows = torch::stable::contiguous(*image_ids);
    const Tensor cols = torch::stable::contiguous(*caption_ids);
    const int64_t* row_ids = data<int64_t>(rows);
    const int64_t* col_ids = data<int64_t>(cols);
    columns_.resize(m);
    std::iota(columns_.begin(), columns_.end(), int64_t{0});
    std::sort(columns_.begin(), columns_.end(), [&](int64_t a, int64_t b) {
      return col_ids[a] != col_ids[b] ? col_ids[a] < col_ids[b] : a < b;
    });
    ranges_.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      const auto begin = std::partition_point(columns_.begin(), columns_.end(),
                                              [&](int64_t c) { return col_ids[c] < row_ids[i]; });
      auto end = begin;
      // Rows of one id share a range; finding its end step by step would be quadratic.
      if (begin != columns_.end() && col_ids[*begin] == row_ids[i])
        end =
            std::partition_point(begin, columns_.end(), [&](int64_t c) { return col_ids[c] <= row_ids[i]; });
      ranges_[i] = {begin - columns_.begin(), end - columns_.begin()};
    }
  }

  // f(column) for every excluded column of `row` in [begin, end).
  template <typename F>
  void for_each(int64_t row, int64_t begin, int64_t end, const F& f) const {
    if (by_number_) {
      if (begin <= row && row < std::min(end, m_)) f(row);
      return;
    }
    const auto first = columns_.begin() + ranges_[row].first, last = columns_.begin() + ranges_[row].second;
    for (auto c = std::lower_bound(first, last, begin); c != last && *c < end; ++c) f(*c);
  }

 private:
  int64_t m_;
  bool by_number_;
  std::vector<int64_t> columns_;                     // sorted by (id, number)
  std::vector<std::pair<int64_t, int64_t>> ranges_;  // of columns_, for each row
};

// The embeddings of one call, in the accumulation type, and what is excluded.
template <typename T>
struct Problem {
  Problem(const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
          const OptionalTensor& caption_ids, int64_t num_pairs)
      : images(contiguous_as(images, SCALAR_TYPE<T>)),
        captions(contiguous_as(captions, SCALAR_TYPE<T>)),
        n(images.size(0)),
        m(captions.size(0)),
        d(images.size(1)),
        k(num_pairs),
        excluded(image_ids, caption_ids, n, m) {}

  const T* image(int64_t i) const { return data<T>(images) + i * d; }
  const T* caption(int64_t j) const { return data<T>(captions) + j * d; }

  // False if an embedding is not finite or so large that a score could overflow.
  bool is_bounded() const { return is_bounded(max_abs(images, n), max_abs(captions, m)); }
  // The same from the largest elements.
  bool is_bounded(T max_image, T max_caption) const {
    return double(max_image) * double(max_caption) * double(d) < double(std::numeric_limits<T>::max());
  }

  void positive_scores(T* positive) const {
    parallel_each(
        k,
        [&](int64_t i) {
          const T *a = image(i), *b = caption(i);
          kernels<T>().dots(&a, 1, &b, 1, d, positive + i, 1);
        },
        GRAIN);
  }

  static constexpr int64_t GRAIN = 64;  // rows: a smaller task is not worth a thread

  Tensor images, captions;
  int64_t n, m, d, k;
  ExcludedPairs excluded;

 private:
  T max_abs(const Tensor& rows, int64_t count) const {
    const int64_t chunks = (count + GRAIN - 1) / GRAIN;
    std::vector<T> partial(chunks);
    parallel_each(chunks, [&](int64_t c) {
      const int64_t begin = c * GRAIN, end = std::min(count, begin + GRAIN);
      partial[c] = kernels<T>().max_abs(data<T>(rows) + begin * d, (end - begin) * d);
    });
    return largest(partial);
  }
};

// The scores of one tile after another, from a GEMM, or kept in `saved` ([N * M], or empty).
template <typename T>
class Scores {
 public:
  struct Block {
    T* s;        // [rows, cols]
    int64_t ld;  // from row to row
  };

  Scores(const Problem<T>& problem, const Tensor& saved) : problem_(problem) {
    if (saved.numel() > 0) {
      kept_ = torch::stable::view(saved, {problem.n, problem.m});
    } else {
      const int64_t rows = std::min(TILE_ROWS, problem.n), cols = std::min(TILE_COLS, problem.m);
      buffer_ = empty({rows * cols}, SCALAR_TYPE<T>);
    }
  }

  Block compute(const Tile& tile) {
    Tensor out = view(tile);
    matmul_into(out, rows_of(problem_.images, tile.row, tile.rows),
                transposed(rows_of(problem_.captions, tile.col, tile.cols)));
    return block(out);
  }

  // What compute() gave in the forward pass; computed again unless it was saved.
  Block recall(const Tile& tile) { return kept_ ? block(view(tile)) : compute(tile); }
  bool is_saved() const { return kept_.has_value(); }

  // Excluded entries lose every maximum and vanish in every sum. Called within the strips' parallel loop.
  void leave_out_excluded(const Tile& tile, int64_t strip, const Block& block) const {
    for (int64_t r = tile.strip_begin(strip), end = r + tile.strip_rows(strip); r < end; ++r)
      problem_.excluded.for_each(tile.row + r, tile.col, tile.col + tile.cols,
                                 [&](int64_t c) { block.s[r * block.ld + c - tile.col] = EXCLUDED<T>; });
  }

 private:
  Tensor view(const Tile& tile) const {
    if (kept_) {
      Tensor rows = rows_of(*kept_, tile.row, tile.rows);
      return torch::stable::narrow(rows, 1, tile.col, tile.cols);
    }
    return torch::stable::view(rows_of(*buffer_, 0, tile.rows * tile.cols), {tile.rows, tile.cols});
  }
  static Block block(const Tensor& out) { return {data<T>(out), out.stride(0)}; }

  const Problem<T>& problem_;
  OptionalTensor kept_, buffer_;
};

// [N * M] to keep S for the backward pass, or [0].
template <typename T>
Tensor saved_scores(const Problem<T>& problem, bool save_scores) {
  const bool fits = problem.n * problem.m <= MAX_SAVED_SCORES;
  return empty({save_scores && fits ? problem.n * problem.m : 0}, SCALAR_TYPE<T>);
}

template <typename T>
void fill(const Tensor& x, T value) {
  std::fill_n(data<T>(x), x.numel(), value);
}

template <typename T>
constexpr T NOT_A_NUMBER = std::numeric_limits<T>::quiet_NaN();

}  // namespace fused_vse
