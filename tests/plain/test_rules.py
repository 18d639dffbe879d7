"""The rules that hold in every backend: non-finite input, determinism, upstream gradients, autograd,
autocast, layouts, sizes, torch.compile. (Ties and anchors without negatives: test_losses.py.)"""

import pytest
import torch
from cases import CASES, Case, embeddings
from conftest import assert_close
from torch._dynamo.testing import CompileCounter

import fused_vse
from fused_vse import (
    all_negatives_loss,
    hardest_negative_loss,
    hardest_negatives,
    hinge_loss,
    sigmoid_loss,
)
from fused_vse.backends import cpu

ALL = {
    "all_negatives": lambda *x, **k: all_negatives_loss(*x, **k),
    "hardest": lambda *x, **k: hardest_negative_loss(*x, **k),
    "smooth": lambda *x, **k: hardest_negative_loss(*x, smooth=True, **k),
    "hinge_sum": lambda *x, **k: hinge_loss(*x, **k),
    "hinge_max": lambda *x, **k: hinge_loss(*x, hardest=True, **k),
    "positives": lambda *x, **k: all_negatives_loss(*x, equal_ids="positive", **k),
    "hardness": lambda *x, **k: all_negatives_loss(*x, hardness=3.0, **k),
    "select": lambda *x, **k: hardest_negative_loss(*x, select=0.2, **k),
    "semi_hard": lambda *x, **k: hardest_negative_loss(*x, false_negative_margin=1e-3, **k),
    "sigmoid": lambda *x, bias=-2.0, **k: sigmoid_loss(*x, bias=bias, **k),
}
EXTRAS = CASES[7]  # N = 45, M = 50, K = 33, D = 24


@pytest.fixture(params=ALL)
def loss(request):
    return ALL[request.param]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("row", [0, 32, 33, -1])  # pairs and extra negatives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_non_finite_input_surfaces(loss, value, side, row, dtype, loss_backend):
    pair = [x.abs().requires_grad_() for x in embeddings(EXTRAS, dtype)]
    with torch.no_grad():
        pair[side][row, 3] = value
    result = loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend)
    assert not result.isfinite()
    if loss_backend != "reference":
        # A gradient scaler looks at the gradients, not at the loss.
        result.backward()
        assert not pair[0].grad.isfinite().any() and not pair[1].grad.isfinite().any()


def test_non_finite_input_surfaces_where_it_is_excluded(loss, loss_backend):
    """Its only pairs are excluded by ids: no statistic sees the row, the loss still must."""
    images, captions = embeddings(CASES[2])
    images[5] = torch.nan
    ids = torch.zeros(len(images), dtype=torch.int64)
    result = loss(images, captions, image_ids=ids, caption_ids=ids, backend=loss_backend)
    assert not result.isfinite()


def test_huge_but_finite_input_never_gives_a_finite_wrong_answer(loss, loss_backend):
    images, captions = (1e30 * x for x in embeddings(CASES[2], torch.float32))
    assert not loss(images, captions, backend=loss_backend).isfinite()


def gradients(loss, case, backend, dtype=torch.float32, **options):
    pair = [x.requires_grad_() for x in embeddings(case, dtype)]
    result = loss(*pair, num_pairs=case.pairs, backend=backend, **options)
    result.sum().backward()
    return [result.detach(), *(x.grad for x in pair)]


@pytest.mark.parametrize("case", [CASES[15], CASES[17], Case("search", 300, 300, 300, 64)], ids=str)
def test_deterministic(loss, case, loss_backend):
    threads = torch.get_num_threads()
    first = gradients(loss, case, loss_backend)
    try:
        for n in (1, 2, 3, threads):
            torch.set_num_threads(n)
            again = gradients(loss, case, loss_backend)
            if loss_backend == "cpu" or n == threads:
                for a, b in zip(first, again, strict=True):
                    if n == threads:
                        assert torch.equal(a, b)
                    else:  # the library's GEMM may add in another order
                        assert_close(a, b, 1e-5)
    finally:
        torch.set_num_threads(threads)


def test_any_upstream_gradient(loss, loss_backend):
    """Non-uniform, zero and negative upstream gradients with reduction="none"."""
    options = {"num_pairs": EXTRAS.pairs, "reduction": "none", "backend": loss_backend}

    def differentiated(upstream=None, entry=None):
        pair = [x.requires_grad_() for x in embeddings(EXTRAS)]
        each = loss(*pair, **options).view(-1)
        (each[entry] if upstream is None else (each * upstream).sum()).backward()
        return [x.grad for x in pair]

    upstream = torch.randn(loss(*embeddings(EXTRAS), **options).numel(), dtype=torch.float64)
    upstream[: EXTRAS.pairs : 2] = 0
    few = torch.zeros_like(upstream)
    few[::8] = upstream[::8]
    totals = [0.0, 0.0]
    for entry in range(0, len(upstream), 8):
        parts = differentiated(entry=entry)
        totals = [t + upstream[entry] * x for t, x in zip(totals, parts, strict=True)]
    for got, want in zip(differentiated(upstream=few), totals, strict=True):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("name", ["all_negatives", "hardest", "smooth"])
def test_double_backward_through_the_temperature(name, loss_backend):
    """Refused, or right: where the temperature meets the statistics in plain PyTorch only."""

    def mixed(backend):
        pair = [x.requires_grad_() for x in embeddings(CASES[2])]
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        result = ALL[name](*pair, temperature=temperature, backend=backend)
        (gradient,) = torch.autograd.grad(result, temperature, create_graph=True)
        return torch.autograd.grad(gradient, pair)

    expected = mixed("reference")
    assert expected[0].abs().sum() > 0
    composed = cpu.SMALL_ROWS == 0  # the formulas of the hardest losses are plain PyTorch then
    if loss_backend != "reference" and (name == "all_negatives" or not composed):
        with pytest.raises(RuntimeError, match="double backward"):
            mixed(loss_backend)
        return
    for got, want in zip(mixed(loss_backend), expected, strict=True):
        assert_close(got, want, 1e-12)


def test_two_forwards_before_one_backward_and_retained_graph(loss, loss_backend):
    case_a, case_b = CASES[2], EXTRAS
    pair_a = [x.requires_grad_() for x in embeddings(case_a)]
    pair_b = [x.requires_grad_() for x in embeddings(case_b)]
    total = loss(*pair_a, backend=loss_backend) + 2 * loss(
        *pair_b, num_pairs=case_b.pairs, backend=loss_backend
    )
    total.backward(retain_graph=True)
    total.backward()
    for pair, case, factor in ((pair_a, case_a, 2), (pair_b, case_b, 4)):
        expected = gradients(loss, case, loss_backend, torch.float64)[1:]
        for x, gradient in zip(pair, expected, strict=True):
            assert_close(x.grad, factor * gradient, 1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_without_grad(loss, frozen, loss_backend):
    pair = list(embeddings(EXTRAS))
    pair[1 - frozen].requires_grad_()
    loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend).backward()
    expected = gradients(loss, EXTRAS, loss_backend, torch.float64)
    assert pair[frozen].grad is None
    assert_close(pair[1 - frozen].grad, expected[2 - frozen], 1e-12)


def test_only_the_temperature_requires_grad(loss_backend):
    temperature = torch.tensor(0.1, requires_grad=True)
    images, captions = embeddings(EXTRAS, torch.float32)
    all_negatives_loss(
        images, captions, num_pairs=EXTRAS.pairs, temperature=temperature, backend=loss_backend
    ).backward()
    assert temperature.grad.isfinite()


def test_no_grad(loss, loss_backend):
    pair = [x.requires_grad_() for x in embeddings(EXTRAS)]
    with torch.no_grad():
        result = loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend)
    assert not result.requires_grad
    assert_close(result, gradients(loss, EXTRAS, loss_backend, torch.float64)[0], 1e-12)


def test_double_backward(loss, loss_backend):
    pair = [x.requires_grad_() for x in embeddings(EXTRAS)]
    result = loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend)
    (first,) = torch.autograd.grad(result, pair[0], create_graph=True)
    if loss_backend == "reference":
        return
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()


def test_strided_and_non_contiguous_input(loss, loss_backend):
    dense = [x.float() for x in embeddings(EXTRAS)]
    views = [torch.randn(x.shape[1] * 2, x.shape[0] * 3).T[::3, ::2].copy_(x) for x in dense]
    assert not any(view.is_contiguous() for view in views)
    results = []
    for pair in (dense, views):
        pair = [x.detach().requires_grad_() for x in pair]
        result = loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend)
        result.backward()
        results.append([result, *(x.grad for x in pair)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_computes_in_the_precision_of_the_embeddings(loss, dtype, loss_backend):
    pair = [x.requires_grad_() for x in embeddings(EXTRAS, dtype)]
    plain = loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend)
    expected = torch.autograd.grad(plain, pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(*pair, num_pairs=EXTRAS.pairs, backend=loss_backend)
        gradients = torch.autograd.grad(result, pair, retain_graph=True)
    assert result.dtype == torch.float32
    assert_close(result, plain, 1e-6)
    if loss_backend != "reference":  # whose backward pass is PyTorch's own
        for got, want in zip(gradients, expected, strict=True):
            assert_close(got, want, 1e-6)
    result.backward()
    assert pair[0].grad.dtype == dtype


def test_autocast_promotes_embeddings_of_different_dtypes(loss, loss_backend):
    images, captions = embeddings(EXTRAS, torch.float32)
    captions = captions.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(images, captions, num_pairs=EXTRAS.pairs, backend=loss_backend)
    expected = loss(images, captions.float(), num_pairs=EXTRAS.pairs, backend=loss_backend)
    assert_close(result, expected, 1e-6)


def eager(name, images, captions, tau=0.05):
    """The formulas in eager PyTorch at the embeddings' own dtype."""
    scores = images @ captions.T
    eye = torch.eye(len(scores), dtype=torch.bool)
    p = scores.diagonal()
    if name == "all_negatives":
        labels = torch.arange(len(scores))
        cross_entropy = torch.nn.functional.cross_entropy
        return cross_entropy(scores / tau, labels) + cross_entropy(scores.T / tau, labels)
    if name == "hardest":
        h = scores.masked_fill(eye, -torch.inf)
        return ((0.2 + h.max(1)[0] - p).relu() + (0.2 + h.max(0)[0] - p).relu()).mean() / tau
    image_hinges = (0.2 + scores - p[:, None]).relu().masked_fill(eye, 0)
    caption_hinges = (0.2 + scores - p[None, :]).relu().masked_fill(eye, 0)
    return image_hinges.sum() + caption_hinges.sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["all_negatives", "hardest", "hinge_sum"])
def test_never_less_accurate_than_eager(name, dtype, tau, seed, loss_backend):
    """Errors of loss and gradients against float64 on the same, already rounded, embeddings."""
    case = Case("accuracy", 260, 260, 260, 200)
    images, captions = embeddings(case, seed=seed)
    # Not too easy: a loss of 1e-19 is lost in the oracle's own rounding.
    captions = torch.nn.functional.normalize(captions + 2 * captions.flip(0))
    start = images.to(dtype), captions.to(dtype)

    def run(function, dtype):
        pair = [x.detach().to(dtype).requires_grad_() for x in start]
        result = function(*pair)
        result.backward()
        return [result.double(), *(x.grad.double() for x in pair)]

    options = {} if name == "hinge_sum" else {"temperature": tau}
    exact = run(lambda *x: eager(name, *x, tau), torch.float64)
    theirs = run(lambda *x: eager(name, *x, tau), dtype)
    ours = run(lambda *x: ALL[name](*x, backend=loss_backend, **options), dtype)
    # Two roundings of the same quality differ by luck: allow that, and half a unit of the result's dtype.
    slack = [torch.finfo(torch.float32).eps, *[torch.finfo(dtype).eps] * 2]
    for what, a, b, e, eps in zip(
        ("loss", "d_images", "d_captions"), ours, theirs, exact, slack, strict=True
    ):
        our_error, their_error = (a - e).norm(), (b - e).norm()
        assert our_error <= 1.5 * their_error + eps * e.norm(), (what, our_error, their_error)


@pytest.mark.expensive(few=6)
def test_compiles_without_graph_breaks(loss, loss_backend):
    torch.compiler.reset()  # every case of this test is a new version of the same code

    def step(images, captions):
        return loss(images, captions, num_pairs=EXTRAS.pairs, normalize=True, backend=loss_backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pair = [x.requires_grad_() for x in embeddings(EXTRAS, torch.float32)]
        result = function(*pair)
        result.backward()
        results.append([result, *(x.grad for x in pair)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.expensive(few=6)
def test_compiles_with_a_tensor_given_twice(loss, loss_backend):
    """The ids of both sides, and embeddings compared with themselves."""
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    rows, ids = torch.randn(6, 5), torch.tensor([0, 0, 1, 2, 3, 3])
    results = []
    for function in (loss, compiled):
        x = rows.clone().requires_grad_()
        function(x, rows, image_ids=ids, caption_ids=ids, backend=loss_backend).backward()
        y = rows.clone().requires_grad_()
        function(y, y, backend=loss_backend).backward()
        results.append((x.grad, y.grad))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.expensive(few=6)
@pytest.mark.parametrize("smallest", [40, 600])  # whole losses as one op, and composed ones
def test_compiles_once_for_batches_of_changing_sizes(smallest, loss, backend):
    """A queue that fills up: the first size, and from the second on one graph for all."""
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for n in range(smallest, smallest + 40, 8):
        images, captions = torch.randn(n, 8).requires_grad_(), torch.randn(n + 7, 8)
        ids = torch.arange(n + 7) // 2
        compiled(
            images, captions, image_ids=ids[:n], caption_ids=ids, num_pairs=n - 3, backend=backend
        ).backward()
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [3, 16, 17])
def test_temperature_gradient_of_low_scores(columns, dtype, loss_backend):
    """log Σ exp far below 0: what pads the last register of a row must not come in as exp(0 - lse)."""
    low = -75.0 if dtype is torch.float64 else -8.9416
    gradients = []
    for name in (loss_backend, "reference"):
        temperature = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        scores = torch.full((3, columns), low, dtype=dtype)
        options = {"num_pairs": 3, "temperature": temperature, "backend": name}
        (1000 * all_negatives_loss(scores=scores, **options)).backward()
        gradients.append(temperature.grad)
    # Terms of 1000 low / τ² cancel to almost nothing, each with an exponential of a rounded low / τ.
    rounding = 1000 * low / 0.1**2 * low / 0.1 * torch.finfo(dtype).eps
    assert (gradients[0] - gradients[1]).abs() <= rounding


@pytest.mark.expensive(few=6)
@pytest.mark.parametrize("name", ALL)
def test_compiles_with_numbers_that_change(name, loss_backend):
    """From the second value on, torch.compile makes a float an input of the graph."""
    torch.compiler.reset()
    loss = ALL[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    changing = {"positives": [], "sigmoid": ["bias"]}.get(name, ["margin"])
    if not name.startswith("hinge"):
        changing.append("temperature")
    pair = embeddings(CASES[2], torch.float32)
    for option in changing:
        for value in (0.1, 0.15, 0.2):
            options = {option: value, "backend": loss_backend}
            if name == "sigmoid":
                options = {"bias": 0.3} | options
            assert_close(compiled(*pair, **options), loss(*pair, **options), 1e-6)


@pytest.mark.expensive(few=6)
@pytest.mark.parametrize("name", ["positives", "hardness", "select", "semi_hard", "sigmoid"])
def test_compiles_with_ids_and_a_temperature_that_learns(name, loss_backend):
    torch.compiler.reset()
    loss = ALL[name]
    if name == "sigmoid":
        loss = lambda *x, **k: sigmoid_loss(*x, equal_ids="positive", **k)  # noqa: E731
    ids = torch.arange(37) // 3
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        pair = [x.requires_grad_() for x in embeddings(CASES[2])]
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        options = {"image_ids": ids, "caption_ids": ids, "temperature": temperature}
        value = function(*pair, backend=loss_backend, **options)
        value.backward()
        results.append([value, temperature.grad, *(x.grad for x in pair)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-10)


@pytest.mark.skipif(fused_vse.backends()["cpu"] != "available", reason="needs the cpu backend")
def test_compiles_with_inductor_and_a_learnable_temperature():
    backend = "cpu"
    module = fused_vse.AllNegativesLoss(learnable_temperature=True, backend=backend)
    compiled = torch.compile(module, fullgraph=True)
    results = []
    for function in (module, compiled):
        module.zero_grad()
        pair = [x.requires_grad_() for x in embeddings(CASES[2], torch.float32)]
        result = function(*pair)
        result.backward()
        results.append([result, module.log_temperature.grad.clone(), *(x.grad for x in pair)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-5)


def test_a_tie_of_a_whole_column_is_one_gradient(backend):
    """The plateau of hardest-negative training: all embeddings equal."""
    rows = torch.ones(300, 8).requires_grad_()
    result = hardest_negatives(rows, rows.detach(), backend=backend)
    assert (result.indices[:, 1:] == 0).all() and (result.indices[:, 0] == 1).all()
