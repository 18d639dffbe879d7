"""Bad arguments never reach a kernel: each error names the argument, what it was and the remedy."""

import fractions
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hardest_negatives, hinge_loss

I, T = torch.randn(4, 3), torch.randn(4, 3)
IDS = torch.arange(4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "prototype stage", once
    NESTED = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
HUGE = 10**400  # no float
ENDLESS = 10**5000  # and too long for Python to print

EVERYWHERE = [
    (dict(images=[[1.0]]), TypeError, "images must be a floating-point tensor.*list"),
    (dict(captions=None), TypeError, "captions are missing.*scores="),
    (dict(images=I.int()), TypeError, r"images .*int32.*\.float\(\)"),
    (dict(images=I.to(torch.complex64)), TypeError, "images .*complex64"),
    (dict(images=I.to_sparse()), TypeError, r"images .*sparse.*to_dense"),
    (dict(images=NESTED), TypeError, r"images .*nested tensor; .*to_padded_tensor"),
    (dict(images=NESTED.to_padded_tensor(0)[0].to_mkldnn()), TypeError, "images .*mkldnn"),
    (dict(images=I.to(torch.float8_e4m3fn)), TypeError, r"images .*float8.*\.float\(\)"),
    (dict(images=I.numpy()), TypeError, r"images .*float32 numpy array of shape \[4, 3\]; wrap it"),
    (dict(images=None, captions=None), TypeError, "images and captions are missing.*scores="),
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
    (
        dict(num_pairs=ENDLESS),
        ValueError,
        "num_pairs must be between 1 and 4.* an int too long to print",
    ),
    (dict(num_pairs=torch.tensor(3)), TypeError, "num_pairs must be an int, got a int64 tensor"),
    (dict(image_ids=IDS), ValueError, "caption_ids is missing"),
    (dict(caption_ids=IDS), ValueError, "image_ids is missing"),
    (dict(image_ids=IDS.float(), caption_ids=IDS), TypeError, r"image_ids .*float32.*\.long\(\)"),
    (dict(image_ids=IDS.bool(), caption_ids=IDS), TypeError, r"image_ids .*bool"),
    (dict(image_ids=IDS, caption_ids=[0, 1, 2, 3]), TypeError, "caption_ids .*torch.tensor"),
    (
        dict(image_ids=IDS[:3], caption_ids=IDS),
        ValueError,
        r"image_ids .* row of images, 4 .*\[3\]",
    ),
    (dict(image_ids=IDS, caption_ids=IDS[None]), ValueError, r"caption_ids .*\[1, 4\]"),
    (dict(image_ids=IDS.to("meta"), caption_ids=IDS), ValueError, "image_ids is on meta"),
    (
        dict(image_ids=IDS.to_sparse(), caption_ids=IDS),
        TypeError,
        r"image_ids .*sparse.*to_dense",
    ),
    (
        dict(image_ids=IDS, caption_ids=torch.nested.nested_tensor([IDS])),
        TypeError,
        "caption_ids .*nested tensor",
    ),
    (
        dict(image_ids=IDS.to(torch.uint32), caption_ids=IDS),
        TypeError,
        r"image_ids .*uint32.*\.long",
    ),
    (
        dict(image_ids=IDS.numpy(), caption_ids=IDS),
        TypeError,
        r"image_ids .*int64 numpy array of shape \[4\]; wrap it in torch.tensor",
    ),
    (dict(normalize="no"), TypeError, "normalize must be True or False, got 'no'"),
    (dict(normalize=torch.tensor([True, False])), TypeError, "normalize .*a bool tensor"),
    (dict(normalize=2), TypeError, "normalize must be True or False, got 2"),
    (
        dict(similarity=np.array(["dot", "order"])),
        TypeError,
        "similarity must be one .*numpy array",
    ),
    (dict(similarity="x" * 5000), ValueError, r"similarity must be one of .{,120}$"),
    (dict(backend=np.array(["auto", "cpu"])), TypeError, "backend must be 'auto' or.*numpy array"),
    (dict(backend=None), TypeError, r"backend must be .*fused_vse.backends\(\).*got None"),
    (dict(backend="gpu"), ValueError, "backend must be one of 'auto', 'reference'.*got 'gpu'"),
]
LOSSES = [
    (
        dict(reduction="avg"),
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none'; got 'avg'",
    ),
    (dict(reduction=np.array(["mean", "sum"])), TypeError, "reduction must be .*numpy array"),
    (dict(reduction=torch.ones(2)), TypeError, "reduction must be .*float32 tensor"),
    (dict(return_statistics=torch.ones(2)), TypeError, "return_statistics must be True or False"),
    (dict(margin=float("nan")), ValueError, "margin must be finite in torch.float32.*got nan"),
    (dict(margin=1e39), ValueError, r"margin must be finite in torch.float32.*got 1e\+39"),
    (dict(margin=-HUGE), ValueError, "margin must be finite.* got -inf"),
    (dict(margin=ENDLESS), ValueError, "margin must be finite.* got inf"),
    (dict(margin=True), TypeError, "margin must be a float, got True"),
    (
        dict(margin=torch.tensor(0.2)),
        TypeError,
        r"margin .*float32 tensor.*convert it with float\(\)",
    ),
    (dict(margin=np.zeros((99, 99))), TypeError, r"margin .*numpy array of shape \[99, 99\]"),
    (dict(margin="0.2"), TypeError, "margin must be a float, got '0.2'"),
    (dict(direction_weights=(1, 2, 3)), TypeError, r"direction_weights .*\(1, 2, 3\)"),
    (dict(direction_weights=0.5), TypeError, "direction_weights .*0.5"),
    (dict(direction_weights=(1, -1)), ValueError, r"direction_weights .*\(1, -1\)"),
    (dict(direction_weights=(1, float("inf"))), ValueError, "direction_weights .*inf"),
    (dict(direction_weights=(1, HUGE)), ValueError, "direction_weights .{,160}$"),
    (dict(direction_weights=(1, ENDLESS)), ValueError, "direction_weights .* an int too long"),
    (dict(direction_weights=(1e39, 1)), ValueError, r"direction_weights .*1e\+39"),
    (dict(direction_weights=(1, True)), TypeError, "direction_weights .*got True"),
    (dict(direction_weights=I), TypeError, r"direction_weights .*tensor of shape \[4, 3\]"),
    (dict(direction_weights=(I[0], 1)), TypeError, r"direction_weights .*tensor of shape \[3\]"),
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
    (torch.tensor([0.1]).to_sparse(), TypeError, "temperature .*sparse.*to_dense"),
    (torch.nested.nested_tensor([torch.ones(1)]), TypeError, "temperature .*nested tensor"),
    (torch.tensor(0.1).to(torch.float8_e5m2), TypeError, "temperature .*float8"),
    (HUGE, ValueError, "temperature must be positive and finite, got inf"),
    (2e10, ValueError, r"temperature must be between 1e-10 and 1e\+10,.*; got 20000000000.0"),
    (9e-11, ValueError, "temperature must be between .*; got 9e-11"),
    (torch.tensor(1e38), ValueError, r"temperature must be between .*got 9.9.*e\+37"),
    (torch.tensor(1e-300).double(), ValueError, "temperature must be positive and finite, got 0.0"),
    (torch.tensor(1e300, dtype=torch.float64), ValueError, r"temperature must .*got 1e\+300"),
    (np.array([0.1, 0.2]), TypeError, r"temperature .*float64 numpy array of shape \[2\]"),
    (np.array(0.1), TypeError, r"temperature .*numpy array.*convert it with float\(\)"),
    (np.bool_(True), TypeError, "temperature must be .*True"),
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


@pytest.mark.parametrize("value", [-0.1, 0.0, 9e-11, 2e10, torch.inf, torch.nan])
def test_a_bad_temperature_that_cannot_be_checked_gives_nan(value, backend):
    """Under torch.compile no value of a tensor is looked at."""
    compiled = torch.compile(all_negatives_loss, fullgraph=True, backend="aot_eager")
    assert compiled(I, T, temperature=torch.tensor(value), backend=backend).isnan()


@pytest.mark.parametrize("temperature", [2e-10, 1e-7, 1e-4, 1e4, 9e9])
def test_outermost_temperatures(temperature, backend):
    """With scores that float32 holds exactly, so that no other rounding is magnified."""
    images, captions = (
        torch.randint(-3, 4, (2, 12, 5), generator=torch.manual_seed(0)) / 4
    ).unbind()
    scores = images @ captions.T
    labels = torch.arange(12)

    def eager(images, captions, temperature):
        logits = images @ captions.T / temperature
        return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)

    def run(function, dtype, *inputs):
        leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
        result = function(*leaves)
        result.backward()
        return [result.detach(), *(x.grad for x in leaves)]

    tau = torch.tensor(temperature)
    ours = lambda x, y, tau: all_negatives_loss(x, y, temperature=tau, backend=backend)  # noqa: E731
    actual = run(ours, torch.float32, images, captions, tau)
    expected = run(eager, torch.float64, images, captions, tau)
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max() + 1e-15
    of_scores = all_negatives_loss(scores=scores, temperature=temperature, backend=backend)
    assert torch.isclose(of_scores, actual[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:no fused backend for meta")
def test_tensors_without_data(backend):
    images, captions = I.to("meta"), T.to("meta")
    with pytest.raises(ValueError, match="images and captions are on meta.*to_empty"):
        all_negatives_loss(images, captions, backend=backend)
    with pytest.raises(ValueError, match="scores are on meta"):
        hardest_negatives(scores=captions[:3], backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "number", [np.float16, np.float32, np.float64, fractions.Fraction, np.int64]
)
def test_real_numbers_of_any_type(number, backend):
    """A bool is none: it is more likely a forgotten argument."""
    one, two, three = number(1), number(2), 3
    options = dict(temperature=two, margin=one, direction_weights=(one, two), backend=backend)
    plain = dict(temperature=2.0, margin=1.0, direction_weights=(1.0, 2.0), backend=backend)
    actual = all_negatives_loss(I, T, num_pairs=np.int32(three), **options)
    assert torch.equal(actual, all_negatives_loss(I, T, num_pairs=three, **plain))


def test_flags_of_other_types(backend):
    for yes, no in ((np.bool_(True), np.bool_(False)), (1, 0)):
        for flag in (yes, no):
            actual = hinge_loss(I, T, hardest=flag, normalize=flag, backend=backend)
            expected = hinge_loss(I, T, hardest=bool(flag), normalize=bool(flag), backend=backend)
            assert torch.equal(actual, expected)
    with pytest.raises(TypeError, match="hardest must be True or False, got 'no'"):
        hinge_loss(I, T, hardest="no", backend=backend)
    with pytest.raises(TypeError, match="smooth must be True or False, got None"):
        hardest_negative_loss(I, T, smooth=None, backend=backend)


def test_messages_are_short():
    for value in ([[0.0] * 1000] * 1000, np.zeros((1000, 1000)), "x" * 10000, {0: I}, (I, I)):
        for name in ("images", "image_ids", "temperature", "margin", "reduction", "backend"):
            arguments = dict(images=I, captions=T, image_ids=IDS, caption_ids=IDS) | {name: value}
            with pytest.raises((TypeError, ValueError), match=name) as caught:
                all_negatives_loss(**arguments)
            assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype, backend):
    ids = torch.tensor([0, 0, 1, 2])
    expected = all_negatives_loss(I, T, image_ids=ids, caption_ids=ids, backend="reference")
    ids = ids.to(dtype)
    actual = all_negatives_loss(I, T, image_ids=ids, caption_ids=ids, backend=backend)
    assert torch.allclose(actual, expected)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:1].expand(4, 3),
        lambda x: torch.complex(x, x).conj().imag,  # negated when it is read
        lambda x: torch.nn.Parameter(x),
        lambda x: x.as_subclass(Subclass),
    ],
    ids=["stride 0", "lazily negated", "parameter", "subclass"],
)
@pytest.mark.parametrize(
    "ids",
    [torch.tensor([7]).expand(4), IDS.repeat(2)[::2], torch.tensor([-(2**63), 2**63 - 1, 0, -1])],
    ids=["stride 0", "strided", "extreme"],
)
def test_unusual_tensors(view, ids, backend):
    options = dict(backend=backend)
    actual = all_negatives_loss(view(I), view(T), image_ids=ids, caption_ids=ids, **options)
    images, captions, ids = (torch.tensor(x.tolist()) for x in (view(I), view(T), ids))
    expected = all_negatives_loss(images, captions, image_ids=ids, caption_ids=ids, **options)
    assert torch.equal(actual.as_subclass(torch.Tensor), expected)


def test_backends_and_requests_for_missing_ones(monkeypatch):
    from fused_vse.backends import cpu

    assert fused_vse.backends()["reference"] == "available"
    monkeypatch.setattr(cpu, "unavailable", lambda: "it was not built; build it")
    assert fused_vse.backends()["cpu"] == "it was not built; build it"
    with pytest.raises(
        RuntimeError, match="backend='cpu' is not available: it was not built; build it"
    ):
        all_negatives_loss(I, T, backend="cpu")
    with pytest.warns(UserWarning, match="no fused backend for cpu .*stores all of S") as record:
        fallback = all_negatives_loss(I, T)
    assert record[0].filename == __file__  # the line that has to change
    assert torch.equal(fallback, all_negatives_loss(I, T, backend="reference"))


@pytest.mark.skipif(fused_vse.backends()["cpu"] != "available", reason="needs the cpu backend")
def test_a_backend_refuses_tensors_of_another_device():
    with pytest.raises(ValueError, match="backend='cpu' takes cpu tensors, got tensors on meta"):
        all_negatives_loss(I.to("meta"), T.to("meta"), backend="cpu")
