"""Code with a mistake, which has to show: in the result or in an error."""

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from . import ptxemu
from .products import Edit, product, tma_product
from .snippets import error_of, pointer

pytestmark = pytest.mark.filterwarnings("ignore")
each_capability = pytest.mark.parametrize("capability", [80, 90])


def shows(run: Callable, **options) -> bool:
    try:
        got, want = run(**options)
    except ptxemu.Error:
        return True
    return not torch.equal(got, want)


def shows_in_product(capability: int, edit: Edit, seed: int = 0, **options) -> bool:
    return shows(
        product, capability=capability, seed=seed, edit=edit, size=(128, 128, 256), **options
    )


def shows_in_tma_product(edit: Edit, seed: int = 0, **options) -> bool:
    return shows(tma_product, seed=seed, edit=edit, **options)


def replaced(pattern: str, by: str) -> Edit:
    def edit(ptx: str) -> str:
        edited, count = re.subn(pattern, by, ptx)
        assert count, f"{pattern} is not in the code"
        return edited

    return edit


unchanged = replaced(r"\bret;", "ret;")
without_barriers = replaced(r"bar\.sync\s+0;", "")


@each_capability
def test_no_wait_for_cp_async(capability):
    assert not shows_in_product(capability, unchanged)
    for by in ("", "cp.async.wait_group 3;"):
        assert shows_in_product(capability, replaced(r"cp\.async\.wait_group\s+\d+;", by))


def test_no_wait_for_wgmma():
    wait = r"wgmma\.wait_group\.sync\.aligned"
    assert shows_in_product(90, replaced(rf"{wait} \d+;", ""))
    assert not shows_in_tma_product(unchanged)
    assert shows_in_tma_product(replaced(rf"{wait} 0;", "wgmma.wait_group.sync.aligned 1;"))


def test_no_wait_for_the_copy_engine():
    """The loop around try_wait taken out, and a wait for the phase before."""
    assert shows_in_tma_product(replaced(r"@!complete bra\.uni waitLoop;", ""), seed=1)
    parity = r"(try_wait.parity.shared(?:::cta)?.b64 complete, \[[^]]*\]), [^;]*;"
    assert shows_in_tma_product(replaced(parity, r"\1, 1;"))


def test_a_missing_barrier_shows_in_some_schedule():
    assert any(shows_in_product(80, without_barriers, seed) for seed in range(1, 9))


@each_capability
def test_a_missing_barrier_is_a_race(capability):
    assert not shows_in_product(capability, unchanged, races=True)
    assert shows_in_product(capability, without_barriers, races=True)


def test_a_missing_barrier_of_the_copy_engine_is_a_race():
    assert not shows_in_tma_product(unchanged, races=True)
    assert shows_in_tma_product(without_barriers, races=True)


EXCHANGE = """
    .shared .align 4 .b8 word[4]; .reg .b32 a, x; .reg .pred first;
    mov.u32 a, word; mov.u32 x, %{rank}; setp.eq.u32 first, x, 0;
    @first st.shared.b32 [a], 7;
    {barrier}
    mapa.shared::cluster.u32 a, a, 0;
    ld.shared::cluster.b32 x, [a];
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    ret;"""


@pytest.mark.parametrize(
    ("barrier", "is_race"),
    [
        ("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", False),
        ("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;", True),
        ("bar.sync 0;", True),
    ],
)
def test_races_in_a_cluster(barrier, is_race):
    code = EXCHANGE.format(rank="cluster_ctarank", barrier=barrier)
    error = error_of(code, grid=(2,), cluster=(2,), races=True)
    assert ("a race" in error) == is_race, error


def test_deadlocks():
    some_wait = """.reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, 32;
        @p bar.sync 1, 64; ret;"""
    assert "deadlock" in error_of(some_wait, threads=64)
    wait = """.reg .pred p; .reg .u32 a; .shared .align 8 .b8 barrier[8]; mov.u32 a, barrier;
        mbarrier.init.shared::cta.b64 [a], 1;
        WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [a], {}; @!p bra WAIT; ret;"""
    assert "deadlock" in error_of(wait.format(0))
    assert error_of(wait.format(1)) == ""


def test_divergence():
    shuffle = """.reg .pred p; .reg .b32 t; mov.u32 t, %laneid; setp.lt.u32 p, t, 16;
        @p bra A; ret; A: shfl.sync.bfly.b32 t, t, 16, 31, -1; ret;"""
    assert "takes no part" in error_of(shuffle)
    aligned = """.reg .pred p; .reg .b32 t; mov.u32 t, %laneid; setp.lt.u32 p, t, 16;
        @p bar.sync 0; ret;"""
    assert "its guard holds in lanes 0xffff only" in error_of(aligned)


def test_mbarriers():
    code = """.reg .b64 s; .reg .u32 a; .shared .align 8 .b8 barrier[8]; mov.u32 a, barrier;
        {} ret;"""
    init = "mbarrier.init.shared.b64 [a], 1;"
    arrive = "mbarrier.arrive.shared.b64 s, [a];"
    drop = "mbarrier.arrive_drop.shared.b64 s, [a], 2;"
    for instructions, why in (
        (arrive, "no initialised mbarrier"),
        (init + "mbarrier.arrive.shared.b64 s, [a], 2;", "more arrivals"),
        (init + drop, "more arrivals dropped"),
        ("mbarrier.init.shared.b64 [a+4], 1;", "no multiple of 8"),
    ):
        assert why in error_of(code.format(instructions), threads=1)
    assert error_of(code.format(init + arrive), threads=1) == ""


STORE = """.reg .b64 a; .reg .u32 t; mov.u32 t, %tid.x; ld.param.u64 a, [p0];
    mad.wide.u32 a, t, 4, a; st.global.u32 [a], t; ret;"""


@pytest.fixture
def memory():
    tensor = torch.zeros(64, dtype=torch.int32)
    ptxemu.register_memory(tensor.data_ptr(), 4 * 64, "the tensor")
    yield tensor
    ptxemu.unregister_memory(tensor.data_ptr())


def test_global_addresses(memory):
    assert error_of(STORE, [pointer(memory)], threads=64) == ""
    assert torch.equal(memory, torch.arange(64, dtype=torch.int32))
    assert "outside of what is registered; the nearest: the tensor" in error_of(
        STORE, [pointer(memory)], threads=96
    )
    shifted = pointer(memory)
    shifted.value += 2
    assert "no multiple of 4" in error_of(STORE, [shifted])


@pytest.mark.parametrize("address", [2048, -8])
def test_shared_addresses(address):
    store = f".reg .b32 a; .reg .b64 x; mov.b32 a, {address}; st.shared.b64 [a], x; ret;"
    assert re.search("outside of|no block", error_of(store))
    assert (error_of(store, dynamic_smem=4096) == "") == (address > 0)


def test_local_and_parameter_addresses():
    store = ".local .b8 x[16]; .reg .b64 a; mov.b64 a, {}; st.local.b64 [a], a; ret;"
    assert error_of(store.format(8)) == ""
    assert "is beyond" in error_of(store.format(16)) and "is beyond" in error_of(store.format(-8))
    load = ".reg .b64 a; ld.param.b64 a, [p0+{}]; ret;"
    assert "beyond the kernel's parameters" in error_of(load.format(-8), [pointer(torch.zeros(1))])
