"""compute-sanitizer over a small case of every kernel of csrc/cuda. It takes minutes, so that benchmarks.gpu
leaves it out: `python -m pytest tests/gpu/test_cuda_sanitizer.py`, with a GPU and a CUDA toolkit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import every_kernel
import pytest
import torch

import fused_vse


def test_every_kernel_has_a_case():
    cases = {kernel for kernels in every_kernel.KERNELS.values() for kernel in kernels}
    folder = Path(__file__).parents[2] / "csrc" / "cuda"
    sources = [path.read_text() for path in folder.rglob("*") if path.suffix in (".cu", ".cuh")]
    if not sources:
        pytest.skip("not in a checkout")
    kernel = r"__global__[^;{]*?\b(\w+_kernel)\("
    assert cases == {name for text in sources for name in re.findall(kernel, text)}


def why_not(which: str) -> str | None:
    if not fused_vse.backends()["cuda"].startswith("available"):
        return f"cuda: {fused_vse.backends()['cuda']}"
    if which == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        return "no GPU of compute capability 9.0"
    return None


def on_its_gpu(which: str):
    skip = pytest.mark.skipif(why_not(which) is not None, reason=str(why_not(which)))
    return pytest.param(which, marks=[pytest.mark.gpu, skip])


cases = pytest.mark.parametrize("which", [on_its_gpu(which) for which in every_kernel.KERNELS])


@cases
def test_the_case_runs_its_kernels(which):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        getattr(every_kernel, which)()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events()]
    for kernel in every_kernel.KERNELS[which]:
        assert any(kernel in name for name in launched), kernel


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@cases
def test_compute_sanitizer_finds_nothing(which, tool):
    root = Path(fused_vse.__file__).parent.parent
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
        "--kernel-name", "kns=fused_vse",  # the namespace, in the kernels' mangled names
        "--report-api-errors", "no",  # PyTorch tries calls that may fail; ours raise
        sys.executable, every_kernel.__file__, which,
    ]  # fmt: skip
    # An allocation of its own for each tensor, so that memcheck sees where it ends.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards displayed" in done.stdout
