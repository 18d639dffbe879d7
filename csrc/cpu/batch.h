// What every statistic is taken of: the first arguments of the ops (fused_vse/ops.py documents them).
#pragma once

#include <numeric>

#include "kernels.h"
#include "tensors.h"

namespace fused_vse {

enum Similarity : int64_t { DOT, ORDER };

struct Batch {
  Tensor images;  // [N, D], or S [N, M]
  OptionalTensor captions, image_ids, caption_ids;
  int64_t row_anchors, column_anchors, pair_row, pair_column, pair_count, similarity;

  int64_t n() const { return images.size(0); }
  int64_t m() const { return captions ? captions->size(0) : images.size(1); }
  int64_t anchors() const { return row_anchors + column_anchors; }
  ScalarType accumulation_type() const {
    return images.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Whoever calls an op: nothing is read out of bounds.
  void check() const {
    const ScalarType type = images.scalar_type();
    STD_TORCH_CHECK(images.dim() == 2, "images must have 2 dimensions");
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
                        type == ScalarType::Double,
                    "images must be floating point");
    if (captions) {
      STD_TORCH_CHECK(images.size(1) > 0, "images must have rows that are not empty");
      STD_TORCH_CHECK(
          captions->dim() == 2 && captions->size(1) == images.size(1) && captions->scalar_type() == type,
          "captions must have the dtype and the row length of images");
    }
    STD_TORCH_CHECK(similarity == DOT || similarity == ORDER, "similarity must be 0 or 1");
    check_ids(image_ids, n(), "image_ids must be int64 [N]");
    check_ids(caption_ids, m(), "caption_ids must be int64 [M]");
    STD_TORCH_CHECK(image_ids.has_value() == caption_ids.has_value(),
                    "image_ids and caption_ids must be given both or not at all");
    STD_TORCH_CHECK(0 <= row_anchors && row_anchors <= n(), "row_anchors must be from 0 to N");
    STD_TORCH_CHECK(0 <= column_anchors && column_anchors <= m(), "column_anchors must be from 0 to M");
    STD_TORCH_CHECK(pair_count >= 0, "pair_count must not be negative");
    STD_TORCH_CHECK(0 <= pair_row && pair_row <= n() - pair_count, "pair_row + pair_count must be at most N");
    STD_TORCH_CHECK(0 <= pair_column && pair_column <= m() - pair_count,
                    "pair_column + pair_count must be at most M");
  }

  // f(k) for every pair within these rows and columns.
  template <typename F>
  void for_each_pair(int64_t row, int64_t rows, int64_t col, int64_t cols, const F& f) const {
    const int64_t begin = std::max({int64_t{0}, row - pair_row, col - pair_column});
    const int64_t end = std::min({pair_count, row + rows - pair_row, col + cols - pair_column});
    for (int64_t k = begin; k < end; ++k) f(k);
  }

 private:
  static void check_ids(const OptionalTensor& ids, int64_t size, const char* message) {
    if (ids)
      STD_TORCH_CHECK(ids->dim() == 1 && ids->size(0) == size && ids->scalar_type() == ScalarType::Long,
                      message);
  }
};

// An op of a batch as the dispatcher calls it.
template <auto op>
struct WithBatch;
template <typename Result, typename... Rest, Result (*op)(const Batch&, Rest...)>
struct WithBatch<op> {
  static Result call(const Tensor& images, const OptionalTensor& captions, const OptionalTensor& image_ids,
                     const OptionalTensor& caption_ids, int64_t row_anchors, int64_t column_anchors,
                     int64_t pair_row, int64_t pair_column, int64_t pair_count, int64_t similarity,
                     Rest... rest) {
    const Batch batch{images,         captions, image_ids,   caption_ids, row_anchors,
                      column_anchors, pair_row, pair_column, pair_count,  similarity};
    batch.check();
    return op(batch, rest...);
  }
};

// A vector argument, after a check; of T.
template <typename T>
std::vector<T> vector_of(const Tensor& x, const char* name, int64_t size) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size, name, " must have ", size, " elements");
  STD_TORCH_CHECK(x.scalar_type() == SCALAR_TYPE<T>, name, " has the wrong dtype");
  std::vector<T> values(size);
  const int64_t stride = x.stride(0);
  const T* const from = data<T>(x);
  for (int64_t i = 0; i < size; ++i) values[i] = from[i * stride];
  return values;
}

// A vector of derivatives: of any dtype, converted.
template <typename T>
std::vector<T> upstream_of(const Tensor& x, const char* name, int64_t size) {
  return vector_of<T>(converted(x, SCALAR_TYPE<T>), name, size);
}

inline double scalar_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.numel() == 1, name, " must have one element");
  return *data<double>(contiguous_as(x, ScalarType::Double));
}

// The factor of the scores in the exponentials: scale_tensor if given, else scale.
inline double effective_scale(double scale, const OptionalTensor& scale_tensor) {
  return scale_tensor ? scalar_of(*scale_tensor, "scale_tensor") : scale;
}

// Whether exponentials can be had with it.
template <typename T>
bool is_usable(double a) {
  return a > 0 && 2 * a < double(std::numeric_limits<T>::max());
}

// One value an anchor [R + C], spread over all rows and columns; `other` for what is no anchor.
template <typename T>
struct PerAnchor {
  PerAnchor(const Batch& batch, T other) : rows(batch.n(), other), cols(batch.m(), other) {}
  PerAnchor(const Batch& batch, const std::vector<T>& values, T other) : PerAnchor(batch, other) {
    for (int64_t a = 0; a < batch.anchors(); ++a) at(batch, a) = values[a];
  }
  T& at(const Batch& batch, int64_t anchor) {
    return anchor < batch.row_anchors ? rows[anchor] : cols[anchor - batch.row_anchors];
  }
  std::vector<T> rows, cols;
};

// Whether a statistic [R + C] says that all gradients are NaN.
template <typename T>
bool is_poisoned(const Batch& batch, const std::vector<T>& x) {
  return (batch.row_anchors > 0 && x[0] != x[0]) ||
         (batch.column_anchors > 0 && x[batch.row_anchors] != x[batch.row_anchors]);
}

// Which columns are no negatives of a row: those of an equal id, or the row's pair.
class ExcludedPairs {
 public:
  // `by_columns`: rows and columns change places.
  explicit ExcludedPairs(const Batch& batch, bool by_columns = false)
      : row_(by_columns ? batch.pair_column : batch.pair_row),
        column_(by_columns ? batch.pair_row : batch.pair_column),
        count_(batch.pair_count),
        by_number_(!batch.image_ids) {
    if (by_number_) return;
    const Tensor rows = torch::stable::contiguous(*(by_columns ? batch.caption_ids : batch.image_ids));
    const Tensor cols = torch::stable::contiguous(*(by_columns ? batch.image_ids : batch.caption_ids));
    const int64_t *row_ids = data<int64_t>(rows), *col_ids = data<int64_t>(cols);
    columns_.resize(cols.size(0));
    std::iota(columns_.begin(), columns_.end(), int64_t{0});
    std::sort(columns_.begin(), columns_.end(), [&](int64_t a, int64_t b) {
      return col_ids[a] != col_ids[b] ? col_ids[a] < col_ids[b] : a < b;
    });
    ranges_.resize(rows.size(0));
    for (size_t i = 0; i < ranges_.size(); ++i) {
      // Rows of one id share a range; finding its end step by step would be quadratic.
      const auto first = columns_.begin(), last = columns_.end();
      const auto begin =
          std::partition_point(first, last, [&](int64_t c) { return col_ids[c] < row_ids[i]; });
      const auto end = std::partition_point(begin, last, [&](int64_t c) { return col_ids[c] <= row_ids[i]; });
      ranges_[i] = {begin - first, end - first};
    }
  }

  // f(column) for every excluded column of `row` in [begin, end).
  template <typename F>
  void for_each(int64_t row, int64_t begin, int64_t end, const F& f) const {
    if (by_number_) {
      const int64_t k = row - row_, column = column_ + k;
      if (0 <= k && k < count_ && begin <= column && column < end) f(column);
      return;
    }
    const auto first = columns_.begin() + ranges_[row].first, last = columns_.begin() + ranges_[row].second;
    for (auto c = std::lower_bound(first, last, begin); c != last && *c < end; ++c) f(*c);
  }

 private:
  int64_t row_, column_, count_;
  bool by_number_;
  std::vector<int64_t> columns_;                     // sorted by (id, number)
  std::vector<std::pair<int64_t, int64_t>> ranges_;  // of columns_, for each row
};

}  // namespace fused_vse
