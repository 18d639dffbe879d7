"""The normalisation of the Triton backend in Triton's interpreter. Collected by test_triton_interpreter.py
alone, like triton_interpreter_cases.py.
"""

import pytest
import torch
from cases import embeddings
from triton_interpreter_cases import DTYPES, EXTRAS, error

from fused_vse.statistics import l2_normalize

pytestmark = pytest.mark.filterwarnings("ignore")


def test_normalization_matches_the_oracle():
    for dtype in DTYPES:
        rows = 3 * embeddings(EXTRAS, dtype, normalize=False)[0]
        rows[3], rows[4] = 0, 1e-3
        results = []
        for name in ("triton", "reference"):
            leaf = rows.detach().requires_grad_()
            value = l2_normalize(leaf, name)
            (value * torch.linspace(-1, 1, 24, dtype=dtype)).sum().backward()
            results.append((value, leaf.grad[torch.arange(45) != 3]))
        for got, want in zip(*results, strict=True):
            assert error(got, want.double()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_normalized_rows_that_are_not_finite_stay_so(value):
    rows = torch.randn(3, 70)
    rows[1, 65] = value
    normalized = l2_normalize(rows, "triton")
    assert normalized[1, 65].isnan() and normalized[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        *((torch.float32, power) for power in (64, 120, -60)),
        *((torch.bfloat16, power) for power in (64, 115)),
        *((torch.float64, power) for power in (64, 512, 1021, -300)),
    ],
    ids=str,
)
def test_normalized_rows_whose_squares_overflow_keep_their_direction(dtype, power):
    """As torch.nn.functional.normalize would, if squares had more exponents; 1e-12 is its least norm."""
    unit = torch.nn.functional.normalize(torch.randn(5, 70, dtype=torch.float64))
    rows = (unit * 2.0**power).to(dtype).requires_grad_()
    normalized = l2_normalize(rows, "triton")
    expected = unit if power > 0 else rows.detach().double() / 1e-12
    assert error(normalized, expected) <= 4 * torch.finfo(dtype).eps
    upstream = torch.randn(5, 70, dtype=dtype)
    normalized.backward(upstream)
    expected = upstream.double()
    if power > 0:
        expected -= unit * (unit * expected).sum(1, keepdim=True)
    d_unit = rows.grad.double() * (2.0**power if power > 0 else 1e-12)
    assert error(d_unit, expected) <= 8 * torch.finfo(dtype).eps
