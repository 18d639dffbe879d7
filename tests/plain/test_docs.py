"""The examples of README.md and docs/ run, and their command lines and links lead somewhere."""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fused_vse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^ *```(\w*)")
# Pages whose examples need another package.
PEERS = ("pytorch_metric_learning", "sentence_transformers")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[tuple[int, list[str]]]:
    """The fenced blocks in these languages, each with the number of lines above its first."""
    found, language, lines, start = [], None, [], 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if fence and language is None:
            language, lines, start = fence[1], [], number
        elif fence:
            if language in languages:
                found.append((start, lines))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page.name}:{start}: the block does not end"
    return found


@pages
def test_python_blocks_run(page, tmp_path):
    """All blocks of a page in one module, with the line numbers that they have on the page."""
    module: list[str] = []
    for start, lines in blocks(page, "python"):
        module += [""] * (start - len(module)) + lines
    if page.stem in PEERS:
        pytest.importorskip(page.stem, reason="pip install '.[peers]'")
    script = tmp_path / "examples.py"
    script.write_text("\n".join(module) + "\n")
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{page}, by its own line numbers:\n{done.stdout}{done.stderr}"


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every command line of the console blocks: where it is, and its words."""
    found = []
    for start, lines in blocks(page, "console", "bash", "sh"):
        prompted = any(line.startswith("$ ") for line in lines)
        for number, line in enumerate(lines, start + 1):
            if prompted and not line.startswith("$ "):
                continue  # what the command prints
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words:
                found.append((f"{page.name}:{number}: {line}", words))
    return found


@pages
def test_commands_name_what_exists(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for where, words in commands(page):
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(named) <= set(targets), where
        elif words[0] in ("python", "python3", "torchrun"):
            _check_program(where, words[1:])


def _check_program(where: str, words: list[str]) -> None:
    while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
        del words[0]
    if not words or words[0] == "-c":
        return
    if words[0] == "-m":
        package = words[1].split(".")[0]
        module = ROOT.joinpath(*words[1].split("."))
        files = module.with_suffix(".py"), module / "__main__.py"
        if (ROOT / package).is_dir():
            assert any(file.is_file() for file in files), f"{where}\nno module {words[1]}"
        else:
            assert importlib.util.find_spec(package), f"{where}\nno package {package}"
        return
    script = ROOT / words[0]
    assert script.is_file(), f"{where}\nno file {words[0]}"
    options = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
    unknown = options and options - _known_options(script)
    assert not unknown, f"{where}\nunknown: {unknown}"


@functools.cache
def _known_options(script: Path) -> set[str]:
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[\w-]+", shown.stdout))


@pages
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", fused_vse.__all__)
def test_public_names_are_documented(name):
    assert getattr(fused_vse, name).__doc__, name
    assert name in (ROOT / "README.md").read_text(), f"README.md does not name {name}"
