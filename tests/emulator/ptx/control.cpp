// Control flow, barriers, fences.
#include "builder.h"

namespace ptxemu {
namespace {

// --- branches

void build_bra(Builder& builder) {
  builder.take("uni");
  const Operand& target = builder.operand(0);
  if (target.kind != Operand::SYMBOL) builder.fail("expected a label");
  builder.instruction.flow = Flow::BRANCH;
  builder.instruction.target = builder.label(target.symbol);
}

void build_exit(Builder& builder) {
  builder.take("uni");
  builder.instruction.flow = Flow::EXIT;
}

void run_trap(Warp&, const Instruction&, Mask) { throw Fault("trap"); }
void build_trap(Builder& builder) { builder.plain(run_trap); }

// --- barriers of a block

NamedBarrier& barrier_of(Warp& warp, const Instruction& in, Mask mask) {
  const uint32_t number = warp.reg<uint32_t>(in.at[0])[__builtin_ctz(mask)];
  if (number >= warp.block->barriers.size())
    throw Fault("barrier " + std::to_string(number) + " of a block that has 16");
  return warp.block->barriers[number];
}

// option[0]: whether a number of threads is given, in at[1].
void arrive(Warp& warp, const Instruction& in, Mask mask, NamedBarrier& barrier) {
  const unsigned expected = in.option[0] ? warp.reg<uint32_t>(in.at[1])[__builtin_ctz(mask)] : 0;
  if (expected % LANES || (in.option[0] && expected == 0))
    throw Fault("a barrier of " + std::to_string(expected) + " threads");
  if (barrier.arrived && barrier.expected != expected)
    throw Fault("a barrier of " + std::to_string(expected) + " threads, where others expect " +
                std::to_string(barrier.expected));
  barrier.expected = expected;
  barrier.arrived += __builtin_popcount(mask);
  const unsigned all = expected ? expected : warp.block->live_threads;
  if (barrier.arrived > all) throw Fault("more threads than expected came to the barrier");
  if (Races* races = races_of(*warp.block)) races->release(warp, barrier.arrived_clock);
  warp.block->launch->event();
  if (barrier.arrived == all) barrier.complete();
}

// Whether the current group has passed the barrier.
bool pass(Warp& warp, const Instruction& in, Mask mask, NamedBarrier& barrier) {
  Group& group = *warp.current;
  if (!group.has_arrived) {
    group.has_arrived = true;
    group.ticket = barrier.generation;
    arrive(warp, in, mask, barrier);
  }
  if (barrier.generation == group.ticket) {
    warp.must_wait = true;
    return false;
  }
  group.has_arrived = false;
  if (Races* races = races_of(*warp.block)) races->acquire(warp, barrier.released_clock);
  return true;
}

void run_barrier_sync(Warp& warp, const Instruction& in, Mask mask) {
  pass(warp, in, mask, barrier_of(warp, in, mask));
}

void run_barrier_arrive(Warp& warp, const Instruction& in, Mask mask) {
  arrive(warp, in, mask, barrier_of(warp, in, mask));
}

// at[2]: result; at[3]: predicate; option[1]: 0 popc, 1 and, 2 or; option[2]: the predicate is negated.
void run_barrier_red(Warp& warp, const Instruction& in, Mask mask) {
  NamedBarrier& barrier = barrier_of(warp, in, mask);
  if (!warp.current->has_arrived) {
    const Mask value = in.option[2] ? ~warp.predicate(in.at[3]) : warp.predicate(in.at[3]);
    barrier.true_count += __builtin_popcount(value & mask);
  }
  if (!pass(warp, in, mask, barrier)) return;
  const unsigned count = barrier.last_true_count;
  if (in.option[1] == 0) {
    for_each_lane(mask, [&](int lane) { warp.reg<uint32_t>(in.at[2])[lane] = count; });
  } else {
    const bool result = in.option[1] == 1 ? count == barrier.last_arrived : count > 0;
    set_lanes(warp.predicate(in.at[2]), mask, result ? ALL_LANES : 0);
  }
}

void barrier_operands(Builder& builder, size_t first, bool has_threads) {
  builder.instruction.at[0] = builder.source(first, 32);
  builder.instruction.option[0] = has_threads;
  if (has_threads) builder.instruction.at[1] = builder.source(first + 1, 32);
}

// bar.sync is barrier.sync.aligned.
void build_cta_barrier(Builder& builder, bool is_aligned) {
  builder.take("cta");
  is_aligned |= builder.take("aligned");
  if (builder.take("sync")) {
    barrier_operands(builder, 0, builder.num_operands() == 2);
    builder.blocking(run_barrier_sync, is_aligned);
  } else if (builder.take("arrive")) {
    barrier_operands(builder, 0, true);
    builder.collective(run_barrier_arrive, is_aligned);
  } else if (builder.take("red")) {
    const std::string operation = builder.take_one_of({"popc", "and", "or"});
    builder.take_one_of({"u32", "pred"});
    Instruction& in = builder.instruction;
    in.option[1] = operation == "popc" ? 0 : operation == "and" ? 1 : 2;
    in.at[2] = builder.destination(0, operation == "popc" ? 32 : 1);
    barrier_operands(builder, 1, builder.num_operands() == 4);
    bool is_negated = false;
    in.at[3] = builder.predicate(builder.num_operands() - 1, is_negated);
    in.option[2] = is_negated;
    builder.blocking(run_barrier_red, is_aligned);
  } else {
    builder.fail("an unsupported form of barrier");
  }
}

// --- barriers of a cluster

// option[0]: .relaxed, which orders nothing.
void run_cluster_arrive(Warp& warp, const Instruction& in, Mask mask) {
  Cluster& cluster = *warp.block->cluster;
  for_each_lane(mask, [&](int lane) { warp.cluster_phase[lane] = cluster.phase; });
  cluster.arrived += __builtin_popcount(mask);
  if (cluster.races && !in.option[0]) cluster.races->release(warp, cluster.arrived_clock);
  warp.block->launch->event();
  cluster.complete_if_all_arrived(*warp.block->launch);
}

void run_cluster_wait(Warp& warp, const Instruction&, Mask mask) {
  Cluster& cluster = *warp.block->cluster;
  for_each_lane(mask, [&](int lane) { warp.must_wait |= warp.cluster_phase[lane] == cluster.phase; });
  if (!warp.must_wait && cluster.races) cluster.races->acquire(warp, cluster.released_clock);
}

void build_barrier(Builder& builder) {
  if (!builder.take("cluster")) return build_cta_barrier(builder, false);
  builder.instruction.option[0] = builder.take("relaxed");
  builder.ignore({"release", "acquire"});
  const bool is_aligned = builder.take("aligned");
  if (builder.take("arrive")) return builder.collective(run_cluster_arrive, is_aligned);
  builder.take_one_of({"wait"});
  builder.blocking(run_cluster_wait, is_aligned);
}

void build_bar(Builder& builder) {
  if (!builder.take("warp")) return build_cta_barrier(builder, true);
  builder.take_one_of({"sync"});
  builder.collective(run_nothing, false, builder.source(0, 32));
}

// --- what has no effect on results here

void build_fence(Builder& builder) {
  builder.ignore({"proxy",
                  "async",
                  "async::generic",
                  "alias",
                  "acq_rel",
                  "sc",
                  "release",
                  "acquire",
                  "cta",
                  "cluster",
                  "gpu",
                  "sys",
                  "mbarrier_init",
                  "global",
                  "shared::cta",
                  "shared::cluster",
                  "shared",
                  "sync_restrict::shared::cta",
                  "sync_restrict::shared::cluster",
                  "gl"});
  builder.plain(run_nothing);
}
void build_nanosleep(Builder& builder) {
  builder.take_one_of({"u32"});
  builder.plain(run_nothing);
}
void build_griddepcontrol(Builder& builder) {
  builder.take_one_of({"launch_dependents", "wait"});
  builder.plain(run_nothing);
}
void build_setmaxnreg(Builder& builder) {
  builder.take_one_of({"inc", "dec"});
  builder.take_one_of({"sync"});
  builder.take_one_of({"aligned"});
  builder.take_one_of({"u32"});
  const int64_t count = builder.number(0);
  if (count < 24 || count > 256 || count % 8) builder.fail("no such number of registers");
  builder.collective(run_nothing, true);
}

}  // namespace

void add_control(Instructions& known) {
  known.builders["bra"] = build_bra;
  known.builders["exit"] = build_exit;
  known.builders["ret"] = build_exit;
  known.builders["trap"] = build_trap;
  known.builders["bar"] = build_bar;
  known.builders["barrier"] = build_barrier;
  known.builders["fence"] = build_fence;
  known.builders["membar"] = build_fence;
  known.builders["nanosleep"] = build_nanosleep;
  known.builders["griddepcontrol"] = build_griddepcontrol;
  known.builders["setmaxnreg"] = build_setmaxnreg;
}

}  // namespace ptxemu
