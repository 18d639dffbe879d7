"""The options of this test suite itself (few_cases.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
EXAMPLE = """
import pytest
from hypothesis import given, settings, strategies


@pytest.mark.expensive(few=2)
@pytest.mark.parametrize("number", range(7))
def test_cases(number):
    assert number < 7


@settings(derandomize=False)  # as it is in CI
@given(strategies.integers())
def test_property(number):
    assert number < 1000


@pytest.mark.expensive
@pytest.mark.parametrize("name", ["a name", "another"])
def test_fails(name):
    assert False
"""


def run(folder, *options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "few_cases",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    ).stdout


def test_a_few_cases_unless_more_are_wanted(tmp_path):
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    for option, passed in (([], 2), (["--cases=3"], 3), (["--cases=all"], 7)):
        assert f"{passed} passed" in run(tmp_path, "-k", "test_cases", *option)


def test_what_fails_names_the_command_that_runs_it_again(tmp_path):
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    lines = re.findall(r"^python -m pytest .*$", run(tmp_path), re.M)
    assert len(lines) == 2
    assert re.fullmatch(
        r"python -m pytest --hypothesis-seed=\d+ test_example.py::test_property", lines[0]
    )
    assert re.fullmatch(
        r"python -m pytest --cases=all 'test_example.py::test_fails\[.*\]'", lines[1]
    )
