// The hardest negatives by a library GEMM, in bfloat16 or in float32, with the float32 answer proven.
//
// I^ and T^ are I and T rounded to the GEMM's precision, z_ij its result. The score c_ij that decides is
// the float32 sum of Kernels::dots. By Cauchy-Schwarz, with g = (d + 64) 2^-23 for either float32
// summation in any order and with any rounding, and r for the rounding of z (2^-8 if to bfloat16, or 0),
//
//   |c_ij - z_ij| <= E_i + r |z_ij|
//   E_i = |I_i - I^_i| max|T| + |I^_i| max|T - T^| + g (|I^_i| max|T^| + |I_i| max|T|) + d 2^-120
//
// (the last term: products that underflow). So the column of the largest c is among those with
//
//   z_ij + r |z_ij| + E_i >= max_j z - r |max_j z| - E_i,        i.e. z_ij >= threshold_i,
//
// and likewise for columns. These few are scored by Kernels::dots; the largest wins, ties go to the
// smallest index. While the tiles pass by, the maxima so far give thresholds that are too low but never
// too high. Rows and columns with more than CAPACITY candidates are scored completely.
//
//   for each tile of S:                         one GEMM
//     for each strip of it, in parallel:        maxima of the tile's rows and columns
//     raise the maxima and thresholds
//     for each strip of it, in parallel:        list the entries above their row's or column's threshold
//   for each row and column, in parallel:       score its candidates
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>

#include "hardest.h"
#include "search_precision.h"

namespace fused_vse {
namespace {

constexpr int64_t CAPACITY = 64;

template <typename Precision>
typename Precision::Key threshold_of(typename Precision::Key max_key, double error) {
  constexpr double rounding = Precision::OUTPUT_ROUNDING;
  if (max_key <= Precision::EXCLUDED_KEY) return Precision::NEVER;
  const double top = Precision::number_of(max_key);
  const double reach = top - rounding * std::fabs(top) - 2 * error;
  return Precision::key_below(reach / (reach >= 0 ? 1 + rounding : 1 - rounding));
}

// E of every row of this side against all rows of the other.
std::vector<double> error_bounds(const SearchOperand& self, const SearchOperand& other, int64_t d) {
  const auto top = [](const std::vector<double>& x) { return *std::max_element(x.begin(), x.end()); };
  const double summation = double(d + 64) * 0x1p-23;
  const double max_norm = top(other.norm), max_rounded = top(other.rounded_norm);
  const double max_error = top(other.error_norm);
  std::vector<double> bounds(self.norm.size());
  for (size_t i = 0; i < bounds.size(); ++i)
    bounds[i] = 1.000001 * (self.error_norm[i] * max_norm + self.rounded_norm[i] * max_error +
                            summation * (self.rounded_norm[i] * max_rounded + self.norm[i] * max_norm)) +
                double(d) * 0x1p-120;
  return bounds;
}

// The candidates of every anchor of one side.
template <typename Precision>
class Candidates {
  using Key = typename Precision::Key;

 public:
  Candidates(int64_t anchors, std::vector<double> error)
      : error(std::move(error)),
        max_key(anchors, Precision::EXCLUDED_KEY),
        threshold(anchors, Precision::NEVER),
        count_(anchors),
        overflowed_(anchors),
        entries_(new Entry[anchors * CAPACITY]) {}

  int64_t anchors() const { return static_cast<int64_t>(count_.size()); }

  std::vector<int64_t> overflowed() const {
    std::vector<int64_t> list;
    for (int64_t a = 0; a < anchors(); ++a)
      if (overflowed_[a]) list.push_back(a);
    return list;
  }

  void raise(int64_t a, Key key) {
    if (key <= max_key[a]) return;
    max_key[a] = key;
    if (!overflowed_[a]) threshold[a] = threshold_of<Precision>(key, error[a]);
  }

  void add(int64_t a, int64_t other, Key key) {
    if (overflowed_[a] || key < threshold[a]) return;
    if (count_[a] == CAPACITY) drop_outdated(a);
    if (count_[a] == CAPACITY) {
      overflowed_[a] = 1;
      threshold[a] = Precision::NEVER;
      return;
    }
    entries_[a * CAPACITY + count_[a]++] = {static_cast<int32_t>(other), key};
  }

  // The candidates that the final threshold leaves; at most CAPACITY.
  int64_t remaining(int64_t a, int64_t* other, double* z) const {
    int64_t n = 0;
    for (int64_t e = a * CAPACITY; e < a * CAPACITY + count_[a]; ++e) {
      if (entries_[e].key < threshold[a]) continue;
      other[n] = entries_[e].other;
      z[n++] = Precision::number_of(entries_[e].key);
    }
    return n;
  }

  std::vector<double> error;
  std::vector<Key> max_key, threshold;

 private:
  struct Entry {
    int32_t other;
    Key key;
  };

  void drop_outdated(int64_t a) {
    Entry* const begin = &entries_[a * CAPACITY];
    count_[a] =
        std::remove_if(begin, begin + CAPACITY, [&](const Entry& e) { return e.key < threshold[a]; }) - begin;
  }

  std::vector<int64_t> count_;
  std::vector<char> overflowed_;
  std::unique_ptr<Entry[]> entries_;  // [anchors, CAPACITY]
};

template <typename Key>
struct ColumnHit {
  int64_t row, col;
  Key key;
};

template <typename Precision>
void list_candidates(const Batch& batch, const SearchOperand& images, const SearchOperand& captions,
                     Candidates<Precision>* of_rows, Candidates<Precision>* of_cols) {
  using Key = typename Precision::Key;
  const ExcludedPairs excluded(batch);
  const int64_t width = std::min(TILE_COLS, batch.m()), height = std::min(TILE_ROWS, batch.n());
  const Tensor buffer = empty({height * width}, Precision::TYPE);
  std::vector<Key> row_max(height), row_threshold(height), col_threshold(width);
  std::vector<Key> strip_cols(TILE_ROWS / STRIP_ROWS * width);
  std::vector<std::vector<ColumnHit<Key>>> strip_hits(TILE_ROWS / STRIP_ROWS);

  for (const Tile& tile : tiles_of(batch)) {
    Tensor z = tile.view(buffer);
    matmul_into(z, rows_of(images.rows, tile.row, tile.rows),
                transposed(rows_of(captions.rows, tile.col, tile.cols)));
    Key* const keys = data<Key>(z);
    const auto row_of = [&](int64_t r) { return keys + r * tile.cols; };
    const int64_t anchor_rows = std::clamp(of_rows->anchors() - tile.row, int64_t{0}, tile.rows);
    const int64_t anchor_cols = std::clamp(of_cols->anchors() - tile.col, int64_t{0}, tile.cols);

    std::fill_n(strip_cols.begin(), tile.strips() * tile.cols, Precision::EXCLUDED_KEY);
    parallel_each(tile.strips(), [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      for (int64_t r = begin; r < begin + count; ++r)
        excluded.for_each(tile.row + r, tile.col, tile.col + tile.cols,
                          [&](int64_t c) { row_of(r)[c - tile.col] = Precision::EXCLUDED_SCORE; });
      Precision::maxima(row_of(begin), count, tile.cols, tile.cols, &row_max[begin],
                        &strip_cols[strip * tile.cols]);
      for (int64_t r = begin; r < begin + count; ++r) {
        row_threshold[r] = Precision::NEVER;
        if (r >= anchor_rows) continue;
        of_rows->raise(tile.row + r, row_max[r]);
        row_threshold[r] = of_rows->threshold[tile.row + r];
      }
    });
    std::fill(col_threshold.begin(), col_threshold.end(), Precision::NEVER);
    for (int64_t c = 0; c < anchor_cols; ++c) {
      Key top = Precision::EXCLUDED_KEY;
      for (int64_t strip = 0; strip < tile.strips(); ++strip)
        top = std::max(top, strip_cols[strip * tile.cols + c]);
      of_cols->raise(tile.col + c, top);
      col_threshold[c] = of_cols->threshold[tile.col + c];
    }

    parallel_each(tile.strips(), [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      std::vector<int32_t> row_hits(tile.cols), col_hits(tile.cols);
      strip_hits[strip].clear();
      for (int64_t r = begin; r < begin + count; ++r) {
        int64_t num_row_hits, num_col_hits;
        Precision::scan(row_of(r), tile.cols, row_threshold[r], col_threshold.data(), row_hits.data(),
                        &num_row_hits, col_hits.data(), &num_col_hits);
        for (int64_t h = 0; h < num_row_hits; ++h)
          of_rows->add(tile.row + r, tile.col + row_hits[h], row_of(r)[row_hits[h]]);
        for (int64_t h = 0; h < num_col_hits; ++h)
          strip_hits[strip].push_back({tile.row + r, tile.col + col_hits[h], row_of(r)[col_hits[h]]});
      }
    });
    for (int64_t strip = 0; strip < tile.strips(); ++strip)
      for (const ColumnHit<Key>& hit : strip_hits[strip]) of_cols->add(hit.col, hit.row, hit.key);
  }
}

// Scores the candidates of one side's anchors; false if a score lies outside its proven distance from z,
// which only a GEMM that does not sum in float32 could cause.
template <typename Precision>
bool decide(const Candidates<Precision>& candidates, const Tensor& anchors, const Tensor& others,
            Best<float>* best) {
  const int64_t d = anchors.size(1);
  const float *const anchor = data<float>(anchors), *const rows = data<float>(others);
  std::atomic<bool> proven{true};
  parallel_each(
      candidates.anchors(),
      [&](int64_t a) {
        int64_t other[CAPACITY];
        double z[CAPACITY];
        const float* sources[CAPACITY];
        float score[CAPACITY];
        const int64_t n = candidates.remaining(a, other, z);
        for (int64_t e = 0; e < n; ++e) sources[e] = rows + other[e] * d;
        const float* const self = anchor + a * d;
        kernels<float>().dots(&self, 1, sources, n, d, score, n);
        for (int64_t e = 0; e < n; ++e) {
          const double distance = std::fabs(double(score[e]) - z[e]);
          if (!(distance <= candidates.error[a] + Precision::OUTPUT_ROUNDING * std::fabs(z[e])))
            proven = false;
          best->offer(a, score[e], other[e]);
        }
      },
      GRAIN);
  return proven;
}

// Scores the anchors with too many candidates completely.
template <typename Precision>
void score_overflowed(const Candidates<Precision>& candidates, const Tensor& anchors, const Tensor& others,
                      const ExcludedPairs& excluded, Best<float>* best) {
  const int64_t d = anchors.size(1), n = others.size(0);
  const auto rows_at = [d](const Tensor& x, const std::vector<int64_t>& rows) {
    std::vector<const float*> pointers;
    for (int64_t row : rows) pointers.push_back(data<float>(x) + row * d);
    return pointers;
  };
  const std::vector<int64_t> list = candidates.overflowed();
  std::vector<int64_t> all(n);
  std::iota(all.begin(), all.end(), int64_t{0});
  const std::vector<const float*> self = rows_at(anchors, list), other = rows_at(others, all);
  const int64_t size = list.size();
  parallel_each(divided_up(size, STRIP_ROWS), [&](int64_t strip) {
    const int64_t begin = strip * STRIP_ROWS, count = std::min(STRIP_ROWS, size - begin);
    std::vector<float> s(STRIP_ROWS * PANEL);
    for (int64_t c = 0; c < n; c += PANEL) {
      const int64_t cols = std::min(PANEL, n - c);
      kernels<float>().dots(&self[begin], count, &other[c], cols, d, s.data(), cols);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t a = list[begin + r];
        float* const row = &s[r * cols];
        excluded.for_each(a, c, c + cols, [&](int64_t j) { row[j - c] = EXCLUDED<float>; });
        const float* const top = std::max_element(row, row + cols);  // the first
        if (*top != EXCLUDED<float>) best->offer(a, *top, c + (top - row));
      }
    }
  });
}

template <typename Precision>
bool search(const Batch& batch, const Embeddings<float>& e, BestOfSides<float>* best) {
  constexpr int64_t INT32_LIMIT = int64_t{1} << 31;
  if (e.d >= MAX_SEARCHED_D || std::max(e.n, e.m) >= INT32_LIMIT) return false;

  const SearchOperand images = Precision::operand(e.images), captions = Precision::operand(e.captions);
  Candidates<Precision> of_rows(batch.row_anchors, error_bounds(images, captions, e.d));
  Candidates<Precision> of_cols(batch.column_anchors, error_bounds(captions, images, e.d));
  list_candidates(batch, images, captions, &of_rows, &of_cols);

  // Scoring listed rows and columns separately costs more than everything in one pass from here on.
  const int64_t overflowed = of_rows.overflowed().size() + of_cols.overflowed().size();
  if (2 * overflowed > batch.anchors()) return false;

  BestOfSides<float> found(batch);
  if (!decide(of_rows, e.images, e.captions, &found.rows) ||
      !decide(of_cols, e.captions, e.images, &found.cols))
    return false;
  score_overflowed(of_rows, e.images, e.captions, ExcludedPairs(batch), &found.rows);
  score_overflowed(of_cols, e.captions, e.images, ExcludedPairs(batch, true), &found.cols);
  *best = found;
  return true;
}

double seconds_of_gemm(ScalarType type) {
  constexpr int64_t SIZE = 512;
  Tensor a = empty({SIZE, SIZE}, type), out = empty({SIZE, SIZE}, type);
  torch::stable::zero_(a);
  double best = 1;
  for (int attempt = 0; attempt < 4; ++attempt) {  // the first one warms up
    const auto start = std::chrono::steady_clock::now();
    matmul_into(out, a, transposed(a));
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Where the library multiplies bfloat16 faster than float32 depends on the CPU and on the library: with
// AVX512-BF16 alone AMD's are twice as fast and Intel's half as fast. So it is measured, once (some
// milliseconds). The answer of the search does not depend on it.
bool bfloat16_is_faster() {
  static const bool faster =
      search_kernels() && seconds_of_gemm(ScalarType::BFloat16) < 0.8 * seconds_of_gemm(ScalarType::Float);
  return faster;
}

}  // namespace

bool search_certified(const Batch& batch, const Embeddings<float>& e, std::optional<ScalarType> precision,
                      BestOfSides<float>* best) {
  const ScalarType type = precision              ? *precision
                          : bfloat16_is_faster() ? ScalarType::BFloat16
                                                 : ScalarType::Float;
  if (type == ScalarType::Float) return search<InFloat32>(batch, e, best);
  return search_kernels() && search<InBfloat16>(batch, e, best);
}

}  // namespace fused_vse
