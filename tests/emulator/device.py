"""What a test of a GPU backend runs on: a GPU, or where there is none the emulator.

This module alone knows how the emulator gets into fused_vse's backends.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fused_vse import ops

from . import build, cuda_ops

# Scores that the emulated GPU saves for the backward pass: so few that a few tiles are a large batch.
SAVED_SCORES = 1 << 14
AMPERE, HOPPER = (8, 0), (9, 0)


class Device(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int = 2
    seed: int | None = None  # of the emulator's schedule; None for a GPU
    races: bool = False  # whether the emulator looks for them

    def __str__(self) -> str:
        if not self.is_emulated:
            return "gpu"
        major, minor = self.capability
        return f"sm_{major}{minor}x{self.multiprocessors}-seed{self.seed}"

    @property
    def is_emulated(self) -> bool:
        return self.seed is not None

    @property
    def type(self) -> str:
        """The device type of its tensors."""
        return "cpu" if self.is_emulated else "cuda"

    def launches(self) -> list[str]:
        """What the CUDA backend has launched in the emulator since the last call, a line a launch."""
        return cuda_emulation().launches()

    def put(self, tensors) -> list[Tensor | None]:
        return [None if x is None else x.to(self.type) for x in tensors]

    def disturbances(self, count: int) -> Iterator[None]:
        """So many times with other addresses and another timing; in the emulator three, with other schedules
        unless the seed is 0."""
        for _ in range(min(count, 3) if self.is_emulated else count):
            if not self.is_emulated:
                torch.empty(1 << 26, device=self.type).normal_()
            yield

    def others(self, *multiprocessors: int) -> Iterator[contextlib.AbstractContextManager]:
        """For each number of multiprocessors, where that can be chosen, what the CUDA backend runs on."""
        for i, number in enumerate(multiprocessors if self.is_emulated else ()):
            other = self._replace(multiprocessors=number, seed=i)
            yield cuda_emulation().using(*other)

    def sized(self, case):
        """The case; in the emulator of no more than 300 rows, which are several tiles in both directions."""
        if not self.is_emulated:
            return case
        rows, columns = min(case.rows, 300), min(case.columns, 280)
        pairs = min(case.pairs, 260, rows, columns)
        return case._replace(rows=rows, columns=columns, pairs=pairs, dim=min(case.dim, 136))


def gpu() -> Device | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Device(torch.cuda.get_device_capability(), properties.multi_processor_count)


def why_not(backend: str) -> str | None:
    """Why the backend cannot be emulated here."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton"  # whose kernels are most backward passes of the CUDA backend, too
    return cuda_ops.why_not() if backend == "cuda" else build.why_not()


def emulated(backend: str, device: Device) -> contextlib.AbstractContextManager:
    """Inside, the backend takes CPU tensors, which are on the device."""
    return {"triton": emulated_triton, "cuda": emulated_cuda}[backend](device)


@contextlib.contextmanager
def emulated_triton(device: Device, on_launch: Callable | None = None) -> Iterator[None]:
    """`on_launch` is called with a kernel's name and grid after each launch."""
    from fused_vse.backends import triton
    from fused_vse.backends.triton import configs, forward, plan

    from . import triton_driver

    _add_triton_ops()
    major, minor = device.capability
    described = configs.Device(device.multiprocessors, major)
    with (
        mock.patch.object(triton, "DEVICE", "cpu"),
        mock.patch.object(triton, "unavailable", return_value=None),
        mock.patch.object(plan, "device_of", return_value=described),
        mock.patch.object(forward, "device_of", return_value=described),
        mock.patch.object(ops, "MAX_SAVED_SCORES", SAVED_SCORES),
        mock.patch.object(configs, "MAX_SAVED_SCORES", SAVED_SCORES),
        mock.patch.object(forward, "MAX_SAVED_SCORES", SAVED_SCORES),
        triton_driver.emulated(10 * major + minor, device.seed, device.races, on_launch),
    ):
        yield


@contextlib.contextmanager
def emulated_cuda(device: Device) -> Iterator[cuda_ops.Emulation]:
    """Tensors made inside are between red zones, of which none may be damaged."""
    from fused_vse.backends import cuda

    emulation = cuda_emulation()
    emulation.launches()
    with (
        emulation.using(*device),
        mock.patch.object(cuda, "DEVICE", "cpu"),
        mock.patch.object(cuda, "unavailable", return_value=None),
        # The backward passes of the statistics are its own; for other GPUs it compiles as for Ampere.
        emulated_triton(
            device if device.capability == HOPPER else device._replace(capability=AMPERE)
        ),
        emulation.guarded_memory(),
    ):
        yield emulation
    damage = emulation.damage()
    assert not damage, damage


# The ops are there for CPU tensors for the rest of the process.


@functools.cache
def _add_triton_ops() -> None:
    from fused_vse.backends import triton
    from fused_vse.backends.triton import ops as triton_ops

    for name in ops.STATISTICS:
        module = triton_ops.backward if name.endswith("_backward") else triton_ops.forward
        triton._library.impl(name, triton_ops._op(getattr(module, name)), "CPU")


@functools.cache
def cuda_emulation() -> cuda_ops.Emulation:
    from fused_vse.backends import cuda, cuda_statistics

    library = os.environ.get(cuda_ops.LIBRARY_VARIABLE)
    emulation = cuda_ops.Emulation(Path(library) if library else cuda_ops.built())
    for name in ops.STATISTICS:
        cuda._library.impl(name, functools.partial(cuda_statistics._op, name), "CPU")
    return emulation
