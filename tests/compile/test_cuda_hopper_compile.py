"""csrc/cuda/hopper_ops.cu compiled for sm_90a, with warnings as errors: no spills, no stack, the registers
and the shared memory that the design counts on, and the instructions that make it fast."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "hopper_ops.cu"
triton = pytest.importorskip("triton", reason="Triton, which ships cuobjdump, is not installed")
cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
NVCC = Path(cpp_extension.CUDA_HOME or "/nowhere", "bin", "nvcc")
pytestmark = [
    pytest.mark.skipif(not SOURCE.exists(), reason="the kernels' sources are not beside the tests"),
    pytest.mark.skipif(not NVCC.exists(), reason="no nvcc"),
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA"),
]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Of a multiprocessor; 1 KiB of the shared memory is the system's.
REGISTERS, SHARED = 65536, 227 << 10
PRODUCER, CONSUMER = 40, 232  # registers a thread, after setmaxnreg
PASSES = [
    f"{problem}, {element}"
    for problem in ("HardestProblem", "LogsumexpProblem", "HingeProblem")
    for element in ("__nv_bfloat16", "__half")
]


class Kernel(NamedTuple):
    registers: int
    stack: int
    spills: int
    sass: str
    ptx: str


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Kernel]:
    binary = tmp_path_factory.mktemp("hopper") / "hopper.fatbin"
    includes = cpp_extension.include_paths("cuda")
    command = [
        NVCC, "-fatbin", "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]", "-O3", "-std=c++17",
        "-Xptxas=-v", "-Werror=all-warnings", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
        *(f"-isystem={path}" for path in includes), SOURCE, "-o", binary,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    log = result.stdout + result.stderr
    # ptxas says so if it has to wait between products, or ignores setmaxnreg.
    assert "serialized" not in log and "setmaxnreg" not in log, log
    sass = dict(
        re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", dumped(binary, "-sass"), re.DOTALL)
    )
    entry = r"\.entry (\w+)\((.*?)(?=\.entry |\Z)"
    ptx = dict(re.findall(entry, dumped(binary, "-ptx"), re.DOTALL))
    found = {}
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    for name, stack, stores, loads, registers in report:
        spills = int(stores) + int(loads)
        found[name] = Kernel(int(registers), int(stack), spills, sass[name], ptx[name])
    return found


def dumped(binary: Path, what: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, what, binary], capture_output=True, text=True, check=True
    ).stdout


def find(kernels: dict[str, Kernel], *parts: str) -> Kernel:
    (kernel,) = (kernel for name, kernel in kernels.items() if all(part in name for part in parts))
    return kernel


def test_no_kernel_spills_or_has_a_stack(kernels):
    assert len(kernels) == len(PASSES) + 6
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.spills) == (0, 0), (name, kernel._replace(sass="", ptx=""))
        assert "STL" not in kernel.sass and "LDL" not in kernel.sass, name


@pytest.mark.parametrize("which", PASSES)
def test_pass_uses_what_the_design_counts_on(which, kernels):
    kernel = find(kernels, "statistics_kernel", *which.split(", "))
    # What a block is given at its start is what the warpgroups share after setmaxnreg.
    assert kernel.registers == 168
    assert 384 * kernel.registers == 128 * PRODUCER + 256 * CONSUMER <= REGISTERS
    sass = kernel.sass
    assert f"USETMAXREG.DEALLOC.CTAPOOL {PRODUCER:#x}" in sass
    assert re.search(rf"USETMAXREG.TRY_ALLOC.CTAPOOL UP\d, {CONSUMER:#x}", sass)
    element = "BF16" if "bfloat16" in which else "F32 "
    products = re.findall(r"HGMMA\.64x192x16\.F32\S* ", sass)
    # 4 steps of 16 along D for 2 blocks of 64 rows, in each copy of the unrolled loop.
    assert products and len(products) % 8 == 0
    assert all(element in product for product in products)
    assert "HMMA.16816" not in sass
    assert "UTMALDG.2D " in sass and "UTMALDG.2D.MULTICAST" in sass
    # The swap-shuffle: for 4 rows, and 6 times for 8 columns, of each word of an item; and one at the start.
    # Both kinds of log-sum-exp are in one kernel.
    words = 3 if "Logsumexp" in which else 2
    assert len(re.findall(r"\bSHFL\b", sass)) == words * ((2 + 1) + 6 * (4 + 2 + 1)) + 1
    # A step's products are waited for when the next one's are queued, and all only at the end.
    assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in sass
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass)) == 1


def test_hardest_stores_by_integer_atomics_and_sums_by_none(kernels):
    """Floating-point atomics would make results depend on the order of the tiles."""
    for which in PASSES:
        kernel = find(kernels, "statistics_kernel", *which.split(", "))
        atomics = set(re.findall(r"\b(?:REDG?|ATOMG?)\.E\.\S+", kernel.sass))
        if which.startswith("Hardest"):
            assert atomics and all("MAX" in x and "64" in x for x in atomics), atomics
        else:
            assert not atomics, atomics


MBARRIER_FENCE = "fence.mbarrier_init.release.cluster;"


def missing_fences(ptx: str) -> list[str]:
    """Where the memory model needs a fence and there is none. (What wgmma reads, the copy engine alone has
    written: that needs no fence.proxy.async.)"""
    missing = []
    # The other block and the copy engine see the initialised barriers only after it.
    initialised, cluster = ptx.rindex("mbarrier.init."), ptx.index("barrier.cluster.arrive")
    if MBARRIER_FENCE not in ptx[initialised:cluster]:
        missing.append(MBARRIER_FENCE)
    # Other instructions write the accumulators, too; they may stand in any other basic block.
    blocks = re.split(r"^\$?\w+:$|^.*\bbra\b.*$", ptx, flags=re.MULTILINE)
    products = [block for block in blocks if "wgmma.mma_async" in block]
    assert products
    return missing + [x for x in products if "wgmma.fence" not in x.partition("wgmma.mma_async")[0]]


@pytest.mark.parametrize("which", PASSES)
def test_fences_are_where_the_memory_model_needs_them(which, kernels):
    """No emulator shows a missing one: where it runs, all memory is one."""
    ptx = find(kernels, "statistics_kernel", *which.split(", ")).ptx
    assert not missing_fences(ptx)
    assert missing_fences(ptx.replace(MBARRIER_FENCE, "")) == [MBARRIER_FENCE]
    fences = [match.span() for match in re.finditer(r"wgmma\.fence\S*;", ptx)]
    for begin, end in fences:
        assert len(missing_fences(ptx[:begin] + ptx[end:])) == 1


def test_shared_memory_fits():
    text = (SOURCE.parent / "hopper_tile.h").read_text()
    names = ("TILE_ROWS", "TILE_COLS", "TILE_DEPTH", "STAGES", "WARPS")
    rows, columns, depth, stages, warps = (
        int(re.search(rf"constexpr int {name} = (\d+);", text).group(1)) for name in names
    )
    stage = 2 * depth * (rows + columns)
    assert stage % 1024 == 0 and 2 * depth * columns // 2 % 1024 == 0  # whole swizzle patterns
    exchange = 2 * warps * columns * 8
    barriers, prepared, alignment = 2 * stages * 8, 16, 1024
    assert stages * stage + exchange + barriers + prepared + alignment <= SHARED
