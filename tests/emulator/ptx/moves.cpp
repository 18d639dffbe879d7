// Moves, comparisons and tests.
#include <algorithm>
#include <cmath>

#include "builder.h"
#include "numbers.h"

namespace ptxemu {
namespace {

// --- comparisons

template <typename T>
bool is_nan(T a) {
  return a != a;
}
enum Comparison { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
const std::vector<std::string> COMPARISONS = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                              "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

template <Comparison C, typename T>
bool compare(T a, T b) {
  switch (C) {
    case EQ: return a == b;
    case NE: return a != b && !is_nan(a) && !is_nan(b);
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return a == b || is_nan(a) || is_nan(b);
    case NEU: return a != b;
    case LTU: return !(a >= b);
    case LEU: return !(a > b);
    case GTU: return !(a <= b);
    case GEU: return !(a < b);
    case NUM: return !is_nan(a) && !is_nan(b);
    default: return is_nan(a) || is_nan(b);
  }
}

template <typename T>
auto value_of(T x) {
  return x;
}
inline float value_of(Half x) { return to_float(x); }
inline float value_of(BFloat x) { return to_float(x); }

// option: the operation with a third operand (0 none, 1 and, 2 or, 3 xor), whether that is negated, ftz.
// at: the result and, or NOWHERE, its opposite; both operands; the third.
template <Comparison C, typename T>
void run_setp(Warp& warp, const Instruction& in, Mask mask) {
  const T *a = warp.reg<T>(in.at[2]), *b = warp.reg<T>(in.at[3]);
  Mask result = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (in.option[2]) {
      for (int i = 0; i < LANES; ++i) result |= Mask{compare<C>(flush(a[i]), flush(b[i]))} << i;
    } else {
      for (int i = 0; i < LANES; ++i) result |= Mask{compare<C>(a[i], b[i])} << i;
    }
  } else {
    for (int i = 0; i < LANES; ++i) result |= Mask{compare<C>(value_of(a[i]), value_of(b[i]))} << i;
  }
  Mask opposite = ~result;
  if (in.option[0]) {
    const Mask c = in.option[1] ? ~warp.predicate(in.at[4]) : warp.predicate(in.at[4]);
    const auto combine = [&](Mask x) {
      return in.option[0] == 1 ? x & c : in.option[0] == 2 ? x | c : x ^ c;
    };
    result = combine(result);
    opposite = combine(opposite);
  }
  set_lanes(warp.predicate(in.at[0]), mask, result);
  if (in.at[1] != NOWHERE) set_lanes(warp.predicate(in.at[1]), mask, opposite);
}

template <typename T, size_t... C>
Run setp_of(size_t comparison, std::index_sequence<C...>) {
  static constexpr Run runs[] = {&run_setp<static_cast<Comparison>(C), T>...};
  return runs[comparison];
}
template <typename T>
Run setp_of(size_t comparison) {
  return setp_of<T>(comparison, std::make_index_sequence<14>());
}

Run setp_run(Builder& builder, const Type& type, size_t comparison) {
  if (type.kind == Type::FLOAT)
    return type.bits == 16   ? setp_of<Half>(comparison)
           : type.bits == 32 ? setp_of<float>(comparison)
                             : setp_of<double>(comparison);
  if (type.kind == Type::BFLOAT) return setp_of<BFloat>(comparison);
  const bool is_signed = type.kind == Type::SIGNED;
  if (type.bits == 16) return is_signed ? setp_of<i16>(comparison) : setp_of<u16>(comparison);
  if (type.bits == 32) return is_signed ? setp_of<i32>(comparison) : setp_of<u32>(comparison);
  if (type.bits == 64) return is_signed ? setp_of<i64>(comparison) : setp_of<u64>(comparison);
  builder.fail("unsupported type");
}

void build_setp(Builder& builder) {
  std::string name = builder.take_optional({"lo", "ls", "hi", "hs"}, "");
  name = name.empty()   ? builder.take_one_of(COMPARISONS)
         : name == "lo" ? "lt"
         : name == "ls" ? "le"
         : name == "hi" ? "gt"
                        : "ge";
  const size_t comparison = std::find(COMPARISONS.begin(), COMPARISONS.end(), name) - COMPARISONS.begin();
  Instruction& in = builder.instruction;
  in.option[0] = builder.take("and") ? 1 : builder.take("or") ? 2 : builder.take("xor") ? 3 : 0;
  in.option[2] = builder.take("ftz");
  const Type type = builder.take_type();
  if (type.count != 1) builder.fail("unsupported type");
  builder.destination_pair(0, 1, in.at[0], in.at[1]);
  in.at[2] = builder.source(1, type.bits);
  in.at[3] = builder.source(2, type.bits);
  if (in.option[0]) {
    bool is_negated = false;
    in.at[4] = builder.predicate(3, is_negated);
    in.option[1] = is_negated;
  }
  builder.plain(setp_run(builder, type, comparison));
}

// --- moves

template <typename T>
T copy(T a) {
  return a;
}

// at[0]: the whole; list: its parts, from the lowest bits on.
template <typename Whole, typename Part>
void run_pack(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    Whole whole = 0;
    for (size_t i = 0; i < in.list.size(); ++i)
      whole |= Whole(warp.reg<Part>(in.list[i])[lane]) << (8 * sizeof(Part) * i);
    warp.reg<Whole>(in.at[0])[lane] = whole;
  });
}
template <typename Whole, typename Part>
void run_unpack(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const Whole whole = warp.reg<Whole>(in.at[0])[lane];
    for (size_t i = 0; i < in.list.size(); ++i)
      warp.reg<Part>(in.list[i])[lane] = Part(whole >> (8 * sizeof(Part) * i));
  });
}

void build_mov(Builder& builder) {
  const Type type = builder.take_type();
  Instruction& in = builder.instruction;
  const Operand &to = builder.operand(0), &from = builder.operand(1);
  const bool packs = from.kind == Operand::VECTOR, unpacks = to.kind == Operand::VECTOR;
  if (packs || unpacks) {
    const size_t parts = packs ? from.parts.size() : to.parts.size();
    const int width = type.bits / static_cast<int>(parts);
    in.list = packs ? builder.sources(1, width) : builder.destinations(0, width);
    in.at[0] = packs ? builder.destination(0, type.bits) : builder.source(1, type.bits);
    if (type.bits == 32 && width == 16)
      return builder.plain(packs ? run_pack<u32, u16> : run_unpack<u32, u16>);
    if (type.bits == 64 && width == 32)
      return builder.plain(packs ? run_pack<u64, u32> : run_unpack<u64, u32>);
    if (type.bits == 64 && width == 16)
      return builder.plain(packs ? run_pack<u64, u16> : run_unpack<u64, u16>);
    builder.fail("unsupported parts");
  }
  in.at[0] = builder.destination(0, type.bits);
  in.at[1] = builder.source(1, type.bits);
  builder.plain(type.bits == 1    ? Lift<copy<bool>>::run
                : type.bits == 16 ? Lift<copy<u16>>::run
                : type.bits == 32 ? Lift<copy<u32>>::run
                                  : Lift<copy<u64>>::run);
}

// --- tests

template <typename T>
bool is_finite(T a) {
  return std::isfinite(a);
}
template <typename T>
bool is_infinite(T a) {
  return std::isinf(a);
}
template <typename T>
bool is_number(T a) {
  return !is_nan(a);
}

template <typename T>
void add_tests(Instructions& known, const std::string& type) {
  known.lanewise["testp.finite" + type] = Lift<is_finite<T>>::lanewise();
  known.lanewise["testp.infinite" + type] = Lift<is_infinite<T>>::lanewise();
  known.lanewise["testp.number" + type] = Lift<is_number<T>>::lanewise();
  known.lanewise["testp.notanumber" + type] = Lift<is_nan<T>>::lanewise();
}

}  // namespace

void add_moves(Instructions& known) {
  known.builders["setp"] = build_setp;
  known.builders["mov"] = build_mov;
  add_tests<float>(known, ".f32");
  add_tests<double>(known, ".f64");
}

}  // namespace ptxemu
