"""The Hopper kernels on a Hopper GPU, or an emulated one."""

import ops_oracle as oracle
import pytest
import torch
from cases import Case, embeddings, integer_embeddings
from conftest import assert_close, assert_same
from hopper_batches import BATCHES, Anchored, in_float64, thresholds

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
from fused_vse.statistics import hardest_negatives, negative_logsumexp

pytestmark = pytest.mark.on_device("cuda", ((9, 0), 2), ((9, 0), 4), ((9, 0), 132), few=2)
DTYPES = (torch.bfloat16, torch.float16)
# Several tiles in every direction, on fewer and on more clusters than there are, ragged, N != M, K < N.
LARGE = Anchored(Case("large", 4500, 5000, 4400, 200))
LARGE_WITH_IDS = Anchored(Case("large with ids", 2304, 2200, 2176, 136, "groups of five"))
UNRELATED_IDS = Anchored(Case("ids meet in every tile", 700, 900, 650, 72, "unrelated"))
SQUARE = Anchored(Case("square", 8192, 8192, 8192, 512))
RANKS = Anchored(Case("columns of all ranks", 4000, 9000, 4000, 136), (3900, 8900, 0, 4000, 3900))
ALIGNED = [x._replace(case=x.case._replace(dim=-(-x.case.dim // 8) * 8)) for x in BATCHES]
# The largest in the emulator: more than a group of cluster rows; more tiles than clusters, many steps of D.
TALL = Anchored(Case("tall", 2200, 400, 390, 8, "groups of five"))
DEEP = Anchored(Case("deep", 520, 600, 510, 392), (500, 590, 7, 80, 500))
RAGGED = [
    Anchored(Case(f"{n} {m} {k} {d}", n, m, k, d))
    for n, m, k, d in (
        (1, 1, 1, 8), (128, 192, 128, 64), (256, 192, 192, 64), (70, 201, 60, 136), (300, 500, 250, 72),
        (257, 385, 257, 328), (1, 300, 1, 16), (300, 1, 1, 16),
    )
]  # fmt: skip
ALL = [
    *ALIGNED,
    *RAGGED,
    TALL,
    DEEP,
    *(pytest.param(x, marks=pytest.mark.gpu) for x in (LARGE, LARGE_WITH_IDS, RANKS, SQUARE)),
    UNRELATED_IDS,
]
each_case = pytest.mark.parametrize("case", ALL, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def ops():
    return torch.ops.fused_vse_cuda


def statistics_of(batch, scale=10.0, scale_tensor=None):
    """What the three kernels give, one after the other."""
    return (
        *ops().hopper_hardest_negatives(*batch, None),
        *ops().hopper_negative_logsumexp(*batch, None, scale, scale_tensor, False)[:2],
        *ops().hopper_hinge_sum(*batch, None, thresholds(batch), False)[:2],
    )


@each_dtype
@each_case
def test_hardest_is_exact(device, case, dtype):
    batch = case.batch(integer_embeddings, dtype, device.type)
    assert ops().hopper_takes(*batch[:2])
    score, index = ops().hopper_hardest_negatives(*batch, None)
    expected, where = oracle.hardest_negatives(in_float64(batch))
    assert torch.equal(score.double(), expected) and torch.equal(index, where)


@each_dtype
@each_case
def test_hinge_sum_is_exact(device, case, dtype):
    batch = case.batch(integer_embeddings, dtype, device.type)
    threshold = thresholds(batch)
    total, active, saved = ops().hopper_hinge_sum(*batch, None, threshold, False)
    expected, count = oracle.hinge_sum(in_float64(batch), None, threshold)
    assert torch.equal(active, count) and saved.numel() == 0
    assert_close(total, expected, 1e-7)  # the largest sums do not fit into float32


@pytest.mark.parametrize("scale", [10.0, 200.0])  # with one exponential, and with two
@each_dtype
@each_case
def test_logsumexp(device, case, dtype, scale):
    batch = case.batch(embeddings, dtype, device.type)
    expected = oracle.logsumexp(in_float64(batch), None, scale)
    for options in ((scale, None), (2.0, torch.full((), scale, device=device.type))):
        reference, log_sum, _ = ops().hopper_negative_logsumexp(*batch, None, *options, False)
        assert reference.isfinite().all()
        assert_close(scale * reference.double() + log_sum, expected, 2e-6)


@pytest.mark.parametrize("loss", [all_negatives_loss, hardest_negative_loss, hinge_loss])
@pytest.mark.parametrize("case", [LARGE, LARGE_WITH_IDS], ids=str)
def test_gradients_are_those_of_triton(device, case, loss):
    if device.is_emulated:  # just more than small_loss takes
        case = Anchored(case.case._replace(rows=530, columns=520, pairs=515, dim=40))
    # Sums in another order may choose another of two nearly equal negatives; those of integers are exact.
    make = integer_embeddings if loss is hardest_negative_loss else embeddings
    results = []
    for backend in ("cuda", "triton"):
        *pair, image_ids, caption_ids = case.batch(make, torch.bfloat16, device.type)[:4]
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


@pytest.mark.parametrize(
    "case",
    [UNRELATED_IDS, DEEP, *(pytest.param(x, marks=pytest.mark.gpu) for x in (SQUARE, RANKS))],
    ids=str,
)
def test_same_bits_every_time(device, case):
    """In the emulator on any number of multiprocessors, too."""
    batch = case.batch(embeddings, torch.bfloat16, device.type)
    first = statistics_of(batch, 100.0)
    for _ in device.disturbances(2):
        assert_same(statistics_of(batch, 100.0), first)
    for machine in device.others(2, 6, 132):
        with machine:
            assert_same(statistics_of(batch, 100.0), first)


@pytest.mark.parametrize("scale", [1e-3, 80.0, 84.0, 86.0, 1e3, 1e6])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0])
def test_scales_at_the_edges_of_the_one_exponential(device, scale, factor):
    batch = Anchored(Case("", 200, 210, 190, 72)).batch(embeddings, torch.float16, device.type)
    batch = batch._replace(images=batch.images * factor, captions=batch.captions * factor)
    reference, log_sum, _ = ops().hopper_negative_logsumexp(*batch, None, scale, None, False)
    expected = oracle.logsumexp(in_float64(batch), None, scale)
    assert_close(scale * reference.double() + log_sum, expected, 4e-6)


@pytest.mark.parametrize("scale", [1.0, 0.01, 1e4])
def test_large_logits(device, scale):
    """s differs by 4 where a s is 3e6 scale: the logarithm and the differences survive."""
    batch = Anchored(Case("", 300, 300, 300, 8)).batch(embeddings, torch.bfloat16, device.type)
    batch.images.fill_(1e3), batch.captions.fill_(1e3)
    batch.captions[:, 3] = 1
    batch.images[::3, 3] += 4
    reference, log_sum, _ = ops().hopper_negative_logsumexp(*batch, None, scale, None, False)
    wide = in_float64(batch)
    assert torch.equal(reference.double(), oracle.hardest_negatives(wide)[0])
    difference = wide._replace(images=wide.images - wide.images[1])
    largest, _ = oracle.hardest_negatives(difference)
    want = oracle.logsumexp(difference, None, scale) - scale * largest
    assert_close(log_sum, want, 1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_scale_that_is_none(device, value):
    batch = Anchored(Case("", 37, 37, 37, 24)).batch(embeddings, torch.bfloat16, device.type)
    for options in ((value, None), (1.0, torch.full((), value, device=device.type))):
        for result in ops().hopper_negative_logsumexp(*batch, None, *options, False)[:2]:
            assert result.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, -1])
def test_non_finite_input_surfaces(device, value, row):
    batch = (DEEP if device.is_emulated else LARGE).batch(embeddings, torch.bfloat16, device.type)
    threshold = thresholds(batch)
    batch.captions[row, 3] = value
    score, index = ops().hopper_hardest_negatives(*batch, None)
    assert score.isnan().all() and (index == -1).all()
    assert ops().hopper_negative_logsumexp(*batch, None, 10.0, None, False)[1].isnan().all()
    total, active, _ = ops().hopper_hinge_sum(*batch, None, threshold, False)
    assert total.isnan().all() and (active == 0).all()


def test_rows_of_a_wider_tensor(device):
    batch = (DEEP if device.is_emulated else LARGE_WITH_IDS).batch(
        integer_embeddings, torch.bfloat16, device.type
    )
    n, d = batch.images.shape
    wide = batch.images.new_full((n, d + 24), torch.nan)
    wide[:, 8 : 8 + d] = batch.images
    view = batch._replace(images=wide[:, 8 : 8 + d])
    assert ops().hopper_takes(*view[:2])
    assert_same(
        ops().hopper_hardest_negatives(*view, None), ops().hopper_hardest_negatives(*batch, None)
    )


@pytest.mark.gpu
def test_more_than_two_to_the_31_scores(device):
    k = 50_000
    batch = Anchored(Case("", k, k, k, 16)).batch(embeddings, torch.bfloat16, device.type)
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


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    rows, columns, dim = (1 << 21) + 3, 100, 1032
    images = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
    # Integers, because tensor cores truncate: a sum of squares comes out 1e-6 to 4e-6 of it too small.
    captions = torch.randint(-3, 4, (columns, dim), device="cuda").bfloat16()
    images[-1] = captions[7]
    batch = images, captions, None, None, columns, columns, 0, 0, columns, 0
    score, index = ops().hopper_hardest_negatives(*batch, None)
    assert index[columns + 7] == rows - 1
    assert score[columns + 7].item() == captions[7].double().square().sum().item()


def test_what_the_kernels_do_not_take_goes_to_triton(device):
    for change in ({"dim": 19}, {"dtype": torch.float32}):
        dtype = change.pop("dtype", torch.bfloat16)
        case = Anchored(device.sized(LARGE.case._replace(**change)))
        batch = case.batch(integer_embeddings, dtype, device.type)
        assert not ops().hopper_takes(*batch[:2])
        with pytest.raises(RuntimeError, match="multiple of 8|bfloat16 or float16"):
            ops().hopper_hardest_negatives(*batch, None)
        results = [
            hardest_negatives(*batch[:2], num_pairs=case.case.pairs, backend=backend)
            for backend in ("cuda", "triton")
        ]
        assert_same(*results)


@pytest.mark.parametrize("save_scores", [False, True])
@pytest.mark.parametrize(
    "case", [UNRELATED_IDS, pytest.param(SQUARE, marks=pytest.mark.gpu)], ids=str
)
def test_ceilings_and_small_saved_scores_are_tritons(device, case, save_scores):
    batch = case.batch(integer_embeddings, torch.bfloat16, device.type)
    threshold = thresholds(batch)
    for ceiling in (None, thresholds(batch, seed=4)):
        options = ceiling, threshold, save_scores
        total, active, saved = ops().hinge_sum(*batch, *options)
        expected, count = oracle.hinge_sum(in_float64(batch), ceiling, threshold)
        assert torch.equal(active, count)
        assert_close(total, expected, 1e-7)
        assert saved.shape == torch.ops.fused_vse_triton.hinge_sum(*batch, *options)[2].shape


@pytest.mark.gpu
def test_in_a_cuda_graph_and_on_another_stream(device):
    images, captions, *_ = SQUARE.batch(embeddings, torch.bfloat16, device.type)
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


WRONG_EMBEDDINGS = {
    "multiple of 8": lambda: torch.zeros(16, 20, dtype=torch.bfloat16),
    "bfloat16 or float16": lambda: torch.zeros(16, 16),
    "unit stride": lambda: torch.zeros(16, 32, dtype=torch.bfloat16)[:, ::2],
    "elements apart": lambda: torch.zeros(16, 20, dtype=torch.bfloat16)[:, :16],
    "16-byte boundary": lambda: torch.zeros(257, dtype=torch.bfloat16)[1:].view(16, 16),
}
GOOD = Anchored(Case("", 16, 20, 16, 16))


@pytest.mark.parametrize("why", WRONG_EMBEDDINGS)
def test_embeddings_that_are_refused(device, why):
    with torch.device(device.type):
        x = WRONG_EMBEDDINGS[why]()
    batch = GOOD.batch(embeddings, torch.bfloat16, device.type)
    assert ops().hopper_takes(*batch[:2]) and not ops().hopper_takes(x, x)
    with pytest.raises(RuntimeError, match=why):
        ops().hopper_hardest_negatives(*batch._replace(images=x, captions=x), None)


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("captions must be given", {"captions": None}),
        ("similarity must be 0", {"similarity": 1}),
        ("both ids or none", {"image_ids": torch.zeros(16).long()}),
        (
            "number of image_ids must be in 16",
            {"image_ids": torch.zeros(20).long(), "caption_ids": torch.zeros(20).long()},
        ),
        (
            "number of caption_ids must be in 20",
            {"image_ids": torch.zeros(16).long(), "caption_ids": torch.zeros(16).long()},
        ),
        (
            "image_ids must be",
            {"image_ids": torch.zeros(16).int(), "caption_ids": torch.zeros(20).long()},
        ),
        ("agree in dtype", {"captions": torch.zeros(20, 16).half()}),
        ("row_anchors must be in 0 .. 16", {"row_anchors": 17}),
        ("column_anchors must be in 0 .. 20", {"column_anchors": -1}),
        ("pair_count must be in 0 .. 16", {"pair_count": 17}),
        ("pair_row must be in 0 .. 0", {"pair_row": 1}),
        ("pair_column must be in 0 .. 4", {"pair_column": 5}),
    ],
)
def test_batches_that_are_refused(device, why, change):
    change = {k: x.to(device.type) if isinstance(x, torch.Tensor) else x for k, x in change.items()}
    batch = GOOD.batch(embeddings, torch.bfloat16, device.type)._replace(**change)
    with pytest.raises(RuntimeError, match=why):
        ops().hopper_hardest_negatives(*batch, None)


def test_options_that_are_refused(device):
    batch = GOOD.batch(embeddings, torch.bfloat16, device.type)
    zeros = torch.zeros(32, device=device.type)
    for x in (zeros[1:], zeros.double(), zeros.new_zeros(33)):
        with pytest.raises(RuntimeError, match="threshold must hold 32"):
            ops().hopper_hinge_sum(*batch, None, x, False)
    for x in (zeros, zeros[0].double()):
        with pytest.raises(RuntimeError, match="scale_tensor must hold 1"):
            ops().hopper_negative_logsumexp(*batch, None, 1.0, x, False)
    with pytest.raises(RuntimeError, match="no ceiling"):
        ops().hopper_hardest_negatives(*batch, zeros)
    with pytest.raises(RuntimeError, match="no save_scores"):
        ops().hopper_hinge_sum(*batch, None, zeros, True)


@pytest.mark.on_device("cuda", ((8, 0), 108))
def test_only_hopper_takes_them(device):
    batch = GOOD.batch(embeddings, torch.bfloat16, device.type)
    assert ops().hopper_takes(*batch[:2]) == (device.capability == (9, 0))
