"""The order similarity and given score matrices of the Triton backend in Triton's interpreter, against
the float64 oracle. Collected by test_triton_interpreter.py alone, like triton_interpreter_cases.py.
"""

import interpreted  # noqa: F401
import pytest
import torch
from cases import CASES, embeddings, ids_of, integer_embeddings
from triton_interpreter_cases import DTYPES, EXTRAS, LOSSES, SMALL_CASES, SMALLEST, error

from fused_vse import hardest_negatives
from fused_vse.backends.triton import configs, forward, plan
from fused_vse.ops import DOT, ORDER, Batch

# The oracle is float64 as well, and a sum of 10^4 terms of both signs in another order.
SMALLEST = {**SMALLEST, torch.float64: 2**-42}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.expensive]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture(params=["scores", "order"])
def kind(request):
    return request.param


def inputs_of(kind, case, dtype, make=embeddings):
    images, captions = make(case, torch.float64)
    if kind == "scores":
        return [(images @ captions.T).to(dtype)]
    return [images.abs().to(dtype), captions.abs().to(dtype)]


def call(function, kind, inputs, case, name="triton", **options):
    options |= dict(zip(("image_ids", "caption_ids"), ids_of(case), strict=True))
    options |= {"num_pairs": case.pairs, "backend": name}
    if kind == "scores":
        return function(scores=inputs[0], **options)
    return function(*inputs, similarity="order", **options)


def differentiated(loss, kind, inputs, case, name="triton", **options):
    """[loss, one gradient for each input, d_temperature if it is among the options]"""
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = call(loss, kind, inputs, case, name, **options)
    weights = torch.linspace(-1, 2, result.numel()).view(result.shape).to(result.dtype)
    (result * weights if result.dim() else result).sum().backward()
    temperature = options.get("temperature")
    return [result.detach(), *(x.grad for x in inputs)] + (
        [temperature.grad] if isinstance(temperature, torch.Tensor) else []
    )


def check_accuracy(loss, kind, case, dtype):
    """Errors against the oracle are at most 3 times those of the same formulas in plain PyTorch."""
    inputs = inputs_of(kind, case, dtype)

    def run(name, dtype):
        options = {"reduction": "none"}
        if loss is LOSSES["all_negatives"]:
            accumulation = torch.promote_types(dtype, torch.float32)
            options["temperature"] = torch.tensor(0.1, dtype=accumulation, requires_grad=True)
        return differentiated(loss, kind, [x.to(dtype) for x in inputs], case, name, **options)

    expected, plain = run("reference", torch.float64), run("reference", dtype)
    for got, eager, want in zip(run("triton", dtype), plain, expected, strict=True):
        assert got.dtype == eager.dtype
        assert error(got, want) <= 3 * error(eager, want) + SMALLEST[got.dtype], (case, dtype)


@pytest.mark.expensive(few=4)
@pytest.mark.parametrize(("number", "case"), list(enumerate(SMALL_CASES)), ids=str)
def test_accuracy(number, case, kind, loss):
    check_accuracy(loss, kind, case, DTYPES[number % 4])


@pytest.mark.expensive(few=4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rectangles_of_one_tile_row(loss, kind, dtype, monkeypatch):
    """The smallest workspace, and nothing kept for the backward pass."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.INTERPRETER._replace(block_m=16))
    monkeypatch.setattr(forward, "MAX_SAVED_SCORES", 0)
    monkeypatch.setattr(plan, "_workspace_bytes", 1)
    check_accuracy(loss, kind, EXTRAS, dtype)


@pytest.mark.expensive(few=4)
@pytest.mark.parametrize(("number", "case"), list(enumerate(SMALL_CASES)), ids=str)
def test_ties_go_to_the_smallest_index(number, case, kind):
    """Integers: sums, and with them ties, are exact."""
    inputs = inputs_of(kind, case, DTYPES[(number + 1) % 4], integer_embeddings)
    inputs = [x.clamp(-100, 100) for x in inputs]
    got = call(hardest_negatives, kind, inputs, case)
    want = call(hardest_negatives, kind, [x.double() for x in inputs], case, "reference")
    assert torch.equal(got.indices, want.indices)
    for a, b in ((got.scores, want.scores), (got.positive_scores, want.positive_scores)):
        # The root is rounded, to the accumulation type.
        # (The oracle's own, in float64, is not always to nearest.)
        assert (a - b.to(a.dtype)).nan_to_num().abs().max() <= 2**-50 * (a.dtype == torch.float64)
        assert torch.equal(a == -torch.inf, b == -torch.inf)


@pytest.mark.expensive(few=2)
@pytest.mark.parametrize(
    ("kind", "view"),
    [*(("scores", view) for view in ("transposed", "strided", "offset", "expanded")),
     ("order", "transposed"), ("order", "expanded")],
)  # fmt: skip
def test_views(kind, view, loss):
    inputs = inputs_of(kind, EXTRAS, torch.float32)
    views = []
    for x in inputs:
        if view == "transposed":
            views.append(x.T.contiguous().T)
        elif view == "strided":
            views.append(torch.stack([x, x + torch.nan], 2)[..., 0])
        elif view == "offset":
            views.append(torch.nn.functional.pad(x, (3, 2, 1, 0), value=torch.nan)[1:, 3:-2])
        else:
            views.append(x[:1].expand_as(x))
    if view == "expanded":
        inputs = [x.contiguous() for x in views]
    expected = differentiated(loss, kind, inputs, EXTRAS)
    for got, want in zip(differentiated(loss, kind, views, EXTRAS), expected, strict=True):
        assert torch.equal(got, want)


def test_addresses_beyond_two_to_the_31(loss, monkeypatch):
    """Four rows of scores that lie 2^30 entries apart; nothing else of that memory is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = CASES[2]._replace(rows=4, columns=4, pairs=4)
    far = torch.empty(3 * 2**30 + 4, dtype=torch.float16).as_strided((4, 4), (2**30, 1))
    scores = inputs_of("scores", case, torch.float16)
    far.copy_(scores[0])
    expected = differentiated(loss, "scores", scores, case)
    for got, want in zip(differentiated(loss, "scores", [far], case), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("value", "place"), [(torch.nan, (44, 3)), (-torch.inf, (7, 49)), (torch.inf, (0, 0))]
)
def test_non_finite_scores_surface(value, place, loss, monkeypatch):
    """Everywhere, even in what an earlier rectangle has finished."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.INTERPRETER._replace(block_m=16))
    monkeypatch.setattr(plan, "_workspace_bytes", 1)
    scores = inputs_of("scores", EXTRAS, torch.float32)
    scores[0][place] = value
    result, gradient = differentiated(loss, "scores", scores, EXTRAS, reduction="none")
    assert result.isnan().all() and gradient.isnan().all()


@pytest.mark.parametrize("source", ["dot", "order", "given"])
def test_nothing_is_active_in_poisoned_input(source, monkeypatch):
    """Counts have no NaN: 0, as in the other backends, in what an earlier piece has finished, too."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.INTERPRETER._replace(block_m=16))
    monkeypatch.setattr(plan, "_workspace_bytes", 1)
    inputs = inputs_of("scores" if source == "given" else "dot", EXTRAS, torch.float32)
    inputs[0][44, 2] = torch.nan
    k = EXTRAS.pairs
    captions = None if source == "given" else inputs[1]
    batch = Batch(
        inputs[0], captions, None, None, k, k, 0, 0, k, ORDER if source == "order" else DOT
    )
    threshold = torch.full((2 * k,), -9.0)
    total, active, _ = torch.ops.fused_vse_triton.hinge_sum(*batch, None, threshold, False)
    assert total.isnan().all() and not active.any()


@pytest.mark.parametrize(("value", "side"), [(torch.nan, 0), (torch.inf, 1), (1e30, 1)])
def test_non_finite_and_overflowing_embeddings_surface(value, side, loss):
    inputs = inputs_of("order", EXTRAS, torch.float32)
    inputs[side][44, 2] = value
    result, *gradients = differentiated(loss, "order", inputs, EXTRAS, reduction="none")
    assert result.isnan().all() and all(x.isnan().all() for x in gradients)


def test_overflowing_scores_surface(loss):
    scores = inputs_of("scores", EXTRAS, torch.float32)
    scores[0][3, 4] = 3e38
    assert call(loss, "scores", scores, EXTRAS).isnan()


def test_what_no_anchor_sees_is_not_looked_at(loss):
    scores = inputs_of("scores", EXTRAS, torch.float32)
    expected = differentiated(loss, "scores", scores, EXTRAS)
    scores[0][33:, 33:] = torch.nan
    result, gradient = differentiated(loss, "scores", scores, EXTRAS)
    assert torch.equal(result, expected[0]) and torch.equal(gradient, expected[1])
    assert not gradient[33:, 33:].any()


def test_order_needs_a_positive_part_to_move(loss):
    """At the kink of the norm, where a caption equals its image, and below it, the gradient is 0."""
    case = CASES[2]._replace(rows=6, columns=6, pairs=6, dim=5)
    images = torch.rand(6, 5)
    for below in (0, 9):
        captions = images - below - torch.arange(6.0)[:, None]
        _, *gradients = differentiated(loss, "order", [images, captions], case)
        assert all(x.isfinite().all() for x in gradients)
        assert below == 0 or not any(x.any() for x in gradients)


def test_one_side_only(loss):
    inputs = inputs_of("order", EXTRAS, torch.float32)
    expected = differentiated(loss, "order", inputs, EXTRAS, reduction="sum")
    for side in (0, 1):
        leaves = [x.detach().requires_grad_(number == side) for number, x in enumerate(inputs)]
        call(loss, "order", leaves, EXTRAS, reduction="sum").backward()
        assert torch.equal(leaves[side].grad, expected[1 + side]) and leaves[1 - side].grad is None


def test_sorted_scatter_equals_searching(monkeypatch):
    inputs = inputs_of("order", EXTRAS, torch.float32, integer_embeddings)
    expected = differentiated(LOSSES["hardest"], "order", inputs, EXTRAS, reduction="none")
    monkeypatch.setattr(configs, "MAX_UNLISTED_ANCHORS", 0)
    actual = differentiated(LOSSES["hardest"], "order", inputs, EXTRAS, reduction="none")
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


def test_full_graph_compilation(kind, loss):
    torch.compiler.reset()
    inputs = inputs_of(kind, EXTRAS, torch.float32)
    expected = differentiated(loss, kind, inputs, EXTRAS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(differentiated(compiled, kind, inputs, EXTRAS), expected, strict=True):
        assert torch.equal(got, want)
