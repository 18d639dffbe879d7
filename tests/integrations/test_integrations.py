"""The stand-ins for projects that are not packages, against their formulas written out here.

Each project's formula is evaluated in float64 as the truth and in float32 as the yardstick: the stand-in
may be as wrong as the project's own arithmetic, and a few units of rounding more.
"""

from types import SimpleNamespace

import pytest
import torch

from fused_vse.integrations import chan, hrem, pcmepp, sgraf, vse_infinity, vsepp

B, D = 24, 16


# ------------------------------------------------------------------------------- the projects' formulas
def dot_scores(im, s):
    return im.mm(s.t())


def order_scores(im, s):
    """Every peer's way: all differences [B, B, D] at once."""
    return -(s[None] - im[:, None]).clamp(min=0).pow(2).sum(2).sqrt()


def hinges_of(scores, margin, max_violation, mask=None, positive_part=lambda x: x.clamp(min=0)):
    positive = scores.diag()
    mask = torch.eye(len(scores)) > 0.5 if mask is None else mask
    by_image = positive_part(margin + scores - positive[:, None]).masked_fill(mask, 0)
    by_caption = positive_part(margin + scores - positive[None]).masked_fill(mask, 0)
    if max_violation:
        by_image, by_caption = by_image.max(1)[0], by_caption.max(0)[0]
    return by_image.sum() + by_caption.sum()


def ccl(scores, temp):
    e = (scores / temp).exp()
    return -(e.diag() / e.sum(1)).log().mean() - (e.diag() / e.sum(0)).log().mean()


def cclhn(scores, margin, temp, filled=-1.0):
    positive = (scores.diag() / temp).exp()
    others = scores.masked_fill(torch.eye(len(scores)) > 0.5, filled)
    by_image = -(positive / ((others.max(1)[0] + margin) / temp).exp()).log()
    by_caption = -(positive / ((others.max(0)[0] + margin) / temp).exp()).log()
    return by_image.clamp(min=0).mean() + by_caption.clamp(min=0).mean()


def simclr(im, s, temp):
    both = torch.cat([im, s])
    e = (both @ both.T / temp).exp()
    others = e[~torch.eye(len(both), dtype=torch.bool)].view(len(both), -1)
    positive = ((im * s).sum(1) / temp).exp().repeat(2)
    return -(positive / others.sum(1)).log().mean()


def info_nce_of_sims(sims, temperature, margin):
    positive, diagonal = sims.diag(), torch.eye(len(sims)) > 0.5
    by_image = (sims - positive[:, None] + margin).masked_fill(diagonal, 0)
    by_caption = (sims - positive[None] + margin).masked_fill(diagonal, 0)
    total = (by_image / temperature).exp().sum(1).log().mean()
    return total + (by_caption / temperature).exp().sum(0).log().mean()


# ------------------------------------------------------------------------------------------- comparison
def run(function, inputs, dtype):
    """The loss and the gradients, in float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    loss = function(*leaves)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [x.double() for x in (loss.detach(), *gradients)]


def assert_same(ours, theirs, inputs, dtype=torch.float32, value_only=False):
    """`ours` in `dtype` is as near to `theirs` in float64 as `theirs` in float32 is."""
    inputs = [x.to(dtype) for x in inputs]
    actual = run(ours, inputs, dtype)
    truth = run(theirs, inputs, torch.float64)
    peer = run(theirs, inputs, torch.float32)
    rounding = [torch.finfo(torch.float32).eps, *[torch.finfo(dtype).eps] * len(inputs)]
    for name, x, y, z, eps in zip(["loss", 1, 2], actual, truth, peer, rounding, strict=False):
        assert x.isfinite().all(), name
        if value_only and name != "loss":
            break
        # A logit of 20 to 100 is itself rounded: that many units of error in every probability.
        allowed = 2 * (z - y).abs().max() + 16 * eps * y.abs().max() + 4e-7
        worst = (x - y).abs().max()
        assert worst <= allowed, f"{name}: off by {worst:.3g}, allowed {allowed:.3g}"


def unit_rows(rows=B, dim=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator).double())


def noisy_copy(im, seed=1):
    return torch.nn.functional.normalize(im + 0.5 * unit_rows(*im.shape, seed=seed))


def random_batch(seed=0):
    im = unit_rows(seed=seed)
    return im, noisy_copy(im, seed + 100)


def integers(seed=0):
    """Exact scores, many of them tied."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(-2, 3, (B, D), generator=generator).double()  # noqa: E731
    return draw(), draw()


def duplicates():
    im, s = random_batch()
    return im[torch.arange(B) // 3], s[torch.arange(B) // 2]


BATCHES = {
    "random": random_batch(),
    "another": random_batch(7),
    "ties": integers(),
    "duplicates": duplicates(),
    "all equal": (unit_rows(1).expand(B, D), unit_rows(1, seed=1).expand(B, D)),
    "one pair": (unit_rows(1), unit_rows(1, seed=1)),
    "two pairs": (unit_rows(2), unit_rows(2, seed=1)),
    "unnormalised": tuple(10 * x for x in random_batch()),
    "all scores below -1": (
        10 * unit_rows(1).expand(B, D),
        -unit_rows(1).expand(B, D) - unit_rows() / 9,
    ),
}
batches = pytest.mark.parametrize("batch", BATCHES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


# ------------------------------------------------------------------------------------------- the hinges
@pytest.mark.parametrize("max_violation", [False, True])
@pytest.mark.parametrize("margin", [0.2, 0])
@batches
def test_vsepp_hinges(batch, margin, max_violation):
    ours = vsepp.ContrastiveLoss(margin=margin, max_violation=max_violation)
    # At an argument of exactly 0 the projects' clamp passes gradient 1 and ours 0, as relu does. With
    # margin 0 and negatives that equal the positive, rounding decides on which side of it they are.
    theirs = lambda im, s: hinges_of(dot_scores(im, s), margin, max_violation, None, torch.relu)  # noqa: E731
    undecided = margin == 0 and batch in ("duplicates", "all scores below -1")
    assert_same(ours, theirs, BATCHES[batch], value_only=undecided)


@pytest.mark.parametrize("max_violation", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_vsepp_hinges_with_clamp(seed, max_violation):
    ours = vsepp.ContrastiveLoss(margin=0.2, max_violation=max_violation)
    theirs = lambda im, s: hinges_of(dot_scores(im, s), 0.2, max_violation)  # noqa: E731
    assert_same(ours, theirs, random_batch(seed))


@dtypes
@pytest.mark.parametrize("max_violation", [False, True])
def test_vsepp_hinges_in_16_bits(dtype, max_violation):
    ours = vsepp.ContrastiveLoss(margin=0.2, max_violation=max_violation)
    theirs = lambda im, s: hinges_of(dot_scores(im, s), 0.2, max_violation)  # noqa: E731
    assert_same(ours, theirs, random_batch(), dtype)


@pytest.mark.parametrize("max_violation", [False, True])
@pytest.mark.parametrize("dim", [1, D, 1030])
def test_vsepp_order(dim, max_violation):
    im = unit_rows(dim=dim).abs()
    s = unit_rows(dim=dim, seed=1).abs()
    ours = vsepp.ContrastiveLoss(margin=0.05, measure="order", max_violation=max_violation)
    theirs = lambda im, s: hinges_of(order_scores(im, s), 0.05, max_violation)  # noqa: E731
    if dim > 1:  # in one dimension, half of the differences have no positive part
        assert_same(ours, theirs, (im, s))
    value = run(
        lambda *x: sum(y.sum() * 0 for y in x) + theirs(*x).detach(), (im, s), torch.float64
    )[0]
    assert torch.isclose(ours(im.float(), s.float()).double(), value, rtol=1e-5)


def test_vsepp_order_at_the_kink():
    """A caption equal to its image: ours takes the subgradient 0, the projects NaN in some PyTorch."""
    im, s = unit_rows().abs(), unit_rows(seed=1).abs()
    s[3] = im[3]
    theirs = lambda im, s: hinges_of(order_scores(im, s), 0.2, False)  # noqa: E731
    at_kink = run(vsepp.ContrastiveLoss(0.2, measure="order"), (im, s), torch.float64)
    assert torch.isclose(at_kink[0], run(theirs, (im, s), torch.float64)[0], rtol=1e-12)
    s[3] -= 1e-9  # below its image in every dimension: nothing moves it either
    nearby = run(theirs, (im, s), torch.float64)
    for x, y in zip(at_kink[1:], nearby[1:], strict=True):
        assert torch.allclose(x, y, atol=1e-6)


# ----------------------------------------------------------------------------------- the paper's losses
@pytest.mark.parametrize("measure", [False, "order"])
@pytest.mark.parametrize("batch", ["random", "another", "two pairs", "duplicates"])
def test_convse_all_negatives(batch, measure):
    scores = order_scores if measure else dot_scores
    ours = vsepp.ContrastiveLoss(measure=measure, loss_fn="CCL", temp=0.1)
    if measure and batch == "duplicates":
        pytest.skip("equal embeddings: the project's order similarity has a NaN gradient")
    assert_same(ours, lambda *x: ccl(scores(*x), 0.1), BATCHES[batch])


@pytest.mark.parametrize("batch", ["random", "another", "two pairs", "duplicates"])
def test_convse_hardest_negative(batch):
    ours = vsepp.ContrastiveLoss(margin=0.2, loss_fn="CCLHN", temp=0.1)
    assert_same(ours, lambda im, s: cclhn(dot_scores(im, s), 0.2, 0.1), BATCHES[batch])


def test_convse_hardest_negative_with_scores_below_minus_one():
    """The project's fill of -1 would be the hardest negative; ours leaves the diagonal out."""
    im, s = BATCHES["all scores below -1"]
    ours = vsepp.ContrastiveLoss(margin=0.2, loss_fn="CCLHN", temp=1.0)
    assert_same(ours, lambda im, s: cclhn(dot_scores(im, s), 0.2, 1.0, filled=-torch.inf), (im, s))
    assert not torch.isclose(ours(im, s), cclhn(dot_scores(im, s), 0.2, 1.0), rtol=1e-2)


@pytest.mark.parametrize("temp", [0.1, 0.5])
@pytest.mark.parametrize(
    "batch", ["random", "another", "ties", "one pair", "two pairs", "duplicates"]
)
def test_convse_simclr(batch, temp):
    inputs = [x / x.norm(dim=1, keepdim=True).clamp(min=1) for x in BATCHES[batch]]
    assert_same(
        vsepp.ContrastiveLoss(loss_fn="SimCLR", temp=temp), lambda *x: simclr(*x, temp), inputs
    )


def test_convse_at_a_temperature_where_the_project_overflows():
    im, s = random_batch()
    ours = vsepp.ContrastiveLoss(loss_fn="CCL", temp=0.005)
    assert ccl(dot_scores(im.float(), s.float()), 0.005).isnan()
    assert_same(ours, lambda *x: 2 * _clip(*x, 200), (im, s))


def _clip(im, s, scale):
    logits, labels = scale * im @ s.T, torch.arange(len(im))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


# -------------------------------------------------------------------------------------- what trainers do
def test_vse_infinity_switches_after_an_epoch():
    options = SimpleNamespace(margin=0.2)
    ours = vse_infinity.ContrastiveLoss(opt=options, margin=0.2)
    assert ours.opt is options and not ours.max_violation
    for switch, max_violation in ((ours.max_violation_on, True), (ours.max_violation_off, False)):
        switch()
        assert ours.max_violation is max_violation
        theirs = lambda im, s, on=max_violation: hinges_of(dot_scores(im, s), 0.2, on)  # noqa: E731
        assert_same(ours, theirs, random_batch())


@pytest.mark.parametrize("max_violation", [False, True])
def test_pcmepp_triplet(max_violation):
    ours = pcmepp.TripletLoss(margin=0.2, max_violation=max_violation)
    theirs = lambda im, s: hinges_of(dot_scores(im, s), 0.2, max_violation)  # noqa: E731
    assert_same(lambda im, s: ours(im, s, matched=None)[0], theirs, random_batch())
    assert_same(lambda im, s: ours({"mean": im}, {"mean": s})[0], theirs, random_batch())
    im, s = (x.clone().requires_grad_() for x in random_batch())
    loss, logged = ours(im, s)
    assert list(logged) == ["loss"] and logged["loss"] == loss and not logged["loss"].requires_grad


@pytest.mark.parametrize("distributed", [False, True])
def test_pcmepp_info_nce(distributed):
    im, s = (x.float() for x in random_batch())
    ours = pcmepp.InfoNCELoss(init_tau=5)
    if distributed:  # the own captions come first
        s = torch.cat([s, unit_rows(seed=9).float()])
    loss, logged = ours({"mean": im}, {"mean": s}, distributed=distributed, matched=None)
    tau = torch.full((1,), 5.0, requires_grad=True)
    logits = im @ s.T * tau
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(B))
    if not distributed:
        expected = (expected + torch.nn.functional.cross_entropy(logits.T, torch.arange(B))) / 2
    assert torch.isclose(loss, expected, rtol=1e-6)
    assert set(logged) == {"loss/loss", "criterion/tau"}
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.tau.grad, tau.grad, rtol=1e-5)
    with pytest.warns(UserWarning, match="max_violation"):
        ours.max_violation_on()


@pytest.mark.parametrize("max_violation", [False, True])
def test_hrem_masks_repeated_images(max_violation):
    ids = torch.arange(B) % 5
    ours = hrem.ContrastiveLoss(SimpleNamespace(mask_repeat=True), 0.2, max_violation)
    mask = ids[:, None] == ids[None]
    theirs = lambda im, s: hinges_of(dot_scores(im, s), 0.2, max_violation, mask)  # noqa: E731
    assert_same(lambda im, s: ours(im, s, ids), theirs, random_batch())
    with pytest.raises(ValueError, match="img_ids"):
        ours(*random_batch())


def test_hrem_without_mask():
    ours = hrem.ContrastiveLoss(SimpleNamespace(mask_repeat=False), 0.2)
    assert_same(ours, lambda im, s: hinges_of(dot_scores(im, s), 0.2, False), random_batch())


# ---------------------------------------------------------------------------------------- score matrices
@pytest.mark.parametrize("max_violation", [False, True])
@pytest.mark.parametrize("margin", [0.2, 0])
@batches
def test_sgraf(batch, margin, max_violation):
    scores = dot_scores(*BATCHES[batch])
    ours = sgraf.ContrastiveLoss(margin, max_violation)
    theirs = lambda scores: hinges_of(scores, margin, max_violation, None, torch.relu)  # noqa: E731
    assert_same(ours, theirs, [scores])


@dtypes
@pytest.mark.parametrize("max_violation", [False, True])
def test_chan_hinges(dtype, max_violation):
    options = SimpleNamespace(margin=0.1, max_violation=max_violation)
    ours = chan.ContrastiveLoss(options, margin=7)
    assert ours.opt is options and (ours.margin, ours.max_violation) == (0.1, max_violation)
    theirs = lambda sims: hinges_of(sims, 0.1, max_violation)  # noqa: E731
    assert_same(ours, theirs, [dot_scores(*random_batch())], dtype)
    assert chan.ContrastiveLoss().margin == 0.2


@pytest.mark.parametrize("margin", [0, 0.2])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_chan_info_nce(temperature, margin):
    ours = chan.InfoNCELoss(temperature, margin)
    ours.max_violation_on()
    theirs = lambda sims: info_nce_of_sims(sims, temperature, margin)  # noqa: E731
    assert_same(ours, theirs, [dot_scores(*random_batch())])


def test_batches_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match="im and s must be pairs, got 4 and 5 rows"):
        vsepp.ContrastiveLoss()(unit_rows(4), unit_rows(5))
    with pytest.raises(ValueError, match=r"scores must be a matrix \[B, B\].*got shape \[4, 5\]"):
        sgraf.ContrastiveLoss()(torch.zeros(4, 5))
