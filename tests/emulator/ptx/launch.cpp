// A launch: its blocks and what they begin with, and the copy engine.
#include <sstream>

#include "machine.h"

namespace ptxemu {
namespace {

constexpr int PLAIN_QUANTUM = 256, MOST_RANDOM_QUANTUM = 400;
// A round in which nothing happens but polling ends by letting try_wait give up; after so many of them
// nothing will happen any more.
constexpr int MOST_IDLE_ROUNDS = 200;
// Without any store, barrier or completion in between, these many steps are a spinning loop.
constexpr uint64_t SPINNING = 200'000, ENDLESS = 100'000'000;
constexpr unsigned MOST_RANDOM_CLUSTERS = 3, MOST_THREADS = 1024, MOST_SHARED = 228 << 10;
constexpr int MOST_SHOWN = 64;

unsigned product(const unsigned (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

template <typename T>
void broadcast(Warp& warp, int at, uint64_t bits) {
  std::fill_n(warp.reg<T>(at), LANES, static_cast<T>(bits));
}

void check_threads(unsigned threads, const ParsedKernel& kernel) {
  const auto refuse = [threads](const std::string& why) {
    throw Fault("a block of " + std::to_string(threads) + " threads" + why);
  };
  if (threads == 0 || threads > MOST_THREADS) refuse("");
  if (kernel.required_threads && threads != kernel.required_threads)
    refuse(", .reqntid " + std::to_string(kernel.required_threads));
  if (kernel.most_threads && threads > kernel.most_threads)
    refuse(", .maxntid " + std::to_string(kernel.most_threads));
}

}  // namespace

std::string describe(const std::array<unsigned, 3>& position) {
  return "block (" + std::to_string(position[0]) + ", " + std::to_string(position[1]) + ", " +
         std::to_string(position[2]) + ")";
}

std::string text_of(const Instruction& instruction) {
  return "line " + std::to_string(instruction.source->line) + ": " + instruction.source->text;
}

std::string name_of(const Warp& warp) {
  return describe(warp.block->position) + " warp " + std::to_string(warp.index);
}

std::string describe(const Warp& warp, const Instruction& instruction) {
  return name_of(warp) + ", " + text_of(instruction);
}

std::string hex(uint64_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

Launch::Launch(Module& module, const Kernel& kernel, const ptxemu_config& config, void** values)
    : module(module),
      kernel(kernel),
      config(config),
      parameters(kernel.parsed.parameter_bytes, 0),
      rng(config.seed),
      executed_warps(kernel.code.size()),
      executed_lanes(kernel.code.size()) {
  for (size_t i = 0; i < kernel.parsed.parameters.size(); ++i) {
    const Parameter& parameter = kernel.parsed.parameters[i];
    std::memcpy(parameters.data() + parameter.offset, values[i], parameter.bytes);
  }
  check_threads(product(config.block), kernel.parsed);
  for (int axis = 0; axis < 3; ++axis)
    if (config.cluster[axis] == 0 || config.grid[axis] % config.cluster[axis])
      throw Fault("a grid of " + std::to_string(config.grid[axis]) + " blocks along axis " +
                  std::to_string(axis) + " is no multiple of the cluster's " +
                  std::to_string(config.cluster[axis]));
  const uint64_t shared = kernel.static_shared + config.dynamic_smem;
  if (shared > MOST_SHARED) throw Fault(std::to_string(shared) + " bytes of shared memory");
  shared_bytes = static_cast<unsigned>(shared);
}

uint64_t Launch::completion_time() {
  if (config.seed == 0) return LATE;
  const uint64_t kind = rng() % 3;
  return kind == 0 ? 0 : kind == 1 ? LATE : tick + 1 + rng() % 64;
}

std::unique_ptr<Cluster> Launch::make_cluster(std::array<unsigned, 3> index) {
  auto cluster = std::make_unique<Cluster>();
  const auto& sizes = config.cluster;
  for (unsigned rank = 0; rank < product(sizes); ++rank) {
    const unsigned inside[3] = {rank % sizes[0], rank / sizes[0] % sizes[1], rank / sizes[0] / sizes[1]};
    std::array<unsigned, 3> position;
    for (int axis = 0; axis < 3; ++axis) position[axis] = index[axis] * sizes[axis] + inside[axis];
    cluster->blocks.push_back(make_block(*cluster, rank, position));
  }
  if (config.races)
    cluster->races =
        std::make_unique<Races>(cluster->blocks.size(), cluster->blocks[0]->warps.size(), shared_bytes);
  return cluster;
}

std::unique_ptr<Block> Launch::make_block(Cluster& cluster, unsigned rank, std::array<unsigned, 3> position) {
  auto block = std::make_unique<Block>();
  block->launch = this;
  block->cluster = &cluster;
  block->rank = rank;
  block->position = position;
  block->shared.assign(shared_bytes, POISON);
  block->live_threads = product(config.block);
  block->warps.resize((block->live_threads + LANES - 1) / LANES);
  for (size_t i = 0; i < block->warps.size(); ++i) {
    Warp& warp = block->warps[i];
    warp.block = block.get();
    warp.index = static_cast<int>(i);
    const unsigned lanes = std::min<unsigned>(LANES, block->live_threads - i * LANES);
    warp.live = lanes == LANES ? ALL_LANES : (Mask{1} << lanes) - 1;
    start(warp);
  }
  return block;
}

// Poisons the registers, and fills in constants and special registers.
void Launch::start(Warp& warp) {
  warp.groups.reserve(LANES);  // there are never more, and pointers to them stay valid
  warp.groups.push_back({0, warp.live});
  warp.registers = AlignedMemory(kernel.register_bytes, POISON);
  warp.local.assign(LANES * kernel.local_bytes, POISON);
  for (const Constant& constant : kernel.constants) {
    if (constant.width == 1) warp.predicate(constant.at) = constant.bits ? ALL_LANES : 0;
    if (constant.width == 16) broadcast<uint16_t>(warp, constant.at, constant.bits);
    if (constant.width == 32) broadcast<uint32_t>(warp, constant.at, constant.bits);
    if (constant.width == 64) broadcast<uint64_t>(warp, constant.at, constant.bits);
  }
  for (const auto& [special, at] : kernel.specials)
    for (unsigned lane = 0; lane < LANES; ++lane)
      warp.reg<uint32_t>(at)[lane] = special.vector({*this, warp, lane})[special.axis];
}

void Launch::run() {
  std::vector<std::array<unsigned, 3>> waiting;
  const auto count = [&](int axis) { return config.grid[axis] / config.cluster[axis]; };
  for (unsigned z = 0; z < count(2); ++z)
    for (unsigned y = 0; y < count(1); ++y)
      for (unsigned x = 0; x < count(0); ++x) waiting.push_back({x, y, z});
  if (config.seed) std::shuffle(waiting.begin(), waiting.end(), rng);
  for (size_t first = 0; first < waiting.size();) {
    size_t together = config.cooperative ? waiting.size()
                      : config.seed      ? 1 + rng() % MOST_RANDOM_CLUSTERS
                                         : 1;
    together = std::min(together, waiting.size() - first);
    for (size_t i = 0; i < together; ++i) clusters.push_back(make_cluster(waiting[first + i]));
    run_resident();
    first += together;
  }
}

// Until all resident blocks are through.
void Launch::run_resident() {
  std::vector<Warp*> warps;
  for (const auto& cluster : clusters)
    for (const auto& block : cluster->blocks)
      for (Warp& warp : block->warps) warps.push_back(&warp);
  event();
  while (!warps.empty()) {
    ++tick;
    if (config.seed) std::shuffle(warps.begin(), warps.end(), rng);
    int progress = 0;
    for (Warp* warp : warps)
      progress += run_warp(*warp, config.seed ? 1 + rng() % MOST_RANDOM_QUANTUM : PLAIN_QUANTUM);
    waits_time_out = false;
    warps.erase(std::remove_if(warps.begin(), warps.end(), [](Warp* warp) { return warp->live == 0; }),
                warps.end());
    complete_copies(false);
    if (steps - steps_at_event > ENDLESS) deadlock();
    if (progress == 0 || steps - steps_at_event > SPINNING) on_no_progress(progress == 0);
  }
  retire_clusters();
}

void Launch::on_no_progress(bool all_wait) {
  if (complete_copies(true)) return;
  if (all_wait && ++idle_rounds > MOST_IDLE_ROUNDS) deadlock();
  waits_time_out = true;
}

void Launch::complete_copy(size_t which) {
  const BulkCopy copy = std::move(bulk_copies[which]);
  bulk_copies.erase(bulk_copies.begin() + which);
  try {
    copy.run();
  } catch (const Fault& fault) {
    throw Fault(copy.origin + ": " + fault.what());
  }
}

// Those that are due; one that is not, if nothing else can go on. Whether there was any.
bool Launch::complete_copies(bool is_stuck) {
  bool any = false;
  for (size_t i = 0; i < bulk_copies.size();) {
    if (bulk_copies[i].due > tick) {
      ++i;
      continue;
    }
    complete_copy(i);
    any = true;
  }
  if (!is_stuck || any || bulk_copies.empty()) return any;
  complete_copy(config.seed ? rng() % bulk_copies.size() : 0);
  return true;
}

void Launch::retire_clusters() {
  for (const auto& cluster : clusters)
    for (const auto& block : cluster->blocks)
      if (block->copies_in_flight)
        throw Fault(describe(block->position) + " ended with " + std::to_string(block->copies_in_flight) +
                    " bulk copies into its shared memory under way");
  clusters.clear();
}

void Launch::deadlock() {
  std::ostringstream out;
  out << "deadlock: no warp makes progress";
  int shown = 0;
  for (const auto& cluster : clusters)
    for (const auto& block : cluster->blocks)
      for (const Warp& warp : block->warps)
        for (const Group& group : warp.groups)
          if (++shown <= MOST_SHOWN)
            out << "\n  " << name_of(warp) << " lanes " << hex(group.mask) << " at "
                << text_of(kernel.code[group.pc]);
  if (shown > MOST_SHOWN) out << "\n  and " << shown - MOST_SHOWN << " more";
  throw Fault(out.str());
}

}  // namespace ptxemu
