// The inner loops of the CPU backend: reductions over one strip of S, and operations on rows.
//
// kernels.inl implements them once; kernels_avx512.cpp, kernels_avx2.cpp and kernels_baseline.cpp compile
// it for one instruction set each, and kernels() picks at run time. T is float or double.
#pragma once

#include <cstdint>
#include <limits>

namespace fused_vse {

template <typename T>
constexpr T EXCLUDED = std::numeric_limits<T>::lowest();

// A few rows of S for the anchors of these rows, and of some columns.
template <typename T>
struct StripScores {
  T* s;                    // [rows, cols]; excluded entries hold EXCLUDED: they lose every maximum, and
  int64_t rows, cols, ld;  // vanish in every exponential and hinge
  // Only s <= ceiling counts for an anchor: [rows], [cols], or both null.
  const T *row_ceiling = nullptr, *col_ceiling = nullptr;

  const T* row(int64_t r) const { return s + r * ld; }
};

template <typename T>
struct Kernels {
  // out[i * ld + j] = <a[i], b[j]> over d. A pair's result does not depend on the other pairs of the call.
  void (*dots)(const T* const* a, int64_t rows, const T* const* b, int64_t cols, int64_t d, T* out,
               int64_t ld);
  // out[i * ld + j] = -|max(0, b[j] - a[i])|_2, likewise.
  void (*order_scores)(const T* const* a, int64_t rows, const T* const* b, int64_t cols, int64_t d, T* out,
                       int64_t ld);
  // The gradients of those scores: out[i] += sum_j w_ij max(0, sources[j] - own[i]) for images, and
  // out[i] -= sum_j w_ij max(0, own[i] - sources[j]) for captions, w_ij = weights[i * own_stride +
  // j * source_stride]. `own` and `out` are [rows, d].
  void (*order_sums_of_images)(const T* own, int64_t rows, const T* const* sources, int64_t n, int64_t d,
                               const T* weights, int64_t own_stride, int64_t source_stride, T* out);
  void (*order_sums_of_captions)(const T* own, int64_t rows, const T* const* sources, int64_t n, int64_t d,
                                 const T* weights, int64_t own_stride, int64_t source_stride, T* out);
  // out[d] = sum_n weights[n] * sources[n][d]
  void (*weighted_sum)(const T* weights, const T* const* sources, int64_t n, int64_t d, T* out);
  // max |x|; NaN if x holds a NaN.
  T (*max_abs)(const T* x, int64_t n);

  // row_max[r] = max_c s; col_max[c] = max(col_max[c], max_r s).
  void (*maxima)(const StripScores<T>&, T* row_max, T* col_max);
  // Lists the columns of one row with s >= row_threshold, and those with s >= col_threshold[c].
  void (*scan)(const T* row, int64_t cols, T row_threshold, const T* col_threshold, int32_t* row_hits,
               int64_t* num_row_hits, int32_t* col_hits, int64_t* num_col_hits);
  // row_sum[r] = sum_c exp(scale * (s - row_max[r])); col_sum[c] += sum_r exp(scale * (s - col_max[c])).
  void (*exp_sums)(const StripScores<T>&, double scale, const T* row_max, const T* col_max, T* row_sum,
                   T* col_sum);
  // g = q + r, q = exp(scale * (s - row_reference)) row_weight and r = exp(scale * (s - col_reference))
  // col_weight; returns sum q * (s - row_reference) + r * (s - col_reference).
  double (*exp_gradient)(const StripScores<T>&, double scale, const T* row_reference, const T* row_weight,
                         const T* col_reference, const T* col_weight, T* g, int64_t ld_g);
  // row_sum[r] = sum_c [s - row_threshold[r]]+, row_count its positive terms; col_* += likewise.
  void (*hinge_sums)(const StripScores<T>&, const T* row_threshold, const T* col_threshold, T* row_sum,
                     T* row_count, T* col_sum, T* col_count);
  // g = [s > row_threshold] row_weight + [s > col_threshold] col_weight.
  void (*hinge_gradient)(const StripScores<T>&, const T* row_threshold, const T* row_weight,
                         const T* col_threshold, const T* col_weight, T* g, int64_t ld_g);
  // With x = scale * s + bias: row_sum[r] = sum_c log(1 + exp(x)), row_slope likewise of 1 / (1 + exp(-x));
  // col_* += likewise. (Ceilings are not looked at.)
  void (*softplus_sums)(const StripScores<T>&, double scale, double bias, T* row_sum, T* row_slope,
                        T* col_sum, T* col_slope);
  // g = weight / (1 + exp(-x)), weight = row_weight + col_weight; returns sum g * s.
  double (*softplus_gradient)(const StripScores<T>&, double scale, double bias, const T* row_weight,
                              const T* col_weight, T* g, int64_t ld_g);
};

template <typename T>
const Kernels<T>& kernels();

// What the certified search in bfloat16 needs. A key is a bfloat16 as an integer of the same order.
struct SearchKernels {
  // Turns the bits of bfloat16 scores into keys, in place. row_max[r] = max_c key;
  // col_max[c] = max(col_max[c], max_r key).
  void (*maxima)(int16_t* tile, int64_t rows, int64_t cols, int64_t ld, int16_t* row_max, int16_t* col_max);
  // As Kernels::scan.
  void (*scan)(const int16_t* row, int64_t cols, int16_t row_threshold, const int16_t* col_threshold,
               int32_t* row_hits, int64_t* num_row_hits, int32_t* col_hits, int64_t* num_col_hits);
  // q = x rounded to bfloat16 (to nearest even), and the sums of the squares of x, q and x - q.
  void (*quantize)(const float* x, int64_t d, uint16_t* q, float* x_squares, float* q_squares,
                   float* error_squares);
};

// nullptr where the CPU does not multiply bfloat16.
const SearchKernels* search_kernels();

}  // namespace fused_vse
