"""Where the Triton backend cannot run: backends() has the reason, a request by name the remedy too."""

import contextlib
import subprocess
import sys
import types
import warnings

import pytest
import torch

import fused_vse
from fused_vse import dispatch
from fused_vse.backends import triton as backend
from fused_vse.ops import DOT, ORDER, Batch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if backend.DEVICE != "cuda":
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

from fused_vse.backends.triton import ops, plan  # noqa: E402

SOURCES = {
    "dot": {"images": torch.ones(2, 2), "captions": torch.ones(2, 2)},
    "order": {"images": torch.ones(2, 2), "captions": torch.ones(2, 2), "similarity": "order"},
    "given": {"scores": torch.ones(2, 2)},
}


def request():
    return fused_vse.hinge_loss(torch.ones(2, 2), torch.ones(2, 2), backend="triton")


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are GPUs of these compute capabilities."""

    def pretend(*capabilities):
        properties = [
            types.SimpleNamespace(
                name=f"GPU {i}", major=major, minor=minor, multi_processor_count=8
            )
            for i, (major, minor) in enumerate(capabilities)
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(properties))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: properties[device if isinstance(device, int) else device.index],
        )
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        backend.unavailable.cache_clear()

    yield pretend
    backend.unavailable.cache_clear()


def test_no_gpu(gpus):
    gpus()
    assert "no CUDA GPU is visible" in fused_vse.backends()["triton"]
    with pytest.raises(RuntimeError, match="triton.*not available: .*needs an NVIDIA GPU"):
        request()


def test_a_gpu_that_is_too_old(gpus):
    gpus((7, 0), (7, 5))
    reason = fused_vse.backends()["triton"]
    assert "8.0 or higher, found GPU 0 with 7.0, GPU 1 with 7.5" in reason
    with pytest.raises(RuntimeError, match="8.0 or higher.*backend='reference'"):
        request()


def test_one_of_the_gpus_is_too_old(gpus, monkeypatch):
    """The backend is there, for tensors on the other one."""
    gpus((8, 0), (7, 5))
    monkeypatch.setattr(backend, "_compile_failure", lambda device: None)
    assert fused_vse.backends()["triton"] == "available"
    plan.device_of.cache_clear()
    assert plan.device_of(torch.device("cuda:0")).capability == 8
    with pytest.raises(RuntimeError, match="cuda:1 is a GPU 1 with 7.5; use backend='reference'"):
        plan.device_of(torch.device("cuda:1"))
    plan.device_of.cache_clear()


def test_triton_that_does_not_compile(gpus, monkeypatch):
    gpus((9, 0))

    def failing(*batch):
        raise RuntimeError("Failed to find C compiler")

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    monkeypatch.setattr(torch.ops.fused_vse_triton, "positive_scores", failing)
    reason = fused_vse.backends()["triton"]
    assert f"Triton {triton.__version__} does not compile here" in reason
    with pytest.raises(RuntimeError, match="find C compiler.*set CC"):
        request()


def test_without_triton():
    command = """
import sys
sys.modules["triton"] = None
import torch, fused_vse
print(fused_vse.backends()["triton"])
try:
    fused_vse.hinge_loss(torch.ones(2, 2), torch.ones(2, 2), backend="triton")
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True
    )
    reason, error = run.stdout.splitlines()
    assert reason.startswith("Triton does not import") and "pip install triton" in reason
    assert error == f"backend='triton' is not available: {reason}"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("op", ops.STATISTICS)
def test_every_statistic_is_there(op, source, gpus, monkeypatch):
    """For CUDA tensors "auto" takes Triton without a word; by name it takes no other tensors."""
    gpus((9, 0))
    monkeypatch.setattr(backend, "_compile_failure", lambda device: None)
    images = types.SimpleNamespace(device=torch.device("cuda"))
    captions = None if source == "given" else images
    similarity = ORDER if source == "order" else DOT
    batch = Batch(images, captions, None, None, 2, 2, 0, 0, 2, similarity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("auto", "triton"):
            assert dispatch.choose(name, op, batch) == "triton"
    with pytest.raises(ValueError, match="takes cuda tensors"):
        fused_vse.hinge_loss(**SOURCES[source], backend="triton")


def test_what_it_does_not_have():
    assert backend.takes("small_loss", None) == "has no small_loss"


def test_amd_gpus_on_request_only(gpus, monkeypatch):
    """Of a ROCm build, whose first numbers are those of other GPUs."""
    gpus((9, 4))
    command = (
        "import torch; torch.version.hip = '7.0'; import fused_vse; from fused_vse.backends import triton;"
        "print(triton.STATUS); print(triton.prefers('hinge_sum', None))"
    )
    run = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True
    )
    assert "not chosen by auto: compiled for AMD GPUs, never run" in run.stdout
    assert run.stdout.splitlines()[-1] == "False"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    plan.device_of.cache_clear()
    device = plan.device_of(torch.device("cuda:0"))
    plan.device_of.cache_clear()
    assert device.amd
