#include "numbers.h"

#include <algorithm>

namespace ptxemu {

float e4m3_to_float(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if ((x & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude =
      exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return x & 0x80 ? -magnitude : magnitude;
}

float e5m2_to_float(uint8_t x) { return to_float(Half{static_cast<uint16_t>(x << 8)}); }

long double round_to_integer(long double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::NEAREST: return std::nearbyint(x);
    case Rounding::ZERO: return std::trunc(x);
    case Rounding::DOWN: return std::floor(x);
    default: return std::ceil(x);
  }
}

double round_to(long double x, int precision, int min_exponent, double largest, Rounding rounding) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const long double rounded = std::scalbn(
      round_to_integer(std::scalbn(x, precision - 1 - exponent), rounding), exponent - precision + 1);
  if (std::fabs(rounded) <= largest) return static_cast<double>(std::copysign(rounded, x));
  const bool to_infinity = rounding == Rounding::NEAREST || (rounding == Rounding::UP && x > 0) ||
                           (rounding == Rounding::DOWN && x < 0);
  return std::copysign(to_infinity ? std::numeric_limits<double>::infinity() : largest, double(x));
}

}  // namespace ptxemu
