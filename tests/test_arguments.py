"""Bad arguments never reach a kernel: each error names the argument, what it was and the remedy."""

import pytest
import torch

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hardest_negatives, hinge_loss

I, T = torch.randn(4, 3), torch.randn(4, 3)
IDS = torch.arange(4)

EVERYWHERE = [
    (dict(images=[[1.0]]), TypeError, "images must be a floating-point tensor.*list"),
    (dict(captions=None), TypeError, "captions must be"),
    (dict(images=I.int()), TypeError, r"images .*int32.*\.float\(\)"),
    (dict(images=I.to(torch.complex64)), TypeError, "images .*complex64"),
    (dict(images=I.to_sparse()), TypeError, r"images .*sparse.*to_dense"),
    (dict(images=I[0]), ValueError, r"images must be .*\[3\]"),
    (dict(captions=T[None]), ValueError, r"captions must be .*\[1, 4, 3\]"),
    (dict(images=I[:0]), ValueError, r"images is empty: shape \[0, 3\]"),
    (dict(captions=T[:, :0]), ValueError, r"captions is empty"),
    (dict(captions=torch.randn(4, 5)), ValueError, r"share D, got \[4, 3\] and \[4, 5\]"),
    (dict(captions=T.double()), TypeError, "float32 but captions are torch.float64"),
    (dict(captions=T.to("meta")), ValueError, "cpu but captions are on meta"),
    (dict(captions=torch.randn(5, 3)), ValueError, r"num_pairs must be given.*\(4\).*\(5\)"),
    (dict(num_pairs=0), ValueError, "num_pairs must be between 1 and 4.*got 0"),
    (dict(num_pairs=5), ValueError, "num_pairs must be between 1 and 4.*got 5"),
    (dict(num_pairs=-1), ValueError, "num_pairs must be between"),
    (dict(num_pairs=2.0), TypeError, "num_pairs must be an int, got 2.0"),
    (dict(num_pairs=True), TypeError, "num_pairs must be an int"),
    (dict(image_ids=IDS), ValueError, "caption_ids is missing"),
    (dict(caption_ids=IDS), ValueError, "image_ids is missing"),
    (dict(image_ids=IDS.float(), caption_ids=IDS), TypeError, r"image_ids .*float32.*\.long\(\)"),
    (dict(image_ids=IDS.bool(), caption_ids=IDS), TypeError, r"image_ids .*bool"),
    (dict(image_ids=IDS, caption_ids=[0, 1, 2, 3]), TypeError, "caption_ids .*torch.tensor"),
    (dict(image_ids=IDS[:3], caption_ids=IDS), ValueError, r"image_ids .* 4 rows of images.*\[3\]"),
    (dict(image_ids=IDS, caption_ids=IDS[None]), ValueError, r"caption_ids .*\[1, 4\]"),
    (dict(image_ids=IDS.to("meta"), caption_ids=IDS), ValueError, "image_ids is on meta"),
    (dict(backend="gpu"), ValueError, "backend must be one of 'auto', 'reference'.*got 'gpu'"),
]
LOSSES = [
    (
        dict(reduction="avg"),
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none'; got 'avg'",
    ),
    (dict(margin=float("nan")), ValueError, "margin must be finite, got nan"),
    (dict(margin="0.2"), TypeError, "margin must be a float, got '0.2'"),
    (dict(direction_weights=(1, 2, 3)), TypeError, r"direction_weights .*\(1, 2, 3\)"),
    (dict(direction_weights=0.5), TypeError, "direction_weights .*0.5"),
    (dict(direction_weights=(1, -1)), ValueError, r"direction_weights .*\(1, -1\)"),
    (dict(direction_weights=(1, float("inf"))), ValueError, "direction_weights .*inf"),
]
TEMPERATURES = [
    (0.0, ValueError, "temperature must be positive and finite, got 0.0"),
    (-1, ValueError, "got -1"),
    (float("nan"), ValueError, "got nan"),
    (float("inf"), ValueError, "got inf"),
    (torch.tensor(-0.1), ValueError, "temperature must be positive.*got -0.1"),
    (torch.tensor([0.1, 0.2]), TypeError, r"temperature .*shape \[2\]"),
    (torch.tensor(1), TypeError, "temperature .*int64"),
    (torch.tensor(0.1, device="meta"), ValueError, "temperature is on meta"),
    ("0.1", TypeError, "temperature .*'0.1'"),
    (None, TypeError, "temperature .*None"),
]


@pytest.mark.parametrize(
    "function", [all_negatives_loss, hardest_negative_loss, hinge_loss, hardest_negatives]
)
@pytest.mark.parametrize(("change", "error", "message"), EVERYWHERE)
def test_shared_arguments(function, change, error, message):
    arguments = {"images": I, "captions": T} | change
    with pytest.raises(error, match=message):
        function(arguments.pop("images"), arguments.pop("captions"), **arguments)


@pytest.mark.parametrize("loss", [all_negatives_loss, hardest_negative_loss, hinge_loss])
@pytest.mark.parametrize(("change", "error", "message"), LOSSES)
def test_arguments_of_losses(loss, change, error, message):
    with pytest.raises(error, match=message):
        loss(I, T, **change)


@pytest.mark.parametrize(
    "loss", [all_negatives_loss, hardest_negative_loss, fused_vse.negative_logsumexp]
)
@pytest.mark.parametrize(("temperature", "error", "message"), TEMPERATURES)
def test_temperature(loss, temperature, error, message):
    with pytest.raises(error, match=message):
        loss(I, T, temperature=temperature)


def test_a_bad_temperature_that_cannot_be_checked_gives_nan():
    """Under torch.compile no value of a tensor is looked at."""
    compiled = torch.compile(all_negatives_loss, fullgraph=True, backend="aot_eager")
    assert compiled(I, T, temperature=torch.tensor(-0.1)).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype, backend):
    ids = torch.tensor([0, 0, 1, 2])
    expected = all_negatives_loss(I, T, image_ids=ids, caption_ids=ids, backend="reference")
    ids = ids.to(dtype)
    actual = all_negatives_loss(I, T, image_ids=ids, caption_ids=ids, backend=backend)
    assert torch.allclose(actual, expected)


def test_backends_and_requests_for_missing_ones(monkeypatch):
    from fused_vse.backends import cpu

    assert fused_vse.backends()["reference"] == "available"
    monkeypatch.setattr(cpu, "UNAVAILABLE", "it was not built; build it")
    assert fused_vse.backends()["cpu"] == "it was not built; build it"
    with pytest.raises(
        RuntimeError, match="backend='cpu' is not available: it was not built; build it"
    ):
        all_negatives_loss(I, T, backend="cpu")
    with pytest.warns(UserWarning, match="no fused backend for cpu .*stores all of S"):
        fallback = all_negatives_loss(I, T)
    assert torch.equal(fallback, all_negatives_loss(I, T, backend="reference"))


@pytest.mark.skipif(fused_vse.backends()["cpu"] != "available", reason="needs the cpu backend")
def test_a_backend_refuses_tensors_of_another_device():
    with pytest.raises(ValueError, match="backend='cpu' takes cpu tensors, got tensors on meta"):
        all_negatives_loss(I.to("meta"), T.to("meta"), backend="cpu")
