"""Code of the Triton compiler, which is known to run on GPUs, against PyTorch."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from . import ptxemu
from .products import operand, product, tma_product
from .triton_driver import emulated

pytestmark = pytest.mark.filterwarnings("ignore")
each_capability = pytest.mark.parametrize("capability", [80, 90])


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(
        out_ptr + offs,
        tl.load(x_ptr + offs, mask=mask) + tl.load(y_ptr + offs, mask=mask),
        mask=mask,
    )


@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + offs, mask=offs < columns, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * columns + offs, e / tl.sum(e, 0), mask=offs < columns)


@triton.jit
def reduce_kernel(
    x_ptr,
    sum_ptr,
    max_ptr,
    argmax_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
):
    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + m[:, None] * COLUMNS + n[None, :])
    out = tl.arange(0, COLUMNS if AXIS == 0 else ROWS)
    tl.store(sum_ptr + out, tl.sum(x, AXIS))
    tl.store(max_ptr + out, tl.max(x, AXIS))
    tl.store(argmax_ptr + out, tl.argmax(x, AXIS))


@triton.jit
def scan_sort_kernel(x_ptr, scan_ptr, sorted_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(scan_ptr + offs, tl.cumsum(x, 0))
    tl.store(sorted_ptr + offs, tl.sort(x))


@triton.jit
def atomics_kernel(x_ptr, sum_ptr, count_ptr, best_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    tl.atomic_add(sum_ptr + offs % 4, x, mask=mask)
    tl.atomic_add(count_ptr, 1)
    tl.atomic_max(best_ptr + offs % 4, x.to(tl.int64) * 4294967296 + offs, mask=mask)


@triton.jit
def scaled_a_kernel(a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The left operand of the product comes from registers."""
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(a_ptr + m[:, None] * K + ks[None, :])
        b = tl.load(b_ptr + ks[:, None] * BN + n[None, :])
        acc = tl.dot((a.to(tl.float32) * 2).to(b.dtype), b, acc)
    tl.store(c_ptr + m[:, None] * BN + n[None, :], acc)


@each_capability
def test_elementwise(capability, schedule):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1000,), torch.nan)
    with emulated(capability, schedule):
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)


@each_capability
def test_softmax(capability, schedule):
    x, out = torch.randn(13, 100), torch.full((13, 100), torch.nan)
    with emulated(capability, schedule):
        softmax_kernel[(13,)](x, out, 100, BLOCK=128)
    torch.testing.assert_close(out, x.softmax(1), atol=1e-6, rtol=0)


@each_capability
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(capability, schedule, axis):
    x = torch.randint(-50, 50, (64, 128)).float()
    length = x.shape[1 - axis]
    total, top = torch.empty(length), torch.empty(length)
    at = torch.empty(length, dtype=torch.int32)
    with emulated(capability, schedule):
        reduce_kernel[(1,)](x, total, top, at, ROWS=64, COLUMNS=128, AXIS=axis)
    assert torch.equal(total, x.sum(axis)) and torch.equal(top, x.amax(axis))
    assert torch.equal(at.long(), (x == x.amax(axis, keepdim=True)).int().argmax(axis))


@each_capability
def test_scan_and_sort(capability, schedule):
    x = torch.randint(-50, 50, (256,), dtype=torch.int32)
    scan, ordered = torch.empty_like(x), torch.empty_like(x)
    with emulated(capability, schedule):
        scan_sort_kernel[(1,)](x, scan, ordered, N=256)
    assert torch.equal(scan.long(), x.cumsum(0)) and torch.equal(ordered, x.sort().values)


@each_capability
def test_atomics(capability, schedule):
    x = torch.randint(-100, 100, (1000,), dtype=torch.int32)
    total, count = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    best = torch.full((4,), -(2**63), dtype=torch.int64)
    with emulated(capability, schedule):
        atomics_kernel[(8,)](x, total, count, best, 1000, BLOCK=128)
    keys = x.long() * 2**32 + torch.arange(1000)
    assert torch.equal(total.long(), x.view(250, 4).sum(0)) and count.item() == 8
    assert torch.equal(best, keys.view(250, 4).amax(0))


PRODUCTS = [
    # dtype, precision, sums, block, warps
    (torch.float16, "ieee", tl.float32, (64, 64, 32), 4),
    # Not with wgmma: Triton's code unpacks float16 sums before it waits for them; ptxas puts that right.
    (torch.float16, "ieee", tl.float16, (32, 32, 32), 4),
    (torch.bfloat16, "ieee", tl.float32, (128, 128, 64), 4),
    (torch.bfloat16, "ieee", tl.float32, (128, 256, 64), 8),
    (torch.bfloat16, "ieee", tl.float32, (32, 32, 64), 4),
    (torch.float32, "tf32", tl.float32, (64, 64, 32), 4),
    (torch.float32, "ieee", tl.float32, (32, 32, 32), 4),
    (torch.int8, "ieee", tl.int32, (64, 64, 64), 4),
    (torch.float8_e4m3fn, "ieee", tl.float32, (64, 64, 64), 4),
]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(("dtype", "precision", "sums", "block", "warps"), PRODUCTS, ids=str)
@each_capability
def test_products(capability, schedule, dtype, precision, sums, block, warps, transposed):
    if dtype == torch.float8_e4m3fn and capability < 90:
        pytest.skip("no such tensor cores")
    got, want = product(
        capability, schedule, dtype, precision, sums, block, transposed, num_warps=warps
    )
    assert torch.equal(got, want)
    uses_wgmma = any(opcode.startswith("wgmma.mma") for opcode in ptxemu.counts())
    can_use_it = dtype.itemsize < 4 or precision == "tf32"
    assert uses_wgmma == (capability == 90 and block[0] >= 64 and can_use_it)


@each_capability
def test_an_operand_in_registers(capability, schedule):
    if capability == 90 and triton.__version__.startswith("3.6."):
        pytest.skip(
            "Triton 3.6 overwrites registers that a product under way reads; ptxas puts that right"
        )
    a, b = operand(64, 128, torch.bfloat16), operand(128, 64, torch.bfloat16)
    c = torch.full((64, 64), torch.nan)
    with emulated(capability, schedule):
        scaled_a_kernel[(1,)](a, b, c, 128, BM=64, BN=64, BK=64, num_stages=2)
    assert torch.equal(c.double(), 2 * (a.double() @ b.double()))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("block", [(128, 128, 64), (64, 64, 32), (64, 32, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensor_maps(schedule, dtype, block, transposed):
    got, want = tma_product(schedule, dtype, block, transposed)
    assert torch.equal(got, want)
    assert any(opcode.startswith("cp.async.bulk.tensor") for opcode in ptxemu.counts())
