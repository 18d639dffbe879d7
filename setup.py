"""Builds the native libraries; everything else is in pyproject.toml.

The libraries use torch's stable ABI and are no Python modules (torch.ops.load_library loads them):
one binary for torch >= 2.10 and every Python. What cannot be built does not stop the installation:
the wheel holds _<name>.not_built.txt in its place, which says why and what to do about it. Without any
library the wheel is pure Python.

FUSED_VSE_NO_EXTENSION=1 gives such a wheel on purpose. FUSED_VSE_CUDA=auto|0|1: build the CUDA library if
nvcc and a CUDA build of torch are there (no GPU is needed), never, or fail where it cannot be built. CXX
names the compiler, CUDA_HOME the place of nvcc, MAX_JOBS the number of compilations at a time.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

from build_backend import MIN_TORCH, find_torch, obstacle

ROOT = Path(__file__).parent
TARGET_TORCH = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"

COMPILE_ARGS = [
    # No -march: the kernels are compiled for several instruction sets and chosen at run time.
    "-O3",
    "-g0",
    "-std=c++17",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
]


GENCODES = [
    # sm_80 for all of Ampere and Ada; its PTX for what is newer than Hopper.
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
]
NVCC_ARGS = [
    "-O3",
    "-std=c++17",
    "--threads=2",
    "-Xcompiler=-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
    "-DUSE_CUDA",
    *GENCODES,
]


def import_torch() -> str | None:
    """Why torch's build tools cannot be imported and the remedy, or None if they can."""
    wanted = f"torch >= {'.'.join(map(str, MIN_TORCH))}"
    if not find_torch():
        return f"{wanted} was not there to build against; install it, and install again"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        return (
            f"torch could not be imported to build against ({error}); repair it, and install again"
        )
    return None


NOT_BUILDABLE = obstacle() or import_torch()
if NOT_BUILDABLE:
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = Extension
else:
    from torch.utils.cpp_extension import BuildExtension, CppExtension


def files(directory: str, *suffixes: str) -> list[str]:
    found = (path for path in (ROOT / directory).rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in found)


def cuda_obstacle() -> str | None:
    """Why the CUDA library cannot be built here and the remedy, or None if it can."""
    if FUSED_VSE_CUDA == "0":
        return "it was left out by FUSED_VSE_CUDA=0; unset that and install again"
    if NOT_BUILDABLE:
        return NOT_BUILDABLE
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch, and then"
            " this package again"
        )
    if not CUDA_HOME or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return (
            "no CUDA compiler: nvcc was not found; install the CUDA toolkit (12.0 or newer; no GPU is"
            " needed), or name its place in CUDA_HOME, and install again"
        )
    return None


def cuda_extension() -> Extension:
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    sources = files("csrc/cuda", ".cu")
    extension = CUDAExtension(
        "fused_vse._cuda",
        sources,
        depends=files("csrc", ".h", ".cuh"),
        extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
        py_limited_api=True,
    )
    # A runtime of its own: the binary then depends on no version of CUDA but the driver's.
    extension.libraries = ["torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl"]
    extension.extra_link_args = ["-Wl,--exclude-libs,ALL"]
    nvcc = [f"{CUDA_HOME}/bin/nvcc", "-dryrun", "-c", sources[0]]
    steps = subprocess.run(nvcc, capture_output=True, text=True, cwd=ROOT).stderr
    extension.library_dirs += re.findall(r'"-L([^"]+)"', steps)
    return extension


def cuda_choice() -> str:
    """One line: whether the CUDA library is built here, why, and how to choose otherwise."""
    if NO_CUDA:
        return f"fused_vse: no cuda backend: {NO_CUDA}"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    gpu = "" if torch.cuda.is_available() else ", though no GPU is visible here"
    return (
        f"fused_vse: the cuda backend will be built, with {CUDA_HOME}/bin/nvcc{gpu}; FUSED_VSE_CUDA=0"
        " leaves it out"
    )


class OptionalBuild(BuildExtension):
    """Builds each library, or leaves a note in its place; without any, the wheel is pure Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.abi3.so"

    def run(self) -> None:
        if not NO_CUDA:
            print(cuda_choice(), file=sys.stderr)
        in_source = self.inplace  # the base class changes it on the way
        compiler, built = self.compiler, []
        for extension, not_built in EXTENSIONS:
            if not not_built:
                self.extensions, self.compiler = [extension], compiler
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:  # noqa: BLE001 - a failure comes wrapped in many ways
                    not_built = (
                        f"its compilation failed ({error}); `pip install -v` shows the messages"
                    )
            library = self.get_ext_filename(extension.name)
            for top in {self.build_lib, ROOT} if in_source else {self.build_lib}:
                leave_note(Path(top, library), not_built)
            if not_built:
                print(f"fused_vse: no {extension.name}: {not_built}", file=sys.stderr)
                if extension.name == "fused_vse._cuda" and FUSED_VSE_CUDA == "1":
                    raise SystemExit(
                        f"FUSED_VSE_CUDA=1, but {extension.name} is missing: {not_built}"
                    )
        self.extensions = built
        if not built:
            self.distribution.ext_modules = []  # the wheel is for any platform
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel:
                wheel.root_is_pure = True


def leave_note(library: Path, not_built: str | None) -> None:
    """Leaves either the library that was built or the note why it was not: never a stale one."""
    note = library.with_name(library.name.removesuffix(".abi3.so") + ".not_built.txt")
    if not_built:
        library.unlink(missing_ok=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(not_built + "\n")
    else:
        note.unlink(missing_ok=True)


FUSED_VSE_CUDA = os.environ.get("FUSED_VSE_CUDA") or "auto"
if FUSED_VSE_CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"FUSED_VSE_CUDA must be auto, 0 or 1; got {FUSED_VSE_CUDA!r}")
NO_CUDA = cuda_obstacle()
CPU = CppExtension(
    "fused_vse._cpu",
    files("csrc/cpu", ".cpp"),
    depends=files("csrc", ".h", ".inl"),
    extra_compile_args=COMPILE_ARGS,
    py_limited_api=True,
)
CUDA = Extension("fused_vse._cuda", []) if NO_CUDA else cuda_extension()
EXTENSIONS = ((CPU, NOT_BUILDABLE), (CUDA, NO_CUDA))  # each with the reason not to build it

# setuptools refuses the tag for the free-threaded Python.
limited_api = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}

if __name__ == "__main__":  # else: imported for cuda_choice()
    setup(
        ext_modules=[extension for extension, _ in EXTENSIONS],
        cmdclass={"build_ext": OptionalBuild},
        options={"bdist_wheel": limited_api},
    )
