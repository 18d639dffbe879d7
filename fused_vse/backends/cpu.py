"""The C++ backend for CPU tensors: loads csrc/cpu and describes its ops to the compiler."""

from pathlib import Path

import torch

from .fakes import register_fakes, register_score_fakes, register_statistic_fakes

DEVICE = "cpu"
NAMESPACE = "fused_vse_cpu"
FAMILIES = ("dot", "order", "scores")


def _load() -> str | None:
    library = Path(__file__).parent.parent / "_cpu.abi3.so"
    if not library.exists():
        note = library.with_name("_cpu.not_built.txt")  # setup.py leaves it where a build fails
        why = (
            note.read_text().strip()
            if note.exists()
            else "install a C++17 compiler, and install again"
        )
        return (
            f"the C++ library was not built: {why} (`pip install --force-reinstall --no-deps"
            " --no-cache-dir fused_vse`, in a checkout `pip install .`)"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"{library.name} does not load under torch {torch.__version__}: {error};"
            " it needs torch >= 2.10 on the platform that it was built for"
        )
    register_fakes(NAMESPACE)
    register_statistic_fakes(f"{NAMESPACE}_order")
    register_score_fakes(f"{NAMESPACE}_scores")
    return None


UNAVAILABLE = _load()
