"""What the compiler made of the CUDA kernels, read from the built library: no GPU is needed."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import fused_vse

ROOT = Path(__file__).parents[2]
LIBRARY = Path(fused_vse.__file__).parent / "_cuda.abi3.so"
# The most registers that a kernel may take, and bytes of static shared memory (sm_90 adds 1 KiB, which the
# system reserves). small_loss_kernel: two blocks of 256 threads on a multiprocessor; the others are bound by
# memory and want eight.
BUDGETS = {
    "small_loss_kernel": (128, 0),
    "small_loss_backward_kernel": (32, 0),
    # What setmaxnreg then divides between the warpgroups: test_cuda_hopper_compile.py.
    "statistics_kernel": (168, 0),
    "survey_kernel": (48, 16),
    "id_ranges_kernel": (64, 0),
    "hardest_finish_kernel": (32, 0),
    "logsumexp_merge_kernel": (40, 0),
    "hinge_merge_kernel": (40, 0),
}


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings."""
    try:
        import triton

        ours = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump") or (str(ours) if ours.exists() else None)


def why_not() -> str | None:
    if not LIBRARY.exists():
        return f"cuda: {fused_vse.backends()['cuda']}"
    return None if cuobjdump() else "cuobjdump was not found: neither a CUDA toolkit nor Triton"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Kernel(NamedTuple):
    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int


def dump(*options: str) -> str:
    command = [cuobjdump(), *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_name(mangled: str) -> str:
    """The identifier that ends in _kernel; its length stands before it."""
    end = mangled.index("_kernel") + len("_kernel")
    return next(
        mangled[start:end]
        for start in range(end, 0, -1)
        if mangled[start].isalpha() and mangled[:start].endswith(str(end - start))
    )


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found, architecture = [], None
    function = re.compile(
        r" Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)|arch = (\S+)"
    )
    for mangled, *numbers, arch in function.findall(dump("--dump-resource-usage")):
        architecture = arch or architecture
        if mangled:
            found.append(Kernel(architecture, kernel_name(mangled), *map(int, numbers)))
    return found


def test_every_architecture_has_every_kernel(kernels):
    names = {}
    for kernel in kernels:
        names.setdefault(kernel.architecture, set()).add(kernel.name)
    assert set(names) == {"sm_80", "sm_90a"}
    assert names["sm_80"] <= names["sm_90a"] == set(BUDGETS), (
        "name the budget of a new kernel above"
    )
    assert "arch = sm_80" in dump("--list-ptx") or ".sm_80.ptx" in dump("--list-ptx")


def test_no_stack_no_spills_and_within_the_budget(kernels):
    for kernel in kernels:
        registers, shared = BUDGETS[kernel.name]
        reserved = 1024 if kernel.architecture.startswith("sm_9") else 0
        assert kernel.stack == 0 and kernel.local == 0, kernel
        assert kernel.registers <= registers, kernel
        assert kernel.shared <= shared + reserved, kernel


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_16_bit_products_are_on_the_tensor_cores(architecture):
    sass = dump("--dump-sass", "--gpu-architecture", architecture)
    bodies = re.findall(r"Function : (\S*small_loss_kernel\S*)(.*?)(?=Function :|\Z)", sass, re.S)
    assert len(bodies) == 3
    for name, body in bodies:
        is_float32 = "kernelIf" in name
        assert ("HMMA.16816.F32" in body) != is_float32, name
        assert "LDGSTS" in body, name  # asynchronous copies
        assert not re.search(r"\b(ATOMG|RED)\S*\.(F16|F32|F64)", body), name


def test_links_no_cuda_runtime():
    """The runtime is inside, so that the library runs with the CUDA of any torch."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf was not found")
    needed = subprocess.run([readelf, "-d", LIBRARY], capture_output=True, text=True).stdout
    assert "libtorch_cuda.so" in needed and "libcudart" not in needed
