"""The Triton kernels for the GPUs that test_triton_compile.py leaves out: they compile, into no more shared
memory than a block may have."""

import functools

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_aot import Launch, compile_for  # noqa: E402
from triton_launches import batches, noted  # noqa: E402

KIB = 1 << 10
# Target, the GPU whose launches it gets, bytes of shared memory of a block, and what is compiled.
TARGETS = {
    "sm_86": (GPUTarget("cuda", 86, 32), 80, 99 * KIB, "cubin"),
    "sm_89": (GPUTarget("cuda", 89, 32), 80, 99 * KIB, "cubin"),
    "sm_100": (GPUTarget("cuda", 100, 32), 90, 227 * KIB, "cubin"),
    "sm_120": (GPUTarget("cuda", 120, 32), 90, 99 * KIB, "cubin"),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 80, 64 * KIB, "hsaco"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 80, 64 * KIB, "hsaco"),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 80, 160 * KIB, "hsaco"),
}


@functools.cache
def launches(capability: int, amd: bool) -> dict[tuple, Launch]:
    """One launch for each kernel, source of scores and tiles."""
    found = {}
    for batch in batches():
        if batch.capability == capability:
            for launch in noted(batch, amd).launches.values():
                source = launch.arguments.get("SOURCE", (None, ""))[1]
                found.setdefault((launch.kernel.__name__, source, launch.tiles), launch)
    return found


@pytest.mark.expensive(few=2)
@pytest.mark.parametrize("name", TARGETS)
def test_compiles(name, request):
    """One launch of each kernel; with --cases=all, all of them."""
    target, capability, shared, binary = TARGETS[name]
    chosen = launches(capability, target.backend == "hip")
    if request.config.getoption("--cases") != "all":
        chosen = {kernel: launch for (kernel, *_), launch in chosen.items()}
    for what, launch in chosen.items():
        compiled = compile_for(launch, target)
        assert compiled.asm[binary], what
        assert compiled.metadata.shared <= shared, what


def test_what_amd_lacks_is_not_launched():
    for (kernel, _, tiles), launch in launches(80, True).items():
        assert "maxnreg" not in launch.options and kernel != "rescore_kernel"
        assert tiles is None or not (tiles.tma or tiles.precision == "tf32")
    assert {kernel for kernel, *_ in launches(80, False)} > {
        kernel for kernel, *_ in launches(80, True)
    }
