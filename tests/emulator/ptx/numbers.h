// Names of number types, floating-point formats and roundings.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptxemu {

using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float to_float(BFloat x) { return bits_as<float>(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest < 0x400) return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(rest) * 0x1p-24f));
  return bits_as<float>(sign | ((rest << 13) + (112u << 23)));
}

inline BFloat to_bfloat(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Round-to-nearest-even by an addition that makes the hardware drop the right number of bits.
inline Half to_half(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

template <typename T>
T narrow(float x) {
  if constexpr (std::is_same_v<T, Half>)
    return to_half(x);
  else
    return to_bfloat(x);
}
inline uint32_t pair(uint16_t high, uint16_t low) { return uint32_t{high} << 16 | low; }

// 8-bit formats: e4m3 has no infinity.
float e4m3_to_float(uint8_t);
float e5m2_to_float(uint8_t);

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

// -0 < +0; a NaN loses unless NAN_WINS.
template <bool IS_MIN, bool NAN_WINS, typename T>
T extreme(T a, T b) {
  using U = std::conditional_t<sizeof(T) == 8, u64, u32>;
  if (NAN_WINS && (a != a || b != b)) return std::numeric_limits<T>::quiet_NaN();
  if (a == b) {
    const U x = bits_as<U>(a), y = bits_as<U>(b);
    return bits_as<T>(IS_MIN ? U(x | y) : U(x & y));
  }
  return (IS_MIN ? a < b : a > b) || b != b ? a : b;
}

enum class Rounding { NEAREST, ZERO, DOWN, UP };

// x rounded to `precision` bits, of which fewer are left below 2^min_exponent; too large is infinity or, by a
// rounding towards zero, `largest`.
double round_to(long double x, int precision, int min_exponent, double largest, Rounding);
long double round_to_integer(long double x, Rounding);

}  // namespace ptxemu
