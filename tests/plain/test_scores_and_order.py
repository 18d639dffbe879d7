"""Losses on a given score matrix, and with the order similarity: every backend, every case.

The truth are the formulas of formulas.py on S, in float64; with S for images and the unit matrix for
captions they take a score matrix.
"""

import formulas
import pytest
import torch
from cases import CASES, embeddings, ids_of, integer_embeddings
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_vse

LOSSES = {
    "all_negatives": (
        lambda *x, **o: fused_vse.all_negatives_loss(*x, temperature=0.3, margin=0.1, **o),
        lambda *x: formulas.all_negatives(*x, temperature=0.3, margin=0.1),
    ),
    "hardest_negative": (fused_vse.hardest_negative_loss, formulas.hardest_negative),
    "smooth": (
        lambda *x, **o: fused_vse.hardest_negative_loss(*x, smooth=True, **o),
        lambda *x: formulas.hardest_negative(*x, smooth=True),
    ),
    "hinge": (fused_vse.hinge_loss, formulas.hinge),
    "hinge_hardest": (
        lambda *x, **o: fused_vse.hinge_loss(*x, hardest=True, **o),
        lambda *x: formulas.hinge(*x, hardest=True),
    ),
    "positives": (
        lambda *x, **o: fused_vse.all_negatives_loss(*x, equal_ids="positive", **o),
        lambda *x: formulas.all_negatives(*x, equal_ids="positive"),
    ),
    "false_negatives": (
        lambda *x, **o: fused_vse.all_negatives_loss(*x, false_negative_margin=0.1, **o),
        lambda *x: formulas.all_negatives(*x, false_negative_margin=0.1),
    ),
    "select": (
        lambda *x, **o: fused_vse.hardest_negative_loss(*x, select=0.2, **o),
        lambda *x: formulas.hardest_negative(*x, select=0.2),
    ),
    "sigmoid": (
        lambda *x, **o: fused_vse.sigmoid_loss(*x, bias=-1.0, **o),
        lambda *x: formulas.sigmoid(*x, bias=-1.0),
    ),
    "sigmoid_positives": (
        lambda *x, **o: fused_vse.sigmoid_loss(*x, bias=-1.0, equal_ids="positive", **o),
        lambda *x: formulas.sigmoid(*x, bias=-1.0, equal_ids="positive"),
    ),
}
losses = pytest.mark.parametrize("name", LOSSES)
# The formulas take seconds at thousands of columns; test_several_blocks_and_panels goes there.
cases = pytest.mark.parametrize(
    "case", [c for c in CASES if max(c.rows, c.columns) < 1000], ids=str
)
both = pytest.mark.parametrize("kind", ["scores", "order"])


def order_scores(images, captions):
    """One row of S after another."""
    rows = [(captions - image).relu().square().sum(1) for image in images]
    squares = torch.stack(rows)
    zero = squares == 0
    return -squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def inputs_of(kind, case, dtype=torch.float64, make=embeddings):
    images, captions = make(case, torch.float64)
    if kind == "scores":
        return [(images @ captions.T).to(dtype)]
    return [images.abs().to(dtype), captions.abs().to(dtype)]


def ours(kind, name, inputs, case, **options):
    """[2, K]"""
    ids = dict(zip(("image_ids", "caption_ids"), ids_of(case), strict=True))
    options = {**ids, "num_pairs": case.pairs, "reduction": "none", **options}
    if kind == "scores":
        return LOSSES[name][0](scores=inputs[0], **options)
    return LOSSES[name][0](*inputs, similarity="order", **options)


def truth(kind, name, inputs, case):
    """[2, K]"""
    scores = inputs[0] if kind == "scores" else order_scores(*inputs)
    unit = torch.eye(case.columns, dtype=scores.dtype)
    return LOSSES[name][1](scores, unit, ids_of(case), case.pairs)


def with_gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(leaves)
    upstream = torch.linspace(-0.5, 1.5, loss.numel()).to(loss.dtype).view_as(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream, allow_unused=True)


def compare(kind, name, case, backend, dtype, tolerance, **options):
    inputs = inputs_of(kind, case, dtype)
    actual = with_gradients(lambda x: ours(kind, name, x, case, backend=backend, **options), inputs)
    expected = with_gradients(lambda x: truth(kind, name, x, case), [x.double() for x in inputs])
    for what, x, y in zip(("loss", "first", "second"), actual, expected, strict=False):
        assert x.dtype == (torch.promote_types(dtype, torch.float32) if what == "loss" else dtype)
        assert_close(x, torch.zeros_like(x) if y is None else y, tolerance, f"{name} {what}")


@losses
@cases
@both
def test_equal_to_the_formulas(kind, case, name, backend):
    compare(kind, name, case, backend, torch.float64, 1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
@losses
@pytest.mark.parametrize("case", [CASES[i] for i in (5, 7, 10)], ids=str)
@both
def test_other_dtypes(kind, case, name, dtype, tolerance, backend):
    compare(kind, name, case, backend, dtype, tolerance)


@cases
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_ties_go_to_the_smallest_index(case, dtype, backend):
    """Integers: scores, indices and gradients are exact."""
    scores = inputs_of("scores", case, dtype, integer_embeddings)[0].clamp(-100, 100)
    options = dict(zip(("image_ids", "caption_ids"), ids_of(case), strict=True))
    options |= {"num_pairs": case.pairs}
    found = fused_vse.hardest_negatives(scores=scores, backend=backend, **options)
    images = scores.double()
    unit = torch.eye(case.columns, dtype=torch.float64)
    triples = formulas.negatives_of(images, unit, *ids_of(case), case.pairs)
    for k, (p, row, negative) in enumerate(triples):
        direction, anchor = divmod(k, case.pairs)
        assert found.positive_scores[anchor] == p
        if not negative.any():
            assert found.indices[direction, anchor] == -1
            assert found.scores[direction, anchor] == -torch.inf
            continue
        best = row.masked_fill(~negative, -torch.inf)
        assert found.scores[direction, anchor] == best.max()
        assert found.indices[direction, anchor] == (best == best.max()).nonzero()[0]


@pytest.mark.parametrize("view", ["transposed", "strided", "offset", "expanded"])
@losses
def test_views_of_scores(view, name, backend):
    case = CASES[5]
    scores = inputs_of("scores", case)[0]
    expected = ours("scores", name, [scores], case, backend=backend)
    if view == "transposed":
        scores = scores.T.contiguous().T
    elif view == "strided":
        scores = torch.stack([scores, scores + 1], 2)[..., 0]
    elif view == "offset":
        scores = torch.nn.functional.pad(scores, (3, 2, 1, 0))[1:, 3:-2]
    else:
        scores = scores[:1].expand_as(scores)
        expected = ours("scores", name, [scores.clone()], case, backend=backend)
    loss, gradient = with_gradients(
        lambda x: ours("scores", name, [x[0]], case, backend=backend), [scores]
    )
    assert torch.equal(loss, expected)
    assert gradient.shape == scores.shape and gradient.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (44, 3), (7, 49)])
@losses
def test_non_finite_scores_surface(place, bad, name, backend):
    case = CASES[7]
    scores = inputs_of("scores", case, torch.float32)[0]
    scores[place] = bad
    loss, gradient = with_gradients(
        lambda x: ours("scores", name, x, case, backend=backend).sum(), [scores]
    )
    assert loss.isnan() and (backend == "reference" or gradient.isnan().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@losses
def test_non_finite_embeddings_surface(bad, name, backend):
    case = CASES[7]
    for side in (0, 1):
        inputs = inputs_of("order", case, torch.float32)
        inputs[side][44, 2] = bad
        assert ours("order", name, inputs, case, backend=backend).isnan().any()


@losses
def test_what_no_anchor_sees_is_not_looked_at(name, backend):
    case = CASES[7]  # 45 x 50, 33 pairs
    scores = inputs_of("scores", case)[0]
    expected = ours("scores", name, [scores], case, backend=backend)
    scores[33:, 33:] = torch.randn(12, 17, dtype=torch.float64) * 1e6
    loss, gradient = with_gradients(
        lambda x: ours("scores", name, x, case, backend=backend), [scores]
    )
    assert torch.equal(loss, expected) and not gradient[33:, 33:].any()


@both
@losses
def test_return_statistics(kind, name, backend):
    case = CASES[8]
    inputs = inputs_of(kind, case)
    loss, statistics = ours(kind, name, inputs, case, backend=backend, return_statistics=True)
    scores = inputs[0] if kind == "scores" else order_scores(*inputs)
    assert_close(loss, truth(kind, name, inputs, case), 1e-11)
    assert_close(statistics.positive_scores, scores.diagonal()[: case.pairs], 1e-12)
    assert statistics.hardest_indices.shape == (2, case.pairs)


@both
@pytest.mark.parametrize("name", ["all_negatives", "smooth"])
def test_gradient_of_the_temperature(kind, name, backend):
    case = CASES[10]
    inputs = inputs_of(kind, case)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = dict(zip(("image_ids", "caption_ids"), ids_of(case), strict=True))
    function = fused_vse.all_negatives_loss
    options = {"num_pairs": case.pairs, "temperature": temperature, "backend": backend, **ids}
    if name == "smooth":
        function, options["smooth"] = fused_vse.hardest_negative_loss, True

    def loss():
        if kind == "scores":
            return function(scores=inputs[0], **options)
        return function(*inputs, similarity="order", **options)

    (gradient,) = torch.autograd.grad(loss(), temperature)
    with torch.no_grad():
        temperature += 1e-6
        above = loss()
        temperature -= 2e-6
        below = loss()
    assert_close(gradient, (above - below) / 2e-6, 1e-7)


def test_order_needs_a_positive_part_to_move(backend):
    """At the kink of the norm the gradient is 0 in both directions, and nothing is NaN."""
    images = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    captions = (images.detach() - torch.arange(6.0)[:, None].double()).requires_grad_()
    for name in LOSSES:
        loss = LOSSES[name][0](images, captions, similarity="order", backend=backend)
        gradients = torch.autograd.grad(loss, (images, captions))
        assert all(gradient.isfinite().all() for gradient in gradients)
    below = torch.autograd.grad(
        fused_vse.hinge_loss(images, captions - 9, similarity="order", backend=backend), images
    )
    assert not below[0].any()


@both
@pytest.mark.parametrize("name", [x for x in LOSSES if not x.startswith("sigmoid")])
def test_gradients_in_one_direction_only(kind, name, backend):
    """One side without a gradient, and weights of 0."""
    case = CASES[5]
    inputs = inputs_of(kind, case)
    expected = with_gradients(lambda x: truth(kind, name, x, case)[0], inputs)
    inputs[0].requires_grad_()
    weighted = ours(kind, name, inputs, case, backend=backend, direction_weights=(1, 0))
    assert not weighted[1].any()
    upstream = torch.linspace(-0.5, 1.5, case.pairs).double()
    (gradient,) = torch.autograd.grad(weighted[0], inputs[0], upstream)
    assert_close(gradient, expected[1], 1e-11)


@both
@losses
def test_threads_change_nothing(kind, name):
    case = CASES[16]._replace(columns=1100)
    inputs = inputs_of(kind, case, torch.float32)
    answers, threads = [], torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        answers.append(with_gradients(lambda x: ours(kind, name, x, case), inputs))
    torch.set_num_threads(threads)
    for x, y in zip(*answers, strict=True):
        assert torch.equal(x, y)


@both
@losses
def test_several_blocks_and_panels(kind, name):
    """With more scores than are kept for the backward pass."""
    case = CASES[2]._replace(rows=2100, columns=2050, pairs=2040, dim=3)
    inputs = inputs_of(kind, case, torch.float32)
    actual = with_gradients(lambda x: ours(kind, name, x, case, backend="cpu"), inputs)
    inputs = [x.double() for x in inputs]
    expected = with_gradients(lambda x: ours(kind, name, x, case, backend="reference"), inputs)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, 1e-4)


@both
@losses
def test_compiles_into_one_graph(kind, name):
    torch.compiler.reset()  # each case is another function: the limit of recompilations
    case = CASES[10]
    inputs = [x.requires_grad_() for x in inputs_of(kind, case, torch.float32)]
    function = torch.compile(
        lambda *x: ours(kind, name, x, case).sum(), fullgraph=True, backend="aot_eager"
    )
    loss = function(*inputs)
    assert torch.isclose(loss, ours(kind, name, inputs, case).sum())
    gradients = torch.autograd.grad(loss, inputs)
    expected = torch.autograd.grad(ours(kind, name, inputs, case).sum(), inputs)
    for x, y in zip(gradients, expected, strict=True):
        assert torch.equal(x, y)


@both
def test_double_backward_is_refused(kind):
    case = CASES[2]
    inputs = [x.requires_grad_() for x in inputs_of(kind, case)]
    for name in LOSSES:
        loss = ours(kind, name, inputs, case, backend="cpu").sum()
        (gradient, *_) = torch.autograd.grad(loss, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.sum(), inputs)


def test_bad_arguments():
    x = torch.randn(4, 4)
    for options, error, match in (
        ({"scores": x, "images": x}, TypeError, "not both"),
        ({"scores": [1.0]}, TypeError, r"scores must be .* \[N, M\]"),
        ({"scores": x.long()}, TypeError, "scores must be"),
        ({"scores": x[0]}, ValueError, "scores must be"),
        ({"scores": x[:0]}, ValueError, "scores is empty"),
        ({"scores": x[:3]}, ValueError, "num_pairs must be given"),
        ({"scores": x, "num_pairs": 5}, ValueError, "between 1 and 4"),
        ({"scores": x, "image_ids": torch.arange(4)}, ValueError, "caption_ids is missing"),
        (
            {"scores": x, "image_ids": torch.arange(4), "caption_ids": torch.arange(3)},
            ValueError,
            "caption_ids must hold one integer for each row of scores.T, 4",
        ),
        ({"scores": x, "normalize": True}, ValueError, "normalize"),
        ({"scores": x, "similarity": "order"}, ValueError, "similarity"),
        (
            {"images": x, "captions": x, "similarity": "cosine"},
            ValueError,
            "similarity must be one of",
        ),
        ({}, TypeError, "images and captions are missing"),
    ):
        for function in (fused_vse.hinge_loss, fused_vse.hardest_negatives):
            with pytest.raises(error, match=match):
                function(**options)


def test_modules_take_scores():
    scores = torch.randn(5, 5)
    assert fused_vse.HingeLoss()(scores=scores) == fused_vse.hinge_loss(scores=scores)
    module = fused_vse.AllNegativesLoss(0.2, learnable_temperature=True)
    assert torch.isclose(
        module(scores=scores), fused_vse.all_negatives_loss(scores=scores, temperature=0.2)
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.data())
def test_any_shape_and_ids(rows, columns, dim, data):
    pairs = data.draw(st.integers(1, min(rows, columns)))
    case = CASES[0]._replace(rows=rows, columns=columns, pairs=pairs, dim=dim)
    case = case._replace(ids=data.draw(st.sampled_from([None, "groups of five", "unrelated"])))
    for kind in ("scores", "order"):
        compare(kind, data.draw(st.sampled_from(list(LOSSES))), case, "cpu", torch.float64, 1e-11)
