// Implementation of kernels.h for the instruction set of the file that includes it; see there.

#include "vec.h"

namespace {

using fused_vse::Kernels;

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

// The bits of |x| as an integer order like |x|, and every NaN above infinity: no maximum drops one.
template <typename T>
T max_abs(const T* x, int64_t n) {
  using Int = IntVec<T>;
  using Scalar = std::remove_reference_t<decltype(Int{}[0])>;
  const Int magnitude = Int{} + std::numeric_limits<Scalar>::max();
  Int best = {};
  for_each_vec<T>(n, [&](int64_t k, auto access) {
    const Int bits = (Int)access.load(x + k) & magnitude;
    best = bits > best ? bits : best;
  });
  auto top = best[0];
  for (int64_t k = 1; k < LANES<T>; ++k) top = best[k] > top ? best[k] : top;
  T result;
  std::memcpy(&result, &top, sizeof(result));
  return result;
}

constexpr double NORM_EPS = 1e-12;  // as torch.nn.functional.normalize

template <typename T>
double squared_norm(const T* x, int64_t d, double scale) {
  double lanes[8] = {};  // float32 squares would overflow above 1e19
  const auto square = [&](int64_t k) {
    const double y = double(x[k]) * scale;
    return y * y;
  };
  int64_t k = 0;
  for (; k + 8 <= d; k += 8)
    for (int64_t l = 0; l < 8; ++l) lanes[l] += square(k + l);
  for (int64_t l = 0; k < d; ++k, ++l) lanes[l] += square(k);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Where the squares overflow double, or the inverse norm is no normal T, a power of two takes the row near 1.
template <typename T>
T normalize(const T* x, int64_t d, T* y) {
  constexpr bool is_double = sizeof(T) == 8;
  constexpr double huge = is_double ? 0x1p1000 : 0x1p200, shrink = is_double ? 0x1p-530 : 0x1p-100;
  double scale = 1, squares = squared_norm(x, d, 1);
  if (squares > huge) scale = shrink, squares = squared_norm(x, d, shrink);
  const double norm = __builtin_sqrt(squares);
  const T factor = T(scale), inverse = T(1.0 / (norm < NORM_EPS ? NORM_EPS : norm));
  for_each_vec<T>(
      d, [&](int64_t k, auto access) { access.store(y + k, access.load(x + k) * factor * inverse); });
  return factor * inverse;
}

template <typename T>
void normalize_backward(const T* dy, const T* y, T inverse_norm, int64_t d, T* dx) {
  Vec<T> acc = {};
  for_each_vec<T>(d, [&](int64_t k, auto access) { acc += access.load(y + k) * access.load(dy + k); });
  const bool shorter_than_eps = inverse_norm >= T(1.0 / NORM_EPS);
  const T projection = shorter_than_eps ? T(0) : horizontal_sum<T>(acc);
  for_each_vec<T>(d, [&](int64_t k, auto access) {
    access.store(dx + k, (access.load(dy + k) - access.load(y + k) * projection) * inverse_norm);
  });
}

template <typename T, int64_t R>
inline void maxima_rows(const T* tile, int64_t cols, int64_t ld, T* row_max, T* col_max) {
  constexpr T lowest = std::numeric_limits<T>::lowest();
  Vec<T> best[R];
  for (int64_t r = 0; r < R; ++r) best[r] = broadcast<T>(lowest);
  for_each_vec<T>(cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
    Vec<T> column = access.load(col_max + c, lowest);
    for (int64_t r = 0; r < R; ++r) {
      const Vec<T> s = access.load(tile + r * ld + c, lowest);
      best[r] = max<T>(best[r], s);
      column = max<T>(column, s);
    }
    access.store(col_max + c, column);
  });
  for (int64_t r = 0; r < R; ++r) row_max[r] = horizontal_max<T>(best[r]);
}

template <typename T>
void maxima(const T* tile, int64_t rows, int64_t cols, int64_t ld, T* row_max, T* col_max) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) maxima_rows<T, ROWS>(tile + r * ld, cols, ld, row_max + r, col_max);
  for (; r < rows; ++r) maxima_rows<T, 1>(tile + r * ld, cols, ld, row_max + r, col_max);
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

constexpr double LOG2_E = 1.4426950408889634;

// 2^x with at most 1 ulp of error in [-126, 127]; 0 below. 2^x = 2^n 2^f, f in [-1/2, 1/2], and a minimax
// polynomial of 2^f (relative error 2e-9; the coefficients are a Chebyshev fit).
inline Vec<float> exp2(Vec<float> x) {
  const Vec<float> shift = broadcast<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> clamped = max<float>(x, broadcast<float>(-126.0f));
  const Vec<float> shifted = clamped + shift;
  const Vec<float> f = clamped - (shifted - shift);
  Vec<float> p = broadcast<float>(1.54614446986e-4f);
  p = p * f + 1.34004281776e-3f;
  p = p * f + 9.61805667852e-3f;
  p = p * f + 5.55032721662e-2f;
  p = p * f + 2.40226509223e-1f;
  p = p * f + 6.93147206703e-1f;
  p = p * f + 1.0f;
  const IntVec<float> n = (IntVec<float>)shifted - (IntVec<float>)shift;
  const Vec<float> power = (Vec<float>)((n + 127) << 23);
  return x < -126.0f ? Vec<float>{} : p * power;
}

inline Vec<double> exp2(Vec<double> x) {
  Vec<double> y;
  for (int64_t k = 0; k < LANES<double>; ++k) y[k] = __builtin_exp2(x[k]);
  return y;
}

template <typename T>
void exp_sums(const T* tile, int64_t rows, int64_t cols, int64_t ld, T scale, const T* row_max,
              const T* col_max, T* row_sum, T* col_sum) {
  const T log2_scale = T(scale * LOG2_E);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = tile + r * ld;
    const T reference = row_max[r];
    Vec<T> acc = {};
    for_each_vec<T>(cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
      const Vec<T> s = access.load(row + c, std::numeric_limits<T>::lowest());
      acc += exp2((s - reference) * log2_scale);
      const Vec<T> e = exp2((s - access.load(col_max + c)) * log2_scale);
      access.store(col_sum + c, access.load(col_sum + c) + e);
    });
    row_sum[r] = horizontal_sum<T>(acc);
  }
}

template <typename T>
double exp_gradient(const T* tile, int64_t rows, int64_t cols, int64_t ld, T scale, const T* row_reference,
                    const T* d_row, const T* col_reference, const T* d_col, T* g, int64_t ld_g) {
  const T log2_scale = T(scale * LOG2_E);
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = tile + r * ld;
    const T reference = row_reference[r], weight = d_row[r];
    Vec<T> acc = {};
    for_each_vec<T>(cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
      // What lies beyond the row must vanish: with 0 its exponential may be infinite.
      const Vec<T> s = access.load(row + c, std::numeric_limits<T>::lowest());
      const Vec<T> column = access.load(col_reference + c);
      const Vec<T> from_row = exp2((s - reference) * log2_scale) * weight;
      const Vec<T> from_col = exp2((s - column) * log2_scale) * access.load(d_col + c);
      const Vec<T> gradient = from_row + from_col;
      acc += gradient * s;
      access.store(g + r * ld_g + c, gradient);
    });
    total += horizontal_sum<T>(acc);
  }
  return total;
}

template <typename T>
void hinge_sums(const T* tile, int64_t rows, int64_t cols, int64_t ld, const T* row_threshold,
                const T* col_threshold, T* row_sum, T* row_count, T* col_sum, T* col_count) {
  const Vec<T> zero = {}, one = broadcast<T>(1);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = tile + r * ld;
    const T threshold = row_threshold[r];
    Vec<T> sum = {}, count = {};
    for_each_vec<T>(cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
      const Vec<T> s = access.load(row + c, std::numeric_limits<T>::lowest());
      const Vec<T> x = s - threshold;
      sum += x > zero ? x : zero;
      count += x > zero ? one : zero;
      const Vec<T> y = s - access.load(col_threshold + c);
      access.store(col_sum + c, access.load(col_sum + c) + (y > zero ? y : zero));
      access.store(col_count + c, access.load(col_count + c) + (y > zero ? one : zero));
    });
    row_sum[r] = horizontal_sum<T>(sum);
    row_count[r] = horizontal_sum<T>(count);
  }
}

template <typename T>
void hinge_gradient(const T* tile, int64_t rows, int64_t cols, int64_t ld, const T* row_threshold,
                    const T* d_row, const T* col_threshold, const T* d_col, T* g, int64_t ld_g) {
  const Vec<T> zero = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = tile + r * ld;
    const T threshold = row_threshold[r];
    const Vec<T> weight = broadcast<T>(d_row[r]);
    for_each_vec<T>(cols, [&](int64_t c, auto access) __attribute__((always_inline)) {
      const Vec<T> s = access.load(row + c);
      const Vec<T> from_row = s - threshold > zero ? weight : zero;
      const Vec<T> from_col = s - access.load(col_threshold + c) > zero ? access.load(d_col + c) : zero;
      access.store(g + r * ld_g + c, from_row + from_col);
    });
  }
}

template <typename T>
constexpr Kernels<T> TABLE = {
    pairs<T, DotProduct>,
    pairs<T, OrderViolation>,
    order_sums<T, true>,
    order_sums<T, false>,
    weighted_sum<T>,
    max_abs<T>,
    normalize<T>,
    normalize_backward<T>,
    maxima<T>,
    scan<T>,
    exp_sums<T>,
    exp_gradient<T>,
    hinge_sums<T>,
    hinge_gradient<T>,
};

}  // namespace
