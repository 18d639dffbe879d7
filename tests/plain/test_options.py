"""Options and losses beyond the paper's: what they refuse, what they cost, how exact they are. Their values
and gradients: test_losses.py, test_scores_and_order.py and test_ranks.py, by the tables there."""

import math
from unittest import mock

import pytest
import torch
from cases import Case, embeddings
from conftest import assert_close
from torch.nn.functional import logsigmoid, normalize

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss, sigmoid_loss
from fused_vse import formulas as of_package

I, T = torch.randn(4, 3), torch.randn(4, 3)
IDS = torch.arange(4) // 2


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (all_negatives_loss, dict(equal_ids=True), TypeError, "equal_ids must be one of.*True"),
        (all_negatives_loss, dict(equal_ids="Positive"), ValueError, "equal_ids .*'Positive'"),
        (all_negatives_loss, dict(equal_ids="positive", margin=0.1), ValueError, "no margin"),
        (all_negatives_loss, dict(equal_ids="positive", hardness=1), ValueError, "no hardness"),
        (
            all_negatives_loss,
            dict(equal_ids="positive", false_negative_margin=0.1),
            ValueError,
            "several positives.*false_negative_margin",
        ),
        (all_negatives_loss, dict(hardness=-1.0), ValueError, "hardness must be at least 0.*-1"),
        (all_negatives_loss, dict(hardness=math.nan), ValueError, "hardness must be finite.*nan"),
        (all_negatives_loss, dict(hardness="9"), TypeError, "hardness must be a float.*'9'"),
        (all_negatives_loss, dict(false_negative_margin=math.inf), ValueError, "finite.*inf"),
        (hinge_loss, dict(false_negative_margin=[0]), TypeError, "false_negative_margin must be"),
        (hinge_loss, dict(equal_ids="positive"), TypeError, "equal_ids"),
        (hardest_negative_loss, dict(equal_ids="positive"), TypeError, "equal_ids"),
        (hardest_negative_loss, dict(select=-0.1), ValueError, "select must be at least 0.*-0.1"),
        (hardest_negative_loss, dict(select=0.1, smooth=True), ValueError, "select .*smooth"),
        (
            hardest_negative_loss,
            dict(select=0.1, false_negative_margin=0.1),
            ValueError,
            "all negatives.*false_negative_margin",
        ),
        (sigmoid_loss, dict(bias=math.nan), ValueError, "bias must be finite.*nan"),
        (sigmoid_loss, dict(bias=torch.tensor(math.inf)), ValueError, "bias must be finite.*inf"),
        (sigmoid_loss, dict(bias=torch.zeros(2)), TypeError, r"bias must be .*shape \[2\]"),
        (sigmoid_loss, dict(bias=torch.tensor(1)), TypeError, "bias must be .*int64"),
        (sigmoid_loss, dict(bias="-10"), TypeError, "bias must be a float.*'-10'"),
        (sigmoid_loss, dict(bias=torch.zeros((), device="meta")), ValueError, "bias is on meta"),
        (sigmoid_loss, dict(margin=0.1), TypeError, "margin"),
        (sigmoid_loss, dict(direction_weights=(1, 1)), TypeError, "direction_weights"),
    ],
)
def test_what_is_refused(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(I, T, image_ids=IDS, caption_ids=IDS, **options)


def test_equals_siglip(loss_backend):
    """The example of the docstring."""
    pair = embeddings(Case("siglip", 37, 37, 37, 19))
    labels = 2 * torch.eye(37) - 1
    expected = -logsigmoid(labels * (pair[0] @ pair[1].T / 0.1 - 10)).sum() / 37
    assert_close(sigmoid_loss(*pair, backend=loss_backend), expected, 1e-12)


def test_select_leaves_the_plateau(loss_backend):
    """There an anchor's gradient is that of the mean of its hinges, not the hardest's."""
    pair = [x.requires_grad_() for x in embeddings(Case("plateau", 40, 40, 40, 8))]
    value = hardest_negative_loss(*pair, select=10.0, temperature=1.0, backend=loss_backend)
    gradients = torch.autograd.grad(value, pair)
    dense = hinge_loss(*pair, reduction="mean", backend=loss_backend) / 39
    assert_close(value, dense, 1e-12)
    for got, want in zip(gradients, torch.autograd.grad(dense, pair), strict=True):
        assert_close(got, want, 1e-12)


def test_select_takes_a_second_pass_only_where_it_must(loss_backend):
    pair = embeddings(Case("apart", 40, 40, 40, 8))
    with mock.patch.object(of_package, "hinge_statistic", side_effect=AssertionError("a pass")):
        value = hardest_negative_loss(*pair, select=0.0, backend=loss_backend)
        with pytest.raises(AssertionError, match="a pass"):
            hardest_negative_loss(*pair, select=10.0, backend=loss_backend)
    assert_close(value, hardest_negative_loss(*pair, backend=loss_backend), 1e-12)


def test_statistics_are_of_what_counts(loss_backend):
    images, captions = embeddings(Case("close", 40, 40, 40, 8))
    captions[1] = captions[0]  # a false negative of pair 0, and pair 0 one of it
    options = {"return_statistics": True, "backend": loss_backend}
    for loss in (all_negatives_loss, hardest_negative_loss, hinge_loss):
        _, all_of_them = loss(images, captions, **options)
        _, statistics = loss(images, captions, false_negative_margin=-0.01, **options)
        assert all_of_them.hardest_indices[0, 0] == 1 and statistics.hardest_indices[0, 0] != 1
        ceiling = statistics.positive_scores - 0.01
        assert (statistics.hardest_scores <= ceiling).all()


def eager(name, images, captions, ids, tau, bias):
    """The formulas in eager PyTorch at the embeddings' own dtype."""
    scores, same = images @ captions.T, ids[:, None] == ids
    if name == "sigmoid":
        logits = scores / tau + bias
        return -logsigmoid(torch.where(same, logits, -logits)).sum() / len(scores)
    logits = scores / tau
    count = same.sum(1)
    positives = (torch.where(same, logits, 0).sum(axis) / count for axis in (1, 0))
    return sum((logits.logsumexp(x) - p).mean() for x, p in zip((1, 0), positives, strict=True))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sigmoid", "positives"])
def test_never_less_accurate_than_eager(name, dtype, trained, seed, loss_backend):
    """Equal ids as positives, before training and after, where two large terms leave a small gradient."""
    n, tau = 260, 0.05
    ids = torch.arange(n) // 4
    images, captions = embeddings(Case("accuracy", n, n, n, 64), seed=seed)
    if trained:
        center = images[ids * 4]
        images, captions = (normalize(center + 0.05 * x) for x in (images, captions))
    start = images.to(dtype), captions.to(dtype)

    def run(function, dtype):
        pair = [x.detach().to(dtype).requires_grad_() for x in start]
        result = function(*pair)
        result.backward()
        return [result.double(), *(x.grad.double() for x in pair)]

    def ours(images, captions):
        options = {"image_ids": ids, "caption_ids": ids, "equal_ids": "positive"}
        options |= {"temperature": tau, "backend": loss_backend}
        if name == "sigmoid":
            return sigmoid_loss(images, captions, bias=-10.0, **options)
        return all_negatives_loss(images, captions, **options)

    exact = run(lambda *x: eager(name, *x, ids, tau, -10.0), torch.float64)
    theirs = run(lambda *x: eager(name, *x, ids, tau, -10.0), dtype)
    slack = [torch.finfo(torch.float32).eps, *[torch.finfo(dtype).eps] * 2]
    for what, a, b, e, eps in zip(
        ("loss", "d_images", "d_captions"), run(ours, dtype), theirs, exact, slack, strict=True
    ):
        our_error, their_error = (a - e).norm(), (b - e).norm()
        assert our_error <= 1.5 * their_error + eps * e.norm(), (what, our_error, their_error)


def test_module_of_the_sigmoid_loss():
    pair = embeddings(Case("module", 20, 20, 20, 6), torch.float32)
    module = fused_vse.SigmoidLoss(0.2, -3.0, learnable_temperature=True, learnable_bias=True)
    assert {name for name, _ in module.named_parameters()} == {"log_temperature", "bias"}
    assert "bias=-3, learnable" in repr(module) and "temperature=0.2, learnable" in repr(module)
    module(*pair).backward()
    leaves = [torch.tensor(x, requires_grad=True) for x in (0.2, -3.0)]
    expected = sigmoid_loss(*pair, temperature=leaves[0], bias=leaves[1])
    expected.backward()
    assert_close(module(*pair), expected, 1e-6)
    assert_close(module.bias.grad, leaves[1].grad, 1e-6)
    assert_close(module.log_temperature.grad, leaves[0].grad * 0.2, 1e-6)
    fixed = fused_vse.SigmoidLoss(bias=-3.0)
    assert not list(fixed.parameters()) and "bias=-3" in repr(fixed)
    with pytest.raises(ValueError, match="bias must be finite"):
        fused_vse.SigmoidLoss(bias=math.inf)
    with pytest.raises(TypeError, match="unknown argument 'margin'"):
        fused_vse.SigmoidLoss(margin=0.2)
