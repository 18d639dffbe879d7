"""The small-batch loss of csrc/cuda without a GPU: the kernel's own source on the CPU (cuda_emulation.cpp)
against the formulas and under the public functions."""

import itertools

import cuda_emulation
import eager
import pytest
import torch
from cases import (
    CASES,
    TRAINED,
    UPSTREAMS,
    Case,
    embeddings,
    ids_of,
    integer_embeddings,
    trained_embeddings,
)
from conftest import assert_close, differentiated
from eager import relative

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
from fused_vse.backends import cuda

REASON = cuda_emulation.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [case for case in CASES if max(case.rows, case.columns) <= cuda.SMALL_ROWS]
SEVERAL_TILES = Case("several tiles of a small batch", 200, 150, 140, 150, "groups of five")
# Name, kind, options of the public function.
LOSSES = {
    "all_negatives": (all_negatives_loss, {}),
    "all_negatives_margin": (all_negatives_loss, {"margin": 0.15}),
    "all_negatives_cold": (all_negatives_loss, {"temperature": 0.01}),
    "hardest": (hardest_negative_loss, {}),
    "hardest_smooth": (hardest_negative_loss, {"smooth": True, "margin": 0.1}),
    "hinge_sum": (hinge_loss, {}),
    "hinge_max": (hinge_loss, {"hardest": True, "margin": 0.3}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", [*SMALL, SEVERAL_TILES], ids=str)
def test_equals_the_reference(case, name, dtype, on_cpu):
    loss, options = LOSSES[name]
    pair = embeddings(case, dtype)
    actual = differentiated(loss, pair, case, "cuda", **options)
    expected = differentiated(loss, [x.double() for x in pair], case, "reference", **options)
    # What float32 scores leave of a softmax; for gradients also one rounding of G and one of the result.
    bound = 2e-6 / options.get("temperature", 0.1)
    assert_close(actual[0], expected[0], bound, "loss")
    for what, got, want in zip(("d_images", "d_captions"), actual[1:], expected[1:], strict=True):
        scale = max(want.abs().max().item(), 1e-3)
        assert_close(got / scale, want / scale, bound + 2 * torch.finfo(dtype).eps, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in SMALL if c.dim <= 33], ids=str)
def test_integer_embeddings_are_exact(case, dtype, on_cpu):
    for loss, options in (
        (hardest_negative_loss, {"temperature": 0.5, "margin": 1}),
        (hinge_loss, {"margin": 2}),
        (hinge_loss, {"margin": 1, "hardest": True}),
    ):
        pair, options = integer_embeddings(case, dtype), {**options, "reduction": "sum"}
        actual = differentiated(loss, pair, case, "cuda", **options)
        expected = differentiated(loss, [x.double() for x in pair], case, "reference", **options)
        assert actual[0].item() == expected[0].item()
        for got, want in zip(actual[1:], expected[1:], strict=True):
            assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_return_statistics(case, name, on_cpu):
    loss, options = LOSSES[name]
    pair, ids = integer_embeddings(case, torch.float32), ids_of(case)
    keywords = dict(image_ids=ids[0], caption_ids=ids[1], num_pairs=case.pairs, **options)
    keywords["return_statistics"] = True
    _, actual = loss(*pair, backend="cuda", **keywords)
    _, expected = loss(*pair, backend="reference", **keywords)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want) and not got.requires_grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("weights", "reduction"),
    list(itertools.product([(1.0, 1.0), (0.5, 0.5), (1, 0), (0.25, 2.0)], ["mean", "sum"])),
)
def test_weights_reductions_and_upstream(name, weights, reduction, on_cpu):
    loss, options = LOSSES[name]

    def squared(*pair, **keywords):
        return loss(*pair, direction_weights=weights, reduction=reduction, **keywords) ** 2

    pair = embeddings(CASES[7], torch.float32)
    actual = differentiated(squared, pair, CASES[7], "cuda", **options)
    expected = differentiated(squared, pair, CASES[7], "reference", **options)
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want, 5e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["all_negatives", "hardest", "hardest_smooth"])
def test_temperature_and_one_sided_gradients(name, normalize, on_cpu):
    loss, options = LOSSES[name]
    gradients = {}
    for backend, sides in itertools.product(("cuda", "reference"), ((), (0,), (1,), (0, 1))):
        pair = list(embeddings(CASES[7], torch.float32))
        for side in sides:
            pair[side].requires_grad_()
        temperature = torch.tensor(0.07, requires_grad=True)
        keywords = options | {"temperature": temperature, "num_pairs": 33, "normalize": normalize}
        loss(*pair, backend=backend, **keywords).backward()
        gradients[backend, sides] = [temperature.grad, *(pair[side].grad for side in sides)]
        assert all((x.grad is not None) == (i in sides) for i, x in enumerate(pair))
    for (backend, sides), actual in gradients.items():
        if backend == "cuda":
            for got, want in zip(actual, gradients["reference", sides], strict=True):
                assert_close(got, want, 5e-5)


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["all_negatives", "hardest_smooth"])
def test_upstream_no_less_accurate_than_eager(name, dtype, upstream, on_cpu):
    """A gradient scaler's factor saves what would underflow in the embeddings' dtype."""
    loss, options = LOSSES[name]
    options = options | {"margin": 0.2 * (name != "all_negatives")}  # as the eager formulas have it
    options |= {"temperature": 0.03, "upstream": upstream}
    pair = trained_embeddings(dtype)
    wide = [x.double() for x in pair]
    _, *expected = differentiated(loss, wide, TRAINED, "reference", **options)
    _, *actual = differentiated(loss, pair, TRAINED, "cuda", **options)
    _, *plain = eager.differentiated(name, pair, TRAINED, 0.03, upstream)
    for got, other, want in zip(actual, plain, expected, strict=True):
        assert relative(got, want) <= relative(other, want), (
            relative(got, want),
            relative(other, want),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_rounded_once(dtype, on_cpu):
    pair = trained_embeddings(dtype)
    unit = cuda_emulation.small_loss(
        *pair, (None, None), TRAINED.pairs, "all_negatives", scale=10.0
    )
    _, *actual = differentiated(all_negatives_loss, pair, TRAINED, "cuda", upstream=0.3)
    for got, exact in zip(actual, (unit.d_images, unit.d_captions), strict=True):
        assert exact.dtype == torch.float32
        assert torch.equal(got, (exact * torch.tensor(0.3)).to(dtype))


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("resident", [8, 132])
@pytest.mark.parametrize("kind", cuda_emulation.KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_cluster_and_any_grid(dtype, kind, resident, cluster):
    """More tiles than blocks, slices without a chunk, threads and blocks in another order: same bits."""
    case = SEVERAL_TILES
    pair, ids = embeddings(case, dtype), ids_of(case)
    options = dict(scale=10.0 if kind != "hinge_sum" else 1.0, margin=0.1, cluster=cluster)

    def run(**more):
        return cuda_emulation.small_loss(*pair, ids, case.pairs, kind, **options, **more)

    actual, roomy = run(resident=resident), run(resident=1000)
    for got, want in zip(actual, roomy, strict=True):
        assert torch.equal(got, want)
    for other in (run(resident=resident, aligned=False), run(resident=resident, backwards=True)):
        for got, want in zip(actual, other, strict=True):
            assert torch.equal(got, want)
    scores = pair[0].double() @ pair[1].double().T
    assert_close(actual.positive, scores.diagonal()[: case.pairs], 1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 44, 23), (1, 49, 23), (1, 7, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_surfaces(dtype, place, value, on_cpu):
    side, row, column = place
    for loss, options in LOSSES.values():
        pair = embeddings(CASES[7], dtype)
        pair[side][row, column] = value
        pair[1 - side][:, column] = 0  # 0 * inf
        for result in differentiated(loss, pair, CASES[7], "cuda", **options):
            assert result.isnan().all()


def test_a_temperature_tensor_that_is_not_positive_gives_nan():
    pair = embeddings(CASES[2], torch.float32)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        result = cuda_emulation.small_loss(
            *pair, (None, None), 37, "all_negatives", scale_tensor=torch.tensor(value)
        )
        assert (result.index == -1).all()
        assert all(x.isnan().all() for x in result._replace(index=result.loss))


EASY = Case("every pair far above its negatives", 70, 70, 70, 96)


def easy_pair(hard: tuple[int, ...]):
    """Orthogonal images, and captions with 0.724 of the next pair's: at temperature 0.01 the gradients of a
    row are about 1e-12, which float16 holds once a gradient scaler has multiplied them. Those of the pairs
    in `hard` are about 1."""
    images = torch.eye(EASY.rows, EASY.dim)
    captions = images + 0.724 * images.roll(-1, 0)
    for k in hard:
        captions[k] = images[k] + 1.02 * images[k - 1]
    return images.half(), captions.half()


def row_errors(actual, expected):
    """Relative to each row's own size."""
    return ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("hard", [(), (4,), (4, 66)], ids=str)
@pytest.mark.parametrize("name", ["all_negatives", "hardest_smooth"])
def test_no_float16_gradient_underflows(name, hard):
    loss, options = LOSSES[name]
    pair, options = easy_pair(hard), options | {"margin": 0.0, "temperature": 0.01}
    wide = [x.double() for x in pair]
    _, *expected = differentiated(loss, wide, EASY, "reference", **options)
    result = cuda_emulation.small_loss(*pair, (None, None), EASY.pairs, name, scale=100.0)
    for got, want in zip((result.d_images, result.d_captions), expected, strict=True):
        smallest = want.abs().amax(1).min()
        assert smallest < 1e-11 and smallest * UPSTREAMS[0] > 2**-24  # the smallest float16
        assert row_errors(got, want) < torch.finfo(torch.float16).eps


def test_float16_gradients_of_a_gradient_scaler(on_cpu):
    """Eager PyTorch loses those of the easy anchors: it scales all of dS by the same number."""
    pair = easy_pair(())
    options = {"temperature": 0.01, "upstream": UPSTREAMS[0]}
    wide = [x.double() for x in pair]
    _, *expected = differentiated(all_negatives_loss, wide, EASY, "reference", **options)
    _, *actual = differentiated(all_negatives_loss, pair, EASY, "cuda", **options)
    _, *plain = eager.differentiated("all_negatives", pair, EASY, **options)
    for got, other, want in zip(actual, plain, expected, strict=True):
        assert row_errors(got, want.half().double()) < 0.1 < row_errors(other, want)
