// The elements of matrices, and what mma and wgmma share.
#pragma once

#include <cstdio>

#include "builder.h"
#include "numbers.h"

namespace ptxemu {

enum Element { F16, BF16, TF32, E4M3, E5M2, S8, U8, F64 };
constexpr int ELEMENT_BYTES[] = {2, 2, 4, 1, 1, 1, 1, 8};

inline float decode_element(Element type, uint32_t bits) {
  switch (type) {
    case F16: return to_float(Half{static_cast<uint16_t>(bits)});
    case BF16: return to_float(BFloat{static_cast<uint16_t>(bits)});
    case TF32: return bits_as<float>(bits & ~0x1fffu);  // the other bits are ignored
    case E4M3: return e4m3_to_float(static_cast<uint8_t>(bits));
    case E5M2: return e5m2_to_float(static_cast<uint8_t>(bits));
    case S8: return static_cast<int8_t>(bits);
    default: return static_cast<uint8_t>(bits);
  }
}

// m16n8k16 and the like.
inline std::array<int, 3> take_shape(Builder& builder) {
  std::array<int, 3> shape{};
  builder.take_if([&](const std::string& modifier) {
    return std::sscanf(modifier.c_str(), "m%dn%dk%d", &shape[0], &shape[1], &shape[2]) == 3;
  });
  return shape;
}

// The next type, in the order of d, a, b and, of mma, c.
inline std::string take_element(Builder& builder) {
  return builder.take_one_of({"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f64", "f32", "s32"});
}

inline Element element_of(Builder& builder, const std::string& name) {
  static const std::vector<std::string> NAMES = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f64"};
  const auto found = std::find(NAMES.begin(), NAMES.end(), name);
  if (found == NAMES.end()) builder.fail("an operand of type " + name);
  return static_cast<Element>(found - NAMES.begin());
}

// The k of element e in register i of a lane: of A and, with i doubled, of B.
inline int k_of(int lane, int i, int e, int per_register) {
  return per_register * (lane % 4) + e + 4 * per_register * (i / 2);
}

}  // namespace ptxemu
