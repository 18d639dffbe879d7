"""The small-batch loss of the cuda backend, on a GPU or an emulated one."""

import conftest
import eager
import pytest
import torch
from cases import (
    CASES,
    TRAINED,
    UPSTREAMS,
    Case,
    embeddings,
    integer_embeddings,
    trained_embeddings,
)
from conftest import assert_same, captured, ids_on
from eager import relative

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
from fused_vse.backends.cuda import SMALL_ROWS
from fused_vse.ops import ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM

pytestmark = [
    # Several tiles of S for each block, and one.
    pytest.mark.on_device("cuda", ((8, 0), 3), ((9, 0), 4), ((9, 0), 132), few=3),
    pytest.mark.filterwarnings("ignore"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = [case for case in CASES if max(case.rows, case.columns) <= SMALL_ROWS]
CLASSIC = Case("the classic setting", 128, 128, 128, 1024)
LARGEST = Case("the largest, ragged", 509, 512, 500, 1000, "groups of five")
SIZES = [*SMALL, CLASSIC, Case("256", 256, 256, 256, 512), LARGEST]
LOSSES = {
    "all_negatives": (all_negatives_loss, {}),
    "all_negatives_cold": (all_negatives_loss, {"temperature": 0.01}),
    "hardest": (hardest_negative_loss, {}),
    "hardest_smooth": (hardest_negative_loss, {"smooth": True}),
    "hinge_sum": (hinge_loss, {"reduction": "mean"}),
    "hinge_max": (hinge_loss, {"hardest": True, "reduction": "mean"}),
}


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


def differentiated(name, pair, case, backend="cuda", upstream=1.0, **more):
    loss, options = LOSSES[name]
    return conftest.differentiated(loss, pair, case, backend, upstream, **(options | more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_no_less_accurate_than_eager(device, name, case, dtype):
    case = device.sized(case)
    pair = device.put(embeddings(case, dtype))
    expected = differentiated(name, [x.double() for x in pair], case, "reference")
    temperature = LOSSES[name][1].get("temperature", 0.1)
    actual = differentiated(name, pair, case)
    plain = eager.differentiated(name, pair, case, temperature)
    for got, other, want in zip(actual, plain, expected, strict=True):
        # A few units in the last place of what is returned count as none.
        smallest = 4 * torch.finfo(got.dtype).eps
        assert relative(got, want) <= 1.5 * relative(other, want) + smallest, (
            relative(got, want),
            relative(other, want),
        )


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["all_negatives", "hardest_smooth"], indirect=True)
def test_upstream_no_less_accurate_than_eager(device, name, dtype, upstream):
    """A gradient scaler's factor saves what would underflow in the embeddings' dtype."""
    pair = device.put(trained_embeddings(dtype))
    options = {"temperature": 0.03, "upstream": upstream}
    wide = [x.double() for x in pair]
    _, *expected = differentiated(name, wide, TRAINED, "reference", **options)
    _, *actual = differentiated(name, pair, TRAINED, **options)
    _, *plain = eager.differentiated(name, pair, TRAINED, **options)
    for got, other, want in zip(actual, plain, expected, strict=True):
        assert relative(got, want) <= relative(other, want), (
            relative(got, want),
            relative(other, want),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_rounded_once(device, dtype):
    pair = device.put(trained_embeddings(dtype))
    small_loss = torch.ops.fused_vse_cuda.small_loss.default
    batch = *pair, None, None, TRAINED.pairs
    options = 0, 10.0, None, 0.0, 1.0, 1.0, True, True, True
    *_, d_images, d_captions = small_loss(*batch, *options)
    _, *actual = differentiated("all_negatives", pair, TRAINED, upstream=0.3)
    for got, exact in zip(actual, (d_images, d_captions), strict=True):
        assert exact.dtype == torch.float32
        assert torch.equal(got, (exact * torch.tensor(0.3)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, LARGEST._replace(dim=24)], ids=str)
def test_integer_embeddings_are_exact(device, case, dtype):
    case = device.sized(case)
    pair, ids = device.put(integer_embeddings(case, dtype)), ids_on(device.type, case)
    options = {"image_ids": ids[0], "caption_ids": ids[1], "num_pairs": case.pairs, "margin": 1.0}
    for hardest in (False, True):
        results = []
        for backend, side in (("cuda", pair), ("reference", [x.double() for x in pair])):
            leaves = [x.detach().requires_grad_() for x in side]
            value, statistics = hinge_loss(
                *leaves, hardest=hardest, backend=backend, return_statistics=True, **options
            )
            value.backward()
            results.append([value, *statistics, *(x.grad for x in leaves)])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("case", [CASES[7], CLASSIC, LARGEST], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(device, name, case, dtype):
    case = device.sized(case)
    pair = device.put(embeddings(case, dtype))
    first = differentiated(name, pair, case)
    for _ in device.disturbances(20):
        assert_same(differentiated(name, pair, case), first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_surfaces(device, name, value, dtype):
    pair = device.put(embeddings(CASES[7], dtype))
    pair[1][-1, 3] = value
    for result in differentiated(name, pair, CASES[7]):
        assert result.isnan().all()


def test_strided_and_misaligned_views(device, name):
    case = device.sized(CLASSIC)
    images, captions = device.put(embeddings(case, torch.bfloat16))
    expected = differentiated(name, (images, captions), case)
    wide = images.new_full((case.rows, 2 * case.dim + 3), torch.nan)
    wide[:, 3::2] = images
    shifted = captions.new_empty(captions.numel() + 1)[1:].view(captions.shape)
    shifted.copy_(captions)
    assert_same(differentiated(name, (wide[:, 3::2], shifted), case), expected)


def step_of(name, static, case):
    loss, options = LOSSES[name]

    def step():
        for x in static:
            x.grad = None
        value = loss(*static, num_pairs=case.pairs, backend="cuda", **options)
        value.backward()
        return value

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[2], CLASSIC], ids=str)
def test_cuda_graph(device, name, case):
    static = [x.requires_grad_() for x in device.put(embeddings(case, torch.bfloat16))]
    graph, value = captured(step_of(name, static, case))
    fresh = device.put(embeddings(case, torch.bfloat16, 1))
    with torch.no_grad():
        for x, new in zip(static, fresh, strict=True):
            x.copy_(new)
    graph.replay()
    assert_same([value, *(x.grad for x in static)], differentiated(name, fresh, case))


@pytest.mark.gpu
def test_a_step_has_two_kernels_of_ours(device, name):
    static = [x.requires_grad_() for x in device.put(embeddings(CLASSIC, torch.bfloat16))]
    step = step_of(name, static, CLASSIC)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("small_loss_kernel" in kernel for kernel in kernels) == 1, kernels
    assert sum("small_loss_backward_kernel" in kernel for kernel in kernels) == 1, kernels
    # autograd fills the upstream gradient of 1; and deterministic mode may fill what is empty.
    others = [k for k in kernels if "_kernel" not in k or "fused_vse" not in k]
    assert all("fill" in k.lower() or "memset" in k.lower() for k in others), kernels


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["all_negatives", "hinge_max"], indirect=True)
def test_full_graph_compilation(device, name, mode):
    torch.compiler.reset()  # other tests compile other versions of the same code
    pair = device.put(embeddings(CLASSIC, torch.bfloat16))
    expected = differentiated(name, pair, CLASSIC)
    loss, options = LOSSES[name]
    compiled = torch.compile(
        lambda *x: loss(*x, backend="cuda", **options), fullgraph=True, mode=mode
    )
    for _ in range(3):
        leaves = [x.detach().requires_grad_() for x in pair]
        value = compiled(*leaves)
        value.backward()
        actual = [x.clone() for x in (value.detach(), *(x.grad for x in leaves))]
    assert_same(actual, expected)


@pytest.mark.gpu
def test_no_synchronisation(device, name):
    pair = device.put(embeddings(CLASSIC, torch.bfloat16))
    differentiated(name, pair, CLASSIC)
    torch.cuda.set_sync_debug_mode("error")
    try:
        temperature = torch.full((), 0.1, device="cuda", requires_grad=True)
        all_negatives_loss(*pair, temperature=temperature, backend="cuda").backward()
        differentiated(name, pair, CLASSIC)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_streams_at_the_same_time(device, name):
    """Cooperative launches wait for each other; blocks of two of them must not wait in a circle."""
    cases = [CLASSIC, LARGEST, CASES[7], LARGEST._replace(reason="no ids", ids=None)]
    pairs = [device.put(embeddings(case, torch.bfloat16)) for case in cases]
    expected = [differentiated(name, pair, case) for pair, case in zip(pairs, cases, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        results = []
        for stream, pair, case in zip(streams, pairs, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(differentiated(name, pair, case))
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(device, name):
    pair = device.put(embeddings(CASES[7], torch.bfloat16))
    expected = differentiated(name, pair, CASES[7])
    elsewhere = differentiated(name, [x.to("cuda:1") for x in pair], CASES[7])
    for got, want in zip(elsewhere, expected, strict=True):
        assert got.device.index == 1 and torch.equal(got.cpu(), want.cpu())


KINDS = {  # kind, alpha, margin
    "all_negatives": (ALL_NEGATIVES, 10.0, 0.15),
    "hardest": (HARDEST, 10.0, 0.2),
    "hardest_smooth": (HARDEST_SMOOTH, 10.0, 0.1),
    "hinge_sum": (HINGE_SUM, 1.0, 0.2),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
TILES = Case("several tiles", 70, 72, 65, 80, "groups of five")


def small_loss(pair, case, kind, weights=(1.0, 1.0), mean=True, needs=(True, True), scale=None):
    """loss, positive, score, index; d_scale, d_images, d_captions."""
    number, alpha, margin = KINDS[kind]
    ids = ids_on(pair[0].device, case)
    options = number, alpha, scale, margin, *weights, mean, *needs
    return torch.ops.fused_vse_cuda.small_loss(*pair, *ids, case.pairs, *options)


@pytest.mark.parametrize(
    ("weights", "mean"), [((1.0, 1.0), True), ((0.25, 2.0), False), ((0.0, 0.0), True)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kind
def test_each_gradient_alone(device, kind, dtype, weights, mean):
    pair = device.put(embeddings(TILES, dtype))
    both = small_loss(pair, TILES, kind, weights, mean)
    upstream = both[0].new_tensor(0.3)
    for needs in ((True, False), (False, True), (False, False)):
        some = small_loss(pair, TILES, kind, weights, mean, needs)
        assert_same(some[:5], both[:5])
        step = torch.ops.fused_vse_cuda.small_loss_backward(*pair, *some[3:], upstream, *needs)
        for got, whole, gradient, needed in zip(some[5:], both[5:], step[:2], needs, strict=True):
            assert torch.equal(got, whole) if needed else got.numel() == 0
            assert torch.equal(gradient, (got * upstream).to(dtype))
        assert torch.equal(step[2], some[4] * upstream)


EASY = Case("every pair far above its negatives", 70, 70, 70, 96)


@pytest.mark.parametrize("hard", [(), (4,), (4, 66)], ids=str)
def test_no_float16_gradient_underflows(device, hard):
    """Each caption has 0.724 of the next image: at temperature 0.01 the gradients of a row are about 1e-12,
    which float16 holds once a gradient scaler has multiplied them; of the pairs in `hard`, about 1."""
    images = torch.eye(EASY.rows, EASY.dim)
    captions = images + 0.724 * images.roll(-1, 0)
    for k in hard:
        captions[k] = images[k] + 1.02 * images[k - 1]
    pair = device.put([images.half(), captions.half()])
    options = {"temperature": 0.01, "margin": 0.0}
    wide = [x.double() for x in pair]
    _, *expected = differentiated("all_negatives", wide, EASY, "reference", **options)
    number, _, _ = KINDS["all_negatives"]
    *_, d_images, d_captions = torch.ops.fused_vse_cuda.small_loss(
        *pair, None, None, EASY.pairs, number, 100.0, None, 0.0, 1.0, 1.0, True, True, True
    )
    for got, want in zip((d_images, d_captions), expected, strict=True):
        smallest = want.abs().amax(1).min()
        assert smallest < 1e-11 and smallest * UPSTREAMS[0] > 2**-24  # the smallest float16
        errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert errors.max() < torch.finfo(torch.float16).eps


@pytest.mark.on_device("cuda", ((8, 0), 108), ((9, 0), 132), few=2)
@each_kind
def test_same_bits_on_other_gpus(device, kind):
    """With fewer multiprocessors, but as many as leave the clusters as they are."""
    pair = device.put(embeddings(TILES, torch.bfloat16))
    first = small_loss(pair, TILES, kind)
    for other in device.others(*((16, 8) if device.capability == (9, 0) else (1, 2, 5))):
        with other:
            assert_same(small_loss(pair, TILES, kind), first)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_scale_that_is_none(device, value):
    pair = device.put(embeddings(TILES, torch.float32))
    scale = pair[0].new_tensor(value)
    loss, positive, score, index, *saved = small_loss(pair, TILES, "all_negatives", scale=scale)
    assert all(x.isnan().all() for x in (loss, positive, score, *saved)) and (index == -1).all()


# They run the code of sm_80, some with 100 KiB of shared memory.
OTHER_GPUS = [((8, 6), 5), ((8, 9), 5), ((10, 0), 5), ((12, 0), 5)]


@pytest.mark.on_device("cuda", *OTHER_GPUS, few=4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpus_without_code_of_their_own(device, name, dtype):
    case = Case("", 70, 130, 65, 72)
    pair = device.put(embeddings(case, dtype))
    actual = differentiated(name, pair, case)
    expected = differentiated(name, [x.double() for x in pair], case, "reference")
    for got, want in zip(actual, expected, strict=True):
        limits = torch.finfo(got.dtype)
        # Rounding to the smallest number may be all of a gradient.
        smallest = limits.smallest_normal * limits.eps * want.numel() ** 0.5
        allowed = (2e-4 + 4 * limits.eps) * want.norm() + smallest
        assert (got.double() - want).norm() <= allowed


@pytest.mark.parametrize("factor", [3.0, 2.0**70])  # the squares overflow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(device, dtype, factor):
    largest = torch.finfo(dtype).max / 16
    pair = [min(factor, largest) * x for x in device.put(embeddings(CASES[7], dtype))]
    actual = differentiated("all_negatives", pair, CASES[7], normalize=True)
    wide = [x.double() for x in pair]
    expected = differentiated("all_negatives", wide, CASES[7], "reference", normalize=True)
    for got, want in zip(actual, expected, strict=True):
        assert relative(got, want) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": torch.ones(6, 8)}, "agree in dtype"),
        ({"captions": torch.ones(6, 9).half()}, "dimension of captions must be in 8 .. 8, got 9"),
        ({"image_ids": torch.arange(5)}, "both ids or none"),
        ({"image_ids": torch.arange(5), "caption_ids": torch.arange(5)}, "number of caption_ids"),
        ({"image_ids": torch.arange(5).int(), "caption_ids": torch.arange(6)}, "image_ids.* int64"),
        ({"num_pairs": 6}, "row_anchors must be in 0 .. 5, got 6"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"kind": 4}, "unknown kind of loss"),
        ({"scale_tensor": torch.ones((), dtype=torch.float64)}, "scale_tensor must hold 1 float32"),
        ({"scale_tensor": torch.ones(2)}, "scale_tensor must hold 1 float32"),
    ],
)
def test_the_op_itself_names_mistakes(device, change, message):
    arguments = dict(
        images=torch.ones(5, 8).half(), captions=torch.ones(6, 8).half(), image_ids=None,
        caption_ids=None, num_pairs=5, kind=0, scale=1.0, scale_tensor=None, margin=0.0,
        image_weight=1.0, caption_weight=1.0, mean=True, need_images=True, need_captions=True,
    )  # fmt: skip
    arguments = {
        name: x.to(device.type) if isinstance(x, torch.Tensor) else x
        for name, x in (arguments | change).items()
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_vse_cuda.small_loss(**arguments)
