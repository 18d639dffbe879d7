// Implementation of kernels.h for the instruction set of the file that includes it; see there.

#include "vec.h"

namespace {

using fused_vse::EXCLUDED;
using fused_vse::Kernels;
using fused_vse::StripScores;

// MR x NR pairs at a time keep their accumulators in registers (16 of 32 with AVX-512, 8 of 16 without).
constexpr int64_t MR = VEC_BYTES == 64 ? 4 : 2;
constexpr int64_t NR = 4;
// Columns whose rows of b stay in the second-level cache while the rows of a pass by.
constexpr int64_t CACHED_BYTES = 256 * 1024;

struct DotProduct {
  template <typename V>
  static V add(V sum, V a, V b) {
    return sum + a * b;
  }
  template <typename T>
  static T score(T sum) {
    return sum;
  }
};

// -|max(0, b - a)|_2
struct OrderViolation {
  template <typename V>
  static V add(V sum, V a, V b) {
    const V difference = b - a;
    const V positive = difference > V{} ? difference : V{};
    return sum + positive * positive;
  }
  static float score(float sum) { return -__builtin_sqrtf(sum); }
  static double score(double sum) { return -__builtin_sqrt(sum); }
};

// One accumulator a pair, d in ascending order: the result of a pair is the same in every shape.
template <typename T, typename Measure, int64_t M, int64_t N>
inline void pairs_block(const T* const* a, const T* const* b, int64_t d, T* out, int64_t ld) {
  Vec<T> acc[M][N] = {};
  for_each_vec<T>(d, [&](int64_t k, auto access) __attribute__((always_inline)) {
    Vec<T> x[M], y[N];
    for (int64_t i = 0; i < M; ++i) x[i] = access.load(a[i] + k);
    for (int64_t j = 0; j < N; ++j) y[j] = access.load(b[j] + k);
    for (int64_t i = 0; i < M; ++i)
      for (int64_t j = 0; j < N; ++j) acc[i][j] = Measure::add(acc[i][j], x[i], y[j]);
  });
  T sums[M][N];
  horizontal_sums<T, M * N>(acc[0], sums[0]);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j) out[i * ld + j] = Measure::score(sums[i][j]);
}

template <typename T, typename Measure, int64_t M>
inline void pairs_rows(const T* const* a, const T* const* b, int64_t cols, int64_t d, T* out, int64_t ld) {
  int64_t j = 0;
  for (; j + NR <= cols; j += NR) pairs_block<T, Measure, M, NR>(a, b + j, d, out + j, ld);
  for (; j < cols; ++j) pairs_block<T, Measure, M, 1>(a, b + j, d, out + j, ld);
}

template <typename T, typename Measure>
void pairs(const T* const* a, int64_t rows, const T* const* b, int64_t cols, int64_t d, T* out, int64_t ld) {
  const int64_t cached = CACHED_BYTES / static_cast<int64_t>(sizeof(T)) / d / NR * NR + NR;
  for (int64_t j = 0; j < cols; j += cached) {
    const int64_t n = cols - j < cached ? cols - j : cached;
    int64_t i = 0;
    for (; i + MR <= rows; i += MR) pairs_rows<T, Measure, MR>(a + i, b + j, n, d, out + i * ld + j, ld);
    for (; i < rows; ++i) pairs_rows<T, Measure, 1>(a + i, b + j, n, d, out + i * ld + j, ld);
  }
}

// Four rows at a time share what they load.
constexpr int64_t ROWS = 4;
// Sources whose rows stay in the cache while the rows that they are added to pass by.
constexpr int64_t SOURCES = 32;

template <typename T, bool IMAGES, int64_t R>
inline void order_sums_rows(const T* own, const T* const* sources, int64_t n, int64_t d, const T* weights,
                            int64_t own_stride, int64_t source_stride, T* out) {
  const Vec<T> zero = {};
  for_each_vec<T>(d, [&](int64_t k, auto access) __attribute__((always_inline)) {
    Vec<T> x[R], acc[R];
    for (int64_t i = 0; i < R; ++i) {
      x[i] = access.load(own + i * d + k);
      acc[i] = access.load(out + i * d + k);
    }
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> y = access.load(sources[j] + k);
      for (int64_t i = 0; i < R; ++i) {
        const T weight = weights[i * own_stride + j * source_stride];
        const Vec<T> difference = IMAGES ? y - x[i] : x[i] - y;
        acc[i] += (difference > zero ? difference : zero) * (IMAGES ? weight : -weight);
      }
    }
    for (int64_t i = 0; i < R; ++i) access.store(out + i * d + k, acc[i]);
  });
}

template <typename T, bool IMAGES>
void order_sums(const T* own, int64_t rows, const T* const* sources, int64_t n, int64_t d, const T* weights,
                int64_t own_stride, int64_t source_stride, T* out) {
  for (int64_t j = 0; j < n; j += SOURCES) {
    const int64_t count = n - j < SOURCES ? n - j : SOURCES;
    const T* const w = weights + j * source_stride;
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      order_sums_rows<T, IMAGES, ROWS>(own + i * d, sources + j, count, d, w + i * own_stride, own_stride,
                                       source_stride, out + i * d);
    for (; i < rows; ++i)
      order_sums_rows<T, IMAGES, 1>(own + i * d, sources + j, count, d, w + i * own_stride, own_stride,
                                    source_stride, out + i * d);
  }
}

template <typename T>
void weighted_sum(const T* weights, const T* const* sources, int64_t n, int64_t d, T* out) {
  for_each_vec<T>(d, [&](int64_t k, auto access) {
    Vec<T> acc = {};
    for (int64_t i = 0; i < n; ++i) acc += weights[i] * access.load(sources[i] + k);
    access.store(out + k, acc);
  });
}

// The bits of |x| as an integer order like |x|, and every NaN above infinity: no maximum drops one. Four
// maxima at a time, or each would wait for the one before.
template <typename T>
T max_abs(const T* x, int64_t n) {
  using Int = IntVec<T>;
  using Scalar = std::remove_reference_t<decltype(Int{}[0])>;
  const Int magnitude = Int{} + std::numeric_limits<Scalar>::max();
  Int best[4] = {};
  const auto raise = [&](int64_t i, Vec<T> v) __attribute__((always_inline)) {
    const Int bits = (Int)v & magnitude;
    best[i] = bits > best[i] ? bits : best[i];
  };
  int64_t k = 0;
  for (; k + 4 * LANES<T> <= n; k += 4 * LANES<T>)
    for (int64_t i = 0; i < 4; ++i) raise(i, Whole<T>{}.load(x + k + i * LANES<T>));
  for_each_vec<T>(n - k, [&](int64_t c, auto access) { raise(0, access.load(x + k + c)); });
  Scalar top = 0;
  for (const Int& v : best)
    for (int64_t l = 0; l < LANES<T>; ++l) top = v[l] > top ? v[l] : top;
  T result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

// The scores that count for an anchor of the strip's rows, or of its columns.
template <typename T, bool CEILED>
inline Vec<T> of_row(Vec<T> s, const StripScores<T>& strip, int64_t r) {
  if constexpr (CEILED) s = s <= strip.row_ceiling[r] ? s : broadcast<T>(EXCLUDED<T>);
  return s;
}

template <typename T, bool CEILED, typename Access>
inline Vec<T> of_column(Vec<T> s, const StripScores<T>& strip, int64_t c, Access access) {
  if constexpr (CEILED) s = s <= access.load(strip.col_ceiling + c) ? s : broadcast<T>(EXCLUDED<T>);
  return s;
}

// body(r) with std::true_type where the strip has ceilings: the loop without them is one of its own.
template <typename T, typename Body>
inline auto with_ceilings(const StripScores<T>& strip, const Body& body) {
  return strip.row_ceiling ? body(std::true_type{}) : body(std::false_type{});
}

template <typename T, bool CEILED, int64_t R>
inline void maxima_rows(const StripScores<T>& strip, int64_t row, T* row_max, T* col_max) {
  const T* const s_row = strip.row(row);
  const int64_t ld = strip.ld;
  Vec<T> best[R];
  for (int64_t r = 0; r < R; ++r) best[r] = broadcast<T>(EXCLUDED<T>);
  for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
    Vec<T> column = access.load(col_max + c, EXCLUDED<T>);
    for (int64_t r = 0; r < R; ++r) {
      const Vec<T> s = access.load(s_row + r * ld + c, EXCLUDED<T>);
      best[r] = max<T>(best[r], of_row<T, CEILED>(s, strip, row + r));
      column = max<T>(column, of_column<T, CEILED>(s, strip, c, access));
    }
    access.store(col_max + c, column);
  });
  for (int64_t r = 0; r < R; ++r) row_max[row + r] = horizontal_max<T>(best[r]);
}

template <typename T>
void maxima(const StripScores<T>& strip, T* row_max, T* col_max) {
  with_ceilings(strip, [&](auto ceiled) {
    int64_t r = 0;
    for (; r + ROWS <= strip.rows; r += ROWS) maxima_rows<T, ceiled, ROWS>(strip, r, row_max, col_max);
    for (; r < strip.rows; ++r) maxima_rows<T, ceiled, 1>(strip, r, row_max, col_max);
  });
}

// Hits are rare: a branch for SCANNED registers at a time.
constexpr int64_t SCANNED = 8;

template <typename T>
void scan(const T* row, int64_t cols, T row_threshold, const T* col_threshold, int32_t* row_hits,
          int64_t* num_row_hits, int32_t* col_hits, int64_t* num_col_hits) {
  int64_t n_row = 0, n_col = 0;
  for (int64_t begin = 0; begin < cols; begin += SCANNED * LANES<T>) {
    const int64_t n = cols - begin < SCANNED * LANES<T> ? cols - begin : SCANNED * LANES<T>;
    IntVec<T> hits = {};
    for_each_vec<T>(n, [&](int64_t k, auto access) __attribute__((always_inline)) {
      const Vec<T> s = access.load(row + begin + k, std::numeric_limits<T>::lowest());
      hits |= (s >= row_threshold) | (s >= access.load(col_threshold + begin + k));
    });
    bool any = false;
    for (int64_t k = 0; k < LANES<T>; ++k) any |= hits[k] != 0;
    if (__builtin_expect(!any, 1)) continue;
    for (int64_t c = begin; c < begin + n; ++c) {
      if (row[c] >= row_threshold) row_hits[n_row++] = static_cast<int32_t>(c);
      if (row[c] >= col_threshold[c]) col_hits[n_col++] = static_cast<int32_t>(c);
    }
  }
  *num_row_hits = n_row;
  *num_col_hits = n_col;
}

// exp(scale x) = power(exponent(x, unit)), a power of two. In double, scale log2(e) is hi + lo: one rounding
// of the exponent is all that is lost, as in what the results are compared with.
template <typename T>
struct Unit {
  static constexpr double LOG2_E = 1.4426950408889634, LOG2_E_REST = 2.0355273740931033e-17;
  explicit Unit(double scale)
      : hi(T(scale * LOG2_E)),
        lo(sizeof(T) == 4 ? 0 : T(__builtin_fma(scale, LOG2_E, -scale * LOG2_E) + scale * LOG2_E_REST)) {}
  T hi, lo;
};

// The least exponent gives 0.
template <typename T>
inline Vec<T> exponent(Vec<T> x, Unit<T> unit) {
  Vec<T> y = x * unit.hi;
  if constexpr (sizeof(T) == 8) y += x * unit.lo;
  return max<T>(y, broadcast<T>(sizeof(T) == 4 ? T(-127) : T(-1076)));
}

// 2^x with at most 1 ulp of error in [-126, 127], x >= -127. 2^x = 2^n 2^f, f in [-1/2, 1/2], and a minimax
// polynomial of 2^f (relative error 2e-9; the coefficients are a Chebyshev fit).
inline Vec<float> power(Vec<float> x) {
  const Vec<float> shift = broadcast<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x + shift;
  const Vec<float> f = x - (shifted - shift);
  Vec<float> p = broadcast<float>(1.54614446986e-4f);
  p = p * f + 1.34004281776e-3f;
  p = p * f + 9.61805667852e-3f;
  p = p * f + 5.55032721662e-2f;
  p = p * f + 2.40226509223e-1f;
  p = p * f + 6.93147206703e-1f;
  p = p * f + 1.0f;
  const IntVec<float> n = (IntVec<float>)shifted - (IntVec<float>)shift;
  return p * (Vec<float>)((n + 127) << 23);
}

inline Vec<double> power(Vec<double> x) {
  Vec<double> y;
  for (int64_t k = 0; k < LANES<double>; ++k) y[k] = __builtin_exp2(x[k]);
  return y;
}

template <typename T>
void exp_sums(const StripScores<T>& strip, double scale, const T* row_max, const T* col_max, T* row_sum,
              T* col_sum) {
  const Unit<T> unit(scale);
  with_ceilings(strip, [&](auto ceiled) {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const T* const row = strip.row(r);
      const T reference = row_max[r];
      Vec<T> sum = {};
      for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
        const Vec<T> s = access.load(row + c, EXCLUDED<T>);
        sum += power(exponent<T>(of_row<T, ceiled>(s, strip, r) - reference, unit));
        const Vec<T> in_column = of_column<T, ceiled>(s, strip, c, access) - access.load(col_max + c);
        access.store(col_sum + c, access.load(col_sum + c) + power(exponent<T>(in_column, unit)));
      });
      row_sum[r] = horizontal_sum<T>(sum);
    }
  });
}

template <typename T>
double exp_gradient(const StripScores<T>& strip, double scale, const T* row_reference, const T* row_weight,
                    const T* col_reference, const T* col_weight, T* g, int64_t ld_g) {
  const Unit<T> unit(scale);
  double total = 0;
  with_ceilings(strip, [&](auto ceiled) {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const T* const row = strip.row(r);
      const T reference = row_reference[r], weight = row_weight[r];
      Vec<T> sum = {};
      for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
        // What lies beyond the row must vanish: with 0 its exponential may be infinite.
        const Vec<T> s = access.load(row + c, EXCLUDED<T>);
        const Vec<T> x = exponent<T>(of_row<T, ceiled>(s, strip, r) - reference, unit);
        const Vec<T> in_column = of_column<T, ceiled>(s, strip, c, access) - access.load(col_reference + c);
        const Vec<T> y = exponent<T>(in_column, unit);
        const Vec<T> from_row = power(x) * weight, from_col = power(y) * access.load(col_weight + c);
        sum += from_row * x + from_col * y;
        access.store(g + r * ld_g + c, from_row + from_col);
      });
      total += horizontal_sum<T>(sum);
    }
  });
  return total / unit.hi;
}

template <typename T>
void hinge_sums(const StripScores<T>& strip, const T* row_threshold, const T* col_threshold, T* row_sum,
                T* row_count, T* col_sum, T* col_count) {
  const Vec<T> zero = {}, one = broadcast<T>(1);
  with_ceilings(strip, [&](auto ceiled) {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const T* const row = strip.row(r);
      const T threshold = row_threshold[r];
      Vec<T> sum = {}, count = {};
      for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
        const Vec<T> s = access.load(row + c, EXCLUDED<T>);
        const Vec<T> x = of_row<T, ceiled>(s, strip, r) - threshold;
        sum += x > zero ? x : zero;
        count += x > zero ? one : zero;
        const Vec<T> y = of_column<T, ceiled>(s, strip, c, access) - access.load(col_threshold + c);
        access.store(col_sum + c, access.load(col_sum + c) + (y > zero ? y : zero));
        access.store(col_count + c, access.load(col_count + c) + (y > zero ? one : zero));
      });
      row_sum[r] = horizontal_sum<T>(sum);
      row_count[r] = horizontal_sum<T>(count);
    }
  });
}

template <typename T>
void hinge_gradient(const StripScores<T>& strip, const T* row_threshold, const T* row_weight,
                    const T* col_threshold, const T* col_weight, T* g, int64_t ld_g) {
  const Vec<T> zero = {};
  with_ceilings(strip, [&](auto ceiled) {
    for (int64_t r = 0; r < strip.rows; ++r) {
      const T* const row = strip.row(r);
      const T threshold = row_threshold[r];
      const Vec<T> weight = broadcast<T>(row_weight[r]);
      for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
        const Vec<T> s = access.load(row + c, EXCLUDED<T>);
        const Vec<T> x = of_row<T, ceiled>(s, strip, r) - threshold;
        const Vec<T> y = of_column<T, ceiled>(s, strip, c, access) - access.load(col_threshold + c);
        access.store(g + r * ld_g + c,
                     (x > zero ? weight : zero) + (y > zero ? access.load(col_weight + c) : zero));
      });
    }
  });
}

// log(1 + y) for y in [0, 1], by 2 atanh(y / (2 + y)): exact to rounding however small y is.
inline Vec<float> log1p(Vec<float> y) {
  const Vec<float> z = y / (y + 2), u = z * z;
  Vec<float> p = broadcast<float>(1 / 13.0f);
  for (const float c : {1 / 11.0f, 1 / 9.0f, 1 / 7.0f, 1 / 5.0f, 1 / 3.0f, 1.0f}) p = p * u + c;
  return 2 * z * p;
}

inline Vec<double> log1p(Vec<double> y) {
  for (int64_t k = 0; k < LANES<double>; ++k) y[k] = __builtin_log1p(y[k]);
  return y;
}

// log(1 + exp(x)) and its derivative.
template <typename T>
struct Softplus {
  explicit Softplus(Vec<T> x) {
    const Vec<T> zero = {}, y = power(exponent<T>(x > zero ? -x : x, Unit<T>(1)));
    value = max<T>(x, zero) + log1p(y);
    slope = (x > zero ? broadcast<T>(1) : y) / (y + 1);
  }
  Vec<T> value, slope;
};

template <typename T>
void softplus_sums(const StripScores<T>& strip, double scale, double bias, T* row_sum, T* row_slope,
                   T* col_sum, T* col_slope) {
  const Vec<T> a = broadcast<T>(T(scale)), b = broadcast<T>(T(bias));
  for (int64_t r = 0; r < strip.rows; ++r) {
    Vec<T> sum = {}, slopes = {};
    for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
      const Softplus<T> f(access.load(strip.row(r) + c, EXCLUDED<T>) * a + b);
      sum += f.value;
      slopes += f.slope;
      access.store(col_sum + c, access.load(col_sum + c) + f.value);
      access.store(col_slope + c, access.load(col_slope + c) + f.slope);
    });
    row_sum[r] = horizontal_sum<T>(sum);
    row_slope[r] = horizontal_sum<T>(slopes);
  }
}

template <typename T>
double softplus_gradient(const StripScores<T>& strip, double scale, double bias, const T* row_weight,
                         const T* col_weight, T* g, int64_t ld_g) {
  const Vec<T> a = broadcast<T>(T(scale)), b = broadcast<T>(T(bias));
  double total = 0;
  for (int64_t r = 0; r < strip.rows; ++r) {
    Vec<T> sum = {};
    for_each_vec<T>(strip.cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
      const Vec<T> s = access.load(strip.row(r) + c, EXCLUDED<T>);
      const Vec<T> q = Softplus<T>(s * a + b).slope * (access.load(col_weight + c) + row_weight[r]);
      sum += q * s;
      access.store(g + r * ld_g + c, q);
    });
    total += horizontal_sum<T>(sum);
  }
  return total;
}

template <typename T>
constexpr Kernels<T> TABLE = {
    pairs<T, DotProduct>,
    pairs<T, OrderViolation>,
    order_sums<T, true>,
    order_sums<T, false>,
    weighted_sum<T>,
    max_abs<T>,
    maxima<T>,
    scan<T>,
    exp_sums<T>,
    exp_gradient<T>,
    hinge_sums<T>,
    hinge_gradient<T>,
    softplus_sums<T>,
    softplus_gradient<T>,
};

}  // namespace
