"""What only the C++ CPU backend has: the certified search, instruction sets, threads, memory."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_close

import fused_vse
from fused_vse import all_negatives_loss, hinge_loss

pytestmark = pytest.mark.skipif(
    fused_vse.backends()["cpu"] != "available", reason=fused_vse.backends()["cpu"]
)
OPS = torch.ops.fused_vse_cpu
normalize = torch.nn.functional.normalize


@pytest.fixture(params=["float32", "bfloat16"])
def search(request):
    """The certified search with a GEMM of either precision."""
    op = getattr(OPS, f"hardest_negatives_in_{request.param}")
    try:
        op(torch.ones(2, 2), torch.eye(2), None, None, 2)
    except RuntimeError:
        pytest.skip("this CPU has no AVX512-BF16")
    return op


def assert_identical(search, images, captions, ids=(None, None), num_pairs=None):
    """The search and the exact path agree to the last bit: positives, scores and indices."""
    num_pairs = num_pairs or min(len(images), len(captions))
    exact = OPS.hardest_negatives_exact(images, captions, *ids, num_pairs)
    certified = search(images, captions, *ids, num_pairs)
    for a, b in zip(exact, certified, strict=True):
        assert torch.equal(a, b)
    # And the exact path is right, to float32 rounding.
    wide = fused_vse.reference.hardest_negatives(
        images.double(), captions.double(), *ids, num_pairs
    )
    assert_close(exact[1], wide[1], 1e-5)


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
            assert_identical(search, *pair, num_pairs=k)
    assert_identical(search, images.to(dtype), captions.to(dtype), num_pairs=k)
    ids = torch.randint(0, n, (n,)), torch.randint(0, n, (m,))
    assert_identical(search, images.to(dtype), captions.to(dtype), ids, k)


def test_search_is_identical_on_near_ties(search):
    """Scores that the GEMM cannot tell apart, down to one unit in the last place of float32."""
    captions = normalize(torch.randn(400, 256))
    for step in (0.0, 6e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        near = torch.cat([captions, captions + step * torch.randn(400, 256)])
        assert_identical(search, normalize(torch.randn(800, 256)), near)
        # Every image's hardest negative has twins that differ in the last bits of one coordinate.
        images = normalize(near + 0.3 * torch.randn(800, 256))
        assert_identical(search, images, near)
    # Negative maxima: rounding goes the other way.
    assert_identical(search, torch.rand(300, 64), -torch.rand(500, 64), num_pairs=300)
    # Norms that differ by six orders of magnitude.
    assert_identical(
        search, torch.randn(400, 64) * torch.logspace(-3, 3, 400)[:, None], torch.randn(400, 64)
    )


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_search_falls_back_on_too_many_candidates(share):
    """The plateau of hardest-negative training: (some) scores are all within the GEMM's error."""
    n = 600
    images, captions = normalize(torch.randn(n, 64)), normalize(torch.randn(n, 64))
    collapsed = int(n * share)
    images[:collapsed] = images[0] + 1e-7 * torch.randn(collapsed, 64)
    captions[:collapsed] = images[0] + 1e-7 * torch.randn(collapsed, 64)
    exact = OPS.hardest_negatives_exact(images, captions, None, None, n)
    for a, b in zip(exact, OPS.hardest_negatives(images, captions, None, None, n), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """The dispatched kernels agree with the oracle whatever ATEN_CPU_CAPABILITY limits them to."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    tests = [
        "test_losses.py::test_equals_the_formula",
        "test_losses.py::test_integer_embeddings_are_exact",
    ]
    here = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k"]
    command += ["cpu and (odd or extra or beyond)"]
    command += [os.path.join(here, test) for test in tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


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
