"""The nn.Module forms."""

import math

import numpy as np
import pytest
import torch
from cases import CASES, embeddings

import fused_vse
from fused_vse import AllNegativesLoss, HardestNegativeLoss, HingeLoss

I, T = embeddings(CASES[2], torch.float32)
IDS = torch.arange(len(I)) // 3


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            AllNegativesLoss(0.2, margin=0.1),
            lambda **k: fused_vse.all_negatives_loss(I, T, temperature=0.2, margin=0.1, **k),
        ),
        (
            HardestNegativeLoss(smooth=True),
            lambda **k: fused_vse.hardest_negative_loss(I, T, smooth=True, **k),
        ),
        (
            HingeLoss(hardest=True, margin=0.4),
            lambda **k: fused_vse.hinge_loss(I, T, hardest=True, margin=0.4, **k),
        ),
    ],
)
def test_equals_the_function(module, expected):
    ids = dict(image_ids=IDS, caption_ids=IDS)
    assert torch.equal(module(I, T), expected())
    assert torch.equal(module(I, T, **ids), expected(**ids))
    assert not list(module.parameters())


@pytest.mark.parametrize("module_class", [AllNegativesLoss, HardestNegativeLoss])
def test_learnable_temperature(module_class):
    module = module_class(0.05, learnable_temperature=True)
    assert [name for name, _ in module.named_parameters()] == ["log_temperature"]
    assert module.log_temperature.item() == pytest.approx(math.log(0.05))
    module(I, T).backward()
    assert module.log_temperature.grad.item() != 0
    loaded = module_class(learnable_temperature=True)
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(I, T), module(I, T))


@pytest.mark.parametrize(("start", "bound"), [(-20.0, 0.01), (20.0, 10.0)])
def test_temperature_is_clamped_and_comes_back(start, bound):
    module = AllNegativesLoss(learnable_temperature=True)
    with torch.no_grad():
        module.log_temperature.fill_(start)
    module(I, T).backward()
    assert module.temperature.item() == pytest.approx(bound)
    assert module.log_temperature.grad.item() != 0  # not stuck at the bound


def test_a_forward_leaves_the_graphs_of_earlier_ones_alone():
    module = AllNegativesLoss(learnable_temperature=True)
    expected = torch.autograd.grad(2 * module(I, T), module.log_temperature)[0]
    expected += 2 * module.log_temperature.detach()
    regularised = module(I, T) + module.log_temperature.square()  # backward needs the parameter
    (regularised + module(I, T)).backward()
    assert torch.allclose(module.log_temperature.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_temperature_of_a_module_in_another_dtype(dtype):
    module = AllNegativesLoss(temperature=0.07, learnable_temperature=True).to(dtype)
    assert module.temperature.dtype == torch.promote_types(dtype, torch.float32)
    exact = module.log_temperature.double().exp().item()
    assert module.temperature.item() == pytest.approx(exact, rel=1e-6)
    module(torch.eye(3, dtype=dtype), torch.eye(3, dtype=dtype)).backward()
    assert module.log_temperature.grad.dtype == dtype


@pytest.mark.skipif(fused_vse.backends()["cpu"] != "available", reason="needs the cpu backend")
def test_two_compiled_forwards_before_one_backward():
    torch.compiler.reset()
    module = AllNegativesLoss(learnable_temperature=True)
    expected = torch.autograd.grad(2 * module(I, T), module.log_temperature)[0]
    call = torch.compile(
        module, fullgraph=True
    )  # inductor computes the temperature again in backward
    (call(I, T) + call(I, T)).backward()
    assert torch.allclose(module.log_temperature.grad, expected)


def test_compiled_module_clamps_and_comes_back():
    module = AllNegativesLoss(learnable_temperature=True)
    torch.compiler.reset()
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    for start, bound in ((-20.0, 0.01), (20.0, 10.0)):
        module.zero_grad()
        with torch.no_grad():
            module.log_temperature.fill_(start)
        call(I, T).backward()
        assert module.temperature.item() == pytest.approx(bound)
        assert module.log_temperature.grad.item() != 0


def test_clamps_in_inference_mode():
    module = AllNegativesLoss(learnable_temperature=True)
    with torch.inference_mode():
        assert torch.allclose(module(I, T), fused_vse.all_negatives_loss(I, T))


def test_bad_arguments():
    with pytest.raises(ValueError, match="temperature must be positive"):
        AllNegativesLoss(0)
    with pytest.raises(ValueError, match=r"between 0\.01 and 10\.0, got 0\.001"):
        AllNegativesLoss(0.001, learnable_temperature=True)
    with pytest.raises(TypeError, match=r"HingeLoss got an unknown argument .tau..*margin"):
        HingeLoss(tau=0.1)
    with pytest.raises(TypeError, match=r"HingeLoss got an unknown argument .scores."):
        HingeLoss(scores=I @ T.T)
    with pytest.raises(TypeError, match="learnable_temperature must be True or False, got 'no'"):
        AllNegativesLoss(learnable_temperature="no")
    with pytest.raises(TypeError, match="temperature .* requires grad.*learnable_temperature=True"):
        AllNegativesLoss(torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="temperature is on meta.*pass a float"):
        AllNegativesLoss(torch.tensor(0.1, device="meta"))


def test_a_temperature_that_is_no_python_float():
    for temperature in (torch.tensor(0.25), np.float32(0.25), np.float64(0.25)):
        assert repr(AllNegativesLoss(temperature)) == "AllNegativesLoss(temperature=0.25)"


def test_repr_shows_the_options():
    assert (
        repr(AllNegativesLoss(0.2, margin=0.1)) == "AllNegativesLoss(temperature=0.2, margin=0.1)"
    )
    learnable = HardestNegativeLoss(learnable_temperature=True)
    assert repr(learnable) == "HardestNegativeLoss(temperature=0.1, learnable)"
    assert repr(learnable.to("meta")) == "HardestNegativeLoss(temperature=?, learnable)"
    assert repr(HingeLoss(hardest=True)) == "HingeLoss(hardest=True)"
