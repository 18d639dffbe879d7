// Loads, stores and what computes addresses.
#include "builder.h"

namespace ptxemu {
namespace {

// address[0]; option[0]: space; list: registers.
template <typename M, typename R>
void run_load(Warp& warp, const Instruction& in, Mask mask) {
  const auto space = static_cast<Space>(in.option[0]);
  const size_t count = in.list.size();
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = address_of(warp, in, 0, lane);
    const uint8_t* from = memory(warp, in, lane, space, address, count * sizeof(M), Access::READ);
    M values[8];
    std::memcpy(values, from, count * sizeof(M));
    for (size_t i = 0; i < count; ++i) warp.reg<R>(in.list[i])[lane] = static_cast<R>(values[i]);
  });
}

template <typename M, typename R>
void run_store(Warp& warp, const Instruction& in, Mask mask) {
  const auto space = static_cast<Space>(in.option[0]);
  const size_t count = in.list.size();
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = address_of(warp, in, 0, lane);
    M values[8];
    for (size_t i = 0; i < count; ++i) values[i] = static_cast<M>(warp.reg<R>(in.list[i])[lane]);
    uint8_t* to = memory(warp, in, lane, space, address, count * sizeof(M), Access::WRITE, values);
    std::memcpy(to, values, count * sizeof(M));
  });
  warp.block->launch->event();
}

template <typename M>
Run load_of(int width) {
  return width == 16 ? run_load<M, uint16_t> : width == 32 ? run_load<M, uint32_t> : run_load<M, uint64_t>;
}
template <typename M>
Run store_of(int width) {
  return width == 16 ? run_store<M, uint16_t> : width == 32 ? run_store<M, uint32_t> : run_store<M, uint64_t>;
}

// The registers of a load or store, all of one width.
std::vector<int> data_registers(Builder& builder, size_t i, int& width, bool is_load) {
  const Operand& operand = builder.operand(i);
  const std::vector<Operand> parts =
      operand.kind == Operand::VECTOR ? operand.parts : std::vector<Operand>{operand};
  std::vector<int> result;
  for (const Operand& part : parts)
    if (builder.is_register(part)) width = part.reg.width;
  for (const Operand& part : parts)
    result.push_back(is_load ? builder.destination(part, width) : builder.source(part, width));
  return result;
}

void build_access(Builder& builder, bool is_load) {
  Instruction& in = builder.instruction;
  const Space space = builder.take_space();
  builder.take_hints();
  const size_t vector = builder.take("v2") ? 2 : builder.take("v4") ? 4 : builder.take("v8") ? 8 : 1;
  const Type type = builder.take_type();
  int width = std::max(16, type.bits);
  in.list = data_registers(builder, is_load ? 0 : 1, width, is_load);
  if (in.list.size() != vector) builder.fail("wrong number of registers");
  if (width < type.bits) builder.fail("a register is too narrow");
  builder.address(is_load ? 1 : 0, 0);
  in.option[0] = static_cast<int>(space);
  const bool is_signed = type.kind == Type::SIGNED && is_load;
  switch (type.bits) {
    case 8:
      return builder.plain(!is_load    ? store_of<uint8_t>(width)
                           : is_signed ? load_of<int8_t>(width)
                                       : load_of<uint8_t>(width));
    case 16:
      return builder.plain(!is_load    ? store_of<uint16_t>(width)
                           : is_signed ? load_of<int16_t>(width)
                                       : load_of<uint16_t>(width));
    case 32:
      return builder.plain(!is_load    ? store_of<uint32_t>(width)
                           : is_signed ? load_of<int32_t>(width)
                                       : load_of<uint32_t>(width));
    case 64: return builder.plain(!is_load ? store_of<uint64_t>(width) : load_of<uint64_t>(width));
    default: builder.fail("unsupported type");
  }
}
void build_ld(Builder& builder) { build_access(builder, true); }
void build_st(Builder& builder) { build_access(builder, false); }

// --- addresses

template <int64_t OFFSET>
void run_shift_address(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    warp.reg<uint64_t>(in.at[0])[lane] = warp.reg<uint64_t>(in.at[1])[lane] + OFFSET;
  });
}

// The generic address of a parameter.
void run_cvta_parameter(Warp& warp, const Instruction& in, Mask mask) {
  const auto first = reinterpret_cast<uint64_t>(warp.block->launch->parameters.data());
  for_each_lane(mask, [&](int lane) {
    warp.reg<uint64_t>(in.at[0])[lane] = warp.reg<uint64_t>(in.at[1])[lane] + first;
  });
}

void build_cvta(Builder& builder) {
  const bool to_space = builder.take("to");
  const bool is_shared = builder.take_shared();
  const bool is_local = builder.take("local"), is_parameter = !to_space && builder.take("param");
  if (!is_shared && !is_local && !is_parameter) builder.take_one_of({"global", "const"});
  builder.take_one_of({"u64"});
  builder.instruction.at[0] = builder.destination(0, 64);
  builder.instruction.at[1] = builder.source(1, 64);
  constexpr auto SHARED = static_cast<int64_t>(SHARED_WINDOW), LOCAL = static_cast<int64_t>(LOCAL_WINDOW);
  if (is_parameter) return builder.plain(run_cvta_parameter);
  if (is_local) return builder.plain(to_space ? run_shift_address<-LOCAL> : run_shift_address<LOCAL>);
  if (is_shared) return builder.plain(to_space ? run_shift_address<-SHARED> : run_shift_address<SHARED>);
  builder.plain(run_shift_address<0>);
}

// The same offset in the block of another rank.
template <typename T, bool IS_GENERIC>
void run_mapa(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    uint64_t address = warp.reg<T>(in.at[1])[lane];
    if (IS_GENERIC) address -= SHARED_WINDOW;
    const uint32_t rank = warp.reg<uint32_t>(in.at[2])[lane];
    if (rank >= warp.block->cluster->blocks.size()) throw Fault("mapa to rank " + std::to_string(rank));
    const uint64_t offset = address & ((uint64_t{1} << SHARED_BLOCK_SHIFT) - 1);
    warp.reg<T>(in.at[0])[lane] =
        T((uint64_t{rank} + 1) << SHARED_BLOCK_SHIFT | offset) + (IS_GENERIC ? T(SHARED_WINDOW) : T(0));
  });
}

void build_mapa(Builder& builder) {
  const bool is_shared = builder.take("shared::cluster");
  const bool is_wide = builder.take_one_of({"u32", "u64"}) == "u64";
  const int width = is_wide ? 64 : 32;
  builder.instruction.at[0] = builder.destination(0, width);
  builder.instruction.at[1] = builder.source(1, width);
  builder.instruction.at[2] = builder.source(2, 32);
  if (!is_shared && !is_wide) builder.fail("a generic address has 64 bits");
  builder.plain(!is_shared ? run_mapa<uint64_t, true>
                : is_wide  ? run_mapa<uint64_t, false>
                           : run_mapa<uint32_t, false>);
}

void run_isspacep(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const Space space = space_of(warp.reg<uint64_t>(in.at[1])[lane]);
    const Mask is_there = space == static_cast<Space>(in.option[0]);
    set_lanes(warp.predicate(in.at[0]), Mask{1} << lane, is_there << lane);
  });
}

void build_isspacep(Builder& builder) {
  const std::string space = builder.take_one_of({"global", "shared", "local"});
  builder.instruction.option[0] = static_cast<int>(space == "global"   ? Space::GLOBAL
                                                   : space == "shared" ? Space::SHARED
                                                                       : Space::LOCAL);
  builder.instruction.at[0] = builder.destination(0, 1);
  builder.instruction.at[1] = builder.source(1, 64);
  builder.plain(run_isspacep);
}

void build_prefetch(Builder& builder) {
  builder.take_space();
  builder.take_one_of({"L1", "L2", "tensormap"});
  builder.address(0, 0);
  builder.plain(run_nothing);
}

// A cache policy is a hint.
void run_createpolicy(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) { warp.reg<uint64_t>(in.at[0])[lane] = 0; });
}
void build_createpolicy(Builder& builder) {
  builder.take_one_of({"fractional"});
  builder.take_hints();
  builder.take_one_of({"b64"});
  builder.instruction.at[0] = builder.destination(0, 64);
  builder.plain(run_createpolicy);
}

}  // namespace

void add_loads_and_stores(Instructions& known) {
  known.builders["ld"] = build_ld;
  known.builders["ldu"] = build_ld;
  known.builders["st"] = build_st;
  known.builders["cvta"] = build_cvta;
  known.builders["mapa"] = build_mapa;
  known.builders["isspacep"] = build_isspacep;
  known.builders["prefetch"] = build_prefetch;
  known.builders["prefetchu"] = build_prefetch;
  known.builders["createpolicy"] = build_createpolicy;
}

}  // namespace ptxemu
