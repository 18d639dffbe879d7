// One SIMD register as GCC and Clang spell it; each kernels_*.cpp sets VEC_BYTES for its instruction set.
//
// Everything here is in an unnamed namespace: the same inline function compiled for two instruction sets
// must not be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace {

template <typename T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(VEC_BYTES)));
  typedef int32_t Int __attribute__((vector_size(VEC_BYTES)));
};
template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(VEC_BYTES)));
  typedef int64_t Int __attribute__((vector_size(VEC_BYTES)));
};

template <typename T>
using Vec = typename VecTraits<T>::Vec;
template <typename T>
using IntVec = typename VecTraits<T>::Int;
template <typename T>
constexpr int64_t LANES = VEC_BYTES / sizeof(T);

template <typename T>
inline Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

template <typename T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// How a loop body reads and writes a whole register, and the ragged rest of a row.
template <typename T>
struct Whole {
  Vec<T> load(const T* p, T = 0) const {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  void store(T* p, Vec<T> v) const { std::memcpy(p, &v, sizeof(v)); }
};

template <typename T>
struct Part {
  int64_t n;
  Vec<T> load(const T* p, T fill = 0) const {
    Vec<T> v = broadcast<T>(fill);
    std::memcpy(&v, p, n * sizeof(T));
    return v;
  }
  void store(T* p, Vec<T> v) const { std::memcpy(p, &v, n * sizeof(T)); }
};

// body(c, access) for every register-sized piece [c, c + LANES) of [0, n).
template <typename T, typename Body>
inline __attribute__((always_inline)) void for_each_vec(int64_t n, const Body& body) {
  int64_t c = 0;
  for (; c + LANES<T> <= n; c += LANES<T>) body(c, Whole<T>{});
  if (c < n) body(c, Part<T>{n - c});
}

#ifdef __clang__
#define SHUFFLE(T, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(T, x, y, ...) __builtin_shuffle(x, y, IntVec<T>{__VA_ARGS__})
#endif

// x and y consist of segments of WIDTH lanes; the result of half as wide ones, those of x before those of y:
// the sums of each segment's lower and upper half.
template <typename T, int64_t WIDTH, size_t... LANE>
inline Vec<T> halved(Vec<T> x, Vec<T> y, std::index_sequence<LANE...>) {
  constexpr int64_t HALF = WIDTH / 2, EACH = LANES<T> / 2;
  constexpr auto lower = [](int64_t lane) {
    return lane / EACH * LANES<T> + lane % EACH / HALF * WIDTH + lane % HALF;
  };
  return SHUFFLE(T, x, y, lower(LANE)...) + SHUFFLE(T, x, y, (lower(LANE) + HALF)...);
}

// out[i] = the sum of x[i]'s lanes. The order of the additions is a tree over the lanes, whatever COUNT is,
// and part of what "deterministic" means. Clobbers x.
template <typename T, int64_t COUNT, int64_t VECTORS = COUNT, int64_t WIDTH = LANES<T>>
inline __attribute__((always_inline)) void horizontal_sums(Vec<T>* x, T* out) {
  if constexpr (WIDTH == 1) {
    std::memcpy(out, x, COUNT * sizeof(T));
  } else {
    constexpr int64_t HALF = (VECTORS + 1) / 2;
    for (int64_t i = 0; i < HALF; ++i)
      x[i] = halved<T, WIDTH>(x[2 * i], x[2 * i + 1 < VECTORS ? 2 * i + 1 : 2 * i],
                              std::make_index_sequence<LANES<T>>{});
    horizontal_sums<T, COUNT, HALF, WIDTH / 2>(x, out);
  }
}

template <typename T>
inline T horizontal_sum(Vec<T> v) {
  T sum;
  horizontal_sums<T, 1>(&v, &sum);
  return sum;
}

template <typename T>
inline T horizontal_max(Vec<T> v) {
  T best = v[0];
  for (int64_t k = 1; k < LANES<T>; ++k) best = v[k] > best ? v[k] : best;
  return best;
}

}  // namespace
