"""The benchmarks' commands where what they need is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As in an environment without these packages.
HIDDEN = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
hidden = "pytest", "pytest_benchmark"
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find_spec(name, *rest)
sys.modules |= dict.fromkeys(hidden)
import torch
torch.cuda.is_available = lambda: True
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("cpu", "pytest and pytest-benchmark"),
        ("drop_in", "pytest and pytest-benchmark"),
        ("gpu", "pytest"),
    ],
)
def test_a_benchmark_without_pytest_names_the_remedy(module, needed):
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, f"benchmarks.{module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout + done.stderr == f"the benchmark needs {needed}: pip install -e '.[test]'\n"
