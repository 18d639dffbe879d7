"""Runs each of the triton_interpreter_*.py in a process of its own: whether Triton interprets or compiles is
decided when it is imported, and the other tests must not see an interpreted backend."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("name", ["cases", "families", "ops"])
def test_kernels_in_the_interpreter(name, interpreter_runs):
    process, output = interpreter_runs[name]
    assert process.wait(timeout=1200) == 0, output.read_text()[-20000:]
