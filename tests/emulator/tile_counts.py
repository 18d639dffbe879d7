"""What a tile of the large kernels executes, by unit of the hardware, in instructions of PTX a warp:

    python -m tests.emulator.tile_counts [--backend triton|cuda] [--capability 80|90]

ptxas merges and splits some of them (moves vanish, a 64-bit integer operation becomes two), so this is a
model of the machine code and not its listing.
"""

import argparse
import warnings
from collections import Counter

import torch

import fused_vse

from . import device, ptxemu

UNITS = {
    "MMA": ("wgmma.mma", "mma.sync"),
    "MUFU": ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"),
    "SHFL": ("shfl", "redux", "vote", "match", "elect"),
    "LDSM": ("ldmatrix", "stmatrix"),
    "LD/ST shared": ("ld.shared", "st.shared", "mbarrier"),
    "LD/ST global": ("ld.global", "st.global", "cp.async", "prefetch", "ld.param"),
    "ATOM": ("atom", "red."),
    "FP64": (),
    "FP32": (),
    "MOV": ("mov", "cvta"),
    "CONTROL": ("bra", "bar", "ret", "exit", "wgmma", "fence", "setmaxnreg"),
    "ALU": (),  # integers, logic, comparisons, selections, minima and maxima, conversions
}
TILES = {"triton": (128, 128), "cuda": (128, 192)}
WARPS = 4  # that share a tile
# Multiples of both; between them nothing counts that a program does once.
SIZES = (768, 1536)
DIMS = (128, 192)  # one step of 64 between them
STATISTICS = {
    "hardest_negatives": fused_vse.hardest_negatives,
    "negative_logsumexp": fused_vse.negative_logsumexp,
}


def unit_of(opcode: str) -> str:
    for unit, beginnings in UNITS.items():
        if opcode.startswith(beginnings):
            return unit
    if opcode.endswith(".f64"):
        return "FP64"
    floating = ("add", "sub", "mul", "fma", "neg", "abs", "div")
    return "FP32" if opcode.endswith(".f32") and opcode.startswith(floating) else "ALU"


def executed(backend: str, capability: int, statistic: str, size: int, dim: int, with_ids: bool):
    """Warps that executed instructions of each unit, in the kernel that executed most."""
    launches = []
    where = device.Device(divmod(capability, 10), seed=0)

    def run():
        images, captions = (torch.randn(size, dim).bfloat16() for _ in range(2))
        ids = torch.arange(size) if with_ids else None
        STATISTICS[statistic](images, captions, image_ids=ids, caption_ids=ids, backend=backend)

    if backend == "triton":
        with device.emulated_triton(where, lambda *_: launches.append(ptxemu.counts())):
            run()
    else:
        with device.emulated_cuda(where) as emulation:
            run()
            kernels = {line.split()[0] for line in emulation.launches()}
            launches += [emulation.counts(kernel) for kernel in kernels]
    largest = max(launches, key=lambda counts: sum(warps for warps, _ in counts.values()))
    total = Counter()
    for opcode, (warps, _) in largest.items():
        total[unit_of(opcode)] += warps
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=TILES, default="triton")
    parser.add_argument("--capability", type=int, choices=(80, 90), default=90)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, columns = TILES[options.backend]
    few, many = ((size // rows) * (size // columns) for size in SIZES)
    for statistic in STATISTICS:
        for with_ids in (False, True):
            by_dim = []
            for dim in DIMS:
                small, large = (
                    executed(options.backend, options.capability, statistic, size, dim, with_ids)
                    for size in SIZES
                )
                by_dim.append({u: (large[u] - small[u]) / (many - few) / WARPS for u in UNITS})
            ids = ", with ids" if with_ids else ""
            print(
                f"{statistic}{ids}, sm_{options.capability}: of a warp (of {WARPS}), for a tile of"
                f" {rows} x {columns} + for each 64 of D"
            )
            sums = [{"all": sum(counts.values()), **counts} for counts in by_dim]
            for unit, count in sums[1].items():
                step = count - sums[0][unit]
                if count:
                    print(f"  {unit:14}{count - 3 * step:9.1f} + {step:6.1f}")


if __name__ == "__main__":
    main()
