"""The table of deliberate bugs (tests/mutations) still fits the sources, and none of them survived."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import __main__ as mutations

ROOT = Path(__file__).parents[2]

BUGS = [(area, bug) for area, (bugs, _) in mutations.AREAS.items() for bug in bugs]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


@pytest.mark.parametrize(("area", "bug"), BUGS, ids=[f"{area}: {bug.name}" for area, bug in BUGS])
def test_the_place_is_there_once(area, bug):
    for file, old, new in bug.changes:
        assert old != new and (ROOT / file).read_text().count(old) == 1


def test_at_least_98_in_100_are_killed():
    known = mutations.rows()
    assert known
    killed = [row for row in known.values() if row.startswith("`")]
    assert len(killed) >= 0.98 * len(known)
    assert not [name for name, row in known.items() if "SURVIVES" in row]


def test_the_command_says_what_it_does():
    command = [sys.executable, "-m", "tests.mutations", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "deliberate bugs" in done.stdout
