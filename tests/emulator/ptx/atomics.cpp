// atom and red.
#include <algorithm>

#include "builder.h"
#include "numbers.h"

namespace ptxemu {
namespace {

enum Atomic { ADD, MIN, MAX, AND, OR, XOR, EXCH, CAS, INC, DEC };
const std::vector<std::string> ATOMICS = {"add", "min",  "max", "and", "or",
                                          "xor", "exch", "cas", "inc", "dec"};

template <Atomic OP, typename T>
T combine(T old, T value, T swap) {
  // Unsigned, because an overflow of signed numbers has no meaning in C++.
  if constexpr (OP == ADD && std::is_integral_v<T>) return static_cast<T>(uint64_t(old) + uint64_t(value));
  if constexpr (OP == ADD) return old + value;
  if constexpr (OP == MIN) return value < old ? value : old;
  if constexpr (OP == MAX) return value > old ? value : old;
  if constexpr (OP == EXCH) return value;
  if constexpr (OP == CAS) return old == value ? swap : old;
  if constexpr (std::is_integral_v<T>) {
    if constexpr (OP == AND) return old & value;
    if constexpr (OP == OR) return old | value;
    if constexpr (OP == XOR) return old ^ value;
    if constexpr (OP == INC) return old >= value ? 0 : old + 1;
    if constexpr (OP == DEC) return old == 0 || old > value ? value : old - 1;
  }
  return old;
}

// address[0]; at[0]: result or NOWHERE; at[1]: operand; at[2]: what cas stores; option[0]: space.
template <Atomic OP, typename T>
void run_atomic(Warp& warp, const Instruction& in, Mask mask) {
  const auto space = static_cast<Space>(in.option[0]);
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = address_of(warp, in, 0, lane);
    uint8_t* where = memory(warp, in, lane, space, address, sizeof(T), Access::ATOMIC);
    T old;
    std::memcpy(&old, where, sizeof(T));
    const T value =
        combine<OP, T>(old, warp.reg<T>(in.at[1])[lane], OP == CAS ? warp.reg<T>(in.at[2])[lane] : T());
    if (std::memcmp(&old, &value, sizeof(T))) warp.block->launch->event();
    std::memcpy(where, &value, sizeof(T));
    if (in.at[0] != NOWHERE) warp.reg<T>(in.at[0])[lane] = old;
  });
}

// Pairs of 16-bit floats: only sums.
template <typename T>
void run_atomic_pair(Warp& warp, const Instruction& in, Mask mask) {
  const auto space = static_cast<Space>(in.option[0]);
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = address_of(warp, in, 0, lane);
    uint8_t* where = memory(warp, in, lane, space, address, 4, Access::ATOMIC);
    T old[2], term[2], sum[2];
    std::memcpy(old, where, 4);
    std::memcpy(term, &warp.reg<uint32_t>(in.at[1])[lane], 4);
    for (int i = 0; i < 2; ++i) sum[i] = narrow<T>(to_float(old[i]) + to_float(term[i]));
    std::memcpy(where, sum, 4);
    if (in.at[0] != NOWHERE) std::memcpy(&warp.reg<uint32_t>(in.at[0])[lane], old, 4);
  });
  warp.block->launch->event();
}

template <typename T>
Run atomic_of(size_t op) {
  static constexpr Run runs[] = {
      run_atomic<ADD, T>, run_atomic<MIN, T>,  run_atomic<MAX, T>, run_atomic<AND, T>, run_atomic<OR, T>,
      run_atomic<XOR, T>, run_atomic<EXCH, T>, run_atomic<CAS, T>, run_atomic<INC, T>, run_atomic<DEC, T>};
  return runs[op];
}

void build_atomic(Builder& builder, bool has_result) {
  Instruction& in = builder.instruction;
  in.option[0] = static_cast<int>(builder.take_space());
  builder.take_hints();
  builder.take("noftz");
  const std::string name = builder.take_one_of(ATOMICS);
  const size_t op = std::find(ATOMICS.begin(), ATOMICS.end(), name) - ATOMICS.begin();
  const Type type = builder.take_type();
  const size_t first = has_result ? 1 : 0;
  const int width = type.bits * type.count;
  if (has_result) in.at[0] = builder.destination(0, width);
  builder.address(first, 0);
  in.at[1] = builder.source(first + 1, width);
  if (op == CAS) in.at[2] = builder.source(first + 2, width);
  if (type.count == 2 && op == ADD)
    return builder.plain(type.kind == Type::FLOAT ? run_atomic_pair<Half> : run_atomic_pair<BFloat>);
  if (type.kind == Type::FLOAT && op == ADD && type.bits >= 32)
    return builder.plain(type.bits == 32 ? atomic_of<float>(op) : atomic_of<double>(op));
  if (!type.is_integer() || type.bits < 32) builder.fail("unsupported type");
  const bool is_signed = type.kind == Type::SIGNED;
  if (type.bits == 32) return builder.plain(is_signed ? atomic_of<int32_t>(op) : atomic_of<uint32_t>(op));
  builder.plain(is_signed ? atomic_of<int64_t>(op) : atomic_of<uint64_t>(op));
}
void build_atom(Builder& builder) { build_atomic(builder, true); }
void build_red(Builder& builder) { build_atomic(builder, false); }

}  // namespace

void add_atomics(Instructions& known) {
  known.builders["atom"] = build_atom;
  known.builders["red"] = build_red;
}

}  // namespace ptxemu
