"""What the emulator needs compiled: made once, kept in build/emulator by what it was made of."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"
OUTPUT = "{output}"  # in a command: the file to make
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror")


class BuildError(RuntimeError):
    """A compiler refused: the command and what it said."""


def compiler() -> list[str]:
    """CXX or c++, as for the libraries."""
    return (os.environ.get("CXX") or "c++").split()


def why_not() -> str | None:
    """Why nothing can be compiled here."""
    name = compiler()[0]
    return None if shutil.which(name) else f"no C++ compiler {name!r}; set CXX"


@functools.cache
def _native(program: str) -> list[str]:
    """The option for this machine's vector instructions, where the compiler knows it."""
    probe = [program, "-march=native", "-x", "c++", "-fsyntax-only", os.devnull]
    return probe[1:2] if subprocess.run(probe, capture_output=True).returncode == 0 else []


@functools.cache
def _identity(program: str) -> str:
    """The compiler's version and what -march=native means to it on this machine."""
    command = [program, *_native(program), "-###", "-E", "-x", "c++", os.devnull]
    if Path(program).name == "nvcc":
        command = [program, "--version"]
    return output_of(command)


def output_of(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def make(
    name: str,
    command: Sequence[str | Path],
    sources: Iterable[Path],
    folder: Path | None = None,
) -> Path:
    """The file `name` that the command makes, in a folder of the cache.

    It is not made again while the command, the compiler and the contents of the sources, with the headers
    that they include, are the same. Processes that want the same file take turns. The command runs in
    `folder`.
    """
    command = [str(x) for x in command]
    digest = hashlib.sha256("\0".join([*command, _identity(command[0])]).encode())
    for source in sorted(_with_headers(sources)):
        digest.update(source.read_bytes())
    place = CACHE / digest.hexdigest()[:20]
    made = place / name
    if made.exists():
        return made
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            unfinished = place / f"unfinished-{name}"
            _run([x.replace(OUTPUT, str(unfinished)) for x in command], folder)
            os.replace(unfinished, made)
    return made


def _run(command: Sequence[str], folder: Path | None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _with_headers(sources: Iterable[Path]) -> set[Path]:
    """The sources, and what they include by a name in quotes from the folder of the one that includes it."""
    found, waiting = set(), [Path(source).resolve() for source in sources]
    while waiting:
        source = waiting.pop()
        if source in found:
            continue
        found.add(source)
        if source.suffix in (".o", ".so"):
            continue
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.M):
            header = (source.parent / name).resolve()
            if header.exists():
                waiting.append(header)
    return found


def in_parallel(tasks: Sequence[Callable[[], Path]]) -> list[Path]:
    """Their results; MAX_JOBS at a time."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda task: task(), tasks))


def compiled(source: Path, *options: str | Path) -> Path:
    """The object file of one C++ source."""
    command = [*compiler(), *FLAGS, *_native(compiler()[0]), *options, "-c", source, "-o", OUTPUT]
    return make(f"{source.stem}.o", command, [source])


@functools.cache
def emulator_library() -> Path:
    """The emulator itself, without Python and without CUDA."""
    sources = sorted((HERE / "ptx").glob("*.cpp"))
    objects = in_parallel([functools.partial(compiled, source) for source in sources])
    command = [*compiler(), "-shared", *objects, "-o", OUTPUT]
    return make("libptxemu.so", command, objects)
