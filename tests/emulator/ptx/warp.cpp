// How a warp runs: its groups of lanes, where they part and where they come together.
#include <climits>

#include "machine.h"

namespace ptxemu {
namespace {

[[noreturn]] void fail(const Warp& warp, const Instruction& instruction, const std::string& what) {
  throw Fault(describe(warp, instruction) + ": " + what);
}

}  // namespace

unsigned Cluster::live_threads() const {
  unsigned sum = 0;
  for (const auto& block : blocks) sum += block->live_threads;
  return sum;
}

void NamedBarrier::complete() {
  last_true_count = true_count;
  last_arrived = arrived;
  arrived = true_count = 0;
  ++generation;
  released_clock = std::move(arrived_clock);
  arrived_clock.clear();
}

void Cluster::complete_if_all_arrived(Launch& launch) {
  if (arrived == 0 || arrived < live_threads()) return;
  released_clock = std::move(arrived_clock);
  arrived_clock.clear();
  arrived = 0;
  ++phase;
  launch.event();
}

// Returns how many instructions it has executed, without those that only waited.
int Launch::run_warp(Warp& warp, int budget) {
  int executed = 0;
  size_t polled = 0;
  while (executed < budget && warp.live) {
    warp.current = choose_group(warp, polled);
    if (!warp.current) break;
    const int before = executed;
    executed += run_group(warp, budget - executed);
    if (executed == before && !warp.current->waits && !warp.current->converges) break;
    merge_groups(warp);
  }
  return executed;
}

// The one furthest behind; where all wait, each in turn.
Group* Launch::choose_group(Warp& warp, size_t& polled) {
  Group* best = nullptr;
  for (Group& group : warp.groups)
    if (!group.waits && !group.converges && (!best || group.pc < best->pc)) best = &group;
  if (best) return best;
  while (polled < warp.groups.size()) {
    Group& group = warp.groups[polled++];
    if (group.waits) return &group;
  }
  for (const Group& group : warp.groups)
    if (group.waits) return nullptr;
  const Group& group = warp.groups.front();
  fail(warp, kernel.code[group.pc],
       "executed by lanes " + hex(group.mask) +
           " only, while no other lane of the warp (live: " + hex(warp.live) + ") comes to it");
}

// Lanes that came to the same instruction go on together.
void Launch::merge_groups(Warp& warp) {
  auto& groups = warp.groups;
  groups.erase(std::remove_if(groups.begin(), groups.end(), [](const Group& g) { return g.mask == 0; }),
               groups.end());
  for (size_t i = 0; i < groups.size(); ++i)
    for (size_t j = i + 1; j < groups.size();) {
      if (groups[i].pc != groups[j].pc || groups[i].has_arrived || groups[j].has_arrived) {
        ++j;
        continue;
      }
      groups[i].mask |= groups[j].mask;
      groups[i].waits = groups[i].converges = false;
      groups.erase(groups.begin() + j);
    }
}

// Whether all lanes that take part in a collective instruction are among those that have come to it.
bool Launch::converged(Warp& warp, const Instruction& instruction, Mask mask) {
  Mask wanted = instruction.needs_all_lanes ? ALL_LANES : mask;
  if (!instruction.needs_all_lanes && instruction.members != NOWHERE)
    for_each_lane(mask, [&](int lane) { wanted |= warp.reg<Mask>(instruction.members)[lane]; });
  wanted &= warp.live;
  if ((mask & wanted) == wanted) return true;
  if (instruction.guard != NOWHERE && (warp.current->mask & wanted) == wanted)
    fail(warp, instruction, "its guard holds in lanes " + hex(mask) + " only of " + hex(wanted));
  return false;
}

// Lanes with different member masks take part in different exchanges.
void Launch::run_collective(Warp& warp, const Instruction& instruction, Mask mask) {
  if (instruction.members == NOWHERE) return instruction.run(warp, instruction, mask);
  const Mask* const members = warp.reg<Mask>(instruction.members);
  while (mask) {
    const Mask wanted = members[__builtin_ctz(mask)];
    Mask part = 0;
    for_each_lane(mask, [&](int lane) { part |= Mask{members[lane] == wanted} << lane; });
    if (part & ~wanted)
      throw Fault("lanes " + hex(part & ~wanted) + " are not in their own member mask " + hex(wanted));
    instruction.run(warp, instruction, part);
    mask &= ~part;
  }
}

// Runs the current group until it waits, splits, meets another one or has used its budget.
int Launch::run_group(Warp& warp, int budget) {
  Group& group = *warp.current;
  int meeting = INT_MAX;
  for (const Group& other : warp.groups)
    if (&other != &group && other.pc > group.pc) meeting = std::min(meeting, other.pc);
  group.waits = group.converges = false;
  const Instruction* const code = kernel.code.data();
  int pc = group.pc, executed = 0;
  bool stops = false;
  while (!stops && executed < budget && pc < meeting) {
    const Instruction& instruction = code[pc];
    const int at = pc;
    Mask mask = group.mask;
    if (instruction.guard != NOWHERE) {
      const Mask guard = warp.predicate(instruction.guard);
      mask &= instruction.guard_negated ? ~guard : guard;
    }
    try {
      switch (instruction.flow) {
        case Flow::PLAIN:
          if (mask) instruction.run(warp, instruction, mask);
          ++pc;
          break;
        case Flow::COLLECTIVE:
        case Flow::BLOCKING:
          warp.must_wait = false;
          if (mask && converged(warp, instruction, mask))
            run_collective(warp, instruction, mask);
          else
            group.converges = mask != 0;
          group.waits = warp.must_wait;
          stops = group.waits || group.converges;
          if (!stops) ++pc;
          break;
        case Flow::BRANCH:
          if (mask && mask != group.mask) {
            Group rest = group;
            rest.mask &= ~mask;
            rest.pc = pc + 1;
            warp.groups.push_back(rest);
            group.mask = mask;
            stops = true;
          }
          pc = mask ? instruction.target : pc + 1;
          break;
        case Flow::EXIT:
          if (mask) exit_lanes(warp, mask);
          group.mask &= ~mask;
          ++pc;
          stops = group.mask == 0;
          break;
      }
    } catch (const Fault& fault) {
      fail(warp, instruction, fault.what());
    }
    if (group.waits || group.converges) break;
    ++executed;
    if (mask) {
      ++executed_warps[at];
      executed_lanes[at] += __builtin_popcount(mask);
    }
  }
  group.pc = pc;
  steps += executed;
  return executed;
}

void Launch::exit_lanes(Warp& warp, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    finish_copies(warp, lane, 0);
    finish_stores(warp, lane, 0, false);
  });
  warp.live &= ~mask;
  Block& block = *warp.block;
  block.live_threads -= __builtin_popcount(mask);
  for (NamedBarrier& barrier : block.barriers)
    if (barrier.expected == 0 && barrier.arrived && barrier.arrived >= block.live_threads) barrier.complete();
  block.cluster->complete_if_all_arrived(*this);
  event();
}

}  // namespace ptxemu
