"""Loads a library that setup.py built, or says why it cannot."""

import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent.parent


def load(name: str, language: str, remedy: str) -> str | None:
    """Loads fused_vse/<name>.abi3.so; returns None, or why not and the remedy."""
    library = PACKAGE / f"{name}.abi3.so"
    if not library.exists():
        note = library.with_name(f"{name}.not_built.txt")  # setup.py leaves it where a build fails
        why = note.read_text().strip() if note.exists() else remedy
        return _missing(library.name, language, why)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"{library.name} does not load under torch {torch.__version__}: {error};"
            " it needs torch >= 2.10 on the platform that it was built for"
        )
    return None


def _missing(library: str, language: str, why: str) -> str:
    try:
        installed = distribution("fused_vse")
    except PackageNotFoundError:
        installed = None
    source = PACKAGE.parent
    if not (source / "setup.py").exists():
        again = _install_command(installed)
    elif installed is not None and _is_elsewhere(installed, library):
        return (
            f"an installed fused_vse has the {language} library, but Python imports the source folder"
            f" {source} in its place: start Python in another folder, or `pip install -e {source}`"
        )
    else:
        again = f"`pip install -e {source}`"
    return f"the {language} library was not built: {why} ({again})"


def _is_elsewhere(installed: Distribution, library: str) -> bool:
    path = Path(installed.locate_file(f"fused_vse/{library}"))
    return path.exists() and path.parent.resolve() != PACKAGE.resolve()


def _install_command(installed: Distribution | None) -> str:
    """From where it was installed the last time, since no index has it."""
    text = installed.read_text("direct_url.json") if installed else None
    where = json.loads(text)["url"].removeprefix("file://") if text else "the folder of its sources"
    command = f"`pip install --force-reinstall --no-deps --no-cache-dir {where}`"
    return command if text else command.replace(where, ".") + f" in {where}"
