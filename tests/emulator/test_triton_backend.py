"""The losses of the Triton backend, compiled for sm_80 and sm_90, against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from . import losses
from .losses import (
    LARGE,
    MEDIUM,
    PRECISIONS,
    SMALL,
    each_ids,
    each_loss,
    each_precision,
    each_shape,
    embeddings,
    keywords,
)

pytestmark = [pytest.mark.on_device("triton"), pytest.mark.filterwarnings("ignore")]


def check(device, loss, shape, precision, leaves, **options):
    losses.check(device, "triton", loss, shape, precision, leaves, reduction="none", **options)


@each_ids
@each_shape(SMALL, MEDIUM, LARGE, losses.LARGE_ALIGNED, losses.LARGE_DEEP, losses.CHUNKS)
@each_precision("bf16", "fp16", "tf32", "fp32")
@each_loss
def test_embeddings(device, loss, precision, shape, ids):
    leaves = embeddings(shape, precision)
    check(device, loss, shape, precision, leaves, **keywords(shape, ids))


@each_shape(losses.RECTANGLE, losses.ALIGNED)
@each_loss
def test_shapes_of_tensor_maps(device, loss, shape):
    precision = PRECISIONS["bf16"]
    leaves = embeddings(shape, precision)
    check(device, loss, shape, precision, leaves, **keywords(shape, True))


@each_loss
def test_float64(device, loss):
    precision = PRECISIONS["fp64"]
    leaves = embeddings(SMALL, precision)
    check(device, loss, SMALL, precision, leaves, **keywords(SMALL, True))


@each_shape(SMALL, MEDIUM)
@each_precision("bf16", "fp32", "fp64")
@each_loss
def test_order_similarity(device, loss, precision, shape):
    leaves, options = embeddings(shape, precision), keywords(shape, shape is SMALL)
    check(device, loss, shape, precision, leaves, similarity="order", **options)


@each_shape(MEDIUM, LARGE)
@each_precision("bf16", "fp32", "fp64")
@each_loss
def test_given_scores(device, loss, precision, shape):
    images, captions = embeddings(shape, precision).values()
    leaves = {"scores": images @ captions.T}
    check(device, loss, shape, precision, leaves, **keywords(shape, shape is MEDIUM))


@each_precision("bf16", "fp32", "fp64")
@pytest.mark.parametrize("loss", [name for name in losses.LOSSES if name != "semi-hard"])
def test_normalisation(device, loss, precision):
    """Rounds once more. (Which negatives are false ones is not to depend on that.)"""
    leaves = {name: 3 * x for name, x in embeddings(SMALL, precision).items()}
    options = keywords(SMALL, True)
    check(device, loss, SMALL, precision, leaves, slack=4, normalize=True, **options)


@each_shape(SMALL, LARGE)
@each_precision("bf16", "fp16", "tf32")
def test_learned_temperature(device, precision, shape):
    leaves = embeddings(shape, precision)
    leaves["temperature"] = torch.tensor(0.07, dtype=torch.float64)
    check(device, "all-negatives", shape, precision, leaves, **keywords(shape, True))
