// The two precisions in which the certified search multiplies: what it needs to know of each.
//
// A key is a score of the tile in a type whose order is that of the scores.
#pragma once

#include <cmath>
#include <cstring>

#include "tiles.h"

namespace fused_vse {

constexpr int64_t MAX_SEARCHED_D = 1 << 16;  // the norms' slack below is proven up to it

// One side's rows as the GEMM takes them, and per row |x|, |x^| and |x - x^|, each rounded up.
struct SearchOperand {
  Tensor rows;  // [size, d]
  std::vector<double> norm, rounded_norm, error_norm;
};

// A float32 sum of d squares is off by less than 2^-8 relative, and by 2^-126 a term where they underflow.
inline double norm_above(float squares, int64_t d) {
  return std::sqrt(double(squares)) * (1 + 0x1p-8) + std::sqrt(double(d)) * 0x1p-63;
}

struct InFloat32 {
  using Key = float;
  static constexpr ScalarType TYPE = ScalarType::Float;
  static constexpr double OUTPUT_ROUNDING = 0;
  static constexpr Key EXCLUDED_SCORE = EXCLUDED<float>, EXCLUDED_KEY = EXCLUDED<float>;
  static constexpr Key NEVER = std::numeric_limits<float>::infinity();

  static double number_of(Key key) { return key; }
  static Key key_below(double x) {
    constexpr Key infinity = std::numeric_limits<float>::infinity();
    return std::max(std::nextafter(static_cast<float>(x), -infinity), std::nextafter(EXCLUDED_KEY, infinity));
  }

  static SearchOperand operand(const Tensor& x) {
    const int64_t size = x.size(0), d = x.size(1);
    std::vector<double> norm(size);
    parallel_each(
        size,
        [&](int64_t i) {
          const float* row = data<float>(x) + i * d;
          float squares;
          kernels<float>().dots(&row, 1, &row, 1, d, &squares, 1);
          norm[i] = norm_above(squares, d);
        },
        GRAIN);
    return {x, norm, norm, std::vector<double>(size)};
  }

  static void maxima(Key* tile, int64_t rows, int64_t cols, int64_t ld, Key* row_max, Key* col_max) {
    kernels<float>().maxima({tile, rows, cols, ld}, row_max, col_max);
  }
  static void scan(const Key* row, int64_t cols, Key row_threshold, const Key* col_threshold,
                   int32_t* row_hits, int64_t* num_row_hits, int32_t* col_hits, int64_t* num_col_hits) {
    kernels<float>().scan(row, cols, row_threshold, col_threshold, row_hits, num_row_hits, col_hits,
                          num_col_hits);
  }
};

// Only where there are search_kernels().
struct InBfloat16 {
  using Key = int16_t;
  static constexpr ScalarType TYPE = ScalarType::BFloat16;
  static constexpr double OUTPUT_ROUNDING = 0x1p-8 * 1.01;
  static constexpr Key EXCLUDED_SCORE = static_cast<Key>(0xff80);  // the bits of -inf,
  static constexpr Key EXCLUDED_KEY = -32641;                      // and their key
  static constexpr Key NEVER = 32767;                              // above the key of every number

  static double number_of(Key key) {
    const uint16_t bits = static_cast<uint16_t>(key ^ ((key >> 15) & 0x7fff));
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
  }
  // One step down for the rounding to float32, and one for the truncation, which raises a negative number.
  static Key key_below(double x) {
    const float f = static_cast<float>(x);
    uint32_t wide;
    std::memcpy(&wide, &f, sizeof(wide));
    int16_t bits;
    const uint16_t high = static_cast<uint16_t>(wide >> 16);
    std::memcpy(&bits, &high, sizeof(bits));
    const int key = static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7fff));
    return static_cast<Key>(std::max(key - 2, EXCLUDED_KEY + 1));
  }

  static SearchOperand operand(const Tensor& x) {
    const int64_t size = x.size(0), d = x.size(1);
    SearchOperand result{empty({size, d}, TYPE), std::vector<double>(size), std::vector<double>(size),
                         std::vector<double>(size)};
    parallel_each(
        size,
        [&](int64_t i) {
          float squares, rounded_squares, error_squares;
          search_kernels()->quantize(data<float>(x) + i * d, d, data<uint16_t>(result.rows) + i * d, &squares,
                                     &rounded_squares, &error_squares);
          result.norm[i] = norm_above(squares, d);
          result.rounded_norm[i] = norm_above(rounded_squares, d);
          result.error_norm[i] = norm_above(error_squares, d);
        },
        GRAIN);
    return result;
  }

  // Turns the scores of the tile into keys, in place.
  static void maxima(Key* tile, int64_t rows, int64_t cols, int64_t ld, Key* row_max, Key* col_max) {
    search_kernels()->maxima(tile, rows, cols, ld, row_max, col_max);
  }
  static void scan(const Key* row, int64_t cols, Key row_threshold, const Key* col_threshold,
                   int32_t* row_hits, int64_t* num_row_hits, int32_t* col_hits, int64_t* num_col_hits) {
    search_kernels()->scan(row, cols, row_threshold, col_threshold, row_hits, num_row_hits, col_hits,
                           num_col_hits);
  }
};

}  // namespace fused_vse
