"""A paper model of the losses over ranks: forward + backward at sizes that nobody here has measured.

    python -m benchmarks.ranks_model                     # the table of docs/distributed.md
    python -m benchmarks.ranks_model --tflops 350 --network 25 --ranks 16 32

One unit is the product of a rank's own rows with all columns: 2 B (W B) D operations at --tflops. A
gather of one side takes max(in the node, across nodes), pipelined: each GPU receives all rows of the others
over its link, and a node receives those of the other nodes over the links of all its GPUs. 16-bit rows travel
forward, float32 gradients back (16-bit ones where rows are gathered). Of a chunked transfer all but one chunk
hides behind the products, where they take longer. Launches, the O(K) formulas and stragglers are left out.
"""

import argparse
import math
from typing import NamedTuple

from fused_vse.distributed.exchange import CHUNK_BYTES

KEPT_BYTES = 2 << 30  # the default of set_gather_bytes
GIB = 2**30


class Machine(NamedTuple):
    tflops: float  # of a GPU, as its GEMMs reach it
    node: float  # GB/s of a GPU's link in its node
    network: float  # GB/s of the network for each GPU
    efficiency: float  # what collectives reach of both
    per_node: int  # GPUs

    def product(self, rows: int, columns: int, dim: int) -> float:
        """Milliseconds of one unit."""
        return 2 * rows * columns * dim / self.tflops / 1e9

    def gather(self, ranks: int, row_bytes: float) -> float:
        """Milliseconds, of row_bytes from every rank; a reduce-scatter takes the same."""
        local = min(ranks, self.per_node)
        in_node = (ranks - ranks / local) * row_bytes / self.node
        across = (ranks - local) * row_bytes / local / self.network
        return max(in_node, across) / self.efficiency / 1e6


class Row(NamedTuple):
    chunks: int
    gathers: int  # 2 where the captions are not kept for the backward pass
    products: float  # of all negatives: ms
    here: float
    hardest: float
    rows: float  # gather_rows, all negatives
    hardest_rows: float
    open_clip: float
    gathered: float  # GiB of captions that a rank holds at a time
    scores: float  # GiB of open_clip's logits


def model(machine: Machine, ranks: int, batch: int, dim: int) -> Row:
    """`batch` pairs on each of `ranks` ranks."""
    total = ranks * batch * dim * 2
    chunks, kept = math.ceil(total / CHUNK_BYTES), total <= KEPT_BYTES
    unit = machine.product(batch, ranks * batch, dim)
    gather = machine.gather(ranks, batch * dim * 2)
    back = machine.gather(ranks, batch * dim * 4)
    gathers = 1 if kept else 2

    def overlapped(products: float, transfer: float) -> float:
        return max(products, transfer) + min(products, transfer) / chunks

    # Forward one product; backward three of all negatives, and of the hardest only a scatter.
    forward = overlapped(unit, gather)
    return Row(
        chunks,
        gathers,
        4 * unit,
        forward + overlapped(3 * unit, back + (gathers - 1) * gather),
        forward + back + (gathers - 1) * gather,
        (8 - 4 / ranks) * unit + 4 * gather,
        (2 - 1 / ranks) * unit + 4 * gather,
        6 * unit + 4 * gather,
        (total if kept else 2 * CHUNK_BYTES) / GIB,
        2 * batch * ranks * batch * 4 / GIB,
    )


def table(machine: Machine, sizes: list[int], batch: int, dim: int) -> str:
    lines = [
        f"Model, not measured: {machine.tflops:g} TF/s a GPU, {machine.node:g} GB/s in a node of"
        f" {machine.per_node}, {machine.network:g} GB/s a GPU across nodes, {machine.efficiency:.0%} of both"
        f" reached; {batch} pairs a GPU, D = {dim}, 16 bits; ms of forward + backward.",
        "",
        "| W | global N | chunks | 4 products | all negatives, `group=` | `gather_rows` |"
        " open_clip's logits | hardest, `group=` | `gather_rows` | captions held, `group=` |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in sizes:
        row = model(machine, ranks, batch, dim)
        times = [row.products, row.here, row.rows, row.open_clip, row.hardest, row.hardest_rows]
        first, here, rows, clip, hardest, hardest_rows = (f"{ms:.3g}" for ms in times)
        cells = [
            *(ranks, ranks * batch, row.chunks, first, here, rows),
            f"{clip} ({row.scores:.2g} GiB)",
            *(hardest, hardest_rows),
            f"{row.gathered:.2g} GiB{', gathered twice' if row.gathers > 1 else ''}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tflops", type=float, default=600)
    parser.add_argument("--node", type=float, default=450, help="GB/s of a GPU in its node")
    parser.add_argument("--network", type=float, default=50, help="GB/s of a GPU across nodes")
    parser.add_argument("--efficiency", type=float, default=0.8, help="of both")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs")
    parser.add_argument("--batch", type=int, default=4096, help="pairs a GPU")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> str:
    """The table for these arguments."""
    given = parsed(argv)
    machine = Machine(given.tflops, given.node, given.network, given.efficiency, given.per_node)
    return table(machine, given.ranks, given.batch, given.dim)


if __name__ == "__main__":
    print(main())
