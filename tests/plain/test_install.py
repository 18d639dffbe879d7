"""What an installation holds, and what it says where the native library is missing."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY, NOTE = "_cpu.abi3.so", "_cpu.not_built.txt"
CUDA_NOTE = "_cuda.not_built.txt"
BUILD_FILES = (
    "build_backend.py",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs a checkout, not an installed package"
)


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of what a build reads, with nothing built."""
    top = tmp_path / "project"
    built = shutil.ignore_patterns("*.so", NOTE, CUDA_NOTE, "__pycache__")
    for directory in ("fused_vse", "csrc"):
        shutil.copytree(ROOT / directory, top / directory, ignore=built)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, top)
    return top


def run(project: Path, code: str, fails: bool = False, **environment: str) -> str:
    """Runs Python code in the project; returns what it prints, or the errors of what is to fail."""
    choices = ("CXX", "CUDA_HOME", "FUSED_VSE_NO_EXTENSION", "FUSED_VSE_CUDA")
    keep = {k: v for k, v in os.environ.items() if k not in choices}
    # The CUDA library takes a minute to build: only where it is the point.
    keep |= {"PYTHONPATH": str(project), "FUSED_VSE_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**keep, **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def build(project: Path, what: str, **environment: str) -> Path:
    """Calls build_wheel or build_sdist, as an installer does."""
    code = f"import build_backend; print(build_backend.build_{what}('dist'))"
    return project / "dist" / run(project, code, **environment).splitlines()[-1]


# The reference takes over under "auto" with a warning; by its name the backend raises.
USE_CPU = """
import warnings
import torch, fused_vse
embeddings = torch.eye(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss = fused_vse.hardest_negative_loss(embeddings, embeddings, margin=1.5, temperature=1.0)
assert loss.item() == 1.0, loss  # two directions of 1.5 + 0 - 1
reason = fused_vse.backends()["cpu"]
assert any(reason in str(warning.message) for warning in caught), caught
try:
    fused_vse.hardest_negative_loss(embeddings, embeddings, backend="cpu")
except RuntimeError as error:
    assert reason in str(error), error
else:
    raise AssertionError("backend='cpu' did not raise")
print(reason)
"""


def test_missing_library_gives_reason_and_remedy(project):
    reason = run(project, USE_CPU)
    assert "was not built" in reason
    assert "pip install" in reason


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("file:///home/me/fused_vse", "--no-cache-dir /home/me/fused_vse`"),
        ("https://example.org/fused_vse.zip", "--no-cache-dir https://example.org/fused_vse.zip`"),
        (None, "--no-cache-dir .` in the folder of its sources"),
    ],
)
def test_the_remedy_names_where_it_was_installed_from(project, url, command):
    (project / "setup.py").unlink()  # as in an installed package
    metadata = project / "fused_vse-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fused_vse\nVersion: 1\n")
    if url:
        (metadata / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {}}))
    assert command in run(project, USE_CPU)


def test_a_source_folder_in_place_of_what_is_installed_is_said_first(project, tmp_path):
    site = tmp_path / "site"
    (site / "fused_vse").mkdir(parents=True)
    (site / "fused_vse" / LIBRARY).write_text("a library")
    metadata = site / "fused_vse-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fused_vse\nVersion: 1\n")
    code = f"import sys; sys.path.insert(1, {str(site)!r})\n{USE_CPU}"
    reason = run(project, code)
    assert reason.startswith(
        "an installed fused_vse has the C++ library, but Python imports the source"
    )
    assert f"`pip install -e {project}`" in reason
    # An editable installation is this folder itself.
    (site / "fused_vse" / LIBRARY).unlink()
    assert (
        f"was not built: install a C++17 compiler, and install again (`pip install -e {project}`)"
        in run(project, code)
    )


def test_library_that_does_not_load_gives_reason_and_remedy(project):
    (project / "fused_vse" / LIBRARY).write_text("no library")
    reason = run(project, USE_CPU)
    assert "does not load" in reason
    assert "torch >= 2.10" in reason


def test_note_of_the_build_is_the_reason(project):
    (project / "fused_vse" / NOTE).write_text("the note of the build\n")
    assert "the note of the build" in run(project, USE_CPU)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FUSED_VSE_NO_EXTENSION": "1"}, "FUSED_VSE_NO_EXTENSION"),
        ({"CXX": "/nowhere/c++"}, "'/nowhere/c++' was not found"),
        ({"CXX": "false"}, "its compilation failed"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built at all")
def test_wheel_without_library_is_pure_and_says_why(project, environment, reason):
    wheel = build(project, "wheel", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert reason in archive.read(f"fused_vse/{NOTE}").decode()
    assert f"fused_vse/{LIBRARY}" not in names
    sources = (path.relative_to(project) for path in (project / "fused_vse").rglob("*.py"))
    assert {str(path) for path in sources} <= names


def cuda_build_of_torch() -> bool:
    import torch

    return torch.version.cuda is not None


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FUSED_VSE_CUDA": "0"}, "left out by FUSED_VSE_CUDA=0"),
        ({"FUSED_VSE_CUDA": "auto", "CUDA_HOME": "/nowhere"}, "nvcc was not found"),
        ({"FUSED_VSE_CUDA": "auto", "FUSED_VSE_NO_EXTENSION": "1"}, "FUSED_VSE_NO_EXTENSION"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built at all")
def test_wheel_without_cuda_says_why(project, environment, reason):
    if "nvcc" in reason and not cuda_build_of_torch():
        reason = "is a build without CUDA"
    # The C++ compiler fails at once: here it is not the point.
    with zipfile.ZipFile(build(project, "wheel", **{"CXX": "false", **environment})) as archive:
        assert reason in archive.read(f"fused_vse/{CUDA_NOTE}").decode()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FUSED_VSE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "FUSED_VSE_CUDA=1, but.*nvcc was not"),
        ({"FUSED_VSE_CUDA": "1", "FUSED_VSE_NO_EXTENSION": "1"}, "but.*FUSED_VSE_NO_EXTENSION"),
        ({"FUSED_VSE_CUDA": "yes"}, "FUSED_VSE_CUDA must be auto, 0 or 1; got 'yes'"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built at all")
def test_cuda_that_was_asked_for_fails_loudly(project, environment, reason):
    if "nvcc" in reason and not cuda_build_of_torch():
        reason = "but.*is a build without CUDA"
    code = "import build_backend; build_backend.build_wheel('dist')"
    assert re.search(reason, run(project, code, fails=True, **{"CXX": "false", **environment}))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built at all")
@pytest.mark.skipif(not cuda_build_of_torch(), reason="needs a CUDA build of torch")
@pytest.mark.parametrize(
    ("gpu", "said"), [(True, ";"), (False, ", though no GPU is visible here;")]
)
def test_building_for_cuda_is_announced(project, tmp_path, gpu, said):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    code = f"import torch; torch.cuda.is_available = lambda: {gpu}; import setup; print(setup.cuda_choice())"
    choices = {"FUSED_VSE_CUDA": "auto", "CUDA_HOME": str(tmp_path / "cuda"), "CXX": "true"}
    assert run(project, code, **choices) == (
        f"fused_vse: the cuda backend will be built, with {nvcc}{said} FUSED_VSE_CUDA=0 leaves it out\n"
    )
    assert "no cuda backend" in run(project, code, **{**choices, "FUSED_VSE_CUDA": "0"})


def test_note_of_the_cuda_build_is_the_reason(project):
    (project / "fused_vse" / CUDA_NOTE).write_text("the note of the build\n")
    reason = run(project, "import fused_vse; print(fused_vse.backends()['cuda'])")
    assert ("the note of the build" if cuda_build_of_torch() else "without CUDA") in reason


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built at all")
def test_failed_build_leaves_no_stale_library(project):
    stale = project / "fused_vse" / LIBRARY
    stale.write_text("of an earlier build")
    code = (
        "import runpy, sys; sys.argv[1:] = ['build_ext', '--inplace'];"
        " runpy.run_path('setup.py', run_name='__main__')"
    )
    run(project, code, CXX="false")
    assert not stale.exists()
    assert "its compilation failed" in stale.with_name(NOTE).read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "words", [["torch==2.13.0", "--index-url", "https://a.b/cpu"], ["torch>=2.13,<2.14"]]
)
def test_make_passes_all_words_of_the_chosen_torch(words, tmp_path):
    command = ["make", "--dry-run", "install", f"VENV={tmp_path}", f"TORCH={' '.join(words)}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [f"{tmp_path}/bin/python", "-m", "pip", "install", *words] in [
        shlex.split(line) for line in shown.splitlines() if " pip install " in line
    ]


def test_sdist_holds_what_a_build_needs(project):
    with tarfile.open(build(project, "sdist")) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = (path for path in (project / "csrc").rglob("*") if path.is_file())
    assert {str(path.relative_to(project)) for path in sources} | set(BUILD_FILES) <= names


@pytest.mark.parametrize(
    ("version", "recent"),
    [("2.9.1", False), ("2.10.0a0+git1a2b3c", True), ("2.15.0+cu132", True), (None, False)],
)
def test_build_asks_for_torch_only_where_it_is_needed(project, version, recent):
    # As in an isolated build environment: torch is hidden, and at most in the environment outside.
    if version:
        metadata = project / "outside" / f"torch-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    code = """
import sys, sysconfig
import build_backend
build_backend.find_spec = lambda name: None
build_backend.build_meta.get_requires_for_build_wheel = lambda settings: []
sys.path = []
sysconfig.get_path = lambda kind: "outside"
print(build_backend.get_requires_for_build_wheel())
"""
    expected = "['ninja']" if recent else "['ninja', 'torch>=2.10']"
    assert run(project, code, CXX="true").strip() == expected
    assert run(project, code, CXX="/nowhere/c++").strip() == "[]"
