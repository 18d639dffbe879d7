"""What only the C++ CPU backend has: the certified search, instruction sets, threads, memory."""

import os
import subprocess
import sys

import ops_oracle as oracle
import pytest
import torch
from conftest import assert_close

import fused_vse
from fused_vse import all_negatives_loss, hinge_loss
from fused_vse.ops import ALL_NEGATIVES, DOT, HARDEST, HARDEST_SMOOTH, HINGE_SUM, ORDER, Batch

pytestmark = pytest.mark.skipif(
    fused_vse.backends()["cpu"] != "available", reason=fused_vse.backends()["cpu"]
)
OPS = torch.ops.fused_vse_cpu
normalize = torch.nn.functional.normalize


@pytest.fixture(params=["float32", "bfloat16"])
def search(request):
    """The certified search with a GEMM of either precision."""
    op = getattr(OPS, f"{request.param}_hardest_negatives")
    try:
        op(*batch_of(torch.ones(2, 2), torch.eye(2)), None)
    except RuntimeError:
        pytest.skip("this CPU has no AVX512-BF16")
    return op


def batch_of(images, captions, ids=(None, None), num_pairs=None):
    k = num_pairs or min(len(images), len(captions))
    return Batch(images, captions, *ids, k, k, 0, 0, k, DOT)


def assert_identical(search, batch):
    """The search and the exact path agree to the last bit: scores and indices."""
    exact = OPS.exact_hardest_negatives(*batch, None)
    for a, b in zip(exact, search(*batch, None), strict=True):
        assert torch.equal(a, b)
    # And the exact path is right, to float32 rounding.
    assert_close(exact[0], oracle.hardest_negatives(batch)[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "m", "k", "d"),
    [
        (300, 300, 300, 64),
        (1100, 1100, 1100, 48),
        (300, 4200, 300, 33),
        (300, 200, 100, 1025),
        (2, 3, 1, 1),
    ],
)
def test_search_is_identical(search, n, m, k, d, dtype):
    images, captions = torch.randn(n, d), torch.randn(m, d)
    for scale_images, scale_captions in ((1, 1), (0.02, 50), (1e-12, 1e-12), (1e15, 1e15)):
        pair = (
            (scale_images * normalize(images)).to(dtype),
            (scale_captions * normalize(captions)).to(dtype),
        )
        if all((x.isfinite() & (x.abs().amax(1, keepdim=True) > 0)).all() for x in pair):
            assert_identical(search, batch_of(*pair, num_pairs=k))
    pair = images.to(dtype), captions.to(dtype)
    assert_identical(search, batch_of(*pair, num_pairs=k))
    ids = torch.randint(0, n, (n,)), torch.randint(0, n, (m,))
    assert_identical(search, batch_of(*pair, ids, k))
    for r, c in ((k, 0), (0, k), (n // 2, m)):
        few = min(r or n, c or m) // 2
        for part in (ids, (None, None)):
            assert_identical(search, Batch(*pair, *part, r, c, 0, (c or m) - few, few, DOT))


def test_search_is_identical_on_near_ties(search):
    """Scores that the GEMM cannot tell apart, down to one unit in the last place of float32."""
    captions = normalize(torch.randn(400, 256))
    for step in (0.0, 6e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        near = torch.cat([captions, captions + step * torch.randn(400, 256)])
        assert_identical(search, batch_of(normalize(torch.randn(800, 256)), near))
        # Every image's hardest negative has twins that differ in the last bits of one coordinate.
        images = normalize(near + 0.3 * torch.randn(800, 256))
        assert_identical(search, batch_of(images, near))
    # Negative maxima: rounding goes the other way.
    assert_identical(search, batch_of(torch.rand(300, 64), -torch.rand(500, 64)))
    # Norms that differ by six orders of magnitude.
    images = torch.randn(400, 64) * torch.logspace(-3, 3, 400)[:, None]
    assert_identical(search, batch_of(images, torch.randn(400, 64)))


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_search_falls_back_on_too_many_candidates(share):
    """The plateau of hardest-negative training: (some) scores are all within the GEMM's error."""
    n = 600
    images, captions = normalize(torch.randn(n, 64)), normalize(torch.randn(n, 64))
    collapsed = int(n * share)
    images[:collapsed] = images[0] + 1e-7 * torch.randn(collapsed, 64)
    captions[:collapsed] = images[0] + 1e-7 * torch.randn(collapsed, 64)
    ids = torch.arange(n) // 2, torch.arange(n) // 2
    for batch in (batch_of(images, captions), batch_of(images, captions, ids, n - 30)):
        assert_identical(OPS.hardest_negatives, batch)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """The dispatched kernels agree with the oracle whatever ATEN_CPU_CAPABILITY limits them to."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    tests = os.path.join(os.path.dirname(__file__), "test_ops.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k"]
    command += ["several_tiles or ties or (other_dtypes and float32)"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("similarity", [DOT, ORDER])
def test_opcheck(similarity):
    """Schemas and fakes of all ops, with and without each option."""

    def check(op, *arguments):
        utils = ("test_schema", "test_faketensor")
        op = getattr(OPS, op).default
        torch.library.opcheck(op, arguments, test_utils=utils)
        return op(*arguments)

    r, c, k = 20, 30, 12
    ids = torch.arange(24) // 5, torch.arange(40) // 5
    whole = Batch(torch.randn(24, 8), torch.randn(40, 8), *ids, r, c, 3, 5, k, similarity)
    g, d_positive, ceiling = torch.randn(r + c), torch.randn(k), torch.randn(r + c)
    given = whole._replace(
        images=torch.randn(24, 40), captions=None, image_ids=None, caption_ids=None
    )
    for batch in (whole, given):
        check("positive_scores", *batch)
        for need in ((True, True, True), (True, False, False), (False, True, False)):
            hardest = check("hardest_negatives", *batch, ceiling)
            check("hardest_negatives_backward", *batch, *hardest, d_positive, g, *need)
            for save, limit in ((True, None), (False, ceiling)):
                options = limit, 10.0, torch.tensor(2.0) if save else None
                sums = check("negative_logsumexp", *batch, *options, save)
                check(
                    "negative_logsumexp_backward",
                    *batch,
                    *options,
                    *sums,
                    d_positive,
                    g.double(),
                    *need,
                )
                total, _, scores = check("hinge_sum", *batch, limit, g, save)
                check("hinge_sum_backward", *batch, limit, g, total, scores, d_positive, g, *need)
    for kind in range(4):
        options = ids[0][:20], ids[1], 15, kind, 10.0, None, 0.2, 1.0, 0.5, True, True, True
        pair = whole.images[:20], whole.captions
        _, _, _, index, *saved = check("small_loss", *pair, *options)
        check("small_loss_backward", *pair, index, *saved, torch.tensor(2.0), True, kind > 1)


def small_loss_formula(batch, kind, scale, margin, weights):
    """With S attached to the graph; anchors without negatives contribute 0."""
    scores = oracle.scores_of(batch)
    total, k = 0.0, batch.pair_count
    positive = scores.s.diagonal()[:k]
    masked = [scores.s.masked_fill(~x, -torch.inf) for x in scores.counts]
    for s, weight in zip((masked[0][:k], masked[1][:, :k].T), weights, strict=True):
        s, p = s[s.isfinite().any(1)], positive[s.isfinite().any(1)]
        violation = s.amax(1) - p + margin
        if kind == ALL_NEGATIVES:
            losses = torch.nn.functional.softplus(
                (scale * (s - p[:, None] + margin)).logsumexp(1), threshold=100
            )
        elif kind == HARDEST:
            losses = scale * violation.relu()
        elif kind == HARDEST_SMOOTH:
            losses = torch.nn.functional.softplus(scale * violation, threshold=100)
        else:
            losses = (s - p[:, None] + margin).relu().sum(1)
        total = total + weight * losses.sum()
    return total


@pytest.mark.parametrize("kind", [ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM])
@pytest.mark.parametrize("ids", [None, "groups", "one"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)]
)
def test_small_loss(kind, ids, dtype, tolerance):
    n, m, k = 45, 70, 33
    pair = [normalize(torch.randn(size, 24)).to(dtype) for size in (n, m)]
    if ids:
        pair_of_ids = [torch.arange(size) // 5 * (ids == "groups") for size in (n, m)]
    batch = batch_of(*pair, pair_of_ids if ids else (None, None), k)
    margin, weights, wide = 0.3, (1.0, 0.25), torch.promote_types(dtype, torch.float32)
    for scale in (12.5, torch.tensor(12.5, dtype=wide)):
        options = (scale, None) if isinstance(scale, float) else (1.0, scale)
        loss, positive, score, index, *saved = OPS.small_loss(
            *batch[:4], k, kind, *options, margin, *weights, True, True, True
        )
        factor = torch.tensor(1.0 if kind == HINGE_SUM else 12.5, dtype=torch.float64)
        leaves = [x.double().clone().requires_grad_() for x in (*pair, factor)]
        attached = batch._replace(images=leaves[0], captions=leaves[1])
        expected = small_loss_formula(attached, kind, leaves[2], margin, weights) / k
        assert_close(loss, expected, max(tolerance / 10, 1e-12))
        assert_close(positive, oracle.positive_scores(batch), 1e-6)
        best, where = oracle.hardest_negatives(batch)
        assert_close(score, best, 1e-6)
        assert torch.equal(index, where)
        want = [torch.zeros_like(x) for x in leaves]
        if expected.requires_grad:
            got = torch.autograd.grad(3 * expected, leaves, allow_unused=True)
            want = [y if x is None else x for x, y in zip(got, want, strict=True)]
        upstream = torch.tensor(3.0, dtype=wide)
        got = OPS.small_loss_backward(*pair, index, *saved, upstream, True, True)
        for x, y in zip(got, want, strict=True):
            size = y.abs().max().clamp(min=1e-30)
            assert_close(x.double() / size, y / size, tolerance)
    pair[0][3, 2] = torch.nan
    loss, _, score, index, *saved = OPS.small_loss(
        *batch[:4], k, kind, 1.0, None, margin, *weights, True, True, True
    )
    gradients = OPS.small_loss_backward(*pair, index, *saved, upstream, True, False)
    assert loss.isnan() and score.isnan().all() and gradients[0].isnan().all()


@pytest.mark.parametrize("loss", [all_negatives_loss, hinge_loss])
def test_saved_and_recomputed_scores_agree(loss):
    """Around the size up to which S is kept for the backward pass."""
    rows = 1030  # 1030 * 4072 < 2 ** 22 < 1030 * 4073
    images, captions = torch.randn(rows, 8), torch.randn(4080, 8)
    if loss is all_negatives_loss:
        images, captions, options = normalize(images), normalize(captions), {}
    else:  # integers: rounding must not open or close a hinge
        images, captions, options = images.round(), captions.round(), {"margin": 0.5}
    for m in (4072, 4073):
        pair = images.clone().requires_grad_(), captions[:m].clone().requires_grad_()
        loss(*pair, num_pairs=rows, **options).backward()
        expected = images.double().requires_grad_(), captions[:m].double().requires_grad_()
        loss(*expected, num_pairs=rows, backend="reference", **options).backward()
        for x, e in zip(pair, expected, strict=True):
            assert_close(x.grad, e.grad, 1e-5)


MEASURE = """
import resource, sys, torch
from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
n, loss = int(sys.argv[1]), dict(a=all_negatives_loss, h=hardest_negative_loss, s=hinge_loss)[sys.argv[2]]
def step(n):
    pair = [torch.nn.functional.normalize(torch.randn(n, 16)).requires_grad_() for _ in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(*pair).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
step(64)
print(step(n))
"""


@pytest.mark.parametrize("loss", ["a", "h", "s"])
def test_memory_does_not_grow_with_the_score_matrix(loss):
    """Peak resident memory of a step; S alone would be 576 MB."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, "12000", loss], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 120 * 1024  # KiB; the tile buffers are 48 MiB
