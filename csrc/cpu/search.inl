// The bfloat16 kernels of the certified search (kernels.h), for AVX-512.

namespace {

using fused_vse::SearchKernels;

constexpr int64_t KEYS = 32;  // a register
constexpr int16_t LOWEST_KEY = -32768;

inline __mmask32 lanes_left(int64_t n) { return n >= KEYS ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

// Negative numbers order backwards by their bits: flip them below the sign.
inline __m512i key_of(__m512i bits) {
  const __m512i flip = _mm512_and_si512(_mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7fff));
  return _mm512_xor_si512(bits, flip);
}

template <int64_t R>
inline void search_maxima_rows(int16_t* tile, int64_t cols, int64_t ld, int16_t* row_max, int16_t* col_max) {
  const __m512i lowest = _mm512_set1_epi16(LOWEST_KEY);
  __m512i best[R];
  for (int64_t r = 0; r < R; ++r) best[r] = lowest;
  for (int64_t c = 0; c < cols; c += KEYS) {
    const __mmask32 mask = lanes_left(cols - c);
    __m512i column = _mm512_maskz_loadu_epi16(mask, col_max + c);
    for (int64_t r = 0; r < R; ++r) {
      int16_t* p = tile + r * ld + c;
      const __m512i key = key_of(_mm512_maskz_loadu_epi16(mask, p));
      _mm512_mask_storeu_epi16(p, mask, key);
      best[r] = _mm512_mask_max_epi16(best[r], mask, best[r], key);
      column = _mm512_max_epi16(column, key);
    }
    _mm512_mask_storeu_epi16(col_max + c, mask, column);
  }
  for (int64_t r = 0; r < R; ++r) {
    int16_t lanes[KEYS];
    _mm512_storeu_si512(lanes, best[r]);
    int16_t top = lanes[0];
    for (int64_t k = 1; k < KEYS; ++k) top = lanes[k] > top ? lanes[k] : top;
    row_max[r] = top;
  }
}

void search_maxima(int16_t* tile, int64_t rows, int64_t cols, int64_t ld, int16_t* row_max,
                   int16_t* col_max) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) search_maxima_rows<4>(tile + r * ld, cols, ld, row_max + r, col_max);
  for (; r < rows; ++r) search_maxima_rows<1>(tile + r * ld, cols, ld, row_max + r, col_max);
}

inline int64_t list(__mmask32 mask, int64_t col, int32_t* hits) {
  int64_t n = 0;
  for (uint32_t bits = mask; bits; bits &= bits - 1)
    hits[n++] = static_cast<int32_t>(col + __builtin_ctz(bits));
  return n;
}

void search_scan(const int16_t* row, int64_t cols, int16_t row_threshold, const int16_t* col_threshold,
                 int32_t* row_hits, int64_t* num_row_hits, int32_t* col_hits, int64_t* num_col_hits) {
  const __m512i threshold = _mm512_set1_epi16(row_threshold);
  int64_t n_row = 0, n_col = 0;
  for (int64_t c = 0; c < cols; c += KEYS) {
    const __mmask32 mask = lanes_left(cols - c);
    const __m512i key = _mm512_maskz_loadu_epi16(mask, row + c);
    const __m512i col = _mm512_maskz_loadu_epi16(mask, col_threshold + c);
    const __mmask32 from_row = _mm512_mask_cmpge_epi16_mask(mask, key, threshold);
    const __mmask32 from_col = _mm512_mask_cmpge_epi16_mask(mask, key, col);
    if (__builtin_expect((from_row | from_col) != 0, 0)) {
      n_row += list(from_row, c, row_hits + n_row);
      n_col += list(from_col, c, col_hits + n_col);
    }
  }
  *num_row_hits = n_row;
  *num_col_hits = n_col;
}

void search_quantize(const float* x, int64_t d, uint16_t* q, float* x_squares, float* q_squares,
                     float* error_squares) {
  __m512 xx = _mm512_setzero_ps(), qq = xx, ee = xx;
  for (int64_t k = 0; k < d; k += 16) {
    const __mmask16 mask = d - k >= 16 ? __mmask16(0xffff) : (__mmask16(1) << (d - k)) - 1;
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_srli_epi32(bits, 16);
    _mm256_mask_storeu_epi16(q + k, mask, _mm512_cvtepi32_epi16(bits));
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    const __m512 difference = _mm512_sub_ps(value, rounded);  // exact
    xx = _mm512_fmadd_ps(value, value, xx);
    qq = _mm512_fmadd_ps(rounded, rounded, qq);
    ee = _mm512_fmadd_ps(difference, difference, ee);
  }
  *x_squares = horizontal_sum<float>(Vec<float>(xx));
  *q_squares = horizontal_sum<float>(Vec<float>(qq));
  *error_squares = horizontal_sum<float>(Vec<float>(ee));
}

constexpr SearchKernels SEARCH_TABLE = {search_maxima, search_scan, search_quantize};

}  // namespace
