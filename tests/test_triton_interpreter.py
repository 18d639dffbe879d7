"""Runs each of the triton_interpreter_*.py in a process of its own: whether Triton interprets or compiles is
decided when it is imported, and the other tests must not see an interpreted backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
NAMES = "cases", "families", "rows"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name to process and output, all started at once: each keeps one core busy for minutes."""
    directory = tmp_path_factory.mktemp("interpreter")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {}
    for name in NAMES:
        cases = Path(__file__).with_name(f"triton_interpreter_{name}.py")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        output = directory / name
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [*command, str(cases)], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        started[name] = process, output
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("name", NAMES)
def test_kernels_in_the_interpreter(name, runs):
    process, output = runs[name]
    assert process.wait(timeout=1200) == 0, output.read_text()[-20000:]
