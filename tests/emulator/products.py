"""Matrix products of Triton's compiler, by cp.async or by the copy engine, on small integers: exact in every
dtype. Their code can be edited before it runs."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_driver import emulated

M, N, K = 150, 136, 208

Edit = Callable[[str], str]


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(
            a_ptr + m[:, None] * K + ks[None, :],
            mask=(m < M)[:, None] & (ks < K)[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + ks[:, None] * stride_bk + n[None, :] * stride_bn,
            mask=(ks < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def tma_matmul_kernel(
    a_desc, b_desc, c_desc, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = a_desc.load([m, k])
        if TRANSPOSED:
            acc = tl.dot(a, b_desc.load([n, k]).T, acc)
        else:
            acc = tl.dot(a, b_desc.load([k, n]), acc)
    c_desc.store([m, n], acc.to(c_desc.dtype))


def operand(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(-3, 4, (rows, columns), generator=generator).float().to(dtype)


def product(
    capability: int, seed: int, dtype=torch.float16, precision="ieee", sums=tl.float32, block=(64, 64, 32),
    transposed=False, size=(M, N, K), num_warps=4, edit: Edit | None = None, races=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernel computes, and the exact product in float64."""
    m, n, k = size
    bm, bn, bk = block
    a, b = operand(m, k, dtype), operand(k, n, dtype)
    stored = b.t().contiguous().t() if transposed else b
    if sums == tl.int32:
        c = torch.full((m, n), -1, dtype=torch.int32)
    else:
        c = torch.full((m, n), torch.nan)
    with emulated(capability, seed, races) as driver:
        _edited(matmul_kernel, driver, edit)[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
            a, stored, c, m, n, k, *stored.stride(), BM=bm, BN=bn, BK=bk, PRECISION=precision, ACC=sums,
            num_warps=num_warps, num_stages=3,
        )  # fmt: skip
    return c.double(), a.double() @ b.double()


def tma_product(
    seed: int, dtype=torch.bfloat16, block=(128, 128, 64), transposed=True, edit: Edit | None = None,
    races=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in `dtype`, whose rounding the sums of these integers do not need."""
    bm, bn, bk = block
    a, b = operand(M, K, dtype), operand(K, N, dtype)
    stored = b.t().contiguous() if transposed else b
    c = torch.full((M, N), torch.nan, dtype=dtype)
    with emulated(90, seed, races) as driver:
        _edited(tma_matmul_kernel, driver, edit)[(triton.cdiv(M, bm), triton.cdiv(N, bn))](
            TensorDescriptor.from_tensor(a, [bm, bk]),
            TensorDescriptor.from_tensor(stored, [bn, bk] if transposed else [bk, bn]),
            TensorDescriptor.from_tensor(c, [bm, bn]),
            K, BM=bm, BN=bn, BK=bk, TRANSPOSED=transposed, num_stages=3,
        )  # fmt: skip
    return c, (a.double() @ b.double()).to(dtype)


def _edited(kernel, driver, edit: Edit | None):
    driver.utils.edit_ptx = edit
    # A kernel of its own, since edited code is not to be found again.
    return kernel if edit is None else triton.jit(kernel.fn)
