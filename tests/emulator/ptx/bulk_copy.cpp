// The copy engine: cp.async.bulk, with a tensor map or without.
//
// A load takes effect at a time of Launch::completion_time(), a store at the latest where the kernel waits.
#include "builder.h"
#include "copies.h"
#include "tensor_map.h"

namespace ptxemu {
namespace {

// address: of shared memory, of the map or global memory, of the mbarrier; at[0]: blocks to write to, or
// NOWHERE; at[1]: the number of bytes, if there is no map; list: coordinates.
enum { SHARED, GLOBAL, BARRIER };

TensorMap read_map(Warp& warp, const Instruction& in, int lane) {
  constexpr uint64_t HALF = 64;  // what may be accessed at once
  const uint64_t address = address_of(warp, in, GLOBAL, lane);
  const uint8_t* where = memory(warp, in, lane, Space::GENERIC, address, HALF, Access::READ);
  memory(warp, in, lane, Space::GENERIC, address + HALF, HALF, Access::READ);
  TensorMap map;
  std::memcpy(&map, where, sizeof(map));
  if (map.magic != TensorMap::MAGIC) throw Fault("no tensor map is at " + hex(address));
  if (map.rank != in.list.size()) throw Fault("the tensor map has rank " + std::to_string(map.rank));
  return map;
}

Coordinates read_coordinates(Warp& warp, const Instruction& in, int lane) {
  Coordinates result{};
  for (size_t i = 0; i < in.list.size(); ++i) result[i] = warp.reg<int32_t>(in.list[i])[lane];
  return result;
}

// One part of a copy into one block: what it writes, and the bytes that it announces to the mbarrier.
void start_copy(Warp& warp, const Instruction& in, Block& block, uint64_t barrier, uint32_t bytes,
                std::function<void()> write) {
  Launch& launch = *warp.block->launch;
  ++block.copies_in_flight;
  const auto run = [&block, barrier, bytes, write = std::move(write)] {
    write();
    complete_bytes(block, barrier, bytes);
    --block.copies_in_flight;
  };
  const uint64_t due = launch.completion_time();
  if (due == 0) return run();
  launch.bulk_copies.push_back({due, describe(warp, in), run});
}

std::vector<Block*> receivers(Warp& warp, const Instruction& in, int lane, Block& own) {
  if (in.at[0] == NOWHERE) return {&own};
  std::vector<Block*> result;
  const uint16_t blocks = warp.reg<uint16_t>(in.at[0])[lane];
  for (int rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      result.push_back(locate_shared(own, uint64_t(rank + 1) << SHARED_BLOCK_SHIFT).first);
  if (result.empty()) throw Fault("a multicast to no block");
  return result;
}

// The block that an operand's shared address is in, and its offset there.
std::pair<Block*, uint64_t> locate_operand(Warp& warp, const Instruction& in, int slot, int lane) {
  return locate_shared(*warp.block, shared_address(address_of(warp, in, slot, lane)));
}

// Where a load writes to, and its mbarrier.
struct Destination {
  Block* block;
  uint64_t offset, barrier;
};
Destination destination_of(Warp& warp, const Instruction& in, int lane) {
  const auto [block, offset] = locate_operand(warp, in, SHARED, lane);
  const auto [barrier_block, barrier] = locate_operand(warp, in, BARRIER, lane);
  if (block != barrier_block) throw Fault("the mbarrier is in another block than the destination");
  return {block, offset, barrier};
}

// What a load is going to write, in one block.
uint8_t* claim(Warp& warp, const Instruction& in, Block& block, const Destination& to, uint64_t bytes) {
  uint8_t* const where = shared_memory(block, to.offset, bytes);
  if (Races* races = races_of(block)) races->bulk_write(warp, block, to.offset, bytes, to.barrier, in);
  return where;
}

void check_box_address(uint64_t offset) {
  if (offset % 128) throw Fault("a box at shared address " + hex(offset) + ", which is no multiple of 128");
}

void check_bulk_copy(uint64_t offset, uint64_t address, uint32_t bytes) {
  if (offset % 16 || address % 16 || bytes % 16)
    throw Fault("a bulk copy of " + std::to_string(bytes) + " bytes between " + hex(offset) + " and " +
                hex(address) + ", which are not all multiples of 16");
}

void run_tensor_load(Warp& warp, const Instruction& in, Mask mask) {
  Launch& launch = *warp.block->launch;
  for_each_lane(mask, [&](int lane) {
    const TensorMap map = read_map(warp, in, lane);
    const Coordinates coordinates = read_coordinates(warp, in, lane);
    const Destination to = destination_of(warp, in, lane);
    check_box_address(to.offset);
    const uint64_t rows = map.num_rows();
    // The bytes may arrive in any portions.
    const uint64_t middle = launch.config.seed ? launch.rng() % (rows + 1) : rows;
    for (Block* block : receivers(warp, in, lane, *to.block)) {
      claim(warp, in, *block, to, rows * map.row_bytes());
      for (const auto& [begin, end] : {std::pair{uint64_t{0}, middle}, std::pair{middle, rows}}) {
        if (begin == end) continue;
        const auto load = [=, first = begin, last = end] {
          load_rows(map, coordinates, *block, to.offset, first, last);
        };
        start_copy(warp, in, *block, to.barrier, static_cast<uint32_t>((end - begin) * map.row_bytes()),
                   load);
      }
    }
  });
}

void run_bulk_load(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const Destination to = destination_of(warp, in, lane);
    const uint32_t bytes = warp.reg<uint32_t>(in.at[1])[lane];
    const uint64_t from = address_of(warp, in, GLOBAL, lane);
    check_bulk_copy(to.offset, from, bytes);
    for (Block* block : receivers(warp, in, lane, *to.block)) {
      uint8_t* const where = claim(warp, in, *block, to, bytes);
      start_copy(warp, in, *block, to.barrier, bytes,
                 [=] { std::memcpy(where, global_memory(from, bytes), bytes); });
    }
  });
}

void run_tensor_store(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const TensorMap map = read_map(warp, in, lane);
    const Coordinates coordinates = read_coordinates(warp, in, lane);
    const auto [block, offset] = locate_operand(warp, in, SHARED, lane);
    check_box_address(offset);
    const auto box = std::make_shared<std::vector<uint8_t>>();
    warp.stores[lane].open.push_back(
        {[=, &warp, &in, block = block, offset = offset] { *box = read_box(warp, in, map, *block, offset); },
         [=] { write_box(map, coordinates, *box); }});
  });
}

void run_bulk_store(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    const auto [block, offset] = locate_operand(warp, in, SHARED, lane);
    const uint32_t bytes = warp.reg<uint32_t>(in.at[1])[lane];
    const uint64_t to = address_of(warp, in, GLOBAL, lane);
    check_bulk_copy(offset, to, bytes);
    const auto data = std::make_shared<std::vector<uint8_t>>();
    warp.stores[lane].open.push_back({[=, &warp, &in, block = block, offset = offset] {
                                        const uint8_t* const from =
                                            shared_memory(warp, in, *block, offset, bytes, Access::READ);
                                        data->assign(from, from + bytes);
                                      },
                                      [=] { std::memcpy(global_memory(to, bytes), data->data(), bytes); }});
  });
}

void run_bulk_commit(Warp& warp, const Instruction&, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    LaneStores& stores = warp.stores[lane];
    stores.groups.push_back(std::move(stores.open));
    stores.open.clear();
  });
}

void run_bulk_wait(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) { finish_stores(warp, lane, in.option[0], in.option[1]); });
}

// An address of global memory, or of a map with coordinates.
void global_operand(Builder& builder, size_t i) {
  Instruction& in = builder.instruction;
  const Operand& operand = builder.operand(i);
  builder.address(i, GLOBAL);
  if (!in.address[GLOBAL].is_wide) builder.fail("a global address has 64 bits");
  for (size_t part = 1; part < operand.parts.size(); ++part)
    in.list.push_back(builder.source(operand.parts[part], 32));
}

void build_bulk_store(Builder& builder, bool is_tensor) {
  builder.take_one_of({"global"});
  builder.take_one_of({"shared::cta"});
  global_operand(builder, 0);
  builder.address(1, SHARED);
  if (!is_tensor) builder.instruction.at[1] = builder.source(2, 32);
  builder.plain(is_tensor ? run_tensor_store : run_bulk_store);
}

void build_bulk_load(Builder& builder, bool is_tensor) {
  Instruction& in = builder.instruction;
  builder.take_one_of({"shared::cluster", "shared::cta"});
  builder.take_one_of({"global"});
  builder.take_one_of({"mbarrier::complete_tx::bytes"});
  const bool is_multicast = builder.take("multicast::cluster");
  global_operand(builder, 1);
  const size_t barrier = is_tensor ? 2 : 3;
  if (!is_tensor) in.at[1] = builder.source(2, 32);
  builder.address(barrier, BARRIER);
  builder.address(0, SHARED);
  if (is_multicast) in.at[0] = builder.source(barrier + 1, 16);
  builder.plain(is_tensor ? run_tensor_load : run_bulk_load);
}

}  // namespace

void build_bulk(Builder& builder) {
  Instruction& in = builder.instruction;
  if (builder.take("commit_group")) return builder.plain(run_bulk_commit);
  if (builder.take("wait_group")) {
    in.option[1] = builder.take("read");
    in.option[0] = static_cast<int>(builder.number(0));
    return builder.plain(run_bulk_wait);
  }
  const bool is_tensor = builder.take("tensor");
  if (is_tensor) builder.take_one_of({"1d", "2d", "3d", "4d", "5d"});
  builder.take("tile");
  builder.take("L2::cache_hint");
  builder.take("bulk_group") ? build_bulk_store(builder, is_tensor) : build_bulk_load(builder, is_tensor);
}

void finish_stores(Warp& warp, int lane, size_t most_pending, bool only_read) {
  auto& groups = warp.stores[lane].groups;
  for (size_t i = 0; i + most_pending < groups.size(); ++i)
    for (BulkStore& store : groups[i])
      if (store.read) {
        store.read();
        store.read = nullptr;
      }
  if (only_read) return;
  for (; groups.size() > most_pending; groups.pop_front())
    for (const BulkStore& store : groups.front()) store.write();
  warp.block->launch->event();
}

void add_copies(Instructions& known) {
  known.builders["cp"] = [](Builder& builder) {
    builder.take_one_of({"async"});
    builder.take("bulk") ? build_bulk(builder) : build_copy(builder);
  };
}

}  // namespace ptxemu
