"""The normalisation of csrc/cuda without a GPU: the kernel's own source on the CPU."""

import cuda_emulation
import pytest
import torch
from conftest import assert_close

REASON = cuda_emulation.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FACTORS = (1.0, 2.0**40, 2.0**64, 2.0**100, 2.0**124, 2.0**-60, 0.0)


@pytest.mark.parametrize("dim", [1, 255, 257, 1024])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_pytorch_in_float64(dtype, factor, dim, emulated_ops):
    """Rows whose squares overflow float32 keep their direction; 1e-12 is the least norm."""
    if dtype == torch.float16:  # which holds neither such rows nor the gradients of tiny ones
        factor = min(max(factor, 2.0**-6), 2.0**12)
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(5, dim, generator=generator) * factor).to(dtype).requires_grad_()
    upstream = torch.randn(5, dim, generator=generator).to(dtype)
    ops = torch.ops.fused_vse_cuda
    with torch.no_grad():
        normalized, inverse_norm = ops.l2_normalize(rows)
        d_rows = ops.l2_normalize_backward(upstream, normalized, inverse_norm)
    wide = rows.detach().double().requires_grad_()
    expected = torch.nn.functional.normalize(wide)
    eps = torch.finfo(dtype).eps
    assert_close(normalized, expected, 2 * eps)
    (gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    scale = max(gradient.abs().max().item(), torch.finfo(torch.float32).tiny)
    # The row's own rounding is a part along itself that the projection leaves; dim = 1 has nothing else.
    room = 8 * eps * min(factor and 1 / factor, 1e12) * upstream.abs().max().item()
    assert (d_rows.double() - gradient).abs().max() <= max(2 * eps * scale, room)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_rows_stay_so(value, emulated_ops):
    rows = torch.randn(3, 300)
    rows[1, 270] = value
    normalized, _ = torch.ops.fused_vse_cuda.l2_normalize(rows)
    assert normalized[1, 270].isnan() and normalized[[0, 2]].isfinite().all()
