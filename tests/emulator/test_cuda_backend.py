"""The losses of the CUDA backend against the float64 reference: csrc/cuda with its host code."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")  # has the backward passes of the statistics

from . import cuda_ops, losses
from .device import AMPERE, HOPPER
from .losses import (
    PRECISIONS,
    Precision,
    Shape,
    each_ids,
    each_precision,
    each_shape,
    embeddings,
    keywords,
)

pytestmark = pytest.mark.filterwarnings("ignore")
# Several tiles for a block, and one; clusters that share D, and none.
on_each_machine = pytest.mark.on_device(
    "cuda", (AMPERE, 3), (AMPERE, 108), (HOPPER, 3), (HOPPER, 132), few=6
)
on_hopper = pytest.mark.on_device("cuda", (HOPPER, 2), (HOPPER, 4), (HOPPER, 132), few=3)

ODD = Shape("odd", 37, 37, 37, 19)
ONE = Shape("one", 1, 1, 1, 5)
EXTRAS = Shape("extras", 45, 50, 33, 24)
TALL = Shape("tall", 131, 70, 70, 33)
WIDE = Shape("wide", 70, 130, 65, 72)
DEEP = Shape("deep", 60, 40, 33, 520)
# Not as small_loss, but as statistics.
HOPPER_SHAPES = (
    Shape("ragged", 300, 400, 290, 136),
    Shape("aligned", 256, 384, 256, 64),
    Shape("few-columns", 530, 60, 60, 72),
    Shape("deep", 257, 385, 257, 328),
)
LOSSES = {  # what csrc/cuda computes; the other losses and options are the Triton backend's
    **{name: losses.LOSSES[name] for name in ("hardest", "all-negatives", "cold", "hinge")},
    "hardest-smooth": (losses.fused_vse.hardest_negative_loss, {"smooth": True, "margin": 0.1}),
    "hinge-max": (losses.fused_vse.hinge_loss, {"hardest": True, "margin": 0.3}),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def of_small_loss(precision: Precision) -> Precision:
    """Everything in float32, and gradients rounded once."""
    eps = torch.finfo(precision.dtype).eps
    return precision._replace(loss=2**-14, gradient=2**-12 + eps)


@pytest.fixture(autouse=True)
def more_losses(monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", LOSSES)


@on_each_machine
@each_ids
@each_shape(ONE, ODD, EXTRAS, TALL, WIDE, DEEP)
@each_precision("bf16", "fp16", "fp32")
@each_loss
def test_small_losses(device, loss, precision, shape, ids):
    precision, leaves = of_small_loss(precision), embeddings(shape, precision)
    losses.check(device, "cuda", loss, shape, precision, leaves, **keywords(shape, ids))


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """Every other column of a wider tensor, with NaN between them."""
    around = torch.full((len(x), 2 * x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    around[:, 3::2] = x
    return around[:, 3::2]


@on_each_machine
@each_precision("bf16", "fp16", "fp32")
def test_strided_views(device, precision):
    precision, leaves = of_small_loss(precision), embeddings(WIDE, precision)
    options = keywords(WIDE, True)
    losses.check(
        device, "cuda", "all-negatives", WIDE, precision, leaves, change=elsewhere, **options
    )


@on_each_machine
@each_precision("bf16", "fp16", "fp32")
def test_learned_temperature_of_normalised_rows(device, precision):
    precision, leaves = of_small_loss(precision), embeddings(WIDE, precision)
    leaves["temperature"] = torch.tensor(0.07, dtype=torch.float64)
    options = keywords(WIDE, True)
    losses.check(
        device, "cuda", "cold", WIDE, precision, leaves, slack=4, normalize=True, **options
    )


@on_each_machine
@pytest.mark.parametrize("side", ["images", "captions"])
@each_loss
def test_small_losses_of_one_side(device, loss, side):
    """The other one is frozen."""
    precision = of_small_loss(PRECISIONS["fp32"])
    narrow = {k: x.to(device.type, precision.dtype) for k, x in embeddings(WIDE, precision).items()}
    options = {k: losses.on(device, x) for k, x in keywords(WIDE, True).items()}
    results = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        both = {name: x.to(dtype) for name, x in narrow.items()}
        leaf = {side: both.pop(side)}
        results.append(losses.differentiated(loss, leaf, backend, both | options))
    errors = [losses.relative_error(a, b) for a, b in zip(*results, strict=True)]
    assert errors[0] <= precision.loss and errors[1] <= precision.gradient, errors


@on_hopper
@each_ids
@each_shape(*HOPPER_SHAPES)
@each_precision("bf16", "fp16")
@each_loss
def test_hopper_statistics(device, loss, precision, shape, ids):
    leaves = embeddings(shape, precision)
    options = {"reduction": "none", **keywords(shape, ids)}
    losses.check(device, "cuda", loss, shape, precision, leaves, **options)
    if device.is_emulated:
        launched = "\n".join(device.launches())
        assert "hopper" in launched and "small_loss" not in launched


def test_hopper_statistics_in_pieces(request):
    """With a workspace so small that S is taken in pieces: another library, in a process of its own."""
    cases = request.config.getoption("--cases")
    if (why := cuda_ops.why_not()) is not None or torch.cuda.is_available() or cases is None:
        pytest.skip(why or "in the emulator with --cases, since nvcc takes a while")
    library = cuda_ops.built([cuda_ops.SMALL_WORKSPACE])
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "hopper and not pieces",
        "--cases", cases, "--seeds", request.config.getoption("--seeds"), __file__,
    ]  # fmt: skip
    environment = os.environ | {cuda_ops.LIBRARY_VARIABLE: str(library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@on_each_machine
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_loss
def test_non_finite_input_surfaces(device, loss, value):
    precision = PRECISIONS["fp16"]
    leaves = {
        k: x.to(device.type, precision.dtype) for k, x in embeddings(EXTRAS, precision).items()
    }
    leaves["captions"][-1, 3] = value
    leaves["images"][:, 3] = 0  # 0 * inf
    options = {k: losses.on(device, x) for k, x in keywords(EXTRAS, True).items()}
    for result in losses.differentiated(loss, leaves, "cuda", options):
        assert result.isnan().all()
