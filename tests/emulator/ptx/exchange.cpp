// Exchange between the lanes of a warp.
#include "builder.h"

namespace ptxemu {
namespace {

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// at: result, value, b, c; at[4]: the predicate or NOWHERE; option[0]: the kind.
void run_shfl(Warp& warp, const Instruction& in, Mask mask) {
  uint32_t values[LANES];
  std::memcpy(values, warp.reg<uint32_t>(in.at[1]), sizeof(values));
  Mask in_range = 0;
  for_each_lane(mask, [&](int lane) {
    const uint32_t b = warp.reg<uint32_t>(in.at[2])[lane] & 31, c = warp.reg<uint32_t>(in.at[3])[lane];
    const uint32_t clamp = c & 31, segment = c >> 8 & 31;
    const int most = static_cast<int>((lane & segment) | (clamp & ~segment));
    const int least = static_cast<int>(lane & segment);
    int from = lane;
    switch (in.option[0]) {
      case UP: from = lane - static_cast<int>(b); break;
      case DOWN: from = lane + static_cast<int>(b); break;
      case BUTTERFLY: from = lane ^ static_cast<int>(b); break;
      default: from = least | static_cast<int>(b & ~segment); break;
    }
    const bool is_valid = in.option[0] == UP ? from >= most : from <= most;
    if (!is_valid) from = lane;
    in_range |= Mask{is_valid} << lane;
    if (!(mask >> from & 1))
      throw Fault("lane " + std::to_string(lane) + " reads lane " + std::to_string(from) +
                  ", which takes no part");
    warp.reg<uint32_t>(in.at[0])[lane] = values[from];
  });
  if (in.at[4] != NOWHERE) set_lanes(warp.predicate(in.at[4]), mask, in_range);
}

void build_shfl(Builder& builder) {
  Instruction& in = builder.instruction;
  builder.take_one_of({"sync"});
  const std::string kind = builder.take_one_of({"up", "down", "bfly", "idx"});
  in.option[0] = kind == "up" ? UP : kind == "down" ? DOWN : kind == "bfly" ? BUTTERFLY : INDEX;
  builder.take_one_of({"b32"});
  builder.destination_pair(0, 32, in.at[0], in.at[4]);
  for (int i = 1; i < 4; ++i) in.at[i] = builder.source(i, 32);
  builder.collective(run_shfl, false, builder.source(4, 32));
}

enum Vote { ALL, ANY, UNI, BALLOT };

void run_vote(Warp& warp, const Instruction& in, Mask mask) {
  const Mask value = (in.option[1] ? ~warp.predicate(in.at[1]) : warp.predicate(in.at[1])) & mask;
  if (in.option[0] == BALLOT) {
    for_each_lane(mask, [&](int lane) { warp.reg<uint32_t>(in.at[0])[lane] = value; });
    return;
  }
  const bool all = value == mask, any = value != 0;
  const bool result = in.option[0] == ALL ? all : in.option[0] == ANY ? any : all || !any;
  set_lanes(warp.predicate(in.at[0]), mask, result ? ALL_LANES : 0);
}

void build_vote(Builder& builder) {
  Instruction& in = builder.instruction;
  builder.take_one_of({"sync"});
  const std::string kind = builder.take_one_of({"all", "any", "uni", "ballot"});
  builder.take_one_of({"pred", "b32"});
  in.option[0] = kind == "all" ? ALL : kind == "any" ? ANY : kind == "uni" ? UNI : BALLOT;
  in.at[0] = builder.destination(0, kind == "ballot" ? 32 : 1);
  bool is_negated = false;
  in.at[1] = builder.predicate(1, is_negated);
  in.option[1] = is_negated;
  builder.collective(run_vote, false, builder.source(2, 32));
}

template <typename T>
void run_match(Warp& warp, const Instruction& in, Mask mask) {
  const T* values = warp.reg<T>(in.at[1]);
  Mask all_equal = ALL_LANES;
  Mask equal[LANES] = {};
  for_each_lane(mask, [&](int lane) {
    for_each_lane(mask, [&](int other) { equal[lane] |= Mask{values[lane] == values[other]} << other; });
    if (equal[lane] != mask) all_equal = 0;
  });
  for_each_lane(mask, [&](int lane) {
    warp.reg<uint32_t>(in.at[0])[lane] = in.option[0] ? mask & all_equal : equal[lane];
  });
  if (in.at[2] != NOWHERE) set_lanes(warp.predicate(in.at[2]), mask, all_equal);
}

void build_match(Builder& builder) {
  Instruction& in = builder.instruction;
  in.option[0] = builder.take_one_of({"any", "all"}) == "all";
  builder.take_one_of({"sync"});
  const Type type = builder.take_type();
  builder.destination_pair(0, 32, in.at[0], in.at[2]);
  in.at[1] = builder.source(1, type.bits);
  builder.collective(type.bits == 64 ? run_match<uint64_t> : run_match<uint32_t>, false,
                     builder.source(2, 32));
}

enum Redux { R_ADD, R_MIN, R_MAX, R_AND, R_OR, R_XOR };

template <typename T>
void run_redux(Warp& warp, const Instruction& in, Mask mask) {
  const T* values = warp.reg<T>(in.at[1]);
  T result = values[__builtin_ctz(mask)];
  for_each_lane(mask & (mask - 1), [&](int lane) {
    const T x = values[lane];
    switch (in.option[0]) {
      case R_ADD: result = T(uint32_t(result) + uint32_t(x)); break;
      case R_MIN: result = x < result ? x : result; break;
      case R_MAX: result = x > result ? x : result; break;
      case R_AND: result &= x; break;
      case R_OR: result |= x; break;
      default: result ^= x; break;
    }
  });
  for_each_lane(mask, [&](int lane) { warp.reg<T>(in.at[0])[lane] = result; });
}

void build_redux(Builder& builder) {
  Instruction& in = builder.instruction;
  builder.take_one_of({"sync"});
  const std::string kind = builder.take_one_of({"add", "min", "max", "and", "or", "xor"});
  in.option[0] = kind == "add"   ? R_ADD
                 : kind == "min" ? R_MIN
                 : kind == "max" ? R_MAX
                 : kind == "and" ? R_AND
                 : kind == "or"  ? R_OR
                                 : R_XOR;
  const bool is_signed = builder.take_one_of({"s32", "u32", "b32"}) == "s32";
  in.at[0] = builder.destination(0, 32);
  in.at[1] = builder.source(1, 32);
  builder.collective(is_signed ? run_redux<int32_t> : run_redux<uint32_t>, false, builder.source(2, 32));
}

void run_elect(Warp& warp, const Instruction& in, Mask mask) {
  const int leader = __builtin_ctz(mask);
  for_each_lane(mask, [&](int lane) { warp.reg<uint32_t>(in.at[0])[lane] = leader; });
  set_lanes(warp.predicate(in.at[1]), mask, Mask{1} << leader);
}

void build_elect(Builder& builder) {
  builder.take_one_of({"sync"});
  Instruction& in = builder.instruction;
  builder.destination_pair(0, 32, in.at[0], in.at[1]);
  if (in.at[1] == NOWHERE) builder.fail("expected a pair of results");
  builder.collective(run_elect, false, builder.source(1, 32));
}

void run_activemask(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) { warp.reg<uint32_t>(in.at[0])[lane] = mask; });
}
void build_activemask(Builder& builder) {
  builder.take_one_of({"b32"});
  builder.instruction.at[0] = builder.destination(0, 32);
  builder.plain(run_activemask);
}

}  // namespace

void add_exchanges(Instructions& known) {
  known.builders["shfl"] = build_shfl;
  known.builders["vote"] = build_vote;
  known.builders["match"] = build_match;
  known.builders["redux"] = build_redux;
  known.builders["elect"] = build_elect;
  known.builders["activemask"] = build_activemask;
}

}  // namespace ptxemu
