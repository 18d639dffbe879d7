"""Do the tests of the CUDA backend see deliberate bugs? Changes csrc, one bug at a time, and runs them:

    python -m tests.emulator.mutations [-k hopper] [--seeds 0,1,2,3]

Takes about a minute a bug, most of which nvcc does.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from typing import NamedTuple

from . import cuda_ops
from .build import HERE, BuildError
from .cuda_ops import SMALL_WORKSPACE, Change

TIMEOUT = 300  # seconds; a bug may be one that never ends


class Bug(NamedTuple):
    name: str
    tests: str  # pytest's -k
    changes: tuple[Change, ...]


def hopper(name: str, *changes: Change) -> Bug:
    return Bug(f"hopper: {name}", "hopper", changes)


def small(name: str, *changes: Change) -> Bug:
    return Bug(f"small: {name}", "small or strided", changes)


KERNEL, PTX, WALK, TILE, OPS = (
    "hopper_kernel.cuh",
    "hopper_ptx.cuh",
    "hopper_walk.h",
    "hopper_tile.h",
    "hopper_ops.cu",
)
BUGS = [
    hopper(
        "producer waits for the wrong parity",
        Change(KERNEL, "position.phase ^ 1);", "position.phase);"),
    ),
    hopper(
        "consumer waits for the wrong parity",
        Change(
            KERNEL,
            "full[position.stage], position.phase);",
            "full[position.stage], position.phase ^ 1);",
        ),
    ),
    hopper("no wait for the last wgmma", Change(KERNEL, "  ptx::wgmma_wait<0>();\n", "")),
    hopper(
        "a stage is released one step early",
        Change(KERNEL, "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    ),
    hopper("no wgmma.fence", Change(KERNEL, "    ptx::wgmma_fence();\n", "")),
    hopper("no commit", Change(KERNEL, "    ptx::wgmma_commit();\n", "")),
    hopper(
        "too few bytes announced",
        Change(
            KERNEL,
            "expect_bytes(full, STAGE_BYTES)",
            "expect_bytes(full, STAGE_BYTES - SHARE_BYTES)",
        ),
    ),
    hopper(
        "the other block is not asked before its stage is overwritten",
        Change(
            KERNEL,
            "if (lane < CLUSTER) ptx::mbarrier_arrive_at(&shared.empty[stage], lane);",
            "if (lane == 0) ptx::mbarrier_arrive_at(&shared.empty[stage], ptx::cluster_rank());",
        ),
        Change(KERNEL, "empty[s], CLUSTER * WARPS)", "empty[s], WARPS)"),
    ),
    hopper("copies reach one block only", Change(KERNEL, "(1 << CLUSTER) - 1);", "1 << rank);")),
    hopper(
        "no fence after the barriers' initialisation",
        Change(KERNEL, "    ptx::fence_mbarrier_init();\n", ""),
    ),
    hopper(
        "no cluster barrier at the start",
        Change(
            KERNEL, "  ptx::cluster_sync();\n\n  // Through", "  __syncthreads();\n\n  // Through"
        ),
    ),
    hopper(
        "no cluster barrier at the end", Change(KERNEL, "  ptx::cluster_sync();\n#endif", "#endif")
    ),
    hopper(
        "the first turn is not given away",
        Change(
            KERNEL, "  if (consumer == 1) ptx::barrier_arrive(TURN_BARRIER, 2 * WARPGROUP);\n", ""
        ),
    ),
    hopper(
        "the turn is given away before the products are issued",
        Change(
            KERNEL,
            "  for (int step = 0; step < depth_steps; ++step) {\n"
            "    Stage& stage = shared.stages[position.stage];\n"
            "    ptx::mbarrier_wait(&shared.full",
            "  if (another_turn) ptx::barrier_arrive(TURN_BARRIER + other, 2 * WARPGROUP);\n"
            "  another_turn = false;\n"
            "  for (int step = 0; step < depth_steps; ++step) {\n"
            "    Stage& stage = shared.stages[position.stage];\n"
            "    ptx::mbarrier_wait(&shared.full",
        ),
    ),
    hopper(
        "no barrier before the column items are read",
        Change(KERNEL, "  ptx::barrier_sync(barrier, WARPGROUP);\n", ""),
    ),
    hopper(
        "both consumers exchange in the same memory",
        Change(KERNEL, "shared.column_items[consumer]", "shared.column_items[0]"),
    ),
    hopper(
        "swizzle of 64 bytes in the descriptor",
        Change(PTX, "uint64_t{1} << 62", "uint64_t{2} << 62"),
    ),
    hopper(
        "distance of the patterns",
        Change(PTX, "uint64_t{1024 / 16} << 32", "uint64_t{512 / 16} << 32"),
    ),
    hopper(
        "no swizzle in the tensor map",
        Change(OPS, "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_NONE"),
    ),
    hopper(
        "step along D inside a stage",
        Change(KERNEL, "ptx::operand_at(b, 32 * k)", "ptx::operand_at(b, 16 * k)"),
    ),
    hopper(
        "the captions' share of the other rank",
        Change(
            KERNEL, "tile.column() + rank * SHARE_COLS;", "tile.column() + (1 - rank) * SHARE_COLS;"
        ),
    ),
    hopper(
        "accumulates onto the tile before",
        Change(KERNEL, "operand_at(b, 32 * k), step + k)", "operand_at(b, 32 * k), 1)"),
    ),
    hopper(
        "mask: one column too many",
        Change(WALK, "item_column(chunk, item) >= columns", "item_column(chunk, item) > columns"),
    ),
    hopper(
        "mask: the diagonal's offset",
        Change(WALK, "const int offset = column - row;", "const int offset = column - row + 1;"),
    ),
    hopper(
        "column results of the tile outside",
        Change(
            WALK,
            "tile.row(rectangle) < rectangle.row_stop && column < rectangle.num_columns",
            "column < rectangle.num_columns",
        ),
    ),
    hopper(
        "raster: the last group's height",
        Change(TILE, "left < GROUP_CLUSTER_ROWS ? left : GROUP_CLUSTER_ROWS", "GROUP_CLUSTER_ROWS"),
    ),
    hopper(
        "accumulators of the second row",
        Change(TILE, "2 * (slot % 2) + item % 2;", "2 * (item % 2) + slot % 2;"),
    ),
    hopper(
        "lane of an item",
        Change(
            TILE,
            "item_of_lane(int lane) { return lane / 4; }",
            "item_of_lane(int lane) { return lane % 8; }",
        ),
    ),
    hopper(
        "ids without room behind them",
        Change(OPS, "with_room(*image_ids, CLUSTER * TILE_ROWS)", "with_room(*image_ids, 0)"),
    ),
    hopper(
        "a total is not carried",
        Change(WALK, "columns && first ? 1 : 0", "columns ? 1 : 0"),
        SMALL_WORKSPACE,
    ),
    hopper(
        "best keys are not cleared",
        Change(
            OPS,
            "  check_cuda(cudaMemsetAsync(best.data_ptr(), 0, best.numel(), pass.stream()));\n",
            "",
        ),
    ),
    hopper(
        "a launch on the default stream",
        Change(OPS, "config.stream = stream();", "config.stream = nullptr;"),
    ),
    hopper(
        "no device guard",
        Change(
            "launch.h",
            "device_(x.get_device_index()), guard_(device_)",
            "device_(x.get_device_index()), guard_(0)",
        ),
    ),
    hopper(
        "workspace too small by a slot",
        Change(
            "hopper_plan.h",
            "partial_at(piece.row_tiles() + 1, 0, num_pairs, 0)",
            "partial_at(piece.row_tiles(), 0, num_pairs, 0)",
        ),
    ),
    small(
        "no barrier between copies and products",
        Change(
            "small_tiles.cuh",
            "    wait_for_copies<STAGES - 2>();\n    __syncthreads();",
            "    wait_for_copies<STAGES - 2>();",
        ),
    ),
    small(
        "waits for a copy too few",
        Change(
            "small_tiles.cuh", "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();"
        ),
    ),
    small(
        "no cluster barrier before the sum",
        Change(
            "small_loss.cu",
            "    cluster_sync();\n    sum_strip",
            "    __syncthreads();\n    sum_strip",
        ),
    ),
    small(
        "no cluster barrier before the next tile",
        Change(
            "small_loss.cu",
            "    if (tile != first) cluster_sync();",
            "    if (tile != first) __syncthreads();",
        ),
    ),
    small(
        "no grid barrier",
        Change(
            "small_loss.cu",
            "  cg::this_grid().sync();\n  if (x.kind",
            "  __syncthreads();\n  if (x.kind",
        ),
    ),
    small(
        "address of ldmatrix",
        Change("small_tiles.cuh", "k + lane / 16 * 16));", "k + lane / 8 % 2 * 16));"),
    ),
    small(
        "slices of D overlap",
        Change(
            "small_plan.h",
            "std::min((cluster_rank + 1) * each, chunks)}",
            "std::min((cluster_rank + 1) * each + 1, chunks)}",
        ),
    ),
    small(
        "no barrier before the gains are found",
        Change(
            "small_loss.cuh",
            "  shared.largest[thread] = largest;\n  __syncthreads();",
            "  shared.largest[thread] = largest;",
        ),
    ),
    small(
        "workspace without the last strip",
        Change(
            "small_plan.h",
            "w.not_finite = w.of_columns + int64_t(plan.strips()) * m",
            "w.not_finite = w.of_columns + int64_t(plan.strips() - 1) * m",
        ),
    ),
    small(
        "rows beyond the last are copied",
        Change("small_tiles.cuh", "r >= x.count || c >= x.dim", "r > x.count || c >= x.dim"),
    ),
]


def found(bug: Bug, seeds: str) -> tuple[bool, str]:
    """Whether the tests fail, and with what."""
    architectures = ("compute_90a",) if bug.tests == "hopper" else cuda_ops.ARCHITECTURES
    library = cuda_ops.built(bug.changes, architectures)
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", "-k", bug.tests,
        "--cases", "40", "--seeds", seeds, str(HERE / "test_cuda_backend.py"),
    ]  # fmt: skip
    environment = os.environ | {cuda_ops.LIBRARY_VARIABLE: str(library)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        return True, "does not end"
    errors = re.findall(r"^(?:E +)?.*(?:Error|assert).*$", done.stdout, re.M)
    why = errors[0] if errors else done.stdout[-300:]
    return done.returncode != 0, re.sub(r"\b_Z\w+: ", "", why)[:260]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", default="", help="what a bug's name must contain")
    parser.add_argument("--seeds", default="0,1,2,3")
    options = parser.parse_args()
    for bug in BUGS:
        if options.k not in bug.name:
            continue
        started = time.time()
        try:
            is_found, why = found(bug, options.seeds)
            result = "found" if is_found else "NOT FOUND"
        except (ValueError, BuildError) as error:
            result, why = "NOT BUILT", str(error)[-300:]
        print(f"| {bug.name} | {result} | {why} | {time.time() - started:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
