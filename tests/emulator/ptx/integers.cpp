// Integers, bits and predicates: what each lane does on its own.
#include <algorithm>
#include <type_traits>

#include "builder.h"
#include "numbers.h"

namespace ptxemu {
namespace {

// Unsigned, because an overflow of signed numbers has no meaning in C++.
template <typename T>
T add(T a, T b) {
  return T(u64(a) + u64(b));
}
template <typename T>
T sub(T a, T b) {
  return T(u64(a) - u64(b));
}
template <typename T>
T mul_lo(T a, T b) {
  return T(u64(a) * u64(b));
}
template <typename T>
T mad_lo(T a, T b, T c) {
  return T(u64(a) * u64(b) + u64(c));
}
template <typename T>
using Wider =
    std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                                          std::conditional_t<std::is_signed_v<T>, i32, u32>>>;
template <typename T>
Wider<T> mul_wide(T a, T b) {
  return Wider<T>(a) * Wider<T>(b);
}
template <typename T>
Wider<T> mad_wide(T a, T b, Wider<T> c) {
  return Wider<T>(u64(mul_wide(a, b)) + u64(c));
}
template <typename T>
T mul_hi(T a, T b) {
  return T(mul_wide(a, b) >> (8 * sizeof(T)));
}
template <typename T>
T mad_hi(T a, T b, T c) {
  return T(u64(mul_hi(a, b)) + u64(c));
}
template <typename T>
T div(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - u64(a));
  return a / b;
}
template <typename T>
T rem(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}
template <typename T>
T negative(T a) {
  return T(0 - u64(a));
}
template <typename T>
T absolute(T a) {
  return a < 0 ? negative(a) : a;
}
template <typename T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T larger(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
T and_(T a, T b) {
  return a & b;
}
template <typename T>
T or_(T a, T b) {
  return a | b;
}
template <typename T>
T xor_(T a, T b) {
  return a ^ b;
}
template <typename T>
T not_(T a) {
  return T(~a);
}
template <typename T>
T cnot(T a) {
  return a == 0;
}
template <typename T>
T shl(T a, u32 by) {
  return by >= 8 * sizeof(T) ? T(0) : T(a << by);
}
template <typename T>
T shr(T a, u32 by) {
  if (by >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return a >> by;
}
template <typename T>
T select(T a, T b, bool c) {
  return c ? a : b;
}
u32 popc32(u32 a) { return __builtin_popcount(a); }
u32 popc64(u64 a) { return __builtin_popcountll(a); }
u32 clz32(u32 a) { return a ? __builtin_clz(a) : 32; }
u32 clz64(u64 a) { return a ? __builtin_clzll(a) : 64; }
u32 brev32(u32 a) {
  u32 result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}
u64 brev64(u64 a) { return u64{brev32(u32(a))} << 32 | brev32(u32(a >> 32)); }
u32 bfind_u32(u32 a) { return a ? 31 - __builtin_clz(a) : ~0u; }
u32 bfind_s32(u32 a) { return bfind_u32(i32(a) < 0 ? ~a : a); }
u32 bfind_u64(u64 a) { return a ? 63 - __builtin_clzll(a) : ~0u; }
template <typename T>
T bfe(T a, u32 from, u32 count) {
  constexpr int BITS = 8 * sizeof(T);
  from &= 0xff, count &= 0xff;
  using U = std::make_unsigned_t<T>;
  if (count == 0) return 0;
  const bool is_negative = std::is_signed_v<T> && (U(a) >> std::min<u32>(from + count - 1, BITS - 1) & 1);
  U result = from >= BITS ? 0 : U(a) >> from;
  const u32 kept = std::min<u32>(count, BITS);
  if (kept < BITS) result &= (U(1) << kept) - 1;
  const u32 there = from >= BITS ? 0 : std::min<u32>(kept, BITS - from);  // bits of `a` itself
  if (is_negative && there < BITS) result |= ~U(0) << there;
  return T(result);
}
template <typename T>
T bfi(T a, T b, u32 at, u32 count) {
  constexpr u32 BITS = 8 * sizeof(T);
  at &= 0xff, count &= 0xff;
  if (at >= BITS || count == 0) return b;
  const T mask = T((count >= BITS ? ~T(0) : (T(1) << count) - 1) << at);
  return (b & ~mask) | (T(a << at) & mask);
}
u32 shf_l_clamp(u32 low, u32 high, u32 by) {
  by = std::min(by, 32u);
  return u32(((u64{high} << 32 | low) << by) >> 32);
}
u32 shf_l_wrap(u32 low, u32 high, u32 by) { return shf_l_clamp(low, high, by & 31); }
u32 shf_r_clamp(u32 low, u32 high, u32 by) { return u32((u64{high} << 32 | low) >> std::min(by, 32u)); }
u32 shf_r_wrap(u32 low, u32 high, u32 by) { return shf_r_clamp(low, high, by & 31); }
u32 prmt(u32 a, u32 b, u32 selection) {
  const u64 bytes = u64{b} << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 which = selection >> 4 * i & 15;
    u32 byte = bytes >> 8 * (which & 7) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <typename A, typename B>
i32 dp4a(u32 a, u32 b, i32 c) {
  for (int i = 0; i < 4; ++i) c = i32(u32(c) + u32(i32(A(a >> 8 * i)) * i32(B(b >> 8 * i))));
  return c;
}
template <typename T>
T sad(T a, T b, T c) {
  return T(u64(c) + (a > b ? u64(a) - u64(b) : u64(b) - u64(a)));
}
u32 mul24(u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }

bool and_p(bool a, bool b) { return a && b; }
bool or_p(bool a, bool b) { return a || b; }
bool xor_p(bool a, bool b) { return a != b; }
bool not_p(bool a) { return !a; }

#define EACH_INTEGER(FUNCTION, NAME)                    \
  table[NAME ".u16"] = Lift<FUNCTION<u16>>::lanewise(); \
  table[NAME ".u32"] = Lift<FUNCTION<u32>>::lanewise(); \
  table[NAME ".u64"] = Lift<FUNCTION<u64>>::lanewise(); \
  table[NAME ".s16"] = Lift<FUNCTION<i16>>::lanewise(); \
  table[NAME ".s32"] = Lift<FUNCTION<i32>>::lanewise(); \
  table[NAME ".s64"] = Lift<FUNCTION<i64>>::lanewise()
#define EACH_BITS(FUNCTION, NAME)                       \
  table[NAME ".b16"] = Lift<FUNCTION<u16>>::lanewise(); \
  table[NAME ".b32"] = Lift<FUNCTION<u32>>::lanewise(); \
  table[NAME ".b64"] = Lift<FUNCTION<u64>>::lanewise()
}  // namespace

void add_integers(Instructions& known) {
  auto& table = known.lanewise;
  EACH_INTEGER(add, "add");
  EACH_INTEGER(sub, "sub");
  EACH_INTEGER(mul_lo, "mul.lo");
  EACH_INTEGER(mul_hi, "mul.hi");
  EACH_INTEGER(mad_lo, "mad.lo");
  EACH_INTEGER(mad_hi, "mad.hi");
  EACH_INTEGER(div, "div");
  EACH_INTEGER(rem, "rem");
  EACH_INTEGER(smaller, "min");
  EACH_INTEGER(larger, "max");
  EACH_INTEGER(shr, "shr");
  EACH_INTEGER(sad, "sad");
  table["mul.wide.u16"] = Lift<mul_wide<u16>>::lanewise();
  table["mul.wide.s16"] = Lift<mul_wide<i16>>::lanewise();
  table["mul.wide.u32"] = Lift<mul_wide<u32>>::lanewise();
  table["mul.wide.s32"] = Lift<mul_wide<i32>>::lanewise();
  table["mad.wide.u16"] = Lift<mad_wide<u16>>::lanewise();
  table["mad.wide.s16"] = Lift<mad_wide<i16>>::lanewise();
  table["mad.wide.u32"] = Lift<mad_wide<u32>>::lanewise();
  table["mad.wide.s32"] = Lift<mad_wide<i32>>::lanewise();
  table["mul24.lo.u32"] = Lift<mul24>::lanewise();
  table["neg.s16"] = Lift<negative<i16>>::lanewise();
  table["neg.s32"] = Lift<negative<i32>>::lanewise();
  table["neg.s64"] = Lift<negative<i64>>::lanewise();
  table["abs.s16"] = Lift<absolute<i16>>::lanewise();
  table["abs.s32"] = Lift<absolute<i32>>::lanewise();
  table["abs.s64"] = Lift<absolute<i64>>::lanewise();
  EACH_BITS(and_, "and");
  EACH_BITS(or_, "or");
  EACH_BITS(xor_, "xor");
  EACH_BITS(not_, "not");
  EACH_BITS(cnot, "cnot");
  EACH_BITS(shl, "shl");
  EACH_BITS(shr, "shr");
  EACH_BITS(select, "selp");
  EACH_INTEGER(select, "selp");
  table["selp.f32"] = Lift<select<u32>>::lanewise();
  table["selp.f64"] = Lift<select<u64>>::lanewise();
  table["and.pred"] = Lift<and_p>::lanewise();
  table["or.pred"] = Lift<or_p>::lanewise();
  table["xor.pred"] = Lift<xor_p>::lanewise();
  table["not.pred"] = Lift<not_p>::lanewise();
  table["popc.b32"] = Lift<popc32>::lanewise();
  table["popc.b64"] = Lift<popc64>::lanewise();
  table["clz.b32"] = Lift<clz32>::lanewise();
  table["clz.b64"] = Lift<clz64>::lanewise();
  table["brev.b32"] = Lift<brev32>::lanewise();
  table["brev.b64"] = Lift<brev64>::lanewise();
  table["bfind.u32"] = Lift<bfind_u32>::lanewise();
  table["bfind.s32"] = Lift<bfind_s32>::lanewise();
  table["bfind.u64"] = Lift<bfind_u64>::lanewise();
  table["bfe.u32"] = Lift<bfe<u32>>::lanewise();
  table["bfe.s32"] = Lift<bfe<i32>>::lanewise();
  table["bfe.u64"] = Lift<bfe<u64>>::lanewise();
  table["bfe.s64"] = Lift<bfe<i64>>::lanewise();
  table["bfi.b32"] = Lift<bfi<u32>>::lanewise();
  table["bfi.b64"] = Lift<bfi<u64>>::lanewise();
  table["shf.l.clamp.b32"] = Lift<shf_l_clamp>::lanewise();
  table["shf.l.wrap.b32"] = Lift<shf_l_wrap>::lanewise();
  table["shf.r.clamp.b32"] = Lift<shf_r_clamp>::lanewise();
  table["shf.r.wrap.b32"] = Lift<shf_r_wrap>::lanewise();
  table["prmt.b32"] = Lift<prmt>::lanewise();
  table["lop3.b32"] = Lift<lop3>::lanewise();
  table["dp4a.s32.s32"] = Lift<dp4a<i8, i8>>::lanewise();
  table["dp4a.u32.u32"] = Lift<dp4a<u8, u8>>::lanewise();
  table["dp4a.s32.u32"] = Lift<dp4a<i8, u8>>::lanewise();
  table["dp4a.u32.s32"] = Lift<dp4a<u8, i8>>::lanewise();
}

}  // namespace ptxemu
