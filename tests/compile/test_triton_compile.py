"""Every Triton kernel, as the host code launches it, compiled ahead of time for sm_80 and sm_90: no spills
that cost time, wgmma on sm_90, and as many programs on a multiprocessor as the configuration counts on."""

import itertools

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from triton.runtime.jit import JITFunction  # noqa: E402
from triton_aot import Compiled, Launch, compiling  # noqa: E402
from triton_launches import Batch, batches, noted  # noqa: E402

from fused_vse.backends.triton import (  # noqa: E402
    certified,
    configs,
    hardest,
    order,
    rows,
    walk,
)

# Bytes of shared memory of a multiprocessor: A100 and H100 / H200.
SHARED = {80: 164 << 10, 90: 228 << 10}
# Registers are allotted by the Triton and the ptxas in it, and which those are is the user's torch's choice.
# Nothing spills with this one, which .ci/run installs for that.
NO_STACK_TRITON = "3.9.0"
# Any other may spill 16 registers of a thread, as 3.8 does, outside of the inner loops: read once a tile or
# block of rows, they come from the first-level cache, next to thousands of instructions.
MAX_STACK = 0 if triton.__version__ == NO_STACK_TRITON else 16 * 4
FAMILIES = (certified, hardest, order, rows, walk)


@pytest.fixture(scope="module")
def compiled(request):
    """Key of a launch to its code. What the selected tests need is all under way at once."""
    launches = {}
    for item in request.session.items:
        batch = getattr(item, "callspec", None) and item.callspec.params.get("batch")
        if isinstance(batch, Batch):
            for key, launch in noted(batch).launches.items():
                known = launches.setdefault(key, launch)
                # Code for less aligned pointers has more instructions.
                launches[key] = min(known, launch, key=lambda each: each.aligned)
    with compiling(launches) as results:
        yield results


@pytest.mark.expensive(few=8)
@pytest.mark.parametrize("batch", batches(), ids=str)
def test_compiles_without_spills(batch, compiled):
    launches = noted(batch).launches
    assert launches
    for key, launch in launches.items():
        code = compiled[key].result()
        name = f"{launch.kernel.__name__} of {batch}, {launch.tiles}"
        what = f"{name}: {code._replace(ptx='', sass='')}"
        assert code.stack <= MAX_STACK, what
        assert not code.stack_accesses_in_inner_loops(), what
        if launch.tiles is None:
            continue
        shared = SHARED[batch.capability]
        programs = code.programs_per_multiprocessor(configs.REGISTERS, shared)
        assert programs >= launch.tiles.programs_per_sm, what
        if not on_tensor_cores(launch):
            continue
        if batch.capability == 90 and launch.tiles.block_m >= 64:
            assert "wgmma.mma_async" in code.ptx, what
        else:
            assert "mma.sync" in code.ptx, what


@pytest.mark.parametrize(
    ("at", "expected"), [(0x10, 0), (0x30, 0), (0x50, 1), (0x90, 0), (0xB0, 1), (0xE0, 0)]
)
def test_finds_the_stack_in_inner_loops(at, expected):
    """0x20 - 0xd0 is a loop over two: one of products, with a wait inside, and one of other instructions."""
    code = dict.fromkeys(range(0, 0x100, 0x10), "IADD3 R1, R1, 0x1")
    code |= {0x40: "HGMMA.64x128x16.F32 R88, gdesc[UR16], R88, gsb0", 0x70: "@P3 BRA 0x60"}
    code |= {0x80: "@!P2 BRA 0x40", 0xC0: "@P1 BRA 0xa0", 0xD0: "BRA 0x20", 0xF0: "BRA 0xf0"}
    code |= {at: "@P0 LDL.LU R5, [R1+0x4]"}
    sass = "\n".join(f"  /*{a:04x}*/  {text} ;  /* 0x000fe200 */" for a, text in code.items())
    compiled = Compiled(registers=255, stack=4, shared=0, threads=128, ptx="", sass=sass)
    assert len(compiled.stack_accesses_in_inner_loops()) == expected


def on_tensor_cores(launch: Launch) -> bool:
    operand, source, tiles = (launch.arguments[name] for name in ("images", "SOURCE", "TILES"))
    is_narrow = "bf16" in operand[0] or "fp16" in operand[0]
    return source[1] == "dot" and (is_narrow or tiles[1].precision == "tf32")


def test_nothing_is_forgotten():
    """A configuration or kernel that no batch reaches needs another batch."""
    launches = [launch for batch in batches() for launch in noted(batch).launches.values()]
    defined = {value for value in vars(configs).values() if isinstance(value, configs.Tiles)}
    assert {launch.tiles for launch in launches} - {None} == defined - {configs.INTERPRETER}
    kernels = {
        name
        for family in FAMILIES
        for name, value in vars(family).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert {launch.kernel.__name__ for launch in launches} == kernels
    blocks = {name: value for name, value in vars(configs).items() if isinstance(value, dict)}
    del blocks["__builtins__"]
    for name, value in blocks.items():
        assert any(value.items() <= settings(launch).items() for launch in launches), name


def settings(launch: Launch) -> dict:
    return {name: value for name, (_, value, _) in launch.arguments.items()} | launch.options


def test_no_size_has_tiles_of_its_own():
    chosen = set().union(*(noted(batch).chosen for batch in batches()))
    sizes = [size + extra for size in (2**k for k in range(20)) for extra in (0, size // 2)]
    for (kind, capability), rows_, columns in itertools.product(
        {each[:2] for each in chosen}, sizes, sizes
    ):
        for multiprocessors in (16, 108, 132):
            device = configs.Device(multiprocessors, capability // 10)
            tiles = configs.tiles_for(kind, rows_, columns, device)
            assert (kind, capability, tiles) in chosen, (kind, rows_, columns, device)


def test_the_shape_buckets():
    hopper, ampere = configs.Device(132, 9), configs.Device(108, 8)
    for size, on_hopper, on_ampere in (
        (128, configs.SMALL, configs.SMALL),
        (1024, configs.MEDIUM, configs.MEDIUM),
        (2048, configs.MEDIUM, configs.MEDIUM),
        (4096, configs.LARGE_TMA, configs.LARGE),
    ):
        assert configs.tiles_for("bf16", size, size, hopper) == on_hopper
        assert configs.tiles_for("bf16", size, size, ampere) == on_ampere
    assert configs.tiles_for("order", 1024, 1024, hopper) == configs.ORDER
    assert configs.tiles_for("order", 128, 128, hopper) == configs.ORDER_SMALL
    assert configs.tiles_for("given", 1024, 1024, hopper) == configs.GIVEN
    assert configs.tiles_for("given", 128, 128, hopper) == configs.STORED
    assert configs.search_pays(32768, 32768, hopper) and not configs.search_pays(512, 512, hopper)
    assert not configs.search_pays(4096, 1 << 20, hopper)
