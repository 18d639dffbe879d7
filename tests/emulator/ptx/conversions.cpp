// cvt.
#include <algorithm>

#include "builder.h"
#include "numbers.h"

namespace ptxemu {
namespace {

// --- those that are frequent; `convert` knows the others

u64 u32_to_u64(u32 a) { return a; }
u64 s32_to_s64(u32 a) { return u64(i64(i32(a))); }
u32 u64_to_u32(u64 a) { return u32(a); }
u16 u32_to_u16(u32 a) { return u16(a); }
u32 u16_to_u32(u16 a) { return a; }
float s32_to_float(i32 a) { return float(a); }
float u32_to_float(u32 a) { return float(a); }
double s32_to_double(i32 a) { return a; }
float bfloat_to_float(u16 a) { return to_float(BFloat{a}); }
float half_to_float(u16 a) { return to_float(Half{a}); }
u16 float_to_bfloat(float a) { return to_bfloat(a).bits; }
u16 float_to_half(float a) { return to_half(a).bits; }
u32 floats_to_bfloats(float high, float low) { return pair(to_bfloat(high).bits, to_bfloat(low).bits); }
u32 floats_to_halves(float high, float low) { return pair(to_half(high).bits, to_half(low).bits); }
double float_to_double(float a) { return a; }
float double_to_float(double a) { return float(a); }
float saturated(float a) { return saturate(a); }
// To nearest with ties away, 10 bits of mantissa.
u32 float_to_tf32(float a) {
  const u32 bits = bits_as<u32>(a);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

// --- the general conversion

struct Format {
  Type type;
  int precision = 0, min_exponent = 0;  // of a float
  double largest = 0;

  int bits() const { return type.bits; }
  bool is_float() const { return precision > 0; }
  bool is_signed() const { return type.kind == Type::SIGNED; }
};

// Of the next type.
Format take_format(Builder& builder) {
  const Type type = builder.take_type();
  if (type.count != 1 || type.kind == Type::BITS || type.kind == Type::PREDICATE)
    builder.fail("unsupported conversion");
  if (type.kind == Type::BFLOAT) return {type, 8, -126, 0x1.fep127};
  if (type.kind != Type::FLOAT) return {type};
  if (type.bits == 16) return {type, 11, -14, 65504.0};
  if (type.bits == 32) return {type, 24, -126, std::numeric_limits<float>::max()};
  return {type, 53, -1022, std::numeric_limits<double>::max()};
}

struct Conversion {
  Format to, from;
  int to_width, from_width;  // of the registers
  bool to_integral = false;  // .rni and the like
  Rounding rounding = Rounding::NEAREST;
  bool ftz = false, saturates = false;
};

u64 raw_bits(Warp& warp, int at, int width, int lane) {
  return width == 16   ? warp.reg<u16>(at)[lane]
         : width == 32 ? warp.reg<u32>(at)[lane]
                       : warp.reg<u64>(at)[lane];
}

long double decode_float(const Format& format, u64 bits) {
  if (format.bits() == 64) return bits_as<double>(bits);
  if (format.bits() == 32) return bits_as<float>(u32(bits));
  return format.precision == 11 ? to_float(Half{u16(bits)}) : to_float(BFloat{u16(bits)});
}

u64 encode_float(const Format& format, double value) {
  if (format.bits() == 64) return bits_as<u64>(value);
  if (format.bits() == 32) return bits_as<u32>(float(value));
  return format.precision == 11 ? to_half(float(value)).bits : to_bfloat(float(value)).bits;
}

i64 sign_extended(u64 bits, int count) { return i64(bits << (64 - count)) >> (64 - count); }

u64 float_to_integer(const Conversion& c, long double x) {
  if (x != x) return c.to.bits() == 64 || c.from.bits() == 64 ? u64{1} << (c.to.bits() - 1) : 0;
  x = round_to_integer(x, c.rounding);
  const int bits = c.to.bits();
  const bool is_signed = c.to.is_signed();
  const long double low = is_signed ? -std::ldexp(1.0L, bits - 1) : 0;
  const long double high = std::ldexp(1.0L, is_signed ? bits - 1 : bits) - 1;
  x = std::min(std::max(x, low), high);
  return is_signed ? u64(i64(x)) : u64(x);
}

u64 integer_to_integer(const Conversion& c, u64 bits) {
  const bool from_signed = c.from.is_signed(), to_signed = c.to.is_signed();
  const i64 extended = from_signed ? sign_extended(bits, c.from.bits()) : i64(bits);
  if (!c.saturates) return u64(extended);
  const bool is_negative = from_signed && extended < 0;
  const u64 top = to_signed ? ~u64{0} >> (65 - c.to.bits()) : ~u64{0} >> (64 - c.to.bits());
  if (!is_negative) return std::min(u64(extended), top);
  return to_signed ? u64(std::max(extended, -i64(top) - 1)) : 0;
}

u64 convert(const Conversion& c, u64 bits) {
  if (c.from.bits() < 64) bits &= (u64{1} << c.from.bits()) - 1;
  if (!c.from.is_float() && !c.to.is_float()) return integer_to_integer(c, bits);
  long double x;
  if (c.from.is_float()) {
    x = decode_float(c.from, bits);
    if (c.ftz && c.from.bits() == 32) x = flush(float(x));
  } else {
    x = c.from.is_signed() ? static_cast<long double>(sign_extended(bits, c.from.bits())) : bits;
  }
  if (!c.to.is_float()) return float_to_integer(c, x);
  if (c.to_integral) x = round_to_integer(x, c.rounding);
  double result = round_to(x, c.to.precision, c.to.min_exponent, c.to.largest, c.rounding);
  if (c.saturates) result = result > 0 ? std::min(result, 1.0) : 0.0;
  if (c.ftz && c.to.bits() == 32) result = flush(float(result));
  return encode_float(c.to, result);
}

void run_convert(Warp& warp, const Instruction& in, Mask mask) {
  const auto& c = in.detail<Conversion>();
  for_each_lane(mask, [&](int lane) {
    u64 bits = convert(c, raw_bits(warp, in.at[1], c.from_width, lane));
    if (c.to.type.kind == Type::UNSIGNED && c.to.bits() < 64) bits &= (u64{1} << c.to.bits()) - 1;
    if (c.to.is_signed()) bits = u64(sign_extended(bits, c.to.bits()));
    if (c.to_width == 16)
      warp.reg<u16>(in.at[0])[lane] = u16(bits);
    else if (c.to_width == 32)
      warp.reg<u32>(in.at[0])[lane] = u32(bits);
    else
      warp.reg<u64>(in.at[0])[lane] = bits;
  });
}

template <bool IS_E4M3>
void run_convert_from_8_bits(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const auto half = [](u8 x) { return to_half(IS_E4M3 ? e4m3_to_float(x) : e5m2_to_float(x)).bits; };
    const u16 both = warp.reg<u16>(in.at[1])[lane];
    warp.reg<u32>(in.at[0])[lane] = pair(half(u8(both >> 8)), half(u8(both)));
  });
}

void build_cvt(Builder& builder) {
  Instruction& in = builder.instruction;
  if (builder.take("f16x2")) {
    builder.take("rn");
    const bool is_e4m3 = builder.take("e4m3x2");
    if (!is_e4m3 && !builder.take("e5m2x2")) builder.fail("unsupported conversion");
    in.at[0] = builder.destination(0, 32);
    in.at[1] = builder.source(1, 16);
    return builder.plain(is_e4m3 ? run_convert_from_8_bits<true> : run_convert_from_8_bits<false>);
  }
  Conversion c{};
  const std::string rounding =
      builder.take_optional({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"}, "rn");
  c.to_integral = rounding.size() == 3;
  c.rounding = rounding[1] == 'n'   ? Rounding::NEAREST
               : rounding[1] == 'z' ? Rounding::ZERO
               : rounding[1] == 'm' ? Rounding::DOWN
                                    : Rounding::UP;
  c.ftz = builder.take("ftz");
  c.saturates = builder.take("sat");
  c.to = take_format(builder);
  c.from = take_format(builder);
  c.to_width = std::max(16, c.to.bits());
  c.from_width = std::max(16, c.from.bits());
  in.at[0] = builder.any_destination(builder.operand(0), c.to_width);
  in.at[1] = builder.any_source(builder.operand(1), c.from_width);
  if (c.from_width < c.from.bits() || c.to_width < c.to.bits()) builder.fail("a register is too narrow");
  in.details = std::make_shared<const Conversion>(c);
  builder.plain(run_convert);
}

}  // namespace

void add_conversions(Instructions& known) {
  auto& table = known.lanewise;
  table["cvt.u64.u32"] = Lift<u32_to_u64>::lanewise();
  table["cvt.s64.s32"] = Lift<s32_to_s64>::lanewise();
  table["cvt.u32.u64"] = Lift<u64_to_u32>::lanewise();
  table["cvt.u16.u32"] = Lift<u32_to_u16>::lanewise();
  table["cvt.u32.u16"] = Lift<u16_to_u32>::lanewise();
  table["cvt.rn.f32.s32"] = Lift<s32_to_float>::lanewise();
  table["cvt.rn.f32.u32"] = Lift<u32_to_float>::lanewise();
  table["cvt.rn.f64.s32"] = Lift<s32_to_double>::lanewise();
  table["cvt.f32.bf16"] = Lift<bfloat_to_float>::lanewise();
  table["cvt.f32.f16"] = Lift<half_to_float>::lanewise();
  table["cvt.rn.bf16.f32"] = Lift<float_to_bfloat>::lanewise();
  table["cvt.rn.f16.f32"] = Lift<float_to_half>::lanewise();
  table["cvt.rn.bf16x2.f32"] = Lift<floats_to_bfloats>::lanewise();
  table["cvt.rn.f16x2.f32"] = Lift<floats_to_halves>::lanewise();
  table["cvt.f64.f32"] = Lift<float_to_double>::lanewise();
  table["cvt.rn.f32.f64"] = Lift<double_to_float>::lanewise();
  table["cvt.sat.f32.f32"] = Lift<saturated>::lanewise();
  table["cvt.rna.tf32.f32"] = Lift<float_to_tf32>::lanewise();
  known.builders["cvt"] = build_cvt;
}

}  // namespace ptxemu
