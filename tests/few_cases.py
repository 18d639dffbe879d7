"""pytest: of a test whose cases are expensive a few run, unless --cases asks for more. Of a case that fails,
the line that runs it again."""

import shlex
import zlib
from collections import defaultdict

import pytest

GOLDEN_RATIO = (5**0.5 - 1) / 2


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        metavar="N|all",
        help="how many cases of each expensive test run, spread over all (default: 1, or what the test says)",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "expensive(few=1): so many cases of the test run without --cases"
    )


def pytest_collection_modifyitems(config, items):
    """Spread evenly by the golden ratio, from another first one for each test."""
    wanted = config.getoption("--cases")
    if wanted == "all":
        return
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("expensive"):
            cases[item.nodeid.partition("[")[0]].append(item)
    dropped = set()
    for name, same in cases.items():
        count = int(wanted or same[0].get_closest_marker("expensive").kwargs.get("few", 1))
        if count < len(same):
            first = zlib.crc32(name.encode()) / 2**32
            kept = {int(len(same) * ((first + i * GOLDEN_RATIO) % 1)) for i in range(count)}
            dropped.update(item for i, item in enumerate(same) if i not in kept)
    if dropped:
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=list(dropped))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("To run it again", repro(item)))
    return report


def repro(item) -> str:
    """With what was drawn: of the cases, the schedules of the emulator, Hypothesis's examples."""
    options = ["--cases=all"] if item.get_closest_marker("expensive") else []
    if "schedule" in item.fixturenames or "device" in item.fixturenames:
        options += ["--seeds=" + item.config.getoption("--seeds")]
        options += ["--races"] * item.config.getoption("--races")
    drawn = getattr(item.obj, "_hypothesis_internal_use_generated_seed", None)
    if drawn is not None:
        options.append(f"--hypothesis-seed={drawn}")
    return shlex.join(["python", "-m", "pytest", *options, item.nodeid])
