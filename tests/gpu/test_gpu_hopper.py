"""The Hopper kernels on a Hopper GPU."""

import ops_oracle as oracle
import pytest
import torch
from cases import Case, embeddings, integer_embeddings
from conftest import assert_close, assert_same
from hopper_batches import BATCHES, Anchored, in_float64, thresholds

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
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
LARGE = Anchored(Case("large", 4500, 5000, 4400, 200))
LARGE_WITH_IDS = Anchored(Case("large with ids", 2304, 2200, 2176, 136, "groups of five"))
UNRELATED_IDS = Anchored(Case("ids meet in every tile", 700, 900, 650, 72, "unrelated"))
SQUARE = Anchored(Case("square", 8192, 8192, 8192, 512))
RANKS = Anchored(Case("columns of all ranks", 4000, 9000, 4000, 136), (3900, 8900, 0, 4000, 3900))
ALIGNED = [x._replace(case=x.case._replace(dim=-(-x.case.dim // 8) * 8)) for x in BATCHES]
ALL = [*ALIGNED, LARGE, LARGE_WITH_IDS, UNRELATED_IDS, RANKS, SQUARE]


def ops():
    return torch.ops.fused_vse_cuda


def statistics_of(batch, scale=10.0, scale_tensor=None):
    """What the three kernels give, one after the other."""
    return (
        *ops().hopper_hardest_negatives(*batch, None),
        *ops().hopper_negative_logsumexp(*batch, None, scale, scale_tensor, False)[:2],
        *ops().hopper_hinge_sum(*batch, None, thresholds(batch), False)[:2],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_hardest_is_exact(case, dtype):
    batch = case.batch(integer_embeddings, dtype, "cuda")
    assert ops().hopper_takes(*batch[:2])
    score, index = ops().hopper_hardest_negatives(*batch, None)
    expected, where = oracle.hardest_negatives(in_float64(batch))
    assert torch.equal(score.double(), expected) and torch.equal(index, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_hinge_sum_is_exact(case, dtype):
    batch = case.batch(integer_embeddings, dtype, "cuda")
    threshold = thresholds(batch)
    total, active, saved = ops().hopper_hinge_sum(*batch, None, threshold, False)
    expected, count = oracle.hinge_sum(in_float64(batch), None, threshold)
    assert torch.equal(active, count) and saved.numel() == 0
    assert_close(total, expected, 1e-7)  # the largest sums do not fit into float32


@pytest.mark.parametrize("scale", [10.0, 200.0])  # with one exponential, and with two
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_logsumexp(case, dtype, scale):
    batch = case.batch(embeddings, dtype, "cuda")
    expected = oracle.logsumexp(in_float64(batch), None, scale)
    for options in ((scale, None), (2.0, torch.full((), scale, device="cuda"))):
        reference, log_sum, _ = ops().hopper_negative_logsumexp(*batch, None, *options, False)
        assert reference.isfinite().all()
        assert_close(scale * reference.double() + log_sum, expected, 2e-6)


@pytest.mark.parametrize("loss", [all_negatives_loss, hardest_negative_loss, hinge_loss])
@pytest.mark.parametrize("case", [LARGE, LARGE_WITH_IDS], ids=str)
def test_gradients_are_those_of_triton(case, loss):
    # Sums in another order may choose another of two nearly equal negatives; those of integers are exact.
    make = integer_embeddings if loss is hardest_negative_loss else embeddings
    results = []
    for backend in ("cuda", "triton"):
        *pair, image_ids, caption_ids = case.batch(make, torch.bfloat16, "cuda")[:4]
        pair = [x.requires_grad_() for x in pair]
        value = loss(
            *pair,
            image_ids=image_ids,
            caption_ids=caption_ids,
            num_pairs=case.case.pairs,
            backend=backend,
        )
        value.backward()
        results.append([value.detach(), *(x.grad for x in pair)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("case", [SQUARE, UNRELATED_IDS, RANKS], ids=str)
def test_same_bits_every_time(case):
    batch = case.batch(embeddings, torch.bfloat16, "cuda")
    first, *others = [statistics_of(batch, 100.0) for _ in range(3)]
    for again in others:
        assert_same(again, first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, -1])
def test_non_finite_input_surfaces(value, row):
    batch = LARGE.batch(embeddings, torch.bfloat16, "cuda")
    threshold = thresholds(batch)
    batch.captions[row, 3] = value
    score, index = ops().hopper_hardest_negatives(*batch, None)
    assert score.isnan().all() and (index == -1).all()
    assert ops().hopper_negative_logsumexp(*batch, None, 10.0, None, False)[1].isnan().all()
    total, active, _ = ops().hopper_hinge_sum(*batch, None, threshold, False)
    assert total.isnan().all() and (active == 0).all()


def test_rows_of_a_wider_tensor():
    batch = LARGE_WITH_IDS.batch(integer_embeddings, torch.bfloat16, "cuda")
    n, d = batch.images.shape
    wide = torch.full((n, d + 24), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[:, 8 : 8 + d] = batch.images
    view = batch._replace(images=wide[:, 8 : 8 + d])
    assert ops().hopper_takes(*view[:2])
    assert_same(
        ops().hopper_hardest_negatives(*view, None), ops().hopper_hardest_negatives(*batch, None)
    )


def test_more_than_two_to_the_31_scores():
    k = 50_000
    batch = Anchored(Case("", k, k, k, 16)).batch(embeddings, torch.bfloat16, "cuda")
    images, captions = batch.images, batch.captions
    captions[-1], images[-1] = 3 * images[0], 3 * captions[0]
    score, index = ops().hopper_hardest_negatives(*batch, None)
    assert index[0] == k - 1 and index[k] == k - 1
    last = images[-1000:].double() @ captions.double().T
    last[torch.arange(1000), torch.arange(k - 1000, k)] = -torch.inf
    assert_close(score[k - 1000 : k], last.amax(1), 1e-6)
    reference, log_sum, _ = ops().hopper_negative_logsumexp(*batch, None, 10.0, None, False)
    result = 10 * reference.double() + log_sum
    assert_close(result[k - 1000 : k], (10 * last).logsumexp(1), 2e-6)


def test_more_than_two_to_the_31_elements():
    rows, columns, dim = (1 << 21) + 3, 100, 1032
    images = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
    # Integers, because tensor cores truncate: a sum of squares comes out 1e-6 to 4e-6 of it too small.
    captions = torch.randint(-3, 4, (columns, dim), device="cuda").bfloat16()
    images[-1] = captions[7]
    batch = images, captions, None, None, columns, columns, 0, 0, columns, 0
    score, index = ops().hopper_hardest_negatives(*batch, None)
    assert index[columns + 7] == rows - 1
    assert score[columns + 7].item() == captions[7].double().square().sum().item()


def test_what_the_kernels_do_not_take_goes_to_triton():
    for change in ({"dim": 19}, {"dtype": torch.float32}):
        dtype = change.pop("dtype", torch.bfloat16)
        case = LARGE._replace(case=LARGE.case._replace(**change))
        batch = case.batch(integer_embeddings, dtype, "cuda")
        assert not ops().hopper_takes(*batch[:2])
        with pytest.raises(RuntimeError, match="multiple of 8|bfloat16 or float16"):
            ops().hopper_hardest_negatives(*batch, None)
        results = [
            hardest_negatives(*batch[:2], num_pairs=case.case.pairs, backend=backend)
            for backend in ("cuda", "triton")
        ]
        assert_same(*results)


@pytest.mark.parametrize("save_scores", [False, True])
@pytest.mark.parametrize("case", [UNRELATED_IDS, SQUARE], ids=str)
def test_ceilings_and_small_saved_scores_are_tritons(case, save_scores):
    batch = case.batch(integer_embeddings, torch.bfloat16, "cuda")
    threshold = thresholds(batch)
    for ceiling in (None, thresholds(batch, seed=4)):
        options = ceiling, threshold, save_scores
        total, active, saved = ops().hinge_sum(*batch, *options)
        expected, count = oracle.hinge_sum(in_float64(batch), ceiling, threshold)
        assert torch.equal(active, count)
        assert_close(total, expected, 1e-7)
        assert saved.shape == torch.ops.fused_vse_triton.hinge_sum(*batch, *options)[2].shape


def test_in_a_cuda_graph_and_on_another_stream():
    images, captions, *_ = SQUARE.batch(embeddings, torch.bfloat16, "cuda")
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
