"""The Triton backend in Triton's interpreter, against the float64 oracle. The interpreter takes about
0.1 s for every tile and launch, so each case runs in one dtype, and the large ones not at all.

Collected by test_triton_interpreter.py alone, with TRITON_INTERPRET=1 in the environment.
"""

import interpreted  # noqa: F401
import pytest
import torch
from cases import (
    CASES,
    UPSTREAMS,
    Case,
    embeddings,
    ids_of,
    integer_embeddings,
    trained_embeddings,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_vse import (
    all_negatives_loss,
    hardest_negative_loss,
    hardest_negatives,
    hinge_loss,
    sigmoid_loss,
)
from fused_vse.backends import triton as backend
from fused_vse.backends.triton import configs, forward, plan

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.expensive]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Errors that count as none: a few units in the last place; for bfloat16, to which the interpreter
# truncates, one.
SMALLEST = {
    torch.float64: 2**-44,
    torch.float32: 2**-18,
    torch.float16: 2**-18,
    torch.bfloat16: 2**-7,
}
SMALL_CASES = [case for case in CASES if case.rows * case.columns < 10_000]
EXTRAS = CASES[7]  # N = 45, M = 50, K = 33, D = 24
LOSSES = {
    "all_negatives": lambda *x, **k: all_negatives_loss(*x, margin=0.1, **k),
    "hardest": lambda *x, **k: hardest_negative_loss(*x, **k),
    "hinge_sum": lambda *x, **k: hinge_loss(*x, **k),
    "sigmoid": lambda *x, **k: sigmoid_loss(*x, bias=-5.0, equal_ids="positive", **k),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def differentiated(loss, pair, case, name="triton", **options):
    """[loss, d_images, d_captions, d_temperature if it is among the options]"""
    pair = [x.detach().requires_grad_() for x in pair]
    ids = ids_of(case)
    result = loss(
        *pair, image_ids=ids[0], caption_ids=ids[1], num_pairs=case.pairs, backend=name, **options
    )
    weights = torch.linspace(-1, 2, result.numel()).view(result.shape).to(result.dtype)
    (result * weights if result.dim() else result).sum().backward()
    gradients = [x.grad for x in pair]
    if isinstance(options.get("temperature"), torch.Tensor):
        gradients.append(options["temperature"].grad)
    return [result.detach(), *gradients]


def error(actual, expected):
    scale = expected.abs().max().clamp(min=1.0)
    return ((actual.double() - expected).abs().max() / scale).item()


def check_accuracy(loss, case, dtype, **options):
    """Errors against the oracle are at most 3 times those of the same formulas in plain PyTorch."""
    pair = embeddings(case, dtype)
    options |= {"reduction": "none"}

    def run(name, dtype, tensors):
        own = dict(options)
        if loss is LOSSES["all_negatives"]:
            accumulation = torch.promote_types(dtype, torch.float32)
            own["temperature"] = torch.tensor(0.1, dtype=accumulation, requires_grad=True)
        return differentiated(loss, [x.to(dtype) for x in tensors], case, name, **own)

    expected = run("reference", torch.float64, pair)
    plain = run("reference", dtype, pair)
    actual = run("triton", dtype, pair)
    for got, eager, want in zip(actual, plain, expected, strict=True):
        assert got.dtype == eager.dtype
        smallest = SMALLEST[got.dtype]
        assert error(got, want) <= 3 * error(eager, want) + smallest, (case, dtype)


@pytest.mark.expensive(few=4)
@pytest.mark.parametrize(("number", "case"), list(enumerate(SMALL_CASES)), ids=str)
def test_accuracy(number, case, loss):
    check_accuracy(loss, case, DTYPES[number % 4])


@pytest.mark.expensive(few=4)
@pytest.mark.parametrize(("number", "case"), list(enumerate(SMALL_CASES)), ids=str)
@pytest.mark.parametrize("kind", ["hardest", "hinge_sum"])
def test_integer_embeddings_are_exact(number, case, kind):
    """Values, ties, indices and gradients to the last bit."""
    options = {"margin": 1.0, "reduction": "sum"}
    dtype = DTYPES[(number + 1) % 4]
    pair = integer_embeddings(case, dtype)
    expected = differentiated(
        LOSSES[kind], [x.double() for x in pair], case, "reference", **options, **tau(kind)
    )
    actual = differentiated(LOSSES[kind], pair, case, **options, **tau(kind))
    assert actual[0].item() == expected[0].item()
    for got, want in zip(actual[1:], expected[1:], strict=True):
        # Beyond 256 an integer is rounded, or by the interpreter truncated, to bfloat16 on its way out.
        step = 2**-7 if dtype == torch.bfloat16 else 0
        assert (got.double() - want).abs().le(step * want.abs()).all()
    if kind == "hardest":
        ids = dict(zip(("image_ids", "caption_ids"), ids_of(case), strict=True))
        got = hardest_negatives(*pair, num_pairs=case.pairs, backend="triton", **ids)
        want = hardest_negatives(
            *(x.double() for x in pair), num_pairs=case.pairs, backend="reference", **ids
        )
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.double(), b.double())


def tau(kind):
    return {"temperature": 0.5} if kind == "hardest" else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_at_reduced_precision_and_other_dtypes_of_one_case(dtype, loss, monkeypatch):
    """The tl.dot path in every dtype that takes it, with rows that are no multiple of 16 bytes."""
    monkeypatch.setattr(plan.torch, "get_float32_matmul_precision", lambda: "high")
    check_accuracy(loss, Case("dot", 45, 50, 33, 23, "groups of five"), dtype)


def test_tensor_descriptors(loss, monkeypatch):
    """The sm_90 way to load the operands, with ragged rows, columns and dimensions."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.INTERPRETER._replace(tma=True))
    check_accuracy(loss, EXTRAS, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rectangles_of_one_tile_row(loss, dtype, monkeypatch):
    """The smallest workspace: results carry over between rectangles, d_captions adds up in float32."""
    monkeypatch.setattr(
        configs, "INTERPRETER", configs.INTERPRETER._replace(block_m=16, block_n=32)
    )
    monkeypatch.setattr(forward, "MAX_SAVED_SCORES", 0)
    monkeypatch.setattr(plan, "_workspace_bytes", 1)
    check_accuracy(loss, EXTRAS, dtype)


@pytest.mark.parametrize("temperature", [0.3, 0.01, 0.002])
def test_cold_and_warm_temperatures(temperature):
    """One exp for both directions, and two where it would underflow."""
    options = {"temperature": temperature, "reduction": "none"}
    pair = embeddings(EXTRAS, torch.bfloat16)
    loss = LOSSES["all_negatives"]
    expected = differentiated(loss, [x.double() for x in pair], EXTRAS, "reference", **options)
    plain = differentiated(loss, pair, EXTRAS, "reference", **options)
    for got, eager, want in zip(
        differentiated(loss, pair, EXTRAS, **options), plain, expected, strict=True
    ):
        assert error(got, want) <= 3 * error(eager, want) + SMALLEST[got.dtype]


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4])
def test_float16_gradients_of_any_size(scale, loss):
    """A float16 gradient of S underflows or overflows without its gain."""
    pair = embeddings(EXTRAS, torch.float16)
    case = EXTRAS
    grads = []
    for name, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in pair]
        (scale * loss(*leaves, num_pairs=case.pairs, reduction="mean", backend=name)).backward()
        grads.append([x.grad.double() for x in leaves])
    for got, want in zip(*grads, strict=True):
        # What float16 itself cannot hold counts as 0.
        assert (got - want).abs().max() <= 2**-9 * want.abs().max() + 2**-24


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("hard", [0, 1])
def test_float16_gradients_of_trained_pairs(hard, upstream):
    """Softmax weights far below 2^-24, with and without a pair whose weights are 1."""
    pair = trained_embeddings(torch.float16)
    pair[1][:hard] = pair[1][7:8]

    def gradients(name, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in pair]
        loss = all_negatives_loss(*leaves, temperature=0.03, backend=name)
        (loss.to(torch.float64) * upstream).backward()
        return [x.grad.double() for x in leaves]

    runs = [("triton", torch.float16), ("reference", torch.float16), ("reference", torch.float64)]
    for got, plain, want in zip(*(gradients(*run) for run in runs), strict=True):
        # G holds what is 2^-39 of its largest entry.
        lost = 2**-37 * want.abs().max()
        for rows in (slice(None), slice(8, None)):  # also those alone that the hard pair dwarfs
            allowed = 1.5 * (plain - want)[rows].norm() + 2**-11 * want[rows].norm()
            assert (got - want)[rows].norm() <= allowed + lost * want[rows].numel() ** 0.5


@pytest.mark.parametrize(
    ("value", "side", "row"),
    [(torch.nan, 0, 0), (torch.inf, 0, 44), (-torch.inf, 1, 32), (torch.nan, 1, 49)],
)
def test_non_finite_input_surfaces(loss, value, side, row):
    pair = [x.abs().requires_grad_() for x in embeddings(EXTRAS, torch.bfloat16)]
    with torch.no_grad():
        pair[side][row, 3] = value
    result = loss(*pair, num_pairs=EXTRAS.pairs, backend="triton")
    assert not result.isfinite()
    result.backward()
    assert not pair[0].grad.isfinite().any() and not pair[1].grad.isfinite().any()


def test_excluded_non_finite_and_overflowing_input_surfaces(loss):
    images, captions = embeddings(CASES[2], torch.float32)
    ids = torch.zeros(len(images), dtype=torch.int64)
    huge = loss(1e30 * images, 1e30 * captions, backend="triton")
    images[5] = torch.nan
    excluded = loss(images, captions, image_ids=ids, caption_ids=ids, backend="triton")
    assert not huge.isfinite() and not excluded.isfinite()


def test_strided_and_expanded_views(loss):
    images, captions = embeddings(EXTRAS, torch.bfloat16)
    expected = differentiated(loss, (images, captions), EXTRAS)
    wide = torch.full((45, 61), torch.nan, dtype=torch.bfloat16)
    wide[:, 3:51:2] = images
    views = wide[:, 3:51:2], captions.T.contiguous().T
    for got, want in zip(differentiated(loss, views, EXTRAS), expected, strict=True):
        assert torch.equal(got, want)
    one = captions[:1].expand(50, 24)
    copied = differentiated(loss, (images, one.contiguous()), EXTRAS)
    for got, want in zip(differentiated(loss, (images, one), EXTRAS), copied, strict=True):
        assert torch.equal(got, want)


def far_apart(x, path):
    """x with its last rows more than 2^31 entries behind the first, in a file that is mostly a hole."""
    stride = 2**31 // (len(x) - 1) + 1
    storage = torch.from_file(str(path), shared=True, size=len(x) * stride, dtype=x.dtype)
    view = storage.as_strided(x.shape, (stride, 1))
    return view.copy_(x)


def test_offsets_beyond_2_to_the_31(loss, tmp_path):
    case = CASES[2]
    images, captions = embeddings(case, torch.bfloat16)
    apart = far_apart(images, tmp_path / "images")
    expected = differentiated(loss, (images, captions), case)
    for got, want in zip(differentiated(loss, (apart, captions), case), expected, strict=True):
        assert torch.equal(got, want)
    scores = images @ captions.T
    expected = loss(scores=scores, num_pairs=case.pairs, backend="triton")
    apart = far_apart(scores, tmp_path / "scores")
    for view in (apart, apart.T):
        got = loss(scores=view, num_pairs=case.pairs, backend="triton")
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_sorted_scatter_equals_searching(monkeypatch):
    """More than MAX_UNLISTED_ANCHORS pairs take the sort; both add in the same order."""
    pair = integer_embeddings(EXTRAS, torch.float32)  # ties abound: some rows are chosen many times
    expected = differentiated(LOSSES["hardest"], pair, EXTRAS, reduction="none")
    monkeypatch.setattr(configs, "MAX_UNLISTED_ANCHORS", 0)
    for got, want in zip(
        differentiated(LOSSES["hardest"], pair, EXTRAS, reduction="none"), expected, strict=True
    ):
        assert torch.equal(got, want)


def test_bitwise_repeatable(loss):
    pair = embeddings(EXTRAS, torch.bfloat16)
    first = differentiated(loss, pair, EXTRAS)
    for a, b in zip(first, differentiated(loss, pair, EXTRAS), strict=True):
        assert torch.equal(a, b)


def test_full_graph_compilation(loss):
    pair = embeddings(EXTRAS, torch.bfloat16)
    expected = differentiated(loss, pair, EXTRAS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(differentiated(compiled, pair, EXTRAS), expected, strict=True):
        assert torch.equal(got, want)


def test_workspace_option():
    before = backend.workspace_bytes()
    backend.set_workspace_bytes(1 << 20)
    assert backend.workspace_bytes() == 1 << 20
    backend.set_workspace_bytes(before)
    for wrong, kind in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="num_bytes"):
            backend.set_workspace_bytes(wrong)


@settings(
    max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    ids=st.sampled_from([None, "groups of five", "all equal", "unrelated"]),
    data=st.data(),
)
def test_any_shape(sizes, dtype, ids, data):
    rows, columns, dim = sizes
    pairs = data.draw(st.integers(1, min(rows, columns)))
    check_accuracy(LOSSES["all_negatives"], Case("", rows, columns, pairs, dim, ids), dtype)
    check_accuracy(LOSSES["hinge_sum"], Case("", rows, columns, pairs, dim, ids), dtype)
