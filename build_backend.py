"""The build backend: setuptools', asking for torch only where a build needs one and has none.

With torch in build-system.requires, every isolated build would download a second torch of several
gigabytes, perhaps one for another CUDA version, and would do so even where no compiler can use it. So
an isolated build takes the torch of the environment that it installs into, if it can be found there,
and asks for one if not. Any torch >= 2.10 will do: the libraries use its stable ABI only.
"""

import os
import shutil
import sys
import sysconfig
from importlib.metadata import distributions
from importlib.util import find_spec

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are

MIN_TORCH = (2, 10)


def obstacle() -> str | None:
    """Why no native library can be built here even with torch, and the remedy; None if it can."""
    if os.environ.get("FUSED_VSE_NO_EXTENSION") == "1":
        return "it was left out by FUSED_VSE_NO_EXTENSION=1; unset that and install again"
    if sys.platform != "linux":
        return f"it is built on Linux only, not on {sys.platform}"
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return (
            f"no C++ compiler: {compiler!r} was not found; install one (Debian: apt install g++),"
            " or name it in CXX, and install again"
        )
    return None


def find_torch() -> bool:
    """Makes an installed torch importable; returns whether there is one that is recent enough."""
    if find_spec("torch") is None:
        # pip hides the packages of the environment that it installs into; they are still there.
        sys.path += [path for path in _site_packages() if _recent_torch([path])]
    return _recent_torch(sys.path)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _build_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _build_requirements()


def _build_requirements() -> list[str]:
    if obstacle():
        return []
    return ["ninja"] if find_torch() else ["ninja", "torch>=" + ".".join(map(str, MIN_TORCH))]


def _site_packages() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))


def _recent_torch(path: list[str]) -> bool:
    # The first one found is the one that an import would take.
    for torch in distributions(name="torch", path=path):
        return tuple(int(part) for part in torch.version.split(".")[:2]) >= MIN_TORCH
    return False
