"""The Hopper kernels on a Hopper GPU."""

import pytest
import torch
from cases import CASES, Case, embeddings, integer_embeddings
from conftest import assert_close, assert_same, ids_on, on_gpu

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss, reference
from fused_vse.statistics import hardest_negatives, negative_logsumexp


def why_missing() -> str | None:
    status = fused_vse.backends()["cuda"]
    if not status.startswith("available"):
        return f"cuda: {status}"
    if torch.cuda.get_device_capability() != (9, 0):
        return "no GPU of compute capability 9.0"
    return None


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_missing() is not None, reason=str(why_missing())),
]
DTYPES = (torch.bfloat16, torch.float16)
# Several tiles in every direction, on fewer and on more clusters than there are, ragged, N != M, K < N.
LARGE = Case("large", 4500, 5000, 4400, 200)
LARGE_WITH_IDS = Case("large with ids", 2304, 2200, 2176, 136, "groups of five")
UNRELATED_IDS = Case("ids meet in every tile", 700, 900, 650, 72, "unrelated")
SQUARE = Case("square", 8192, 8192, 8192, 512)
ALIGNED = [case._replace(dim=-(-case.dim // 8) * 8) for case in CASES]
ALL = [*ALIGNED, LARGE, LARGE_WITH_IDS, UNRELATED_IDS]


def ops():
    return torch.ops.fused_vse_cuda


def batch_of(case, make=embeddings, dtype=torch.bfloat16):
    return *on_gpu(case, dtype, make=make), *ids_on("cuda", case)


def in_float64(images, captions, *rest):
    return images.double(), captions.double(), *rest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ALL, SQUARE], ids=str)
def test_hardest_is_exact(case, dtype):
    batch = batch_of(case, integer_embeddings, dtype)
    assert ops().hopper_takes(*batch[:2])
    results = ops().hopper_hardest_negatives(*batch, case.pairs)
    expected = reference.hardest_negatives(*in_float64(*batch), case.pairs)
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual.double(), wanted.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_hinge_sum_is_exact(case, dtype):
    batch = batch_of(case, integer_embeddings, dtype)
    positive, total, active = ops().hopper_hinge_sum(*batch, case.pairs, 0.25)
    expected = reference.hinge_sum(*in_float64(*batch), case.pairs, 0.25)
    assert torch.equal(positive.double(), expected[0]) and torch.equal(active, expected[2])
    assert_close(total, expected[1], 1e-7)  # the largest sums do not fit into float32


@pytest.mark.parametrize("scale", [10.0, 200.0])  # with one exponential, and with two
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ALL, SQUARE], ids=str)
def test_logsumexp(case, dtype, scale):
    batch = batch_of(case, dtype=dtype)
    scale_tensor = torch.full((), scale / 2, device="cuda")
    for arguments in ((scale, None), (2.0, scale_tensor)):
        _, result = ops().hopper_negative_logsumexp(*batch, case.pairs, *arguments)
        _, expected = reference.negative_logsumexp(*in_float64(*batch), case.pairs, scale)
        assert_close(result, expected, 2e-6)


@pytest.mark.parametrize("loss", [all_negatives_loss, hardest_negative_loss, hinge_loss])
@pytest.mark.parametrize("case", [LARGE, LARGE_WITH_IDS], ids=str)
def test_gradients_are_those_of_triton(case, loss):
    # Sums in another order may choose another of two nearly equal negatives; those of integers are exact.
    make = integer_embeddings if loss is hardest_negative_loss else embeddings
    results = []
    for backend in ("cuda", "triton"):
        *pair, image_ids, caption_ids = batch_of(case, make)
        pair = [x.requires_grad_() for x in pair]
        value = loss(
            *pair,
            image_ids=image_ids,
            caption_ids=caption_ids,
            num_pairs=case.pairs,
            backend=backend,
        )
        value.backward()
        results.append([value.detach(), *(x.grad for x in pair)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("case", [SQUARE, UNRELATED_IDS], ids=str)
def test_same_bits_every_time(case):
    batch = batch_of(case)
    runs = [
        (
            *ops().hopper_hardest_negatives(*batch, case.pairs),
            *ops().hopper_negative_logsumexp(*batch, case.pairs, 100.0, None),
            *ops().hopper_hinge_sum(*batch, case.pairs, 0.2),
        )
        for _ in range(3)
    ]
    for again in runs[1:]:
        assert_same(again, runs[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, -1])
def test_non_finite_input_surfaces(value, row):
    batch = batch_of(LARGE)
    batch[1][row, 3] = value
    positive, score, index = ops().hopper_hardest_negatives(*batch, LARGE.pairs)
    assert positive.isnan().all() and score.isnan().all() and (index == -1).all()
    assert ops().hopper_negative_logsumexp(*batch, LARGE.pairs, 10.0, None)[1].isnan().all()
    assert ops().hopper_hinge_sum(*batch, LARGE.pairs, 0.2)[1].isnan().all()


def test_rows_of_a_wider_tensor():
    case = LARGE_WITH_IDS
    images, captions, *ids = batch_of(case, integer_embeddings)
    wide = torch.full((case.rows, case.dim + 24), torch.nan, device="cuda", dtype=images.dtype)
    wide[:, 8 : 8 + case.dim] = images
    view = wide[:, 8 : 8 + case.dim]
    assert ops().hopper_takes(view, captions)
    assert_same(
        ops().hopper_hardest_negatives(view, captions, *ids, case.pairs),
        ops().hopper_hardest_negatives(images, captions, *ids, case.pairs),
    )


def test_more_than_two_to_the_31_scores():
    case = Case("", 50_000, 50_000, 50_000, 16)
    images, captions = on_gpu(case)
    captions[-1], images[-1] = 3 * images[0], 3 * captions[0]
    _, score, index = ops().hopper_hardest_negatives(images, captions, None, None, case.pairs)
    assert index[0, 0] == 49_999 and index[1, 0] == 49_999
    last = images[-1000:].double() @ captions.double().T
    last[torch.arange(1000), torch.arange(49_000, 50_000)] = -torch.inf
    assert_close(score[0, -1000:], last.amax(1), 1e-6)
    _, result = ops().hopper_negative_logsumexp(
        images, captions, None, None, case.pairs, 10.0, None
    )
    assert_close(result[0, -1000:], (10 * last).logsumexp(1), 2e-6)


def test_more_than_two_to_the_31_elements():
    rows, columns, dim = (1 << 21) + 3, 100, 1032
    images = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
    # Integers, because tensor cores truncate: a sum of squares comes out 1e-6 to 4e-6 of it too small.
    captions = torch.randint(-3, 4, (columns, dim), device="cuda").bfloat16()
    images[-1] = captions[7]
    _, score, index = ops().hopper_hardest_negatives(images, captions, None, None, columns)
    assert index[1, 7] == rows - 1
    assert score[1, 7].item() == captions[7].double().square().sum().item()


def test_what_the_kernels_do_not_take_goes_to_triton():
    for change in ({"dim": 19}, {"dtype": torch.float32}):
        dtype = change.pop("dtype", torch.bfloat16)
        case = LARGE._replace(**change)
        batch = batch_of(case, integer_embeddings, dtype)
        assert not ops().hopper_takes(*batch[:2])
        with pytest.raises(RuntimeError, match="multiple of 8|bfloat16 or float16"):
            ops().hopper_hardest_negatives(*batch, case.pairs)
        results = [
            hardest_negatives(*batch[:2], num_pairs=case.pairs, backend=backend)
            for backend in ("cuda", "triton")
        ]
        assert_same(*results)


def test_in_a_cuda_graph_and_on_another_stream():
    images, captions, *_ = batch_of(SQUARE)
    expected = negative_logsumexp(images, captions, backend="cuda").logsumexp
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = negative_logsumexp(images, captions, backend="cuda").logsumexp
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)
