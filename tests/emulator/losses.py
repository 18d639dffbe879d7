"""A GPU backend's losses, by their public functions, against the float64 reference."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fused_vse
from fused_vse.backends.triton import set_workspace_bytes, workspace_bytes


class Shape(NamedTuple):
    name: str
    rows: int
    columns: int
    pairs: int
    dim: int
    workspace: int = 256 << 20

    def __str__(self) -> str:
        return self.name


SMALL = Shape("small", 45, 50, 33, 24)
RECTANGLE = Shape("rectangle", 30, 70, 30, 40)
ALIGNED = Shape("aligned", 64, 64, 64, 128)
MEDIUM = Shape("medium", 120, 130, 110, 96)
# From here on the scores are too many to be saved, which takes the large tiles.
LARGE = Shape("large", 300, 280, 260, 136)
LARGE_ALIGNED = Shape("large-aligned", 256, 256, 256, 64)
LARGE_DEEP = Shape("large-deep", 130, 260, 130, 520)
CHUNKS = Shape("chunks", 300, 280, 260, 72, workspace=100_000)
SHAPES = (SMALL, MEDIUM, LARGE, LARGE_ALIGNED, LARGE_DEEP, CHUNKS)


class Precision(NamedTuple):
    dtype: torch.dtype
    of_products: str  # torch.set_float32_matmul_precision
    # Errors of a loss and of gradients, whose matrix products take rounded weights, relative to the largest
    # element.
    loss: float
    gradient: float


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, "highest", 2**-8, 2**-6),
    "fp16": Precision(torch.float16, "highest", 2**-10, 2**-9),
    "fp32": Precision(torch.float32, "highest", 2**-16, 2**-15),
    "tf32": Precision(torch.float32, "high", 2**-15, 2**-14),
    "fp64": Precision(torch.float64, "highest", 2**-28, 2**-28),
}
LOSSES = {
    "hardest": (fused_vse.hardest_negative_loss, {}),
    "all-negatives": (fused_vse.all_negatives_loss, {"margin": 0.1}),
    "cold": (fused_vse.all_negatives_loss, {"temperature": 0.01}),
    "hinge": (fused_vse.hinge_loss, {}),
    "sigmoid": (fused_vse.sigmoid_loss, {"bias": -5.0}),
    "sigmoid-positive": (fused_vse.sigmoid_loss, {"bias": -5.0, "equal_ids": "positive"}),
    "semi-hard": (fused_vse.hardest_negative_loss, {"false_negative_margin": 0.01}),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_ids = pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])


def each_precision(*names):
    return pytest.mark.parametrize("precision", [PRECISIONS[x] for x in names], ids=names)


def each_shape(*shapes):
    return pytest.mark.parametrize("shape", shapes, ids=str)


def embeddings(shape: Shape, precision: Precision) -> dict[str, Tensor]:
    """In float64: images [N, D] and captions [M, D], pairs barely above their negatives, so that every loss
    and gradient has many terms."""
    generator = torch.Generator().manual_seed(0)
    images, captions = (
        torch.randn(rows, shape.dim, generator=generator, dtype=torch.float64)
        for rows in (shape.rows, shape.columns)
    )
    captions[: shape.pairs] += 0.3 * images[: shape.pairs]
    pair = [normalize(x) for x in (images, captions)]
    if precision.of_products == "high":  # without what tensor cores would drop
        pair = [(x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in pair]
    return dict(zip(("images", "captions"), pair, strict=True))


def keywords(shape: Shape, ids: bool) -> dict:
    if not ids:
        return {"num_pairs": shape.pairs}
    n, m = torch.arange(shape.rows) // 5, torch.arange(shape.columns) // 5
    return {"num_pairs": shape.pairs, "image_ids": n, "caption_ids": m}


def on(device, value):
    return value.to(device.type) if isinstance(value, Tensor) else value


def differentiated(loss: str, leaves: dict[str, Tensor], backend: str, options: dict):
    """The loss, if reduction="none" of each anchor, and the gradients of a weighted sum by all leaves."""
    function, more = LOSSES[loss]
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}  # a view stays one
    value = function(backend=backend, **(more | leaves | options))
    weights = torch.linspace(0.5, 1.5, value.numel(), device=value.device, dtype=torch.float64)
    (value * weights.view(value.shape).to(value.dtype)).sum().backward()
    return [value.detach(), *(x.grad for x in leaves.values())]


@contextlib.contextmanager
def settings(shape: Shape, precision: Precision):
    before = torch.get_float32_matmul_precision(), workspace_bytes()
    torch.set_float32_matmul_precision(precision.of_products)
    set_workspace_bytes(shape.workspace)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        set_workspace_bytes(before[1])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Of the largest element, without what underflows."""
    assert got.shape == want.shape
    got, smallest = (
        got.double(),
        torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps,
    )
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf)
    scale = want[want.isfinite()].abs().max().clamp(min=1e-30)
    return ((error - smallest).clamp(min=0).max() / scale).item()


def check(
    device, backend: str, loss: str, shape: Shape, precision: Precision, leaves: dict[str, Tensor],
    slack=1.0, change=lambda x: x, **options,
) -> None:  # fmt: skip
    """The backend against the reference. `leaves` in float64; what `change` makes of them are equal numbers
    that lie elsewhere."""
    narrow = {name: x.to(device.type, precision.dtype) for name, x in leaves.items()}
    if "temperature" in narrow:
        narrow["temperature"] = narrow["temperature"].float()
    options = {name: on(device, x) for name, x in options.items()}
    with settings(shape, precision):
        wide = {name: x.double() for name, x in narrow.items()}
        expected = differentiated(loss, wide, "reference", options)
        placed = {name: change(x) if x.dim() else x for name, x in narrow.items()}
        actual = differentiated(loss, placed, backend, options)
    errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    assert errors[0] <= slack * precision.loss, errors
    assert max(errors[1:]) <= slack * precision.gradient, errors
