"""The small-batch loss of csrc/cuda without a GPU: its schedule, its index arithmetic, and the kernel's own
source on the CPU (cuda_emulation.cpp) against the formulas and under the public functions."""

import ctypes
import itertools
import re

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
from conftest import assert_close
from eager import relative

from fused_vse import all_negatives_loss, dispatch, hardest_negative_loss, hinge_loss
from fused_vse.backends import cuda, fakes

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


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_emulation.build(tmp_path_factory.mktemp("cuda"))


def schema(name: str) -> str:
    """As csrc/ops.h has it, its string literals put together."""
    text = (cuda_emulation.ROOT / "csrc" / "ops.h").read_text()
    literals = re.search(rf"#define {name}_SCHEMA((?:[^\n]*\\\n)*[^\n]*)", text)[1]
    return "".join(re.findall(r'"([^"]*)"', literals))


@pytest.fixture(scope="module")
def operators(library):
    """The ops of fused_vse_cuda for CPU tensors, by the emulation."""
    namespace = torch.library.Library(cuda.NAMESPACE, "FRAGMENT")
    if not hasattr(torch.ops.fused_vse_cuda, "small_loss"):  # the library was not built
        for name in ("SMALL_LOSS", "SCALE_GRADIENTS", "L2_NORMALIZE", "L2_NORMALIZE_BACKWARD"):
            namespace.define(schema(name))
        fakes.register_normalize_fakes(cuda.NAMESPACE)
        fakes.register_small_loss_fakes(cuda.NAMESPACE)

    def small_loss(
        images, captions, image_ids, caption_ids, num_pairs, kind, scale, scale_tensor, margin,
        image_weight, caption_weight, mean, need_images, need_captions,
    ):  # fmt: skip
        result = cuda_emulation.small_loss(
            library, images, captions, (image_ids, caption_ids), num_pairs,
            cuda_emulation.KINDS[kind], scale, margin, (image_weight, caption_weight), mean,
            scale_tensor, (need_images, need_captions),
        )  # fmt: skip
        loss, d_images, d_captions, *rest = result
        d_images = d_images if need_images else d_images.new_empty(0)
        d_captions = d_captions if need_captions else d_captions.new_empty(0)
        return loss, d_images, d_captions, *rest

    def scale_gradients(upstream, d_images, d_captions, d_scale, like):
        scaled = [(upstream * x).to(like.dtype) for x in (d_images, d_captions)]
        return *scaled, upstream * d_scale

    def l2_normalize(rows):
        norm = rows.float().norm(dim=1).clamp(min=1e-12)
        return (rows.float() / norm[:, None]).to(rows.dtype), 1 / norm

    def l2_normalize_backward(d, normalized, inverse_norm):
        return (d - (d * normalized).sum(1, keepdim=True) * normalized) * inverse_norm[:, None]

    for op in (small_loss, scale_gradients, l2_normalize, l2_normalize_backward):
        namespace.impl(op.__name__, op, "CPU")
    yield
    namespace._destroy()


@pytest.fixture
def on_cpu(operators, monkeypatch):
    """backend="cuda" takes CPU tensors."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "_unavailable", lambda: None)


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def differentiated(loss, pair, case, backend, upstream=1.0, **options):
    pair, ids = leaves(pair), ids_of(case)
    value = loss(
        *pair,
        image_ids=ids[0],
        caption_ids=ids[1],
        num_pairs=case.pairs,
        backend=backend,
        **options,
    )
    (value * upstream).backward()
    return [value.detach(), *(x.grad for x in pair)]


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
def test_gradients_are_rounded_once(dtype, library, on_cpu):
    pair = trained_embeddings(dtype)
    unit = cuda_emulation.small_loss(
        library, *pair, (None, None), TRAINED.pairs, "all_negatives", scale=10.0
    )
    _, *actual = differentiated(all_negatives_loss, pair, TRAINED, "cuda", upstream=0.3)
    for got, exact in zip(actual, (unit.d_images, unit.d_captions), strict=True):
        assert exact.dtype == torch.float32
        assert torch.equal(got, (exact * torch.tensor(0.3)).to(dtype))


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("resident", [8, 132])
@pytest.mark.parametrize("kind", cuda_emulation.KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_cluster_and_any_grid(dtype, kind, resident, cluster, library):
    """More tiles than blocks, slices without a chunk, threads and blocks in another order: same bits."""
    case = SEVERAL_TILES
    pair, ids = embeddings(case, dtype), ids_of(case)
    options = dict(scale=10.0 if kind != "hinge_sum" else 1.0, margin=0.1, cluster=cluster)

    def run(**more):
        return cuda_emulation.small_loss(library, *pair, ids, case.pairs, kind, **options, **more)

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


def test_a_temperature_tensor_that_is_not_positive_gives_nan(library):
    pair = embeddings(CASES[2], torch.float32)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        result = cuda_emulation.small_loss(
            library, *pair, (None, None), 37, "all_negatives", scale_tensor=torch.tensor(value)
        )
        assert all(x.isnan().all() for x in result[:-1]) and (result.index == -1).all()


def test_tiny_float16_gradients_do_not_underflow(library):
    """Negatives so far below the positives that their exponentials are about 1e-7."""
    images = torch.eye(64, 64)
    captions = torch.eye(64, 64)
    captions[:, 0] += 0.1
    pair = images.half(), captions.half()
    leaf = pair[0].double().requires_grad_()
    all_negatives_loss(
        leaf, pair[1].double(), temperature=1 / 16, backend="reference", reduction="sum"
    ).backward()
    result = cuda_emulation.small_loss(
        library, *pair, (None, None), 64, "all_negatives", scale=16.0, mean=False
    )
    assert_close(
        result.d_images.double() / leaf.grad.abs().max(), leaf.grad / leaf.grad.abs().max(), 2e-3
    )


def test_the_preferred_cluster(library):
    """A power of two, at most 16 strips, and a chunk of D for each of its blocks."""
    for n, d, size in itertools.product(range(1, 513, 7), (1, 64, 65, 256, 1024, 1025), (2, 4)):
        cluster = library.preferred_cluster_of(n, d, size)
        assert cluster in (1, 2, 4, 8)
        assert cluster * -(-n // 64) <= 16
        assert cluster == 1 or cluster * 128 <= d * size
    assert library.preferred_cluster_of(128, 1024, 2) == 8


def test_index_arithmetic_against_brute_force(library):
    """Every element, byte, chunk and tile belongs to one thread, place, block and job."""
    library.index_arithmetic_error.restype = ctypes.c_char_p
    assert library.index_arithmetic_error() is None


def test_limits_agree_with_the_kernel():
    plan = (cuda_emulation.ROOT / "csrc" / "cuda" / "small_plan.h").read_text()
    assert f"MAX_ROWS = {cuda.SMALL_ROWS};" in plan
    assert "MAX_DIM = 1 << 16;" in plan and cuda.SMALL_DIM == 1 << 16


def test_auto_takes_only_what_was_measured(monkeypatch):
    images = torch.empty(128, 1024, dtype=torch.bfloat16, device="meta")
    assert cuda.MEASURED == () and not cuda.is_measured_ahead("small_loss", images, images)
    monkeypatch.setattr(cuda, "DEVICE", "meta")
    monkeypatch.setattr(cuda, "_unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    bucket = cuda.Bucket("small_loss", (9, 0), torch.bfloat16, max_rows=128, max_dim=1024)
    monkeypatch.setattr(cuda, "MEASURED", (bucket,))
    assert cuda.is_measured_ahead("small_loss", images, images)
    assert not cuda.is_measured_ahead("other", images, images)
    assert not cuda.is_measured_ahead("small_loss", images.half(), images.half())
    assert not cuda.is_measured_ahead("small_loss", images, torch.cat([images, images]))
    assert not cuda.is_measured_ahead("small_loss", *[torch.cat([images, images], 1)] * 2)
    monkeypatch.setattr(cuda, "MEASURED", (bucket._replace(capability=(8, 0)),))
    assert not cuda.is_measured_ahead("small_loss", images, images)


def test_auto_does_not_choose_what_was_never_measured(on_cpu, monkeypatch):
    assert dispatch.backends()["cuda"] == (
        "available on request; not chosen by auto: never measured on a GPU"
    )
    monkeypatch.setattr(dispatch, "_FUSED", {"cuda": cuda})
    with pytest.warns(UserWarning, match="cuda: not chosen by auto: never measured"):
        assert dispatch.select("auto", torch.device("cpu")) == dispatch.REFERENCE


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((513, 4), {}, "at most 512 images and captions, got 513 and 513.*triton"),
        ((4, 4), {"reduction": "none"}, "no reduction='none'"),
        ((4, 4), {"dtype": torch.float64}, "float32 embeddings, got torch.float64"),
        ((2, (1 << 16) + 1), {}, "65536 dimensions, got 65537"),
        ((4, 4), {"similarity": "order"}, "no order similarity"),
    ],
)
def test_what_it_does_not_take_is_named(shape, options, message, on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "FAMILIES", ("loss",))  # as without Triton
    options = dict(options)
    x = torch.ones(shape, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=message):
        hinge_loss(x, x, backend="cuda", **options)


def test_scores_and_statistics_are_not_taken(on_cpu, monkeypatch):
    from fused_vse import hardest_negatives

    monkeypatch.setattr(cuda, "FAMILIES", ("loss",))  # as without Triton
    with pytest.raises(RuntimeError, match="no score-matrix losses"):
        hinge_loss(scores=torch.ones(2, 2), backend="cuda")
    with pytest.raises(RuntimeError, match="no statistics of the dot product"):
        hardest_negatives(torch.ones(2, 2), torch.ones(2, 2), backend="cuda")


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_describe_the_results(dtype, need, operators):
    images, captions = embeddings(CASES[7], dtype)
    batch = images, captions, None, None, 33
    options = 0, 1.0, torch.tensor(10.0), 0.0, 1.0, 1.0, True, *need
    checks = "test_schema", "test_faketensor"
    op = torch.ops.fused_vse_cuda.small_loss.default
    torch.library.opcheck(op, (*batch, *options), test_utils=checks)
    gradients = op(*batch, *options)[1:4]
    scale = torch.ops.fused_vse_cuda.scale_gradients.default
    torch.library.opcheck(scale, (torch.tensor(2.0), *gradients, images), test_utils=checks)


def test_full_graph_compilation(on_cpu):
    torch.compiler.reset()  # other tests compile other versions of the same code
    pair = embeddings(CASES[7], torch.float32)
    expected = differentiated(all_negatives_loss, pair, CASES[7], "cuda")
    compiled = torch.compile(all_negatives_loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(differentiated(compiled, pair, CASES[7], "cuda"), expected, strict=True):
        assert_close(got, want, 1e-6)


def test_double_backward_raises(on_cpu):
    pair = leaves(embeddings(CASES[2], torch.float32))
    gradients = torch.autograd.grad(
        all_negatives_loss(*pair, backend="cuda"), pair, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        gradients[0].sum().backward()
