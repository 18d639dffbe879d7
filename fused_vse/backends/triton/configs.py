"""The few tile shapes that the kernels run with, each with its reason. Nothing is tuned at run time.

`programs_per_sm` programs share a multiprocessor, which tests/compile/test_triton_compile.py checks
against the registers and the shared memory that each kernel takes on sm_80 and sm_90.
"""

from typing import NamedTuple

from ...ops import MAX_SAVED_SCORES

# Of a multiprocessor and of a thread, on every GPU from sm_80 on.
REGISTERS, MOST_REGISTERS = 65536, 255


class Device(NamedTuple):
    """What the choice depends on."""

    multiprocessors: int
    capability: int  # major
    interpreted: bool = False
    # No bulk copy engine, no tf32 but on some; 64 KiB of shared memory, which hold the tiles of sm_80.
    amd: bool = False


class Tiles(NamedTuple):
    """Part of the code: a kernel's argument TILES."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    group: int = 8
    # How often a gradient's tile is halved before its entries are computed, in float64 once more: what
    # tests/compile/test_triton_compile.py needs to see no spills.
    halvings: int = 2
    tma: bool = False  # the bulk copy engine of sm_90 loads the operands
    precision: str = "ieee"  # of tl.dot, for float32 operands

    @property
    def registers(self) -> int:
        """What a thread may take. Told nothing, ptxas spills to make room for programs that never come."""
        threads = 32 * self.num_warps * self.programs_per_sm
        return min(REGISTERS // threads, MOST_REGISTERS)


# Two programs of 128 x 128 on a multiprocessor: one reduces its tile while the other multiplies. 3 stages
# of (128 + 128) x 64 x 2 bytes are 96 KiB of the 227 KiB that Hopper has.
LARGE = Tiles(128, 128, 64, num_warps=4, num_stages=3, programs_per_sm=2)
# Without the addresses of its loads a kernel has 32 registers a thread more for its epilogue.
LARGE_TMA = LARGE._replace(tma=True)
# N ~ 1024: 64 tiles of 128 x 128 would leave half of the multiprocessors idle.
MEDIUM = Tiles(64, 64, 64, num_warps=4, num_stages=4, programs_per_sm=2)
# N <= 512: latency; as many programs as there are, and few steps along D.
SMALL = Tiles(32, 32, 128, num_warps=4, num_stages=3, programs_per_sm=2)

# float32 operands are twice as wide.
LARGE_TF32 = Tiles(128, 128, 32, num_warps=4, num_stages=3, programs_per_sm=2, precision="tf32")
LARGE_TF32_TMA = LARGE_TF32._replace(tma=True)
MEDIUM_TF32 = Tiles(64, 64, 32, num_warps=4, num_stages=4, programs_per_sm=2, precision="tf32")
SMALL_TF32 = Tiles(32, 32, 64, num_warps=4, num_stages=3, programs_per_sm=2, precision="tf32")

# Scores read from memory: as wide as coalescing likes, small enough for float64 in registers.
STORED = Tiles(32, 64, 16, num_warps=4, num_stages=1, programs_per_sm=2)
# Scores that are given, in bulk: 32 a thread, so that 16 KiB of bfloat16 are under way on a multiprocessor,
# and that their magnitudes fit into registers next to them.
GIVEN = Tiles(64, 64, 16, num_warps=4, num_stages=1, programs_per_sm=2)
# The gradient of given scores where it is sparse: written once, 512 bytes of bfloat16 to a row.
SPARSE = Tiles(16, 256, 16, num_warps=4, num_stages=1, programs_per_sm=2, halvings=0)
# Order similarity: three instructions a difference. With fewer rows or columns than threads Triton loads
# both operands in the layout of the tile; beyond, it would exchange them through shared memory.
ORDER = Tiles(32, 64, 16, num_warps=4, num_stages=1, programs_per_sm=2, halvings=1)
ORDER_SMALL = Tiles(32, 32, 16, num_warps=4, num_stages=1, programs_per_sm=2, halvings=1)
# float32 multiply-adds outside the tensor cores: 32 accumulators a thread leave room for the operands.
EXACT = Tiles(64, 64, 16, num_warps=4, num_stages=3, programs_per_sm=2)
# The interpreter's time goes by the number of operations: few, small tiles.
INTERPRETER = Tiles(64, 32, 64, num_warps=4, num_stages=1, programs_per_sm=4)

# Partial results: 32 slots x 32 anchors are whole 128-byte lines, and few steps for 1000 slots.
MERGE = {"BLOCK_S": 32, "BLOCK_A": 32, "num_warps": 4}
# Gradients of the order similarity: 16 accumulators a thread; in float64 4, or the stack is used.
ORDER_SUMS = {"BLOCK_R": 32, "BLOCK_D": 64, "BLOCK_J": 64, "num_warps": 4}
ORDER_SUMS_FLOAT64 = {"BLOCK_R": 16, "BLOCK_D": 32, "BLOCK_J": 64, "num_warps": 4}
# Up to this many anchors of a side, the sparse backward pass finds its entries by looking through all.
MAX_UNLISTED_ANCHORS = 1024


# The certified search takes over where the large tiles do, as long as a program can look at all tiles of
# an anchor at once. Rescoring 32 entries an anchor reads as much as 1 / 100 of what the search multiplies.
MAX_SEARCH_SLOTS = 1024
MAX_RESCORED_PER_ANCHOR = 32
# 8 x 512 float64 products: 32 a thread.
RESCORE = {"BLOCK_J": 8, "BLOCK_D": 512, "num_warps": 4, "maxnreg": MOST_REGISTERS}


def tiles_for(
    kind: str, num_rows: int, num_columns: int, device: Device, crowded: bool = False
) -> Tiles:
    """
    Args:
        kind: "bf16" for 16-bit operands, "tf32", "exact"; "stored", "given", "none"; "order",
            "order_float64".
        crowded: two vectors belong to each side of a tile, for which LARGE has no registers left.
    """
    if device.interpreted:
        # The order similarity goes through a block of D one by one, zeros at its end included.
        return INTERPRETER._replace(block_k=8) if kind.startswith("order") else INTERPRETER
    if kind == "stored":
        return STORED
    if kind == "none":
        return SPARSE
    if kind == "exact":
        return EXACT
    if kind == "order_float64":
        return ORDER_SMALL
    if kind in ("order", "given"):
        tiles, small = {"order": (ORDER, ORDER_SMALL), "given": (GIVEN, STORED)}[kind]
        fills = device.multiprocessors * tiles.block_m * tiles.block_n
        return tiles if num_rows * num_columns >= fills else small
    large, large_tma, medium, small = {
        "bf16": (LARGE, LARGE_TMA, MEDIUM, SMALL),
        "tf32": (LARGE_TF32, LARGE_TF32_TMA, MEDIUM_TF32, SMALL_TF32),
    }[kind]
    # Up to MAX_SAVED_SCORES the kernels may have scores to save, for which there are none either.
    if num_rows * num_columns > MAX_SAVED_SCORES and not crowded:
        return large_tma if device.capability >= 9 and not device.amd else large
    if num_rows * num_columns >= device.multiprocessors * medium.block_m * medium.block_n:
        return medium
    return small


def search_pays(num_rows: int, num_columns: int, device: Device) -> bool:
    """Whether the certified search is faster than torch.mm in float32 and a pass over the result. On AMD's
    GPUs nobody knows."""
    tiles = tiles_for("bf16", num_rows, num_columns, device)
    slots = max(num_rows, num_columns) // min(tiles.block_m, tiles.block_n) + 2
    return tiles in (LARGE, LARGE_TMA) and slots <= MAX_SEARCH_SLOTS and not device.amd
