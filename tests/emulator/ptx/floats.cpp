// float32 and float64: what each lane does on its own.
#include "builder.h"
#include "numbers.h"

namespace ptxemu {
namespace {

using Table = std::unordered_map<std::string, Lanewise>;

template <bool FTZ>
float in(float x) {
  return FTZ ? flush(x) : x;
}
template <bool FTZ, bool SAT>
float out(float x) {
  const float y = FTZ ? flush(x) : x;
  return SAT ? saturate(y) : y;
}
template <bool FTZ, bool SAT>
float fadd(float a, float b) {
  return out<FTZ, SAT>(in<FTZ>(a) + in<FTZ>(b));
}
template <bool FTZ, bool SAT>
float fsub(float a, float b) {
  return out<FTZ, SAT>(in<FTZ>(a) - in<FTZ>(b));
}
template <bool FTZ, bool SAT>
float fmul(float a, float b) {
  return out<FTZ, SAT>(in<FTZ>(a) * in<FTZ>(b));
}
template <bool FTZ, bool SAT>
float ffma(float a, float b, float c) {
  return out<FTZ, SAT>(__builtin_fmaf(in<FTZ>(a), in<FTZ>(b), in<FTZ>(c)));
}

// The other roundings. Volatile, so that nothing moves across the changes of mode.
template <int MODE, typename T, typename F>
T rounded(F f) {
  std::fesetround(MODE);
  const volatile T result = f();
  std::fesetround(FE_TONEAREST);
  return result;
}
template <int MODE, typename T>
T add_to(T a, T b) {
  volatile T x = a, y = b;
  return rounded<MODE, T>([&] { return x + y; });
}
template <int MODE, typename T>
T sub_to(T a, T b) {
  volatile T x = a, y = b;
  return rounded<MODE, T>([&] { return x - y; });
}
template <int MODE, typename T>
T mul_to(T a, T b) {
  volatile T x = a, y = b;
  return rounded<MODE, T>([&] { return x * y; });
}
template <int MODE, typename T>
T div_to(T a, T b) {
  volatile T x = a, y = b;
  return rounded<MODE, T>([&] { return x / y; });
}
template <int MODE, typename T>
T sqrt_to(T a) {
  volatile T x = a;
  return rounded<MODE, T>([&] { return std::sqrt(T(x)); });
}
template <int MODE, typename T>
T fma_to(T a, T b, T c) {
  volatile T x = a, y = b, z = c;
  return rounded<MODE, T>([&] { return std::fma(T(x), T(y), T(z)); });
}

template <bool FTZ>
float fdiv(float a, float b) {
  return out<FTZ, false>(in<FTZ>(a) / in<FTZ>(b));
}
// Beyond 2^126 the approximation's reciprocal is flushed: 0, of an infinite `a` NaN.
template <bool FTZ>
float div_approx(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::isfinite(b)) return a * std::copysign(0.0f, b);
  return fdiv<FTZ>(a, b);
}
template <bool FTZ>
float frcp(float a) {
  return out<FTZ, false>(1.0f / in<FTZ>(a));
}
template <bool FTZ>
float fsqrt(float a) {
  return out<FTZ, false>(std::sqrt(in<FTZ>(a)));
}
template <bool FTZ>
float frsqrt(float a) {
  return float(1.0 / std::sqrt(double(in<FTZ>(a))));
}
template <bool FTZ>
float fex2(float a) {
  return out<FTZ, false>(exp2f(in<FTZ>(a)));
}
template <bool FTZ>
float flg2(float a) {
  return out<FTZ, false>(log2f(in<FTZ>(a)));
}
template <bool FTZ>
float fsin(float a) {
  return sinf(in<FTZ>(a));
}
template <bool FTZ>
float fcos(float a) {
  return cosf(in<FTZ>(a));
}
float ftanh(float a) { return tanhf(a); }
template <bool FTZ>
float fneg(float a) {
  return -in<FTZ>(a);
}
template <bool FTZ>
float fabs_(float a) {
  return std::fabs(in<FTZ>(a));
}
float copysign_(float sign, float x) { return std::copysign(x, sign); }
double copysign_(double sign, double x) { return std::copysign(x, sign); }

template <bool FTZ, bool NAN_WINS>
float min32(float a, float b) {
  return extreme<true, NAN_WINS>(in<FTZ>(a), in<FTZ>(b));
}
template <bool FTZ, bool NAN_WINS>
float max32(float a, float b) {
  return extreme<false, NAN_WINS>(in<FTZ>(a), in<FTZ>(b));
}
template <bool IS_MIN, bool NAN_WINS>
float extreme_xorsign(float a, float b) {
  const u32 sign = (bits_as<u32>(a) ^ bits_as<u32>(b)) & 0x80000000u;
  const float result = extreme<IS_MIN, NAN_WINS>(std::fabs(a), std::fabs(b));
  return bits_as<float>(bits_as<u32>(result) | sign);
}
template <bool IS_MIN>
float extreme3(float a, float b, float c) {
  return extreme<IS_MIN, false>(extreme<IS_MIN, false>(a, b), c);
}

double dadd(double a, double b) { return a + b; }
double dsub(double a, double b) { return a - b; }
double dmul(double a, double b) { return a * b; }
double dfma(double a, double b, double c) { return __builtin_fma(a, b, c); }
double ddiv(double a, double b) { return a / b; }
double drcp(double a) { return 1.0 / a; }
double dsqrt(double a) { return std::sqrt(a); }
double dneg(double a) { return -a; }
double dabs(double a) { return std::fabs(a); }
// Only the upper half of the result is computed, to 20 bits.
double upper_half(double a) { return bits_as<double>(bits_as<u64>(a) & 0xffffffff00000000u); }
double drcp_approx(double a) { return upper_half(1.0 / upper_half(a)); }
double drsqrt_approx(double a) { return upper_half(1.0 / std::sqrt(upper_half(a))); }

// name[.rn][.ftz][.sat].f32
template <auto PLAIN, auto FTZ, auto SAT, auto FTZ_SAT>
void add_f32(Table& table, const std::string& name) {
  for (const char* rounding : {"", ".rn"}) {
    table[name + rounding + ".f32"] = Lift<PLAIN>::lanewise();
    table[name + rounding + ".ftz.f32"] = Lift<FTZ>::lanewise();
    table[name + rounding + ".sat.f32"] = Lift<SAT>::lanewise();
    table[name + rounding + ".ftz.sat.f32"] = Lift<FTZ_SAT>::lanewise();
  }
}

template <auto PLAIN, auto FTZ>
void add_ftz(Table& table, const std::string& name) {
  table[name + ".f32"] = Lift<PLAIN>::lanewise();
  table[name + ".ftz.f32"] = Lift<FTZ>::lanewise();
}

template <int MODE>
void add_rounding(Table& table, const std::string& mode) {
  table["add" + mode + ".f32"] = Lift<add_to<MODE, float>>::lanewise();
  table["sub" + mode + ".f32"] = Lift<sub_to<MODE, float>>::lanewise();
  table["mul" + mode + ".f32"] = Lift<mul_to<MODE, float>>::lanewise();
  table["div" + mode + ".f32"] = Lift<div_to<MODE, float>>::lanewise();
  table["sqrt" + mode + ".f32"] = Lift<sqrt_to<MODE, float>>::lanewise();
  table["fma" + mode + ".f32"] = Lift<fma_to<MODE, float>>::lanewise();
  table["add" + mode + ".f64"] = Lift<add_to<MODE, double>>::lanewise();
  table["sub" + mode + ".f64"] = Lift<sub_to<MODE, double>>::lanewise();
  table["mul" + mode + ".f64"] = Lift<mul_to<MODE, double>>::lanewise();
  table["div" + mode + ".f64"] = Lift<div_to<MODE, double>>::lanewise();
  table["sqrt" + mode + ".f64"] = Lift<sqrt_to<MODE, double>>::lanewise();
  table["fma" + mode + ".f64"] = Lift<fma_to<MODE, double>>::lanewise();
}

}  // namespace

void add_floats(Instructions& known) {
  auto& table = known.lanewise;
  add_f32<fadd<false, false>, fadd<true, false>, fadd<false, true>, fadd<true, true>>(table, "add");
  add_f32<fsub<false, false>, fsub<true, false>, fsub<false, true>, fsub<true, true>>(table, "sub");
  add_f32<fmul<false, false>, fmul<true, false>, fmul<false, true>, fmul<true, true>>(table, "mul");
  add_f32<ffma<false, false>, ffma<true, false>, ffma<false, true>, ffma<true, true>>(table, "fma");
  add_rounding<FE_TOWARDZERO>(table, ".rz");
  add_rounding<FE_DOWNWARD>(table, ".rm");
  add_rounding<FE_UPWARD>(table, ".rp");
  add_ftz<fdiv<false>, fdiv<true>>(table, "div.rn");
  add_ftz<fdiv<false>, fdiv<true>>(table, "div.full");
  add_ftz<div_approx<false>, div_approx<true>>(table, "div.approx");
  add_ftz<frcp<false>, frcp<true>>(table, "rcp.rn");
  add_ftz<frcp<false>, frcp<true>>(table, "rcp.approx");
  add_ftz<fsqrt<false>, fsqrt<true>>(table, "sqrt.rn");
  add_ftz<fsqrt<false>, fsqrt<true>>(table, "sqrt.approx");
  add_ftz<frsqrt<false>, frsqrt<true>>(table, "rsqrt.approx");
  add_ftz<fex2<false>, fex2<true>>(table, "ex2.approx");
  add_ftz<flg2<false>, flg2<true>>(table, "lg2.approx");
  add_ftz<fsin<false>, fsin<true>>(table, "sin.approx");
  add_ftz<fcos<false>, fcos<true>>(table, "cos.approx");
  table["tanh.approx.f32"] = Lift<ftanh>::lanewise();
  add_ftz<fneg<false>, fneg<true>>(table, "neg");
  add_ftz<fabs_<false>, fabs_<true>>(table, "abs");
  add_ftz<min32<false, false>, min32<true, false>>(table, "min");
  add_ftz<max32<false, false>, max32<true, false>>(table, "max");
  table["min.NaN.f32"] = Lift<min32<false, true>>::lanewise();
  table["max.NaN.f32"] = Lift<max32<false, true>>::lanewise();
  table["min.ftz.NaN.f32"] = Lift<min32<true, true>>::lanewise();
  table["max.ftz.NaN.f32"] = Lift<max32<true, true>>::lanewise();
  table["min.xorsign.abs.f32"] = Lift<extreme_xorsign<true, false>>::lanewise();
  table["max.xorsign.abs.f32"] = Lift<extreme_xorsign<false, false>>::lanewise();
  table["min.NaN.xorsign.abs.f32"] = Lift<extreme_xorsign<true, true>>::lanewise();
  table["max.NaN.xorsign.abs.f32"] = Lift<extreme_xorsign<false, true>>::lanewise();
  table["copysign.f32"] = Lift<static_cast<float (*)(float, float)>(copysign_)>::lanewise();
  table["copysign.f64"] = Lift<static_cast<double (*)(double, double)>(copysign_)>::lanewise();
  for (const char* rounding : {"", ".rn"}) {
    table[std::string("add") + rounding + ".f64"] = Lift<dadd>::lanewise();
    table[std::string("sub") + rounding + ".f64"] = Lift<dsub>::lanewise();
    table[std::string("mul") + rounding + ".f64"] = Lift<dmul>::lanewise();
  }
  table["fma.rn.f64"] = Lift<dfma>::lanewise();
  table["div.rn.f64"] = Lift<ddiv>::lanewise();
  table["rcp.rn.f64"] = Lift<drcp>::lanewise();
  table["sqrt.rn.f64"] = Lift<dsqrt>::lanewise();
  table["rcp.approx.ftz.f64"] = Lift<drcp_approx>::lanewise();
  table["rsqrt.approx.ftz.f64"] = Lift<drsqrt_approx>::lanewise();
  table["neg.f64"] = Lift<dneg>::lanewise();
  table["abs.f64"] = Lift<dabs>::lanewise();
  table["min.f64"] = Lift<extreme<true, false, double>>::lanewise();
  table["max.f64"] = Lift<extreme<false, false, double>>::lanewise();
  table["min3.f32"] = Lift<extreme3<true>>::lanewise();
  table["max3.f32"] = Lift<extreme3<false>>::lanewise();
}

}  // namespace ptxemu
