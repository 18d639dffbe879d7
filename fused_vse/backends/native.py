"""Loads a library that setup.py built, or says why it cannot."""

from pathlib import Path

import torch


def load(name: str, language: str, remedy: str) -> str | None:
    """Loads fused_vse/<name>.abi3.so; returns None, or why not and the remedy."""
    library = Path(__file__).parent.parent / f"{name}.abi3.so"
    if not library.exists():
        note = library.with_name(f"{name}.not_built.txt")  # setup.py leaves it where a build fails
        why = note.read_text().strip() if note.exists() else remedy
        return (
            f"the {language} library was not built: {why} (`pip install --force-reinstall --no-deps"
            " --no-cache-dir fused_vse`; to use a checkout from its own folder, `pip install -e .` there)"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"{library.name} does not load under torch {torch.__version__}: {error};"
            " it needs torch >= 2.10 on the platform that it was built for"
        )
    return None
