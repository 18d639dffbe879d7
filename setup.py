"""Builds the native libraries; everything else is in pyproject.toml.

The libraries use torch's stable ABI and are no Python modules (torch.ops.load_library loads them):
one binary for torch >= 2.10 and every Python. What cannot be built does not stop the installation:
the wheel is then pure Python, and holds _<name>.not_built.txt, which says why and what to do about it.

FUSED_VSE_NO_EXTENSION=1 gives such a wheel on purpose. CXX names the compiler, MAX_JOBS the number of
compilations at a time.
"""

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


class OptionalBuild(BuildExtension):
    """Builds the libraries, or leaves a note in the place of each and a pure-Python wheel."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.abi3.so"

    def run(self) -> None:
        in_source = self.inplace  # the base class changes it on the way
        not_built = NOT_BUILDABLE
        if not not_built:
            try:
                super().run()
            except Exception as error:  # noqa: BLE001 - a failure comes wrapped in many ways
                not_built = f"its compilation failed ({error}); `pip install -v` shows the messages"
        for extension in self.extensions:
            library = self.get_ext_filename(extension.name)
            for top in {self.build_lib, ROOT} if in_source else {self.build_lib}:
                leave_note(Path(top, library), not_built)
        if not_built:
            print(f"fused_vse: no native library: {not_built}", file=sys.stderr)
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


# setuptools refuses the tag for the free-threaded Python.
limited_api = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}

setup(
    ext_modules=[
        CppExtension(
            "fused_vse._cpu",
            files("csrc/cpu", ".cpp"),
            depends=files("csrc", ".h", ".inl"),
            extra_compile_args=COMPILE_ARGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": limited_api},
)
