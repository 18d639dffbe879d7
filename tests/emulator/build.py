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
    """CXX or c++, as for the library, for this machine's vector instructions where it knows them."""
    return _with_native(tuple((os.environ.get("CXX") or "c++").split()))


@functools.cache
def _with_native(command: tuple[str, ...]) -> list[str]:
    native = [*command, "-march=native"]
    probe = [*native, "-x", "c++", "-fsyntax-only", os.devnull]
    known = subprocess.run(probe, capture_output=True).returncode == 0
    return native if known else list(command)


def why_not() -> str | None:
    """Why nothing can be compiled here."""
    name = compiler_name()
    return None if shutil.which(name) else f"no C++ compiler {name!r}; set CXX"


def compiler_name() -> str:
    return (os.environ.get("CXX") or "c++").split()[0]


@functools.cache
def _identity(program: str, *options: str) -> str:
    """The compiler's version and, of -march=native, what that means on this machine."""
    command = [program, *options, "-###", "-E", "-x", "c++", os.devnull]
    if "nvcc" in Path(program).name:
        command = [program, "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def make(name: str, command: Sequence[str | Path], sources: Iterable[Path]) -> Path:
    """The file `name` that the command makes; not again while the command, the compiler and the contents of
    the sources, with the headers beside them, are the same. Processes that want the same file take turns."""
    command = [str(x) for x in command]
    native = [x for x in command if x == "-march=native"]
    digest = hashlib.sha256("\0".join([*command, _identity(command[0], *native)]).encode())
    for source in sorted(_with_headers(sources)):
        digest.update(source.read_bytes())
    folder = CACHE / f"{digest.hexdigest()[:20]}"
    made = folder / name
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            unfinished = folder / f"unfinished-{name}"
            run([x.replace(OUTPUT, str(unfinished)) for x in command])
            os.replace(unfinished, made)
    return made


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


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
    command = [*compiler(), *FLAGS, *options, "-c", source, "-o", OUTPUT]
    return make(f"{source.stem}.o", command, [source])


@functools.cache
def emulator_library() -> Path:
    """The emulator itself, without Python and without CUDA."""
    sources = sorted((HERE / "ptx").glob("*.cpp"))
    objects = in_parallel([functools.partial(compiled, source) for source in sources])
    command = [*compiler(), "-shared", *objects, "-o", OUTPUT]
    return make("libptxemu.so", command, objects)
