"""Builds csrc/cuda for the emulator and loads it: torch.ops.fused_vse_cuda for CPU tensors.

The sources are compiled as they are, host code included. nvcc embeds PTX for compute_80 and compute_90a,
which setup.py's options lead to as well, and no machine code. torch's functions that would need a CUDA build
are renamed to those of cuda/torch.cpp.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import build
from .build import HERE, OUTPUT, ROOT
from .ptxemu import parsed_counts

RENAMED = (
    "device_type_cuda",
    "get_device_index",
    "library_init_impl",
    "create_device_guard",
    "delete_device_guard",
    "get_current_cuda_stream",
)
# What torch.utils.cpp_extension adds for nvcc.
TORCH_NVCC_ARGS = (
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
)
ARCHITECTURES = ("compute_80", "compute_90a")
TORCH = Path(torch.__file__).parent
TORCH_INCLUDES = (
    "-isystem", TORCH / "include", "-isystem", TORCH / "include/torch/csrc/api/include",
)  # fmt: skip


# Names a library that was built before, with changes.
LIBRARY_VARIABLE = "FUSED_VSE_EMULATED_CUDA"


class Change(NamedTuple):
    """Of a source, for a library that is not as the sources are."""

    file: str  # below csrc/cuda
    old: str  # occurs once
    new: str


# S in pieces of one row of cluster tiles.
SMALL_WORKSPACE = Change(
    "hopper_ops.cu", "WORKSPACE_BYTES = int64_t{256} << 20;", "WORKSPACE_BYTES = 1;"
)


def why_not() -> str | None:
    """Why the library cannot be built here."""
    if not (ROOT / "csrc/cuda").exists():
        return "needs a checkout, not an installed package"
    return build.why_not() or (None if shutil.which("nvcc") else "no nvcc")


def built(changes: Sequence[Change] = ()) -> Path:
    """The library; only what a change touches is compiled for it alone."""
    with _changed(changes) as csrc:
        sources = sorted(csrc.glob("cuda/*.cu"))
        own = sorted((HERE / "cuda").glob("*.cpp"))
        includes = ("-isystem", _cuda_include(), "-isystem", TORCH / "include")
        objects = build.in_parallel(
            [functools.partial(_compiled, source) for source in sources]
            + [functools.partial(build.compiled, source, *includes) for source in own]
        )
    emulator, lib = build.emulator_library(), TORCH / "lib"
    command = [
        *build.compiler(), "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", *objects, emulator,
        f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}", "-o", OUTPUT,
    ]  # fmt: skip
    return build.make("fused_vse_cuda_emulated.so", command, [*objects, emulator])


@contextlib.contextmanager
def _changed(changes: Sequence[Change]) -> Iterator[Path]:
    """csrc, or a copy with the changes."""
    if not changes:
        yield ROOT / "csrc"
        return
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder, "csrc")
        shutil.copytree(ROOT / "csrc", csrc)
        for file, old, new in changes:
            path = csrc / "cuda" / file
            text = path.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{text.count(old)} places in {file} for the change of {old!r}")
            path.write_text(text.replace(old, new))
        yield csrc


def _compiled(source: Path) -> Path:
    """The object file of one .cu file: host code and PTX."""
    command = [
        "nvcc", "-c", source.name, "-o", OUTPUT, "-ccbin", build.compiler()[0],
        "-O3", "-std=c++17", "-cudart", "none", "--compress-mode=none",
        "-Xcompiler=-fvisibility=hidden,-fPIC,-O1",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", *TORCH_NVCC_ARGS,
        *(f"-Daoti_torch_{name}=cudaemu_torch_{name}" for name in RENAMED),
        *(f"-gencode=arch={x},code={x}" for x in ARCHITECTURES), *TORCH_INCLUDES,
    ]  # fmt: skip
    return build.make(f"{source.stem}.o", command, [source], source.parent)


@functools.cache
def _cuda_include() -> Path:
    """Where nvcc has its headers."""
    text = build.output_of(["nvcc", "-dryrun", "-c", "-x", "cu", os.devnull])
    top = next(line.split("=", 1)[1] for line in text.splitlines() if line.startswith("#$ TOP="))
    return Path(top.strip(), "include")


class Emulation:
    """A library that is loaded, once a process: its devices, how kernels run, what was found."""

    def __init__(self, library: Path):
        torch.ops.load_library(library)
        self._lib = ctypes.CDLL(str(library))
        for name in ("log", "counts", "damage"):
            getattr(self._lib, f"cudaemu_{name}").restype = ctypes.c_char_p
        self._devices: dict[tuple[int, int, int], int] = {}
        self._used = (0, 0, False)  # device, on which nothing runs, seed and races

    @contextlib.contextmanager
    def using(
        self, capability: tuple[int, int], multiprocessors: int, seed: int = 0, races: bool = False
    ) -> Iterator[None]:
        """Inside, all CPU tensors are on this device."""
        key = *capability, multiprocessors
        if key not in self._devices:
            self._devices[key] = self._lib.cudaemu_add_device(*key)
        before = self._used
        self._use((self._devices[key], seed, races))
        try:
            yield
        finally:
            self._use(before)

    def _use(self, used: tuple[int, int, bool]) -> None:
        self._used = used
        device, seed, races = used
        self._lib.cudaemu_use_device(device, ctypes.c_uint64(seed), int(races))

    @contextlib.contextmanager
    def guarded_memory(self) -> Iterator[None]:
        """Tensors made inside are poisoned and have red zones: `damage` tells of what was written there."""
        self.damage()
        self._lib.cudaemu_guard_memory(1)
        try:
            yield
        finally:
            self._lib.cudaemu_guard_memory(0)

    def damage(self) -> str:
        """What the red zones of freed tensors showed since the last call."""
        return self._lib.cudaemu_damage().decode()

    def launches(self) -> list[str]:
        """What was launched since the last call, a line a launch."""
        lines = self._lib.cudaemu_log().decode().splitlines()
        self._lib.cudaemu_clear_log()
        return lines

    def counts(self, kernel: str) -> dict[str, tuple[int, int]]:
        """Opcode to (warps, lanes) of the last launch of the kernel whose mangled name contains `kernel`."""
        return parsed_counts(self._lib.cudaemu_counts(kernel.encode()))
