// mbarriers: words of shared memory that count arrivals and bytes, phase by phase.
#include "builder.h"

namespace ptxemu {
namespace {

struct Mbarrier {
  uint32_t pending = 0, expected = 0;  // arrivals
  int32_t bytes = 0;                   // announced and not there yet
  bool phase = false;
};

constexpr uint64_t COUNT_MASK = (1 << 20) - 1, VALID = uint64_t{1} << 61, MARKER = uint64_t{3} << 61;
constexpr int32_t MOST_BYTES = (1 << 20) - 1;

uint64_t encode(const Mbarrier& barrier) {
  return barrier.pending | uint64_t{barrier.expected} << 20 | (uint64_t(barrier.bytes) & 0x1fffff) << 40 |
         VALID | uint64_t{barrier.phase} << 63;
}

Mbarrier decode_mbarrier(uint64_t word) {
  if ((word & MARKER) != VALID) throw Fault("no initialised mbarrier is there");
  Mbarrier barrier;
  barrier.pending = word & COUNT_MASK;
  barrier.expected = word >> 20 & COUNT_MASK;
  barrier.bytes = static_cast<int32_t>(static_cast<int64_t>(word << 3) >> 43);
  barrier.phase = word >> 63;
  return barrier;
}

uint8_t* mbarrier_word(Block& from, uint64_t address) {
  const auto [block, offset] = locate_shared(from, address);
  if (offset % 8) throw Fault("an mbarrier at " + hex(address) + ", which is no multiple of 8");
  return shared_memory(*block, offset, 8);
}

template <typename F>
void update_mbarrier(Block& from, uint64_t address, F change) {
  uint8_t* const where = mbarrier_word(from, address);
  uint64_t word;
  std::memcpy(&word, where, 8);
  Mbarrier barrier = decode_mbarrier(word);
  change(barrier);
  if (barrier.bytes > MOST_BYTES || barrier.bytes < -MOST_BYTES)
    throw Fault("too many bytes for an mbarrier");
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.expected;
    barrier.phase = !barrier.phase;
    const auto [block, offset] = locate_shared(from, address);
    if (Races* races = races_of(from)) races->mbarrier_complete(*block, offset);
  }
  word = encode(barrier);
  std::memcpy(where, &word, 8);
  from.launch->event();
}

void arrive(Mbarrier& barrier, uint32_t count) {
  if (count > barrier.pending) throw Fault("more arrivals at an mbarrier than it expects in a phase");
  barrier.pending -= count;
}

// address[0]; at[0]: the state or predicate that results, or NOWHERE; at[1]: a count, parity or state, or
// NOWHERE.
uint64_t lane_address(Warp& warp, const Instruction& in, int lane) {
  return shared_address(address_of(warp, in, 0, lane));
}

void run_mbarrier_init(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const uint32_t count = warp.reg<uint32_t>(in.at[1])[lane];
    if (count == 0 || count > COUNT_MASK)
      throw Fault("an mbarrier for " + std::to_string(count) + " arrivals");
    Mbarrier barrier;
    barrier.pending = barrier.expected = count;
    const uint64_t word = encode(barrier);
    const uint64_t address = lane_address(warp, in, lane);
    std::memcpy(mbarrier_word(*warp.block, address), &word, 8);
    if (Races* races = races_of(*warp.block)) races->mbarrier_init(*warp.block, address);
  });
  warp.block->launch->event();
}

void run_mbarrier_inval(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    update_mbarrier(*warp.block, lane_address(warp, in, lane), [](Mbarrier& barrier) {
      if (barrier.bytes) throw Fault("an mbarrier is invalidated while bytes are announced");
    });
    std::memset(mbarrier_word(*warp.block, lane_address(warp, in, lane)), 0xff, 8);
  });
}

enum Operation { ARRIVE, ARRIVE_EXPECT, EXPECT, COMPLETE, DROP };

// option[0]: .relaxed, which orders nothing.
template <Operation KIND>
void run_mbarrier_arrive(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const uint64_t address = lane_address(warp, in, lane);
    const uint32_t operand = in.at[1] == NOWHERE ? 1 : warp.reg<uint32_t>(in.at[1])[lane];
    if (in.at[0] != NOWHERE)
      std::memcpy(&warp.reg<uint64_t>(in.at[0])[lane], mbarrier_word(*warp.block, address), 8);
    constexpr bool ARRIVES = KIND == ARRIVE || KIND == ARRIVE_EXPECT || KIND == DROP;
    if (Races* races = ARRIVES && !in.option[0] ? races_of(*warp.block) : nullptr) {
      const auto [block, offset] = locate_shared(*warp.block, address);
      races->mbarrier_arrive(warp, *block, offset);
    }
    update_mbarrier(*warp.block, address, [&](Mbarrier& barrier) {
      if (KIND == ARRIVE_EXPECT || KIND == EXPECT) barrier.bytes += static_cast<int32_t>(operand);
      if (KIND == COMPLETE) barrier.bytes -= static_cast<int32_t>(operand);
      if (KIND == DROP && operand > barrier.expected) throw Fault("more arrivals dropped than are expected");
      if (KIND == DROP) barrier.expected -= operand;
      if (KIND == ARRIVE || KIND == DROP) arrive(barrier, operand);
      if (KIND == ARRIVE_EXPECT) arrive(barrier, 1);
    });
  });
}

// option[0]: by parity, not by state; option[1]: try_wait.
void run_mbarrier_wait(Warp& warp, const Instruction& in, Mask mask) {
  Launch& launch = *warp.block->launch;
  Mask done = 0;
  for_each_lane(mask, [&](int lane) {
    uint64_t word;
    std::memcpy(&word, mbarrier_word(*warp.block, lane_address(warp, in, lane)), 8);
    const bool phase = decode_mbarrier(word).phase;
    const bool waited_for =
        in.option[0] ? warp.reg<uint32_t>(in.at[1])[lane] & 1 : warp.reg<uint64_t>(in.at[1])[lane] >> 63;
    done |= Mask{phase != waited_for} << lane;
  });
  constexpr int SPURIOUS = 16;
  if (done == 0 && in.option[1] && !launch.waits_time_out && !launch.chance(SPURIOUS)) {
    warp.must_wait = true;
    return;
  }
  set_lanes(warp.predicate(in.at[0]), mask, done);
  if (Races* races = races_of(*warp.block))
    for_each_lane(done,
                  [&](int lane) { races->mbarrier_wait(warp, *warp.block, lane_address(warp, in, lane)); });
}

void build_mbarrier(Builder& builder) {
  Instruction& in = builder.instruction;
  const bool is_relaxed = builder.take("relaxed");
  builder.ignore({"release", "acquire", "cta", "cluster", "shared", "shared::cta", "shared::cluster"});
  if (builder.take("init")) {
    builder.take_one_of({"b64"});
    builder.address(0, 0);
    in.at[1] = builder.source(1, 32);
    return builder.plain(run_mbarrier_init);
  }
  if (builder.take("inval")) {
    builder.take_one_of({"b64"});
    builder.address(0, 0);
    return builder.plain(run_mbarrier_inval);
  }
  const bool tries = builder.take("try_wait");
  if (tries || builder.take("test_wait")) {
    in.option[0] = builder.take("parity");
    in.option[1] = tries;
    builder.take_one_of({"b64"});
    in.at[0] = builder.destination(0, 1);
    builder.address(1, 0);
    in.at[1] = builder.source(2, in.option[0] ? 32 : 64);
    return builder.blocking(run_mbarrier_wait, false);
  }
  const bool arrives = builder.take("arrive"), drops = builder.take("arrive_drop");
  const bool expects = builder.take("expect_tx"), completes = builder.take("complete_tx");
  builder.take_one_of({"b64"});
  const size_t first = arrives || drops ? 1 : 0;
  if (first && builder.is_register(builder.operand(0))) in.at[0] = builder.destination(0, 64);
  builder.address(first, 0);
  if (builder.num_operands() > first + 1) in.at[1] = builder.source(first + 1, 32);
  if ((expects || completes) && in.at[1] == NOWHERE) builder.fail("too few operands");
  if (arrives + drops + completes > 1 || (expects && (drops || completes)) ||
      !(arrives || drops || expects || completes))
    builder.fail("an unsupported form");
  in.option[0] = is_relaxed;
  builder.plain(drops                ? run_mbarrier_arrive<DROP>
                : arrives && expects ? run_mbarrier_arrive<ARRIVE_EXPECT>
                : arrives            ? run_mbarrier_arrive<ARRIVE>
                : expects            ? run_mbarrier_arrive<EXPECT>
                                     : run_mbarrier_arrive<COMPLETE>);
}

}  // namespace

void complete_bytes(Block& block, uint64_t offset, uint32_t bytes) {
  update_mbarrier(block, offset, [&](Mbarrier& barrier) { barrier.bytes -= static_cast<int32_t>(bytes); });
}

void add_mbarriers(Instructions& known) { known.builders["mbarrier"] = build_mbarrier; }

}  // namespace ptxemu
