// The machine: warps of 32 lanes in blocks in clusters, their memory, and what runs asynchronously to them.
//
// A warp's lanes are in groups, each at one instruction. The group that is furthest behind runs, and groups
// that meet become one, which is where the paths of structured code come together again.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "parser.h"
#include "ptxemu.h"
#include "races.h"

namespace ptxemu {

using Mask = uint32_t;  // one bit a lane
constexpr int LANES = 32;
constexpr Mask ALL_LANES = ~Mask{0};

// Shared addresses: offset in the own block, or (1 + rank in the cluster) << 24 | offset. The system keeps
// the first bytes, as on the hardware. Generic addresses are host addresses, or SHARED_WINDOW + shared
// address, or LOCAL_WINDOW + offset in the lane's local memory. An address of a parameter is its offset.
constexpr uint64_t SHARED_RESERVED = 1024, SHARED_BLOCK_SHIFT = 24;
constexpr uint64_t SHARED_WINDOW = uint64_t{1} << 56, LOCAL_WINDOW = uint64_t{1} << 57;
constexpr uint64_t WINDOW_BYTES = uint64_t{1} << 32;

// What a kernel does wrong while it runs.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp;
struct Block;
struct Launch;

template <typename F>
inline void for_each_lane(Mask mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Those lanes of a predicate that `mask` has become those of `value`.
inline void set_lanes(Mask& predicate, Mask mask, Mask value) {
  predicate = (predicate & ~mask) | (value & mask);
}

// Bytes at an address that is a multiple of whatever a kernel's variables or a vector instruction ask for.
class AlignedMemory {
 public:
  AlignedMemory() = default;
  AlignedMemory(size_t bytes, uint8_t fill) : bytes_(bytes) {
    constexpr size_t ALIGNMENT = 128;
    data_.reset(static_cast<uint8_t*>(
        std::aligned_alloc(ALIGNMENT, (std::max<size_t>(bytes, 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), fill, bytes);
  }
  uint8_t* data() const { return data_.get(); }
  size_t size() const { return bytes_; }

 private:
  std::unique_ptr<uint8_t, void (*)(void*)> data_{nullptr, std::free};
  size_t bytes_ = 0;
};
constexpr uint8_t POISON = 0xff;  // a NaN in every floating-point type

enum class Flow : uint8_t {
  PLAIN,
  COLLECTIVE,  // runs once the lanes that take part are at it together
  BLOCKING,    // may have to wait; is run again until it has not
  BRANCH,
  EXIT,
};

constexpr int NOWHERE = -1;  // an operand that is not there

// [register + offset]
struct Address {
  int at = NOWHERE;
  bool is_wide = true;  // 64 bits, not 32
  int64_t offset = 0;
};

struct Instruction;
using Run = void (*)(Warp&, const Instruction&, Mask);

struct Instruction {
  Run run = nullptr;
  Flow flow = Flow::PLAIN;
  bool needs_all_lanes = false;  // .aligned
  bool guard_negated = false;
  int guard = NOWHERE;
  int members = NOWHERE;  // where the member mask of a collective is
  int target = NOWHERE;   // of a branch
  int opcode = 0;         // index into Module::opcodes
  // Places of operands in a warp's registers, in bytes; constants are registers, too.
  std::array<int, 6> at{NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE};
  std::array<Address, 3> address{};
  std::vector<int> list;                // of an operand that is a vector
  std::array<int, 4> option{};          // what else the instruction's function needs to know,
  std::shared_ptr<const void> details;  // and what does not fit there
  const Statement* source = nullptr;

  template <typename T>
  const T& detail() const {
    return *static_cast<const T*>(details.get());
  }
};

// A special register's value in one lane, such as %tid.y: the element of a vector.
struct Thread {
  const Launch& launch;
  const Warp& warp;
  unsigned lane;
};
struct Special {
  std::array<unsigned, 3> (*vector)(const Thread&) = nullptr;
  int axis = 0;
};
// Without a vector if there is no such register.
Special find_special(const std::string& name);

struct Constant {
  int at, width;
  uint64_t bits;
};

struct Kernel {
  ParsedKernel parsed;
  std::vector<Instruction> code;
  int register_bytes = 0;  // of a warp
  std::vector<Constant> constants;
  std::vector<std::pair<Special, int>> specials;  // and their places
  uint64_t static_shared = 0;                     // with what the system keeps
  uint64_t local_bytes = 0;                       // of a lane
};

struct Module {
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::map<std::string, AlignedMemory> globals;
  std::vector<std::string> opcodes;
  std::unordered_map<std::string, int> opcode_numbers;
};

struct Group {
  int pc = 0;
  Mask mask = 0;
  bool waits = false;        // polls the instruction at pc
  bool converges = false;    // until other lanes come to the instruction at pc
  bool has_arrived = false;  // at the barrier that it waits for
  uint64_t ticket = 0;
};

// cp.async of one lane.
struct Copy {
  uint64_t to;  // in the block's shared memory
  const uint8_t* from;
  int bytes, source_bytes;
  const Instruction* instruction;
  void run(Warp&) const;
};
struct LaneCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// cp.async.bulk from shared memory, in its two steps.
struct BulkStore {
  std::function<void()> read, write;
};
struct LaneStores {
  std::vector<BulkStore> open;
  std::deque<std::vector<BulkStore>> groups;
};

// The accumulators of wgmma while products into them are under way; the registers are poisoned.
struct Accumulators {
  std::vector<int> registers;
  std::vector<std::array<uint32_t, LANES>> values;
  int pending = 0;
};
struct Product {
  const Instruction* instruction;
  uint64_t a = 0, b = 0;  // descriptors
  bool accumulates = true;
  std::shared_ptr<Accumulators> accumulators;
  bool is_done = false;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  Mask live = 0;
  std::vector<Group> groups;
  Group* current = nullptr;
  bool must_wait = false;  // set by a blocking instruction
  AlignedMemory registers;
  std::vector<uint8_t> local;  // one lane's after the other's
  std::array<LaneCopies, LANES> copies;
  std::array<LaneStores, LANES> stores;
  std::vector<std::shared_ptr<Accumulators>> accumulators;  // those in flight
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> products;
  std::array<uint64_t, LANES> cluster_phase{};

  template <typename T>
  T* reg(int at) {
    return reinterpret_cast<T*>(registers.data() + at);
  }
  Mask& predicate(int at) { return *reg<Mask>(at); }
};

struct NamedBarrier {
  unsigned expected = 0;  // threads; 0: all that live
  unsigned arrived = 0;
  uint64_t generation = 0;
  // bar.red: of the round that is under way, and of the last one
  unsigned true_count = 0, last_true_count = 0, last_arrived = 0;
  Clock arrived_clock, released_clock;
  void complete();
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned arrived = 0;
  uint64_t phase = 0;
  Clock arrived_clock, released_clock;
  std::unique_ptr<Races> races;  // if they are looked for
  unsigned live_threads() const;
  void complete_if_all_arrived(Launch&);
};

struct Block {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in the cluster
  std::array<unsigned, 3> position{};
  std::vector<uint8_t> shared;
  std::vector<Warp> warps;
  unsigned live_threads = 0;
  std::array<NamedBarrier, 16> barriers;
  int copies_in_flight = 0;  // of the copy engine, into its shared memory
};

// None unless races are looked for.
inline Races* races_of(const Block& block) { return block.cluster->races.get(); }

// What the copy engine has to do.
struct BulkCopy {
  uint64_t due;        // a tick, or LATE
  std::string origin;  // warp and instruction
  std::function<void()> run;
};
constexpr uint64_t LATE = ~uint64_t{0};

struct Launch {
  Launch(Module&, const Kernel&, const ptxemu_config&, void** parameters);
  void run();
  void event() {
    steps_at_event = steps;
    idle_rounds = 0;
  }
  // When an asynchronous operation that begins now takes effect: at once (0), at a tick, or LATE.
  uint64_t completion_time();
  bool chance(int one_in) { return config.seed && rng() % one_in == 0; }

  Module& module;
  const Kernel& kernel;
  const ptxemu_config config;
  AlignedMemory parameters;
  std::array<uint64_t, 8> grid_workspace{};
  std::mt19937_64 rng;
  std::vector<std::unique_ptr<Cluster>> clusters;  // the resident ones
  std::deque<BulkCopy> bulk_copies;
  std::vector<uint64_t> executed_warps, executed_lanes;  // by instruction
  uint64_t tick = 0, steps = 0, steps_at_event = 0;
  int idle_rounds = 0;
  bool waits_time_out = false;  // try_wait gives up
  unsigned shared_bytes = 0;

 private:
  std::unique_ptr<Cluster> make_cluster(std::array<unsigned, 3> index);
  std::unique_ptr<Block> make_block(Cluster&, unsigned rank, std::array<unsigned, 3> position);
  void start(Warp&);
  void run_resident();
  int run_warp(Warp&, int budget);
  int run_group(Warp&, int budget);
  Group* choose_group(Warp&, size_t& polled);
  bool converged(Warp&, const Instruction&, Mask);
  void run_collective(Warp&, const Instruction&, Mask);
  void exit_lanes(Warp&, Mask);
  void merge_groups(Warp&);
  void complete_copy(size_t which);
  bool complete_copies(bool is_stuck);
  void retire_clusters();
  void on_no_progress(bool all_wait);
  [[noreturn]] void deadlock();
};

// A fault's warp and instruction.
std::string name_of(const Warp&);
std::string text_of(const Instruction&);
std::string describe(const Warp&, const Instruction&);
std::string hex(uint64_t);
std::string describe(const std::array<unsigned, 3>& position);  // of a block

// --- memory

enum class Space { GLOBAL, SHARED, LOCAL, GENERIC, PARAMETER };

// A module's own variables do not turn the check of addresses on.
void register_memory(const void* start, size_t bytes, const std::string& name, bool is_module = false);
void unregister_memory(const void* start);
// The host address of global memory, checked against what is registered.
uint8_t* global_memory(uint64_t address, uint64_t bytes);
// The host address of an offset in a block's shared memory; and the same for a warp's access.
uint8_t* shared_memory(Block&, uint64_t offset, uint64_t bytes);
uint8_t* shared_memory(Warp&, const Instruction&, Block&, uint64_t offset, uint64_t bytes, Access,
                       const void* written = nullptr);
// Where a generic address points to.
Space space_of(uint64_t address);
// Of a shared or generic address.
uint64_t shared_address(uint64_t address);
// The block that a shared address is in, and its offset there.
std::pair<Block*, uint64_t> locate_shared(Block&, uint64_t address);
// `written`: what a WRITE is going to write, where that is known.
uint8_t* memory(Warp&, const Instruction&, int lane, Space, uint64_t address, uint64_t bytes, Access,
                const void* written = nullptr);

// Where the 16 bytes at an address are with the swizzle of 32, 64 or 128 bytes; 0 is none.
inline uint64_t swizzled(uint64_t address, int span) {
  return address ^ (address >> 7 & (span / 16 - (span > 0))) << 4;
}

// Of a bulk copy, which have been written: the mbarrier hears of it.
void complete_bytes(Block&, uint64_t mbarrier, uint32_t bytes);

// Waits, as the instructions of these names; and at the end of a lane.
void finish_copies(Warp&, int lane, size_t most_pending);
void finish_stores(Warp&, int lane, size_t most_pending, bool only_read);
void finish_products(Warp&, size_t most_pending);

std::unique_ptr<Kernel> decode(Module&, ParsedKernel, const ParsedModule&);

}  // namespace ptxemu
