// cp.async of each lane.
#include "builder.h"
#include "copies.h"

namespace ptxemu {
namespace {

// address: in shared memory and in global memory; at[0]: bytes to read, or NOWHERE; option[0]: bytes to
// write.
void run_copy(Warp& warp, const Instruction& in, Mask mask) {
  Launch& launch = *warp.block->launch;
  const int bytes = in.option[0];
  for_each_lane(mask, [&](int lane) {
    const uint32_t asked = in.at[0] == NOWHERE ? bytes : warp.reg<uint32_t>(in.at[0])[lane];
    Copy copy;
    copy.bytes = bytes;
    copy.source_bytes = static_cast<int>(std::min<uint32_t>(asked, bytes));
    copy.instruction = &in;
    copy.to = address_of(warp, in, 0, lane);
    if (copy.to % bytes)
      throw Fault("shared address " + hex(copy.to) + " is no multiple of " + std::to_string(bytes));
    shared_memory(warp, in, *warp.block, copy.to, bytes, Access::WRITE);
    const uint64_t from = address_of(warp, in, 1, lane);
    if (from % bytes)
      throw Fault("global address " + hex(from) + " is no multiple of " + std::to_string(bytes));
    copy.from = copy.source_bytes ? global_memory(from, copy.source_bytes) : nullptr;
    if (launch.chance(2))
      copy.run(warp);
    else
      warp.copies[lane].open.push_back(copy);
  });
}

void run_copy_commit(Warp& warp, const Instruction&, Mask mask) {
  for_each_lane(mask, [&](int lane) {
    LaneCopies& copies = warp.copies[lane];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
  });
}

void run_copy_wait(Warp& warp, const Instruction& in, Mask mask) {
  for_each_lane(mask, [&](int lane) { finish_copies(warp, lane, in.option[0]); });
}

void run_copy_wait_all(Warp& warp, const Instruction& in, Mask mask) {
  run_copy_commit(warp, in, mask);
  for_each_lane(mask, [&](int lane) { finish_copies(warp, lane, 0); });
}

}  // namespace

void build_copy(Builder& builder) {
  Instruction& in = builder.instruction;
  if (builder.take("commit_group")) return builder.plain(run_copy_commit);
  if (builder.take("wait_all")) return builder.plain(run_copy_wait_all);
  if (builder.take("wait_group")) {
    in.option[0] = static_cast<int>(builder.number(0));
    return builder.plain(run_copy_wait);
  }
  const bool is_wide = builder.take_one_of({"ca", "cg"}) == "cg";
  builder.take_one_of({"shared", "shared::cta"});
  builder.take_one_of({"global"});
  builder.ignore({"L2::64B", "L2::128B", "L2::256B"});
  builder.address(0, 0);
  builder.address(1, 1);
  const int64_t bytes = builder.number(2);
  if (bytes != 16 && (is_wide || (bytes != 4 && bytes != 8))) builder.fail("unsupported size");
  in.option[0] = static_cast<int>(bytes);
  if (builder.num_operands() > 3) in.at[0] = builder.source(3, 32);
  if (builder.num_operands() > 4) builder.fail("unsupported operands");
  builder.plain(run_copy);
}

void Copy::run(Warp& warp) const {
  uint8_t* const where = shared_memory(warp, *instruction, *warp.block, to, bytes, Access::WRITE);
  if (source_bytes) std::memcpy(where, from, source_bytes);
  std::memset(where + source_bytes, 0, bytes - source_bytes);
}

void finish_copies(Warp& warp, int lane, size_t most_pending) {
  auto& groups = warp.copies[lane].groups;
  for (; groups.size() > most_pending; groups.pop_front())
    for (const Copy& copy : groups.front()) copy.run(warp);
}

}  // namespace ptxemu
