"""Every Triton kernel, as the host code launches it, compiled ahead of time for sm_80 and sm_90: no stack,
no spills, wgmma on sm_90, and as many programs on a multiprocessor as the configuration counts on."""

from unittest import mock

import pytest
import torch
from cases import Case

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from triton_aot import Launch, compile_all, record_launches  # noqa: E402

from fused_vse.backends.triton import backward, configs, forward, walk  # noqa: E402

# Bytes of shared memory and registers of a multiprocessor: A100 and H100 / H200.
SHARED = {80: 164 << 10, 90: 228 << 10}
REGISTERS = 65536
WALKS = (
    "hardest_kernel",
    "logsumexp_kernel",
    "hinge_kernel",
    "logsumexp_gradient_kernel",
    "hinge_gradient_kernel",
)

# Above MAX_SAVED_SCORES, so that no scores are saved; sizes divisible by 16 and not; sizes of 1, for
# which Triton compiles code of its own.
LARGE = Case("large", 2304, 2304, 2304, 64)
LARGE_WITH_IDS = Case("large with ids", 2300, 2311, 2297, 72, "groups of five")
SMALL = Case("small", 256, 256, 256, 64)
SMALL_WITH_IDS = Case("small with ids", 45, 50, 33, 1031, "groups of five")
ONE = Case("one", 1, 1, 1, 1)

# name of the configuration or family of ops, kind of GPU, dtype, case
COMBINATIONS = [
    ("LARGE", 80, torch.bfloat16, LARGE),
    ("LARGE", 80, torch.float16, LARGE_WITH_IDS),
    ("LARGE_TMA", 90, torch.bfloat16, LARGE),
    ("LARGE_TMA", 90, torch.float16, LARGE_WITH_IDS),
    ("LARGE_TF32", 80, torch.float32, LARGE),
    ("LARGE_TF32_TMA", 90, torch.float32, LARGE_WITH_IDS),
    ("MEDIUM", 80, torch.bfloat16, SMALL),
    ("MEDIUM", 90, torch.float16, SMALL_WITH_IDS),
    ("SMALL", 80, torch.float16, SMALL_WITH_IDS),
    ("SMALL", 90, torch.bfloat16, ONE),
    ("MEDIUM_TF32", 80, torch.float32, SMALL_WITH_IDS),
    ("MEDIUM_TF32", 90, torch.float32, SMALL),
    ("SMALL_TF32", 80, torch.float32, SMALL),
    ("SMALL_TF32", 90, torch.float32, ONE),
    ("STORED", 80, torch.float32, SMALL_WITH_IDS),
    ("STORED", 90, torch.float32, SMALL),
    ("STORED", 80, torch.float64, ONE),
    ("STORED", 90, torch.float64, SMALL_WITH_IDS),
    # Families of ops other than the dot product, with the tiles that belong to the size.
    ("order", 80, torch.float32, LARGE_WITH_IDS),
    ("order", 90, torch.bfloat16, LARGE),
    ("order", 90, torch.float16, SMALL_WITH_IDS),
    ("order", 80, torch.float32, SMALL),
    ("order", 90, torch.float64, SMALL_WITH_IDS),
    ("order", 80, torch.float64, ONE),
    ("scores", 80, torch.float32, LARGE_WITH_IDS),
    ("scores", 90, torch.float32, LARGE),
    ("scores", 90, torch.bfloat16, LARGE_WITH_IDS),
    ("scores", 80, torch.float16, SMALL),
    ("scores", 90, torch.float64, SMALL_WITH_IDS),
    ("scores", 80, torch.bfloat16, ONE),
    # The certified search launches the search, the rescoring and the exact pass.
    ("search", 80, torch.float32, LARGE_WITH_IDS),
    ("search", 90, torch.float32, LARGE),
    ("search", 90, torch.float32, LARGE._replace(reason="one pair", rows=2200, pairs=1)),
]


def ids_and_scale(case: Case, dtype: torch.dtype):
    """image_ids, caption_ids and scale_tensor, all or none."""
    if case.ids is None:
        return (None, None), None
    ids = tuple(torch.zeros(size, dtype=torch.int64) for size in (case.rows, case.columns))
    return ids, torch.zeros((), dtype=torch.promote_types(dtype, torch.float32))


def run_every_op(case: Case, dtype: torch.dtype, family: str) -> None:
    """Every op of the backend on tensors without meaning, in all variants that differ in code."""
    n, m, k, d = case[1:5]
    images, captions = torch.zeros(n, d, dtype=dtype), torch.zeros(m, d, dtype=dtype)
    ids, scale_tensor = ids_and_scale(case, dtype)
    batch, options = (images, captions, *ids), {"family": family}
    positive, score, index = forward.hardest_negatives(*batch, k, **options)
    index.zero_()
    for pairs in {k, configs.MAX_UNLISTED_PAIRS + 1}:
        index = index[:, :1].expand(2, pairs)
        upstream = score.new_zeros(pairs), score.new_zeros(2, pairs)
        backward.hardest_negatives_backward(
            *upstream, positive, index, images, captions, True, True, **options
        )
    for save in (True, False):
        positive, lse, scores = forward.negative_logsumexp(
            *batch, k, 1.5, scale_tensor, save, **options
        )
        backward.negative_logsumexp_backward(
            positive, lse, lse, scores, *batch, 1.5, scale_tensor, True, True, **options
        )
        positive, total, active, scores = forward.hinge_sum(*batch, k, 0.2, save, **options)
        backward.hinge_sum_backward(
            positive, total, positive, active, scores, *batch, 0.2, True, True, **options
        )
    if family == "dot":
        normalized, inverse_norm = forward.l2_normalize(images)
        backward.l2_normalize_backward(normalized, normalized, inverse_norm)


def run_every_op_of_scores(case: Case, dtype: torch.dtype) -> None:
    """The same for a score matrix, also a transposed one."""
    n, m, k = case[1:4]
    ids, scale_tensor = ids_and_scale(case, dtype)
    for scores in (torch.zeros(n, m, dtype=dtype), torch.zeros(m, n, dtype=dtype).t()):
        positive, score, index = forward.hardest_negatives_of_scores(scores, *ids, k)
        backward.hardest_negatives_of_scores_backward(positive, score, positive, index, scores)
        positive, lse = forward.negative_logsumexp_of_scores(scores, *ids, k, 1.5, scale_tensor)
        backward.negative_logsumexp_of_scores_backward(
            positive, lse, lse, scores, *ids, 1.5, scale_tensor
        )
        positive, total, active = forward.hinge_sum_of_scores(scores, *ids, k, 0.2)
        backward.hinge_sum_of_scores_backward(positive, total, positive, active, scores, *ids, 0.2)


def recorded(name: str, capability: int, dtype: torch.dtype, case: Case) -> dict[tuple, Launch]:
    device = configs.Device(multiprocessors=132, capability=capability // 10)
    choose = configs.tiles_for

    def tiles_for(kind, *args):
        if name in ("search", "order", "scores") or kind in ("stored", "exact"):
            return choose(kind, *args)
        return getattr(configs, name)

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if "TF32" in name else "highest")
    try:
        with (
            mock.patch.object(walk, "device_of", return_value=device),
            mock.patch.object(forward, "device_of", return_value=device),
            mock.patch.object(configs, "tiles_for", tiles_for),
            record_launches() as launches,
        ):
            if name == "search":
                batch = [torch.zeros(rows, case.dim) for rows in (case.rows, case.columns)]
                ids = [torch.zeros(len(x), dtype=torch.int64) if case.ids else None for x in batch]
                forward.hardest_negatives(*batch, *ids, case.pairs)
                names = [launch.kernel.__name__ for launch in launches]
                assert names.count("hardest_kernel") >= 2 and "rescore_kernel" in names
            elif name == "scores":
                run_every_op_of_scores(case, dtype)
            else:
                run_every_op(case, dtype, "order" if name == "order" else "dot")
    finally:
        torch.set_float32_matmul_precision(precision)
    return {launch.key: launch for launch in launches}


def label(value) -> str | None:
    return value.reason.replace(" ", "_") if isinstance(value, Case) else None


@pytest.mark.parametrize(("name", "capability", "dtype", "case"), COMBINATIONS, ids=label)
def test_compiles_without_spills(name, capability, dtype, case):
    launches = list(recorded(name, capability, dtype, case).values())
    assert launches
    if case.pairs == 1 and name != "SMALL":
        # It has to compile, with K folded into the code; nobody waits for it.
        compile_all(launches, capability)
        return
    for launch, compiled in zip(launches, compile_all(launches, capability), strict=True):
        kernel = launch.kernel.__name__
        what = f"{kernel} {name} sm_{capability} {dtype} {case.reason}: {compiled._replace(ptx='')}"
        assert compiled.stack == 0 and compiled.spills == 0, what
        if kernel not in WALKS:
            continue
        tiles = {
            name: launch.arguments[name][1]
            for name in ("BLOCK_M", "BLOCK_N", "SOURCE", "PRECISION")
        }
        wanted = configs.SMALL.programs_per_sm
        assert compiled.programs_per_multiprocessor(REGISTERS, SHARED[capability]) >= wanted, what
        on_tensor_cores = tiles["SOURCE"] == "dot" and (
            dtype != torch.float32 or tiles["PRECISION"] == "tf32"
        )
        if on_tensor_cores and capability == 90 and tiles["BLOCK_M"] >= 64:
            assert "wgmma.mma_async" in compiled.ptx, what
        elif on_tensor_cores:
            assert "mma.sync" in compiled.ptx, what


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
