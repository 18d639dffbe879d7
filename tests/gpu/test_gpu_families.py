"""The order similarity and given score matrices of the Triton backend, on a GPU or an emulated one."""

import pytest
import torch
from cases import CASES, Case, embeddings
from conftest import assert_close, assert_same, captured, ids_on
from eager import relative
from test_gpu import LOSSES

from fused_vse import hardest_negatives

pytestmark = [pytest.mark.on_device("triton"), pytest.mark.filterwarnings("ignore")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MEDIUM = Case("medium", 700, 700, 650, 96, "groups of five")
LARGE = Case("large", 2304, 2200, 2176, 40)
losses = pytest.mark.parametrize("name", LOSSES)
kinds = pytest.mark.parametrize("kind", ["scores", "order"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs_of(device, kind, case, dtype=torch.float32, seed=0):
    images, captions = device.put(embeddings(case, torch.float64, seed))
    if kind == "scores":
        return [(images @ captions.T).to(dtype)]
    return [images.abs().to(dtype), captions.abs().to(dtype)]


def call(function, kind, inputs, case, backend="triton"):
    ids = ids_on(inputs[0].device, case)
    options = {"image_ids": ids[0], "caption_ids": ids[1], "num_pairs": case.pairs}
    if kind == "scores":
        return function(scores=inputs[0], backend=backend, **options)
    return function(*inputs, similarity="order", backend=backend, **options)


def differentiated(name, kind, inputs, case, backend="triton"):
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = call(LOSSES[name], kind, inputs, case, backend)
    value.backward()
    return [value.detach(), *(x.grad for x in inputs)]


@dtypes
@pytest.mark.parametrize("case", [CASES[2], CASES[7], MEDIUM], ids=str)
@kinds
@losses
def test_no_less_accurate_than_eager(device, name, kind, case, dtype):
    case = device.sized(case)
    inputs = inputs_of(device, kind, case, dtype)
    expected = differentiated(name, kind, [x.double() for x in inputs], case, "reference")
    plain = differentiated(name, kind, inputs, case, "reference")
    for got, eager, want in zip(
        differentiated(name, kind, inputs, case), plain, expected, strict=True
    ):
        # A few units in the last place of what is returned count as none.
        smallest = (64 if dtype == torch.float64 else 8) * torch.finfo(got.dtype).eps
        assert relative(got, want) <= 1.5 * relative(eager, want) + smallest


@kinds
def test_every_index(device, kind):
    case = device.sized(MEDIUM)
    inputs = inputs_of(device, kind, case)
    got = call(hardest_negatives, kind, inputs, case)
    want = call(hardest_negatives, kind, [x.double() for x in inputs], case, "reference")
    assert_close(got.scores, want.scores, 1e-6)
    if kind == "scores":
        assert torch.equal(got.indices, want.indices)


@dtypes
@kinds
@losses
def test_bitwise_repeatable(device, name, kind, dtype):
    case = device.sized(LARGE)
    inputs = inputs_of(device, kind, case, dtype)
    first = differentiated(name, kind, inputs, case)
    for _ in device.disturbances(5):
        assert_same(differentiated(name, kind, inputs, case), first)


@kinds
@losses
def test_non_finite_input_surfaces(device, name, kind):
    case = device.sized(LARGE)
    inputs = inputs_of(device, kind, case)
    inputs[0][-1, 3] = torch.nan
    result, *gradients = differentiated(name, kind, inputs, case)
    assert result.isnan() and all(x.isnan().all() for x in gradients)


@losses
def test_transposed_scores(device, name):
    case = device.sized(LARGE)
    scores = inputs_of(device, "scores", case, torch.bfloat16)
    expected = differentiated(name, "scores", scores, case)
    transposed = [scores[0].T.contiguous().T]
    # A tile has another layout, in which a sum may round otherwise.
    for a, b in zip(expected, differentiated(name, "scores", transposed, case), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-6)


@pytest.mark.gpu
@losses
def test_more_than_two_to_the_31_scores(name):
    size = 50_000
    case = Case("", size, size, size, 16)
    scores = torch.empty(size, size, dtype=torch.bfloat16, device="cuda").normal_()
    scores[-1, -2] = scores[-2, -1] = 100
    scores.requires_grad_()
    found = call(hardest_negatives, "scores", [scores], case)
    assert found.indices[0, -1] == size - 2 and found.indices[1, -1] == size - 2
    call(LOSSES[name], "scores", [scores], case).backward()
    assert scores.grad[-1].isfinite().all() and scores.grad[-1, -2] > 0 and scores.grad[-1, -1] < 0


@pytest.mark.gpu
@losses
def test_memory_of_the_order_similarity_is_bounded(device, name):
    """The differences of all pairs would take 64 GiB."""
    case = Case("", 16_384, 16_384, 16_384, 64)
    inputs = inputs_of(device, "order", case)
    differentiated(name, "order", inputs, case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    differentiated(name, "order", inputs, case)
    assert torch.cuda.max_memory_allocated() - before < 400 << 20


@pytest.mark.gpu
@kinds
@losses
def test_cuda_graph(device, name, kind):
    static = [x.requires_grad_() for x in inputs_of(device, kind, LARGE)]

    def step():
        for x in static:
            x.grad = None
        value = call(LOSSES[name], kind, static, LARGE)
        value.backward()
        return value

    graph, value = captured(step)
    fresh = inputs_of(device, kind, LARGE, seed=1)
    with torch.no_grad():
        for x, new in zip(static, fresh, strict=True):
            x.copy_(new)
    graph.replay()
    expected = differentiated(name, kind, fresh, LARGE)
    assert_same([value, *(x.grad for x in static)], expected)


@pytest.mark.gpu
def test_auto_takes_it(device, recwarn):
    inputs = inputs_of(device, "order", MEDIUM)
    images, captions = (x[: MEDIUM.pairs] for x in inputs)
    expected = -(captions - images).relu().norm(dim=1)
    got = call(hardest_negatives, "order", inputs, MEDIUM, "auto")
    assert not recwarn.list
    assert_close(got.positive_scores, expected, 1e-6)
