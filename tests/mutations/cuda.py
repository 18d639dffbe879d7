"""Bugs in csrc/cuda."""

from . import Bug

KERNEL, PTX, WALK = "hopper_kernel.cuh", "hopper_ptx.cuh", "hopper_walk.h"
TILE, OPS = "hopper_tile.h", "hopper_ops.cu"
TILES, LOSS, PLAN = "small_tiles.cuh", "small_loss.cu", "small_plan.h"
# S in pieces of one row of cluster tiles.
SMALL_WORKSPACE = OPS, "WORKSPACE_BYTES = int64_t{256} << 20;", "WORKSPACE_BYTES = 1;"


def bug(name: str, file: str, old: str, new: str, *also: tuple[str, str, str]) -> Bug:
    further = tuple((f"csrc/cuda/{file}", old, new) for file, old, new in also)
    return Bug(name, f"csrc/cuda/{file}", old, new, further)


def hopper(name: str, *change) -> Bug:
    return bug(f"hopper: {name}", *change)


def small(name: str, *change) -> Bug:
    return bug(f"small: {name}", *change)


BUGS = [
    hopper("producer waits for the wrong parity", KERNEL, "position.phase ^ 1);", "position.phase);"),
    hopper("consumer waits for the wrong parity", KERNEL, "full[position.stage], position.phase);", "full[position.stage], position.phase ^ 1);"),
    hopper("no wait for the last wgmma", KERNEL, "  ptx::wgmma_wait<0>();\n", ""),
    hopper("a stage is released one step early", KERNEL, "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    hopper("no wgmma.fence", KERNEL, "    ptx::wgmma_fence();\n", ""),
    hopper("no commit", KERNEL, "    ptx::wgmma_commit();\n", ""),
    hopper("too few bytes announced", KERNEL, "expect_bytes(full, STAGE_BYTES)", "expect_bytes(full, STAGE_BYTES - SHARE_BYTES)"),
    hopper("the other block is not asked before its stage is overwritten", KERNEL, "if (lane < CLUSTER) ptx::mbarrier_arrive_at(&shared.empty[stage], lane);", "if (lane == 0) ptx::mbarrier_arrive_at(&shared.empty[stage], ptx::cluster_rank());", (KERNEL, "empty[s], CLUSTER * WARPS)", "empty[s], WARPS)")),
    hopper("copies reach one block only", KERNEL, "(1 << CLUSTER) - 1);", "1 << rank);"),
    hopper("no fence after the barriers' initialisation", KERNEL, "    ptx::fence_mbarrier_init();\n", ""),
    hopper("no cluster barrier at the start", KERNEL, "  ptx::cluster_sync();\n\n  // Through", "  __syncthreads();\n\n  // Through"),
    hopper("no cluster barrier at the end", KERNEL, "  ptx::cluster_sync();\n#endif", "#endif"),
    hopper("the first turn is not given away", KERNEL, "  if (consumer == 1) ptx::barrier_arrive(TURN_BARRIER, 2 * WARPGROUP);\n", ""),
    hopper("the turn is given away before the products are issued", KERNEL, "  for (int step = 0; step < depth_steps; ++step) {\n    Stage& stage = shared.stages[position.stage];\n    ptx::mbarrier_wait(&shared.full", "  if (another_turn) ptx::barrier_arrive(TURN_BARRIER + other, 2 * WARPGROUP);\n  another_turn = false;\n  for (int step = 0; step < depth_steps; ++step) {\n    Stage& stage = shared.stages[position.stage];\n    ptx::mbarrier_wait(&shared.full"),
    hopper("no barrier before the column items are read", KERNEL, "  ptx::barrier_sync(barrier, WARPGROUP);\n", ""),
    hopper("both consumers exchange in the same memory", KERNEL, "shared.column_items[consumer]", "shared.column_items[0]"),
    hopper("swizzle of 64 bytes in the descriptor", PTX, "uint64_t{1} << 62", "uint64_t{2} << 62"),
    hopper("distance of the patterns", PTX, "uint64_t{1024 / 16} << 32", "uint64_t{512 / 16} << 32"),
    hopper("no swizzle in the tensor map", OPS, "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_NONE"),
    hopper("step along D inside a stage", KERNEL, "ptx::operand_at(b, 32 * k)", "ptx::operand_at(b, 16 * k)"),
    hopper("the captions' share of the other rank", KERNEL, "tile.column() + rank * SHARE_COLS;", "tile.column() + (1 - rank) * SHARE_COLS;"),
    hopper("accumulates onto the tile before", KERNEL, "operand_at(b, 32 * k), step + k)", "operand_at(b, 32 * k), 1)"),
    hopper("mask: one column too many", WALK, "item_column(chunk, item) >= columns", "item_column(chunk, item) > columns"),
    hopper("mask: the diagonal's offset", WALK, "pair + pair_column - column : -1;", "pair + pair_column - column + 1 : -1;"),
    hopper("column results of the tile outside", WALK, "tile.row(rectangle) < rectangle.row_stop && column < column_anchors", "column < column_anchors"),
    hopper("raster: the last group's height", TILE, "left < GROUP_CLUSTER_ROWS ? left : GROUP_CLUSTER_ROWS", "GROUP_CLUSTER_ROWS"),
    hopper("accumulators of the second row", TILE, "2 * (slot % 2) + item % 2;", "2 * (item % 2) + slot % 2;"),
    hopper("lane of an item", TILE, "item_of_lane(int lane) { return lane / 4; }", "item_of_lane(int lane) { return lane % 8; }"),
    hopper("ids without room behind them", OPS, "with_room(*batch.image_ids, CLUSTER * TILE_ROWS)", "with_room(*batch.image_ids, 0)"),
    hopper("a total is not carried", WALK, "              first,\n", "              1,\n", SMALL_WORKSPACE),
    hopper("best keys are not cleared", OPS, "    check_cuda(cudaMemsetAsync(x.data_ptr(), 0, count, stream()));\n", ""),
    hopper("a launch on the default stream", OPS, "config.stream = stream();", "config.stream = nullptr;"),
    hopper("no device guard", "launch.h", "device_(x.get_device_index()), guard_(device_)", "device_(x.get_device_index()), guard_(0)"),
    hopper("workspace too small by a slot", "hopper_plan.h", "MAX_ITEM_BYTES * (piece.row_tiles() + 1) * column_anchors", "MAX_ITEM_BYTES * piece.row_tiles() * column_anchors"),
    small("no barrier between copies and products", TILES, "    wait_for_copies<STAGES - 2>();\n    __syncthreads();", "    wait_for_copies<STAGES - 2>();"),
    small("waits for a copy too few", TILES, "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();"),
    small("no cluster barrier before the sum", LOSS, "    cluster_sync();\n    sum_strip", "    __syncthreads();\n    sum_strip"),
    small("no cluster barrier before the next tile", LOSS, "    if (tile != first) cluster_sync();", "    if (tile != first) __syncthreads();"),
    small("no grid barrier", LOSS, "  cg::this_grid().sync();\n  if (x.kind", "  __syncthreads();\n  if (x.kind"),
    small("address of ldmatrix", TILES, "k + lane / 16 * 16));", "k + lane / 8 % 2 * 16));"),
    small("slices of D overlap", PLAN, "std::min((cluster_rank + 1) * each, chunks)}", "std::min((cluster_rank + 1) * each + 1, chunks)}"),
    small("no barrier before the gains are found", "small_loss.cuh", "  shared.largest[thread] = largest;\n  __syncthreads();", "  shared.largest[thread] = largest;"),
    small("workspace without the last strip", PLAN, "w.not_finite = w.of_columns + int64_t(plan.strips()) * m", "w.not_finite = w.of_columns + int64_t(plan.strips() - 1) * m"),
    small("rows beyond the last are copied", TILES, "r >= x.count || c >= x.dim", "r > x.count || c >= x.dim"),
    Bug("small: one side's gradient only", "fused_vse/small_loss.py", "needs_grad(batch.images), needs_grad(batch.captions), tensor", "needs_grad(batch.images), needs_grad(batch.images), tensor"),
]  # fmt: skip
