// Races in shared memory, by what happens before what: each warp has a vector clock, which barriers join.
//
// The copy engine counts as one agent for each mbarrier it reports to: a phase's copies are ordered before
// whatever has waited for that phase. Lanes of a warp are taken as ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace ptxemu {

struct Block;
struct Instruction;
struct Warp;

using Clock = std::vector<uint32_t>;  // by agent
void join(Clock& into, const Clock& from);

// REWRITE: of what is there already, which is no race even if it is not ordered.
enum class Access { READ, WRITE, REWRITE, ATOMIC };

// Of the blocks of a cluster.
class Races {
 public:
  Races(size_t num_blocks, size_t warps_of_block, size_t shared_bytes);

  // An access of the warp, which has to be ordered after those that conflict with it.
  void access(const Warp&, const Block& where, uint64_t offset, uint64_t bytes, Access, const Instruction&);
  // What the warp has done so far goes into `clock`; what is in `clock` comes before what the warp does next.
  void release(const Warp&, Clock& clock);
  void acquire(const Warp&, const Clock& clock);
  // Of the barrier of the grid, which global atomics make: it orders the blocks of a cluster, too.
  Clock grid;
  // The beginning of a bulk copy that reports to the mbarrier, whose writes have to be ordered after what was
  // there before.
  void bulk_write(const Warp&, const Block& where, uint64_t offset, uint64_t bytes, uint64_t barrier,
                  const Instruction&);
  void mbarrier_init(const Block&, uint64_t offset);
  void mbarrier_arrive(const Warp&, const Block&, uint64_t offset);
  void mbarrier_complete(const Block&, uint64_t offset);  // a phase
  void mbarrier_wait(const Warp&, const Block&, uint64_t offset);

 private:
  struct Cell {                        // a byte
    uint32_t writer = 0, written = 0;  // agent and its time; 0: not yet
    bool is_atomic = false;
    const Instruction* instruction = nullptr;  // that has written it
  };
  struct Mbarrier {
    uint32_t agent;
    uint32_t phase = 1;
    Clock arrived, released;
  };
  size_t agent_of(const Warp&) const;
  Clock& clock_of(const Warp&);
  Mbarrier& mbarrier(const Block&, uint64_t offset);
  // Whether there is what an access is not ordered after.
  bool conflicts(const Clock&, size_t cell, bool is_write, bool is_atomic) const;
  bool has_unordered_writer(const Clock&, const Cell&) const;
  size_t unordered_reader(const Clock&, size_t cell) const;
  [[noreturn]] void report(const Clock&, size_t cell, uint64_t offset) const;

  size_t warps_of_block_, shared_bytes_, num_warps_;
  std::vector<Clock> clocks_;   // of the warps
  std::vector<Cell> cells_;     // of all blocks' shared memory
  std::vector<uint32_t> read_;  // when each warp has last read each cell
  std::map<std::pair<unsigned, uint64_t>, Mbarrier> mbarriers_;
  uint32_t num_agents_;
};

}  // namespace ptxemu
