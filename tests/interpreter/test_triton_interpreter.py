"""Runs each of the triton_interpreter_*.py in a process of its own: whether Triton interprets or compiles is
decided when it is imported, and the other tests must not see an interpreted backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("name", ["cases", "families", "ops"])
def test_kernels_in_the_interpreter(name, request):
    cases = Path(__file__).with_name(f"triton_interpreter_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", cases]
    if (wanted := request.config.getoption("--cases")) is not None:
        command += ["--cases", wanted]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    is_old = [int(x) for x in triton.__version__.split(".")[:2]] < [3, 8]
    of_numpy = "only 0-dimensional arrays can be converted to Python scalars" in done.stdout
    if done.returncode and is_old and of_numpy:
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy<2.4")
    assert done.returncode == 0, done.stdout[-20000:]
