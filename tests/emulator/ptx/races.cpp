#include "races.h"

#include <algorithm>

#include "machine.h"

namespace ptxemu {
namespace {

uint32_t time_of(const Clock& clock, size_t agent) { return agent < clock.size() ? clock[agent] : 0; }

}  // namespace

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Races::Races(size_t num_blocks, size_t warps_of_block, size_t shared_bytes)
    : warps_of_block_(warps_of_block),
      shared_bytes_(shared_bytes),
      num_warps_(num_blocks * warps_of_block),
      clocks_(num_warps_, Clock(num_warps_, 0)),
      cells_(num_blocks * shared_bytes),
      read_(cells_.size() * num_warps_, 0),
      num_agents_(static_cast<uint32_t>(num_warps_)) {
  for (size_t i = 0; i < num_warps_; ++i) clocks_[i][i] = 1;
}

size_t Races::agent_of(const Warp& warp) const { return warp.block->rank * warps_of_block_ + warp.index; }

Clock& Races::clock_of(const Warp& warp) { return clocks_[agent_of(warp)]; }

bool Races::has_unordered_writer(const Clock& clock, const Cell& cell) const {
  return cell.written > time_of(clock, cell.writer);
}

// The number of a warp, or of warps.
size_t Races::unordered_reader(const Clock& clock, size_t cell) const {
  size_t warp = 0;
  while (warp < num_warps_ && read_[cell * num_warps_ + warp] <= time_of(clock, warp)) ++warp;
  return warp;
}

bool Races::conflicts(const Clock& clock, size_t cell, bool is_write, bool is_atomic) const {
  const Cell& there = cells_[cell];
  return (has_unordered_writer(clock, there) && !(is_atomic && there.is_atomic)) ||
         (is_write && unordered_reader(clock, cell) < num_warps_);
}

void Races::report(const Clock& clock, size_t cell, uint64_t offset) const {
  const auto name = [&](size_t agent) {
    if (agent >= num_warps_) return std::string("the copy engine");
    return "warp " + std::to_string(agent % warps_of_block_) + " of block " +
           std::to_string(agent / warps_of_block_) + " of the cluster";
  };
  const Cell& there = cells_[cell];
  const std::string what = has_unordered_writer(clock, there)
                               ? name(there.writer) + " writes in " + text_of(*there.instruction)
                               : name(unordered_reader(clock, cell)) + " reads";
  throw Fault("a race at shared address " + hex(offset) + ", which " + what);
}

void Races::access(const Warp& warp, const Block& where, uint64_t offset, uint64_t bytes, Access access,
                   const Instruction& instruction) {
  const size_t agent = agent_of(warp);
  const Clock& clock = clocks_[agent];
  const bool is_write = access != Access::READ, is_atomic = access == Access::ATOMIC;
  for (uint64_t i = 0; i < bytes; ++i) {
    const size_t cell = where.rank * shared_bytes_ + offset + i;
    if (conflicts(clock, cell, is_write, is_atomic)) {
      if (access == Access::REWRITE) continue;
      report(clock, cell, offset + i);
    }
    if (is_write)
      cells_[cell] = {static_cast<uint32_t>(agent), clock[agent], is_atomic, &instruction};
    else
      read_[cell * num_warps_ + agent] = clock[agent];
  }
}

void Races::release(const Warp& warp, Clock& clock) {
  join(clock, clock_of(warp));
  ++clock_of(warp)[agent_of(warp)];
}

void Races::acquire(const Warp& warp, const Clock& clock) { join(clock_of(warp), clock); }

Races::Mbarrier& Races::mbarrier(const Block& block, uint64_t offset) {
  const auto [found, is_new] = mbarriers_.try_emplace({block.rank, offset});
  if (is_new) found->second.agent = num_agents_++;
  return found->second;
}

void Races::bulk_write(const Warp& warp, const Block& where, uint64_t offset, uint64_t bytes,
                       uint64_t barrier, const Instruction& instruction) {
  const Mbarrier& reported = mbarrier(where, barrier);
  const Clock& clock = clock_of(warp);
  for (uint64_t i = 0; i < bytes; ++i) {
    const size_t cell = where.rank * shared_bytes_ + offset + i;
    if (conflicts(clock, cell, true, false)) report(clock, cell, offset + i);
    cells_[cell] = {reported.agent, reported.phase, false, &instruction};
  }
}

// Epochs go on: what was copied before an mbarrier was made anew stays ordered by its waits.
void Races::mbarrier_init(const Block& block, uint64_t offset) { mbarrier(block, offset).arrived.clear(); }

void Races::mbarrier_arrive(const Warp& warp, const Block& block, uint64_t offset) {
  release(warp, mbarrier(block, offset).arrived);
}

void Races::mbarrier_complete(const Block& block, uint64_t offset) {
  Mbarrier& barrier = mbarrier(block, offset);
  barrier.released = barrier.arrived;
  if (barrier.released.size() <= barrier.agent) barrier.released.resize(barrier.agent + 1, 0);
  barrier.released[barrier.agent] = barrier.phase++;
}

void Races::mbarrier_wait(const Warp& warp, const Block& block, uint64_t offset) {
  acquire(warp, mbarrier(block, offset).released);
}

}  // namespace ptxemu
