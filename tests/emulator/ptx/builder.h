// Statements -> instructions. Whatever an opcode's builder does not know of it is an error.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"

namespace ptxemu {

// A function of one lane's operands, lifted to a warp. bool stands for a predicate.
struct Lanewise {
  Run run;
  std::vector<int> widths;  // of the result and the operands
};

class Builder;
struct Instructions {
  std::unordered_map<std::string, Lanewise> lanewise;            // by opcode with all modifiers
  std::unordered_map<std::string, void (*)(Builder&)> builders;  // by what stands before the first dot
};
void add_integers(Instructions&);
void add_floats(Instructions&);
void add_halves(Instructions&);
void add_conversions(Instructions&);
void add_moves(Instructions&);
void add_loads_and_stores(Instructions&);
void add_atomics(Instructions&);
void add_mbarriers(Instructions&);
void add_copies(Instructions&);
void add_control(Instructions&);
void add_exchanges(Instructions&);
void add_mma(Instructions&);
void add_wgmma(Instructions&);

struct Type {
  enum Kind { UNSIGNED, SIGNED, BITS, FLOAT, BFLOAT, PREDICATE } kind;
  int bits;       // of an element
  int count = 1;  // f16x2
  bool is_integer() const { return kind == UNSIGNED || kind == SIGNED || kind == BITS; }
};

// Where a kernel's names are.
struct Places {
  std::vector<int> registers;                 // by number
  std::map<std::string, uint64_t> variables;  // in shared and local memory
  std::map<std::string, int> specials;
  std::map<std::pair<uint64_t, int>, int> constants;  // by bits and width
};

class Builder {
 public:
  Builder(Module&, Kernel&, Places&, const Statement&);

  Instruction instruction;
  const Statement& statement;

  // Whether the modifier is there, which it then counts as known.
  bool take(const std::string& modifier);
  // Those that change nothing here.
  void ignore(std::initializer_list<const char*> modifiers);
  // The next of the modifiers that is one of these, or an error.
  std::string take_one_of(const std::vector<std::string>&);
  std::string take_optional(const std::vector<std::string>&, const std::string& otherwise);
  // The next one that is a type.
  Type take_type();
  // The next one for which `is_wanted`; empty if there is none.
  template <typename F>
  std::string take_if(F is_wanted) {
    for (size_t i = 0; i < modifiers_.size(); ++i)
      if (!known_[i] && is_wanted(modifiers_[i])) {
        known_[i] = true;
        return modifiers_[i];
      }
    return "";
  }
  Space take_space();
  bool take_shared();  // of the own block or of the cluster
  void take_hints();
  // An error if a modifier is left.
  void finish() const;

  size_t num_operands() const { return statement.operands.size(); }
  const Operand& operand(size_t i) const;
  bool is_register(const Operand& o) const { return o.kind == Operand::REGISTER; }
  // Places in the register file; anything but registers becomes a constant.
  int source(const Operand&, int width);
  int source(size_t i, int width) { return source(operand(i), width); }
  int destination(const Operand&, int width);
  int destination(size_t i, int width) { return destination(operand(i), width); }
  // A register of whatever width, which is returned in `width`; constants get the width given.
  int any_source(const Operand&, int& width);
  int any_destination(const Operand&, int& width);
  std::vector<int> sources(size_t i, int width);
  std::vector<int> destinations(size_t i, int width);
  // A predicate, and whether it stands there negated.
  int predicate(size_t i, bool& negated);
  // The two results of a|b; the second is NOWHERE if there is only one.
  void destination_pair(size_t i, int width, int& first, int& second);
  // [register + offset] or [variable + offset], as instruction.address[slot].
  void address(size_t i, int slot);
  // The statement that a label stands before.
  int label(const std::string& name) const;
  // An integer that has to be there as a number.
  int64_t number(size_t i) const;

  void plain(Run);
  void collective(Run, bool needs_all_lanes, int members = NOWHERE);
  void blocking(Run, bool needs_all_lanes);

  [[noreturn]] void fail(const std::string& what) const;

 private:
  int constant(uint64_t bits, int width);
  int special(const std::string& name);
  bool find_symbol(const std::string& name, uint64_t& value) const;

  Module& module_;
  Kernel& kernel_;
  Places& places_;
  std::vector<std::string> modifiers_;
  std::vector<bool> known_;
};

inline void run_nothing(Warp&, const Instruction&, Mask) {}

inline uint64_t address_of(Warp& warp, const Instruction& in, int slot, int lane) {
  const Address& a = in.address[slot];
  return (a.is_wide ? warp.reg<uint64_t>(a.at)[lane] : warp.reg<uint32_t>(a.at)[lane]) + a.offset;
}

template <typename T>
constexpr int width_of_register() {
  return std::is_same_v<T, bool> ? 1 : sizeof(T) == 1 ? 16 : 8 * sizeof(T);
}

template <typename T>
struct LaneView {
  const T* values;
  T operator[](int lane) const { return values[lane]; }
};
template <>
struct LaneView<bool> {
  Mask mask;
  bool operator[](int lane) const { return mask >> lane & 1; }
};
template <typename T>
LaneView<T> lanes_of(Warp& warp, int at) {
  if constexpr (std::is_same_v<T, bool>)
    return {warp.predicate(at)};
  else
    return {warp.reg<T>(at)};
}

template <auto F>
struct Lift;
template <typename R, typename... A, R (*F)(A...)>
struct Lift<F> {
  template <size_t... I>
  static void apply(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<I...>) {
    const std::tuple<LaneView<A>...> operands{lanes_of<A>(warp, in.at[I + 1])...};
    if constexpr (std::is_same_v<R, bool>) {
      Mask result = 0;
      for (int lane = 0; lane < LANES; ++lane) result |= Mask{F(std::get<I>(operands)[lane]...)} << lane;
      set_lanes(warp.predicate(in.at[0]), mask, result);
    } else if (mask == ALL_LANES) {
      R result[LANES];
      for (int lane = 0; lane < LANES; ++lane) result[lane] = F(std::get<I>(operands)[lane]...);
      std::memcpy(warp.reg<R>(in.at[0]), result, sizeof(result));
    } else {
      R* out = warp.reg<R>(in.at[0]);
      for_each_lane(mask, [&](int lane) { out[lane] = F(std::get<I>(operands)[lane]...); });
    }
  }
  static void run(Warp& warp, const Instruction& in, Mask mask) {
    apply(warp, in, mask, std::index_sequence_for<A...>());
  }
  static Lanewise lanewise() { return {&run, {width_of_register<R>(), width_of_register<A>()...}}; }
};

}  // namespace ptxemu
