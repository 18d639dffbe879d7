"""Every loss and option against the formulas written out in formulas.py, values and gradients."""

import itertools

import formulas
import pytest
import torch
from cases import CASES, embeddings, ids_of, integer_embeddings
from conftest import assert_close

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss, sigmoid_loss

LOSSES = {
    "all_negatives": (all_negatives_loss, formulas.all_negatives, {}),
    "all_negatives_margin": (all_negatives_loss, formulas.all_negatives, {"margin": 0.15}),
    "all_negatives_cold": (all_negatives_loss, formulas.all_negatives, {"temperature": 0.01}),
    "hardest": (hardest_negative_loss, formulas.hardest_negative, {}),
    "hardest_smooth": (
        hardest_negative_loss,
        formulas.hardest_negative,
        {"smooth": True, "margin": 0.1},
    ),
    "hinge_sum": (hinge_loss, formulas.hinge, {}),
    "hinge_max": (hinge_loss, formulas.hinge, {"hardest": True, "margin": 0.3}),
    "all_negatives_positive": (
        all_negatives_loss,
        formulas.all_negatives,
        {"equal_ids": "positive"},
    ),
    "all_negatives_hardness": (
        all_negatives_loss,
        formulas.all_negatives,
        {"hardness": 4.0, "margin": 0.1},
    ),
    "all_negatives_false": (
        all_negatives_loss,
        formulas.all_negatives,
        {"false_negative_margin": -0.2, "hardness": 1.0},
    ),
    "hardest_select": (hardest_negative_loss, formulas.hardest_negative, {"select": 0.3}),
    "hardest_semi": (
        hardest_negative_loss,
        formulas.hardest_negative,
        {"false_negative_margin": 1e-3, "margin": 0.4},
    ),
    "smooth_false": (
        hardest_negative_loss,
        formulas.hardest_negative,
        {"false_negative_margin": -0.1, "smooth": True},
    ),
    "hinge_false": (hinge_loss, formulas.hinge, {"false_negative_margin": 0.1}),
    "hinge_semi": (hinge_loss, formulas.hinge, {"hardest": True, "false_negative_margin": 1e-3}),
    "sigmoid": (sigmoid_loss, formulas.sigmoid, {}),
    "sigmoid_positive": (
        sigmoid_loss,
        formulas.sigmoid,
        {"equal_ids": "positive", "bias": -3.0, "temperature": 0.2},
    ),
}
DIRECTED = [name for name in LOSSES if not name.startswith("sigmoid")]
WITH_TEMPERATURE = [name for name in LOSSES if not name.startswith("hinge")]


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_formula(case, name, loss_backend):
    loss, formula, options = LOSSES[name]
    ids = ids_of(case)
    expected_inputs = leaves(*embeddings(case))
    expected = formula(*expected_inputs, ids, case.pairs, **options)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    expected.backward(upstream)

    inputs = leaves(*embeddings(case))
    actual = loss(
        *inputs,
        image_ids=ids[0],
        caption_ids=ids[1],
        num_pairs=case.pairs,
        reduction="none",
        backend=loss_backend,
        **options,
    )
    assert actual.shape == expected.shape and actual.dtype == torch.float64
    actual.backward(upstream)
    assert_close(actual, expected, 1e-12, "loss")
    for side, tensor, reference in zip(
        ("images", "captions"), inputs, expected_inputs, strict=True
    ):
        assert_close(tensor.grad, reference.grad, 1e-11, f"d_{side}")


@pytest.mark.parametrize("name", DIRECTED)
@pytest.mark.parametrize(
    ("weights", "reduction"),
    list(itertools.product([(1.0, 1.0), (0.5, 0.5), (1, 0), (0.25, 2.0)], ["mean", "sum", "none"])),
)
def test_reductions_and_direction_weights(name, weights, reduction, loss_backend):
    loss, formula, options = LOSSES[name]
    case = CASES[7]
    inputs, expected_inputs = leaves(*embeddings(case)), leaves(*embeddings(case))
    expected = formulas.reduced(
        formula(*expected_inputs, (None, None), case.pairs, **options), weights, reduction
    )
    actual = loss(
        *inputs,
        num_pairs=case.pairs,
        direction_weights=weights,
        reduction=reduction,
        backend=loss_backend,
        **options,
    )
    assert_close(actual, expected, 1e-12, "loss")
    (actual**2).sum().backward()  # an upstream gradient that is not 1
    (expected**2).sum().backward()
    for tensor, reference in zip(inputs, expected_inputs, strict=True):
        assert_close(tensor.grad, reference.grad, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_positive"])
def test_reductions_of_the_sigmoid_loss(name, reduction, loss_backend):
    loss, formula, options = LOSSES[name]
    case = CASES[7]
    expected = formula(*embeddings(case), (None, None), case.pairs, **options)
    options = {"num_pairs": case.pairs, "reduction": reduction, "backend": loss_backend, **options}
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    assert_close(loss(*embeddings(case), **options), expected, 1e-12)


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_temperature_and_bias(case, name, loss_backend):
    loss, formula, options = LOSSES[name]
    ids = dict(zip(("image_ids", "caption_ids"), ids_of(case), strict=True))
    gradients = []
    for function in (loss, formula):
        leaves = {"temperature": torch.tensor(0.07, dtype=torch.float64, requires_grad=True)}
        if loss is sigmoid_loss:
            leaves["bias"] = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
        own = options | leaves
        if function is formula:
            value = formula(*embeddings(case), ids_of(case), case.pairs, **own).sum() / case.pairs
        else:
            own |= ids | {"num_pairs": case.pairs, "backend": loss_backend}
            value = loss(*embeddings(case), **own)
        value.backward()
        gradients.append([x.grad for x in leaves.values()])
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, 1e-11, "gradient")


@pytest.mark.parametrize("name", LOSSES)
def test_normalize_folds_in_the_normalisation(name, loss_backend):
    loss, _, options = LOSSES[name]
    case = CASES[7]
    raw = [3 * x for x in embeddings(case, normalize=False)]
    results = []
    for fold in (True, False):
        inputs = leaves(*raw)
        rows = inputs if fold else [torch.nn.functional.normalize(x) for x in inputs]
        value = loss(*rows, num_pairs=case.pairs, normalize=fold, backend=loss_backend, **options)
        value.backward()
        results.append([value, *(x.grad for x in inputs)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-12)


def test_normalize_of_a_zero_row_is_zero_with_a_finite_gradient(loss_backend):
    images, captions = leaves(*embeddings(CASES[2]))
    with torch.no_grad():
        images[3] = 0
    all_negatives_loss(images, captions, normalize=True, backend=loss_backend).backward()
    expected = images.detach().clone().requires_grad_()
    rows = torch.nn.functional.normalize(expected), torch.nn.functional.normalize(captions.detach())
    all_negatives_loss(*rows, backend="reference").backward()
    assert_close(images.grad, expected.grad, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        *((torch.float32, power) for power in (40, 64, 90, 125, -60, -120)),
        *((torch.bfloat16, power) for power in (64, 125, -60, -120)),
        *((torch.float64, power) for power in (90, 499, 512, 800, 1021, -60, -800)),
    ],
    ids=str,
)
def test_normalize_of_rows_whose_squares_overflow_or_underflow(dtype, power, backend):
    """As torch.nn.functional.normalize would, if squares had more exponents; 1e-12 is its least norm."""
    images, captions = (x.to(dtype) for x in embeddings(CASES[7], normalize=False))
    factor = torch.tensor(2.0, dtype=torch.float64).pow(power)
    images[::2] = (images[::2] * factor).to(dtype)
    unit = torch.nn.functional.normalize(images.double() / factor)
    rows = images.double() / 1e-12 if power < 0 else unit
    rows[1::2] = torch.nn.functional.normalize(images[1::2].double())
    images.requires_grad_()
    options = {"num_pairs": CASES[7].pairs, "backend": backend}
    value = all_negatives_loss(images, captions, normalize=True, **options)
    expected = all_negatives_loss(
        rows.to(dtype), torch.nn.functional.normalize(captions), num_pairs=CASES[7].pairs
    )
    assert_close(value, expected, 2e-2 if dtype is torch.bfloat16 else 1e-5)
    value.backward()
    assert images.grad.isfinite().all() and (images.grad[1::2] != 0).any()
    # It has no part along the row, up to rounding and to what is too small for a float.
    along = (images.grad.double() * unit).sum(1).abs()[::2]
    assert (
        power < 0
        or (along <= 1e-2 * images.grad[::2].double().abs().amax(1) + torch.finfo(dtype).tiny).all()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", [c for c in CASES if c.dim <= 33], ids=str)
def test_integer_embeddings_are_exact(case, dtype, loss_backend):
    """All arithmetic is exact, so values, ties and gradients must be equal to the last bit."""
    ids = ids_of(case)
    for loss, formula, options in (
        (hardest_negative_loss, formulas.hardest_negative, {"temperature": 0.5, "margin": 1}),
        (hinge_loss, formulas.hinge, {"margin": 2}),
        (hinge_loss, formulas.hinge, {"margin": 1, "hardest": True}),
    ):
        inputs = leaves(*integer_embeddings(case, dtype))
        expected_inputs = leaves(*integer_embeddings(case, torch.float64))
        expected = formula(*expected_inputs, ids, case.pairs, **options).sum()
        actual = loss(
            *inputs,
            image_ids=ids[0],
            caption_ids=ids[1],
            num_pairs=case.pairs,
            reduction="sum",
            backend=loss_backend,
            **options,
        )
        assert actual.item() == expected.item()
        actual.backward()
        expected.backward()
        for tensor, reference in zip(inputs, expected_inputs, strict=True):
            assert tensor.grad.dtype == dtype
            # An entry beyond 256 is rounded once to bfloat16 on its way out.
            assert torch.equal(tensor.grad, reference.grad.to(dtype))


def test_is_twice_the_clip_loss(loss_backend):
    images, captions = embeddings(CASES[2])
    logits, labels = images @ captions.T / 0.1, torch.arange(len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(logits, labels) + cross_entropy(logits.T, labels)
    assert_close(all_negatives_loss(images, captions, backend=loss_backend), expected, 1e-12)


def test_equals_vsepp(loss_backend):
    """The formula of VSE++'s released loss, with margin 0.2 and its in-place mask."""
    images, captions = embeddings(CASES[2])
    for hardest in (False, True):
        scores = images @ captions.T
        diagonal = scores.diag().view(-1, 1)
        cost_captions = (0.2 + scores - diagonal).clamp(min=0)
        cost_images = (0.2 + scores - diagonal.T).clamp(min=0)
        eye = torch.eye(len(scores), dtype=torch.bool)
        cost_captions, cost_images = (
            cost.masked_fill(eye, 0) for cost in (cost_captions, cost_images)
        )
        if hardest:
            cost_captions, cost_images = cost_captions.max(1)[0], cost_images.max(0)[0]
        actual = hinge_loss(images, captions, hardest=hardest, backend=loss_backend)
        assert_close(actual, cost_captions.sum() + cost_images.sum(), 1e-12)
