"""pytest: the `device` of a test, and the options of the emulator."""

import itertools

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("emulator")
    group.addoption(
        "--seeds",
        default="0,1",
        help="schedules of the emulator: 0 is the plain one, others are random (default: %(default)s)",
    )
    group.addoption(
        "--races", action="store_true", help="the emulator looks for races in shared memory"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "on_device(backend, *machines, few=1): its fixture `device` is a GPU for the backend; where there is"
        " none, in the emulator, each of the machines (compute capability, multiprocessors), where the test"
        " is expensive",
    )


def seeds_of(config) -> list[int]:
    return [int(seed) for seed in config.getoption("--seeds").split(",")]


def pytest_generate_tests(metafunc):
    if "schedule" in metafunc.fixturenames:
        seeds = seeds_of(metafunc.config)
        metafunc.parametrize("schedule", seeds, ids=[f"seed{seed}" for seed in seeds])
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices(metafunc), indirect=True, ids=str)


def _devices(metafunc) -> list:
    from .device import AMPERE, HOPPER, Device, gpu

    if (real := gpu()) is not None:
        return [real]
    machines = _marker(metafunc.definition).args[1:] or ((AMPERE, 2), (HOPPER, 2))
    races = metafunc.config.getoption("--races")
    seeds = seeds_of(metafunc.config)
    return [Device(*machine, seed, races) for machine, seed in itertools.product(machines, seeds)]


def _marker(item) -> pytest.Mark:
    marker = item.get_closest_marker("on_device")
    if marker is None:
        raise pytest.UsageError(f"{item.nodeid}: the fixture `device` needs the marker on_device")
    return marker


@pytest.fixture
def device(request):
    """Where the test is to put its tensors: see Device."""
    import fused_vse

    from . import device as devices

    backend = _marker(request.node).args[0]
    if not request.param.is_emulated:
        status = fused_vse.backends()[backend]
        if not status.startswith("available"):
            pytest.skip(f"{backend}: {status}")
        yield request.param
        return
    if (why := devices.why_not(backend)) is not None:
        pytest.skip(f"{backend} in the emulator: {why}")
    with devices.emulated(backend, request.param):
        yield request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        device = getattr(item, "callspec", None) and item.callspec.params.get("device")
        if device is not None and device.is_emulated:
            item.add_marker(pytest.mark.expensive(few=_marker(item).kwargs.get("few", 1)))
