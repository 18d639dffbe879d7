// The hardest negatives by a bfloat16 GEMM, with the float32 answer proven.
//
// I^ and T^ are I and T rounded to bfloat16, and z_ij the bfloat16 result of a library GEMM on them. The
// score c_ij that decides is the float32 sum of Kernels::dots. By Cauchy-Schwarz, with g = (d + 64) 2^-23
// for either float32 summation in any order and with any rounding,
//
//   |c_ij - z_ij| <= E_i + 2^-8 |z_ij|            (the last term: the rounding of z itself)
//   E_i = |I_i - I^_i| max|T| + |I^_i| max|T - T^| + g (|I^_i| max|T^| + |I_i| max|T|) + d 2^-120
//
// (the last term: products that underflow). So the column of the largest c is among those with
//
//   z_ij + 2^-8 |z_ij| + E_i >= max_j z - 2^-8 |max_j z| - E_i,        i.e. z_ij >= threshold_i,
//
// and likewise for columns. These few are scored by Kernels::dots; the largest wins, ties go to the
// smallest index. While the tiles pass by, the maxima so far give thresholds that are too low but never
// too high. Rows and columns with more than CAPACITY candidates are scored completely.
//
//   for each tile of S:                         one bfloat16 GEMM
//     for each strip of it, in parallel:        maxima of the tile's rows and columns
//     raise the maxima and thresholds
//     for each strip of it, in parallel:        list the entries above their row's or column's threshold
//   for each row and column, in parallel:       score its candidates
#include <atomic>
#include <cmath>
#include <cstring>

#include "hardest.h"

namespace fused_vse {
namespace {

constexpr int64_t CAPACITY = 64;
constexpr int64_t MAX_D = 1 << 16;  // the norms' slack is proven below it (search.inl)

constexpr int16_t NEVER = 32767;              // above the key of every number
constexpr int16_t KEY_OF_MINUS_INF = -32641;  // excluded entries
constexpr uint16_t BITS_OF_MINUS_INF = 0xff80;
constexpr double OUTPUT_ROUNDING = 0x1p-8 * 1.01;

float number_of(int16_t key) {
  const uint16_t bits = static_cast<uint16_t>(key ^ ((key >> 15) & 0x7fff));
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

// The key of a bfloat16 number below x: one step down for the rounding to float32, and one for the
// truncation, which raises a negative number.
int16_t key_below(double x) {
  const float f = static_cast<float>(x);
  uint32_t wide;
  std::memcpy(&wide, &f, sizeof(wide));
  int16_t bits;
  const uint16_t high = static_cast<uint16_t>(wide >> 16);
  std::memcpy(&bits, &high, sizeof(bits));
  const int key = static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7fff));
  return static_cast<int16_t>(std::max(key - 2, KEY_OF_MINUS_INF + 1));
}

int16_t threshold_of(int16_t max_key, double error) {
  if (max_key <= KEY_OF_MINUS_INF) return NEVER;
  const double top = number_of(max_key);
  const double reach = top - OUTPUT_ROUNDING * std::fabs(top) - 2 * error;
  return key_below(reach / (reach >= 0 ? 1 + OUTPUT_ROUNDING : 1 - OUTPUT_ROUNDING));
}

// One side's rows rounded to bfloat16, and the norms that bound the error.
struct Quantized {
  Quantized(const Tensor& x, const SearchKernels& k)
      : rows(empty({x.size(0), x.size(1)}, ScalarType::BFloat16)),
        norm(x.size(0)),
        rounded_norm(x.size(0)),
        error_norm(x.size(0)) {
    const int64_t d = x.size(1);
    parallel_each(
        x.size(0),
        [&](int64_t i) {
          k.quantize(data<float>(x) + i * d, d, data<uint16_t>(rows) + i * d, &norm[i], &rounded_norm[i],
                     &error_norm[i]);
        },
        Problem<float>::GRAIN);
  }

  // E of every row of this side against all rows of the other.
  std::vector<double> bound(const Quantized& other, int64_t d) const {
    const auto top = [](const std::vector<double>& x) { return *std::max_element(x.begin(), x.end()); };
    const double summation = double(d + 64) * 0x1p-23;
    const double max_norm = top(other.norm), max_rounded = top(other.rounded_norm);
    const double max_error = top(other.error_norm);
    std::vector<double> bound(norm.size());
    for (size_t i = 0; i < bound.size(); ++i)
      bound[i] = 1.000001 * (error_norm[i] * max_norm + rounded_norm[i] * max_error +
                             summation * (rounded_norm[i] * max_rounded + norm[i] * max_norm)) +
                 double(d) * 0x1p-120;
    return bound;
  }

  Tensor rows;  // [size, d] bfloat16
  std::vector<double> norm, rounded_norm, error_norm;
};

// The candidates of every anchor of one side.
class Candidates {
 public:
  Candidates(int64_t anchors, std::vector<double> error)
      : error(std::move(error)),
        max_key(anchors, KEY_OF_MINUS_INF),
        threshold(anchors, NEVER),
        count_(anchors),
        overflowed_(anchors),
        entries_(new Entry[anchors * CAPACITY]) {}

  int64_t anchors() const { return static_cast<int64_t>(count_.size()); }
  bool overflowed(int64_t a) const { return overflowed_[a]; }

  void raise(int64_t a, int16_t key) {
    if (key <= max_key[a]) return;
    max_key[a] = key;
    if (!overflowed_[a]) threshold[a] = threshold_of(key, error[a]);
  }

  void add(int64_t a, int64_t other, int16_t key) {
    if (overflowed_[a] || key < threshold[a]) return;
    if (count_[a] == CAPACITY) drop_outdated(a);
    if (count_[a] == CAPACITY) {
      overflowed_[a] = 1;
      threshold[a] = NEVER;
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
      z[n++] = double(number_of(entries_[e].key));
    }
    return n;
  }

  std::vector<double> error;
  std::vector<int16_t> max_key, threshold;

 private:
  struct Entry {
    int32_t other;
    int16_t key;
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

struct ColumnHit {
  int64_t row, col;
  int16_t key;
};

void list_candidates(const Problem<float>& problem, const SearchKernels& k, const Quantized& images,
                     const Quantized& captions, Candidates* of_rows, Candidates* of_cols) {
  const int64_t width = std::min(TILE_COLS, problem.m), height = std::min(TILE_ROWS, problem.n);
  const Tensor buffer = empty({height * width}, ScalarType::BFloat16);
  std::vector<int16_t> row_max(height), row_threshold(height), col_threshold(width);
  std::vector<int16_t> strip_cols(TILE_ROWS / STRIP_ROWS * width);
  std::vector<std::vector<ColumnHit>> strip_hits(TILE_ROWS / STRIP_ROWS);

  for (const Tile& tile : tiles_of(problem.n, problem.m, problem.k)) {
    Tensor z = torch::stable::view(rows_of(buffer, 0, tile.rows * tile.cols), {tile.rows, tile.cols});
    matmul_into(z, rows_of(images.rows, tile.row, tile.rows),
                transposed(rows_of(captions.rows, tile.col, tile.cols)));
    int16_t* const keys = data<int16_t>(z);
    const auto row_of = [&](int64_t r) { return keys + r * tile.cols; };
    const int64_t anchor_rows = std::max(int64_t{0}, std::min(tile.rows, problem.k - tile.row));
    const int64_t anchor_cols = std::max(int64_t{0}, std::min(tile.cols, problem.k - tile.col));

    std::fill_n(strip_cols.begin(), tile.strips() * tile.cols, KEY_OF_MINUS_INF);
    parallel_each(tile.strips(), [&](int64_t strip) {
      const int64_t begin = tile.strip_begin(strip), count = tile.strip_rows(strip);
      for (int64_t r = begin; r < begin + count; ++r)
        problem.excluded.for_each(tile.row + r, tile.col, tile.col + tile.cols, [&](int64_t c) {
          std::memcpy(row_of(r) + c - tile.col, &BITS_OF_MINUS_INF, sizeof(uint16_t));
        });
      k.maxima(row_of(begin), count, tile.cols, tile.cols, &row_max[begin], &strip_cols[strip * tile.cols]);
      for (int64_t r = begin; r < begin + count; ++r) {
        row_threshold[r] = NEVER;
        if (r >= anchor_rows) continue;
        of_rows->raise(tile.row + r, row_max[r]);
        row_threshold[r] = of_rows->threshold[tile.row + r];
      }
    });
    std::fill(col_threshold.begin(), col_threshold.end(), NEVER);
    for (int64_t c = 0; c < anchor_cols; ++c) {
      int16_t top = KEY_OF_MINUS_INF;
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
        k.scan(row_of(r), tile.cols, row_threshold[r], col_threshold.data(), row_hits.data(), &num_row_hits,
               col_hits.data(), &num_col_hits);
        for (int64_t h = 0; h < num_row_hits; ++h)
          of_rows->add(tile.row + r, tile.col + row_hits[h], row_of(r)[row_hits[h]]);
        for (int64_t h = 0; h < num_col_hits; ++h)
          strip_hits[strip].push_back({tile.row + r, tile.col + col_hits[h], row_of(r)[col_hits[h]]});
      }
    });
    for (int64_t strip = 0; strip < tile.strips(); ++strip)
      for (const ColumnHit& hit : strip_hits[strip]) of_cols->add(hit.col, hit.row, hit.key);
  }
}

// Scores the candidates of one side's anchors; false if a score lies outside its proven distance from z,
// which only a GEMM that does not sum in float32 could cause.
bool decide(const Candidates& candidates, const Tensor& anchors, const Tensor& others, Best<float>* best) {
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
          if (!(distance <= candidates.error[a] + OUTPUT_ROUNDING * std::fabs(z[e]))) proven = false;
          best->offer(a, score[e], other[e]);
        }
      },
      Problem<float>::GRAIN);
  return proven;
}

std::vector<int64_t> overflowed(const Candidates& candidates) {
  std::vector<int64_t> list;
  for (int64_t a = 0; a < candidates.anchors(); ++a)
    if (candidates.overflowed(a)) list.push_back(a);
  return list;
}

}  // namespace

bool search_certified(const Problem<float>& problem, Best<float>* best_of_rows, Best<float>* best_of_cols) {
  const SearchKernels* const k = search_kernels();
  constexpr int64_t INT32_LIMIT = int64_t{1} << 31;
  if (!k || problem.d >= MAX_D || std::max(problem.n, problem.m) >= INT32_LIMIT) return false;

  const Quantized images(problem.images, *k), captions(problem.captions, *k);
  Candidates of_rows(problem.k, images.bound(captions, problem.d));
  Candidates of_cols(problem.k, captions.bound(images, problem.d));
  list_candidates(problem, *k, images, captions, &of_rows, &of_cols);

  // Scoring listed rows and columns separately costs more than everything in one pass from here on.
  const auto rows = overflowed(of_rows), cols = overflowed(of_cols);
  if (static_cast<int64_t>(rows.size() + cols.size()) > problem.k) return false;

  const bool proven = decide(of_rows, problem.images, problem.captions, best_of_rows) &&
                      decide(of_cols, problem.captions, problem.images, best_of_cols);
  if (!proven) return false;

  std::vector<int64_t> all(std::max(problem.n, problem.m));
  std::iota(all.begin(), all.end(), int64_t{0});
  const std::vector<int64_t> all_rows(all.begin(), all.begin() + problem.n);
  const std::vector<int64_t> all_cols(all.begin(), all.begin() + problem.m);
  search_exactly<float>(problem, rows, all_cols, best_of_rows, nullptr);
  search_exactly<float>(problem, all_rows, cols, nullptr, best_of_cols);
  return true;
}

}  // namespace fused_vse
