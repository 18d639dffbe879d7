"""Runs the bugs of this folder: see its __init__.py."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import Bug, cpu, cuda, python, triton

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TREE = ROOT / "build" / "mutations"  # a copy of the repository, which keeps what it has built
RESULTS = HERE / "RESULTS.md"
SECONDS = 1200  # a bug may be one that never ends
HEAD = """# Deliberate bugs and what kills them

Written by `python -m tests.mutations`. Of {total} bugs {count} have been run, and a test kills {killed} of these. Those that are not, change
nothing that could be seen: why, stands in their row.

| area | bug | killed by |
|---|---|---|
"""
# Those tests look at the sources themselves.
COMMON = [
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "--tb=line",
    "--ignore=tests/plain/test_mutations.py",
]
IN_PARALLEL = ["-n", os.environ.get("MAX_JOBS", "2"), "--dist", "loadfile"]
EMULATED = ["--cases", "12", "--seeds", "0,1,2,3"]
# For each area its bugs and, one after the other until one fails, the tests that may see them.
AREAS = {
    "python": (
        python.BUGS,
        [
            [f"tests/plain/test_{name}.py" for name in ("losses", "arguments", "rules", "statistics", "modules")],
            [f"tests/plain/test_{name}.py" for name in ("ranks", "ranks_use", "distributed", "accuracy")],
            ["tests/plain", "tests/integrations", "tests/training"],
        ],
    ),
    "cpu": (
        cpu.BUGS,
        [
            [f"tests/plain/test_{name}.py" for name in ("ops", "losses", "cpu", "accuracy")],
            [f"tests/plain/test_{name}.py" for name in ("scores_and_order", "rules", "statistics")],
            ["tests/plain"],
        ],
    ),
    "triton": (
        triton.BUGS,
        [
            ["tests/emulator/test_triton_backend.py", "tests/gpu/test_gpu_families.py", "--cases", "4", "--seeds", "0,1"],
            ["tests/interpreter"],
            ["tests/interpreter", "--cases", "12"],
        ],
    ),
    "cuda": (
        cuda.BUGS,
        [
            ["tests/emulator/test_cuda_backend.py", *EMULATED],
            ["tests/gpu/test_gpu_hopper.py", "tests/gpu/test_gpu_small.py", *EMULATED],
            ["tests/compile/test_cuda_hopper_compile.py", "tests/plain/test_cuda_plan.py"],
        ],
    ),
}  # fmt: skip


def copy_repository() -> None:
    """The sources as they are now; what the copy has built before stays."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        source, copy = ROOT / name, TREE / name
        if not source.exists() or (copy.exists() and copy.read_bytes() == source.read_bytes()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)


def build() -> None:
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=TREE, check=True, capture_output=True, env=os.environ | {"FUSED_VSE_CUDA": "0"},
    )  # fmt: skip


def apply(bug: Bug) -> None:
    for file, old, new in bug.changes:
        path = TREE / file
        text = path.read_text()
        assert text.count(old) == 1, f"{bug.name}: {text.count(old)} places in {file}"
        path.write_text(text.replace(old, new))


def restore(bug: Bug) -> None:
    for file, _, _ in bug.changes:
        shutil.copy(ROOT / file, TREE / file)


def killer(area: str, bug: Bug) -> str | None:
    """The test that fails, or how the tests end, or None."""
    apply(bug)
    try:
        if area == "cpu":
            build()
        for tests in AREAS[area][1]:
            if area == "cuda":
                tests = [
                    *tests,
                    "-k",
                    bug.name.split(":")[0] + (" or strided" if bug.name[0] == "s" else ""),
                ]
            if (found := failure(tests)) is not None:
                return found
    except subprocess.TimeoutExpired:
        return "does not end"
    finally:
        restore(bug)
    return None


def failure(tests: list[str]) -> str | None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *COMMON, *IN_PARALLEL, *tests],
        cwd=TREE, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", done.stdout, re.M)
    return found[1] if found else f"pytest ended with {done.returncode}"


def rows() -> dict[tuple[str, str], str]:
    """What is known of bugs that there still are."""
    known = {}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            if match := re.match(r"\| (\w+) \| (.+?) \| (.+) \|$", line):
                known[match[1], match[2]] = match[3]
    names = [(area, bug.name) for area, (bugs, _) in AREAS.items() for bug in bugs]
    return {name: known[name] for name in names if name in known}


def write(known: dict[tuple[str, str], str]) -> None:
    killed = sum(row.startswith("`") for row in known.values())
    lines = [f"| {area} | {name} | {row} |\n" for (area, name), row in known.items()]
    total = sum(len(bugs) for bugs, _ in AREAS.values())
    RESULTS.write_text(HEAD.format(killed=killed, count=len(known), total=total) + "".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=sys.modules[__package__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-k", default="", help="what area and name, with a colon between, contain")
    parser.add_argument("--new", action="store_true", help="only those without a result")
    parser.add_argument("--survivors", action="store_true", help="only those that nothing killed")
    options = parser.parse_args()
    copy_repository()
    build()
    for area, (bugs, _) in AREAS.items():
        for bug in bugs:
            known = rows()
            row = known.get((area, bug.name))
            if options.k not in f"{area}: {bug.name}" or (options.new and row):
                continue
            if options.survivors and (row is None or row.startswith("`")):
                continue
            start = time.monotonic()
            found = killer(area, bug)
            row = f"`{found}`" if found else f"nothing: {bug.equivalent or 'SURVIVES'}"
            print(f"{area}: {bug.name}: {row} ({time.monotonic() - start:.0f} s)", flush=True)
            write(rows() | {(area, bug.name): row})
    return int(any("SURVIVES" in row for row in rows().values()))


if __name__ == "__main__":
    sys.exit(main())
