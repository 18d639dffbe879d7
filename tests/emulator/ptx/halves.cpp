// float16 and bfloat16, alone and in pairs: what each lane does on its own.
#include "builder.h"
#include "numbers.h"

namespace ptxemu {
namespace {

float add(float a, float b) { return a + b; }
float sub(float a, float b) { return a - b; }
float mul(float a, float b) { return a * b; }
float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <typename T, auto F>
u16 single2(u16 a, u16 b) {
  return narrow<T>(F(to_float(T{a}), to_float(T{b}))).bits;
}
template <typename T, auto F>
u16 single3(u16 a, u16 b, u16 c) {
  return narrow<T>(F(to_float(T{a}), to_float(T{b}), to_float(T{c}))).bits;
}
template <typename T, auto F>
u32 pair2(u32 a, u32 b) {
  return pair(single2<T, F>(u16(a >> 16), u16(b >> 16)), single2<T, F>(u16(a), u16(b)));
}
template <typename T, auto F>
u32 pair3(u32 a, u32 b, u32 c) {
  return pair(single3<T, F>(u16(a >> 16), u16(b >> 16), u16(c >> 16)), single3<T, F>(u16(a), u16(b), u16(c)));
}
u16 neg16(u16 a) { return a ^ 0x8000; }
u16 abs16(u16 a) { return a & 0x7fff; }
u32 neg16x2(u32 a) { return a ^ 0x80008000u; }
u32 abs16x2(u32 a) { return a & 0x7fff7fffu; }
u16 ex2_half(u16 a) { return to_half(exp2f(to_float(Half{a}))).bits; }
u16 tanh_half(u16 a) { return to_half(tanhf(to_float(Half{a}))).bits; }

#define EACH_HALF(NAME, FUNCTION, ARITY)                                   \
  table[NAME ".f16"] = Lift<single##ARITY<Half, FUNCTION>>::lanewise();    \
  table[NAME ".bf16"] = Lift<single##ARITY<BFloat, FUNCTION>>::lanewise(); \
  table[NAME ".f16x2"] = Lift<pair##ARITY<Half, FUNCTION>>::lanewise();    \
  table[NAME ".bf16x2"] = Lift<pair##ARITY<BFloat, FUNCTION>>::lanewise()

}  // namespace

void add_halves(Instructions& known) {
  auto& table = known.lanewise;
  EACH_HALF("add", add, 2);
  EACH_HALF("add.rn", add, 2);
  EACH_HALF("sub", sub, 2);
  EACH_HALF("sub.rn", sub, 2);
  EACH_HALF("mul", mul, 2);
  EACH_HALF("mul.rn", mul, 2);
  EACH_HALF("fma.rn", fma, 3);
  EACH_HALF("min", (extreme<true, false, float>), 2);
  EACH_HALF("max", (extreme<false, false, float>), 2);
  EACH_HALF("min.NaN", (extreme<true, true, float>), 2);
  EACH_HALF("max.NaN", (extreme<false, true, float>), 2);
  for (const char* type : {".f16", ".bf16"}) {
    table[std::string("neg") + type] = Lift<neg16>::lanewise();
    table[std::string("abs") + type] = Lift<abs16>::lanewise();
    table[std::string("neg") + type + "x2"] = Lift<neg16x2>::lanewise();
    table[std::string("abs") + type + "x2"] = Lift<abs16x2>::lanewise();
  }
  table["ex2.approx.f16"] = Lift<ex2_half>::lanewise();
  table["tanh.approx.f16"] = Lift<tanh_half>::lanewise();
}

}  // namespace ptxemu
