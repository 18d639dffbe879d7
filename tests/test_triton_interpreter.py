"""Runs each of the triton_interpreter_*.py in a process of its own: whether Triton interprets or compiles is
decided when it is imported, and the other tests must not see an interpreted backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("name", ["cases", "families"])
def test_kernels_in_the_interpreter(name):
    cases = Path(__file__).with_name(f"triton_interpreter_{name}.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        str(cases),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
