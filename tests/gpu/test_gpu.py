"""The Triton backend with embeddings, on a GPU or an emulated one."""

import os
import subprocess
import sys

import conftest
import eager
import pytest
import torch

pytest.importorskip("triton")

from cases import CASES, Case, embeddings, integer_embeddings
from conftest import assert_same, captured, ids_on
from eager import relative

from fused_vse import all_negatives_loss, hardest_negative_loss, hardest_negatives, hinge_loss
from fused_vse.backends.triton import configs

pytestmark = [pytest.mark.on_device("triton", few=2), pytest.mark.filterwarnings("ignore")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = Case("large tiles", 2304, 2200, 2176, 200)
LARGE_WITH_IDS = Case("large tiles with ids", 2304, 2200, 2176, 130, "groups of five")
LOSSES = {
    "all_negatives": lambda *x, **k: all_negatives_loss(*x, **k),
    "all_negatives_cold": lambda *x, **k: all_negatives_loss(*x, temperature=0.01, **k),
    "hardest": lambda *x, **k: hardest_negative_loss(*x, **k),
    "hinge_sum": lambda *x, **k: hinge_loss(*x, reduction=k.pop("reduction", "mean"), **k),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def put(device, case, dtype=torch.bfloat16, seed=0):
    return device.put(embeddings(case, dtype, seed))


def differentiated(loss, pair, case, backend="triton", **options):
    return conftest.differentiated(loss, pair, case, backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [CASES[2], CASES[7], Case("medium", 700, 700, 700, 96), LARGE, LARGE_WITH_IDS], ids=str
)
@pytest.mark.parametrize("name", LOSSES)
def test_no_less_accurate_than_eager(device, name, case, dtype):
    case = device.sized(case)
    pair = put(device, case, dtype)
    expected = differentiated(LOSSES[name], [x.double() for x in pair], case, "reference")
    plain = eager.differentiated(name, pair, case, 0.01 if name.endswith("cold") else 0.1)
    actual = differentiated(LOSSES[name], pair, case)
    for got, other, want in zip(actual, plain, expected, strict=True):
        # A few units in the last place of what is returned count as none.
        smallest = 4 * torch.finfo(got.dtype).eps
        assert relative(got, want) <= 1.5 * relative(other, want) + smallest, (
            relative(got, want),
            relative(other, want),
        )


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("case", [*CASES, LARGE_WITH_IDS], ids=str)
def test_integer_embeddings_are_exact(device, case, precision):
    case = device.sized(case)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for dtype in DTYPES:
            pair = device.put(integer_embeddings(case, dtype))
            ids = ids_on(device.type, case)
            keywords = {"image_ids": ids[0], "caption_ids": ids[1], "num_pairs": case.pairs}
            got = hardest_negatives(*pair, backend="triton", **keywords)
            want = hardest_negatives(*(x.double() for x in pair), backend="reference", **keywords)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.double(), b.double())
            options = {"margin": 1.0, "reduction": "sum"}
            got = differentiated(hinge_loss, pair, case, **options)
            want = differentiated(
                hinge_loss, [x.double() for x in pair], case, "reference", **options
            )
            assert got[0].item() == want[0].item()
            for a, b in zip(got[1:], want[1:], strict=True):
                assert (a.double() - b).abs().le(torch.finfo(dtype).eps * b.abs()).all()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[7], LARGE_WITH_IDS], ids=str)
def test_bitwise_repeatable(device, loss, case, dtype):
    case = device.sized(case)
    pair = put(device, case, dtype)
    first = differentiated(loss, pair, case)
    for _ in device.disturbances(5):
        assert_same(differentiated(loss, pair, case), first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [CASES[7], LARGE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_surfaces(device, loss, case, value, dtype):
    case = device.sized(case)
    pair = put(device, case, dtype)
    pair[1][-1, 3] = value
    result, *gradients = differentiated(loss, pair, case)
    assert not result.isfinite()
    assert not any(g.isfinite().any() for g in gradients)


def near_ties(images, captions):
    factors = 1 + torch.arange(len(captions), device=captions.device) % 7 * 2**-22
    captions[:] = captions[:1] * factors[:, None]


@pytest.mark.parametrize("kind", ["random", "duplicates", "near ties"])
def test_certified_search_is_exact(device, kind, monkeypatch):
    monkeypatch.setattr(configs, "search_pays", lambda *shape_and_device: True)
    case = device.sized(Case("search", 4096, 4000, 3900, 256, "groups of five"))
    images, captions = put(device, case, torch.float32)
    if kind == "duplicates":
        captions[1::2] = captions[::2]
    elif kind == "near ties":
        near_ties(images, captions)
    ids = ids_on(device.type, case)
    keywords = {"image_ids": ids[0], "caption_ids": ids[1], "num_pairs": case.pairs}
    got = hardest_negatives(images, captions, backend="triton", **keywords)
    scores = (images.double() @ captions.double().T).float()
    scores = scores.masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    for row, s in enumerate((scores[: case.pairs], scores[:, : case.pairs].T)):
        value = s.max(1).values
        if kind == "random":
            assert torch.equal(got.scores[row], value)
            assert torch.equal(got.indices[row], (s == value[:, None]).int().argmax(1))
            continue
        # So many have to be scored again that all are: in float32 arithmetic.
        assert torch.allclose(got.scores[row], value, rtol=1e-5, atol=1e-6)
        chosen = s.gather(1, got.indices[row, :, None])[:, 0]
        assert torch.allclose(chosen, value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_more_than_two_to_the_31_scores(device):
    case = Case("", 50_000, 50_000, 50_000, 16)
    pair = put(device, case)
    pair[1][-1], pair[0][-1] = 3 * pair[0][0], 3 * pair[1][0]
    result = hardest_negatives(*pair, backend="triton")
    assert result.indices[0, 0] == 49_999 and result.indices[1, 0] == 49_999
    for loss in LOSSES.values():
        gradients = differentiated(loss, pair, case)
        assert all(x.isfinite().all() for x in gradients)
    last = slice(49_000, 50_000)  # rows whose scores lie beyond 2^31
    scores = pair[0][last].float() @ pair[1].float().T
    scores[torch.arange(1000), torch.arange(49_000, 50_000)] = -torch.inf
    assert torch.allclose(result.scores[0, last], scores.max(1).values, rtol=1e-3)


def test_strided_views(device, loss):
    case = device.sized(LARGE)
    images, captions = put(device, case)
    expected = differentiated(loss, (images, captions), case)
    width = 3 + 2 * case.dim
    wide = torch.full((case.rows, width), torch.nan, dtype=images.dtype, device=images.device)
    wide[:, 3::2] = images
    views = wide[:, 3::2], captions.T.contiguous().T
    assert_same(differentiated(loss, views, case), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[2], LARGE], ids=str)
def test_cuda_graph(device, loss, case):
    """Capture once, replay on new input: no synchronisation, no allocation outside the pool."""
    static = [x.requires_grad_() for x in put(device, case)]

    def step():
        for x in static:
            x.grad = None
        value = loss(*static, num_pairs=case.pairs, backend="triton")
        value.backward()
        return value

    graph, value = captured(step)
    fresh = put(device, case, seed=1)
    with torch.no_grad():
        for x, new in zip(static, fresh, strict=True):
            x.copy_(new)
    graph.replay()
    assert_same([value, *(x.grad for x in static)], differentiated(loss, fresh, case))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_full_graph_compilation(device, loss, mode):
    case = CASES[7]
    pair = put(device, case)
    expected = differentiated(loss, pair, case)
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(3):
        actual = [x.clone() for x in differentiated(compiled, pair, case)]
    for got, want in zip(actual, expected, strict=True):
        assert torch.allclose(
            got, want, rtol=1e-5 if got.dtype == torch.float32 else 1e-2, atol=1e-6
        )


@pytest.mark.gpu
def test_no_synchronisation(device, loss):
    pair = put(device, LARGE)
    differentiated(loss, pair, LARGE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        temperature = torch.full((), 0.1, device="cuda", requires_grad=True)
        all_negatives_loss(
            *pair, num_pairs=LARGE.pairs, temperature=temperature, backend="triton"
        ).backward()
        differentiated(loss, pair, LARGE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_two_streams(device, loss):
    cases = LARGE, LARGE_WITH_IDS
    pairs = [put(device, case) for case in cases]
    expected = [differentiated(loss, pair, case) for pair, case in zip(pairs, cases, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(3):
        results = []
        for stream, pair, case in zip(streams, pairs, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(differentiated(loss, pair, case))
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(device, loss):
    pair = put(device, CASES[7])
    expected = differentiated(loss, pair, CASES[7])
    elsewhere = differentiated(loss, [x.to("cuda:1") for x in pair], CASES[7])
    for got, want in zip(elsewhere, expected, strict=True):
        assert got.device.index == 1 and torch.equal(got.cpu(), want.cpu())


@pytest.mark.gpu
def test_out_of_memory_leaves_the_process_usable(device, loss):
    case = CASES[7]
    pair = put(device, case)
    expected = differentiated(loss, pair, case)
    huge = torch.randn(1 << 20, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_allocated() + (64 << 20))
        / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        with pytest.raises(torch.OutOfMemoryError):
            loss(huge, huge, backend="triton").backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(differentiated(loss, pair, case), expected)


@pytest.mark.gpu
def test_memory_is_bounded(device, loss):
    """N = 65536: S alone would take 8 GiB in bfloat16."""
    case = Case("", 65_536, 65_536, 65_536, 64)
    pair = put(device, case)
    differentiated(loss, pair, case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    differentiated(loss, pair, case)
    assert torch.cuda.max_memory_allocated() - before < 700 << 20


@pytest.mark.gpu
def test_the_first_import_does_not_initialise_cuda():
    command = "import torch, fused_vse; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", command], check=True, env=os.environ)
