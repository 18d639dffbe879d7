// Address spaces: what an access may touch, and where on the host that is.
#include "machine.h"

namespace ptxemu {
namespace {

// Without an overflow, whatever the address.
bool is_inside(uint64_t address, uint64_t bytes, uint64_t begin, uint64_t end) {
  return address >= begin && address <= end && bytes <= end - address;
}

struct Range {
  uint64_t end;
  std::string name;
  bool is_module;
  int times = 0;  // that it has been registered
};
std::map<uint64_t, Range>& ranges() {
  static std::map<uint64_t, Range> all;
  return all;
}
size_t num_checked = 0;  // ranges that are no module's
// The range that the last access was in.
uint64_t last_begin = 1, last_end = 0;

std::string nearest_ranges(uint64_t address) {
  std::string text;
  const auto describe = [&](std::map<uint64_t, Range>::iterator range) {
    text += " " + range->second.name + " [" + hex(range->first) + ", " + hex(range->second.end) + ")";
  };
  const auto after = ranges().upper_bound(address);
  if (after != ranges().begin()) describe(std::prev(after));
  if (after != ranges().end()) describe(after);
  return text;
}

}  // namespace

void register_memory(const void* start, size_t bytes, const std::string& name, bool is_module) {
  const auto begin = reinterpret_cast<uint64_t>(start);
  const auto [found, is_new] = ranges().try_emplace(begin, Range{begin + bytes, name, is_module});
  found->second.end = std::max(found->second.end, begin + bytes);
  ++found->second.times;
  num_checked += is_new && !is_module;
}

void unregister_memory(const void* start) {
  last_begin = 1, last_end = 0;
  const auto range = ranges().find(reinterpret_cast<uint64_t>(start));
  if (range == ranges().end() || --range->second.times > 0) return;
  num_checked -= !range->second.is_module;
  ranges().erase(range);
}

uint8_t* global_memory(uint64_t address, uint64_t bytes) {
  auto* const pointer = reinterpret_cast<uint8_t*>(address);
  if (is_inside(address, bytes, last_begin, last_end)) return pointer;
  if (address < 4096 || address >= uint64_t{1} << 47) throw Fault("global address " + hex(address));
  if (num_checked == 0) return pointer;
  auto range = ranges().upper_bound(address);
  if (range == ranges().begin() || !is_inside(address, bytes, 0, std::prev(range)->second.end))
    throw Fault(std::to_string(bytes) + " bytes at global address " + hex(address) +
                " are outside of what is registered; the nearest:" + nearest_ranges(address));
  range = std::prev(range);
  last_begin = range->first, last_end = range->second.end;
  return pointer;
}

uint8_t* shared_memory(Block& block, uint64_t offset, uint64_t bytes) {
  if (!is_inside(offset, bytes, SHARED_RESERVED, block.shared.size()))
    throw Fault("shared address " + hex(offset) + " + " + std::to_string(bytes) + " is outside of " +
                hex(SHARED_RESERVED) + " to " + hex(block.shared.size()));
  return block.shared.data() + offset;
}

uint8_t* shared_memory(Warp& warp, const Instruction& in, Block& block, uint64_t offset, uint64_t bytes,
                       Access access, const void* written) {
  uint8_t* const where = shared_memory(block, offset, bytes);
  if (Races* races = races_of(block)) {
    if (written && std::memcmp(where, written, bytes) == 0) access = Access::REWRITE;
    races->access(warp, block, offset, bytes, access, in);
  }
  return where;
}

std::pair<Block*, uint64_t> locate_shared(Block& block, uint64_t address) {
  const uint64_t rank = address >> SHARED_BLOCK_SHIFT;
  if (rank == 0) return {&block, address};
  const auto& blocks = block.cluster->blocks;
  if (rank > blocks.size()) throw Fault("shared address " + hex(address) + " is in no block of the cluster");
  Block& other = *blocks[rank - 1];
  if (other.live_threads == 0)
    throw Fault("shared memory of block " + std::to_string(rank - 1) + " of the cluster, which has ended");
  return {&other, address & ((uint64_t{1} << SHARED_BLOCK_SHIFT) - 1)};
}

Space space_of(uint64_t address) {
  if (address - SHARED_WINDOW < WINDOW_BYTES) return Space::SHARED;
  if (address - LOCAL_WINDOW < WINDOW_BYTES) return Space::LOCAL;
  return Space::GLOBAL;
}

uint64_t shared_address(uint64_t address) {
  return space_of(address) == Space::SHARED ? address - SHARED_WINDOW : address;
}

uint8_t* memory(Warp& warp, const Instruction& in, int lane, Space space, uint64_t address, uint64_t bytes,
                Access access, const void* written) {
  if (address % bytes) throw Fault("address " + hex(address) + " is no multiple of " + std::to_string(bytes));
  Launch& launch = *warp.block->launch;
  const uint64_t parameter_bytes = launch.kernel.parsed.parameter_bytes;
  if (space == Space::PARAMETER) {
    if (!is_inside(address, bytes, 0, parameter_bytes)) throw Fault("beyond the kernel's parameters");
    return launch.parameters.data() + address;
  }
  if (space == Space::GENERIC) {
    space = space_of(address);
    address -= space == Space::SHARED ? SHARED_WINDOW : space == Space::LOCAL ? LOCAL_WINDOW : 0;
  }
  if (space == Space::LOCAL) {
    const uint64_t size = launch.kernel.local_bytes;
    if (!is_inside(address, bytes, 0, size))
      throw Fault("local address " + hex(address) + " is beyond " + hex(size));
    return warp.local.data() + lane * size + address;
  }
  if (space == Space::SHARED) {
    const auto [block, offset] = locate_shared(*warp.block, address);
    return shared_memory(warp, in, *block, offset, bytes, access, written);
  }
  const auto is_within = [&](const void* start, uint64_t size) {
    const auto first = reinterpret_cast<uint64_t>(start);
    return is_inside(address, bytes, first, first + size);
  };
  const bool is_of_grid_barrier = is_within(launch.grid_workspace.data(), sizeof(launch.grid_workspace));
  if (Races* races = is_of_grid_barrier ? races_of(*warp.block) : nullptr) {
    if (access != Access::READ) races->release(warp, races->grid);
    races->acquire(warp, races->grid);
  }
  if (is_of_grid_barrier || is_within(launch.parameters.data(), parameter_bytes))
    return reinterpret_cast<uint8_t*>(address);
  return global_memory(address, bytes);
}

}  // namespace ptxemu
