"""Bad input: one line naming the file and the place, exit code 2, earlier outputs untouched."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from tiny_data import (
    FEATURES,
    IMAGES,
    TINY,
    cut,
    fails,
    replace_line,
    write_tiny_data,
)

import fused_vse
import training

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    return write_tiny_data(tmp_path / "data")


def change(array):
    """Rewrites an .npy file with another array made of its own."""

    def corrupt(path):
        path.write_bytes(npy(array(numpy.load(path))))

    return corrupt


def npy(array, **kwargs):
    buffer = io.BytesIO()
    numpy.save(buffer, array, **kwargs)
    return buffer.getvalue()


def with_value(value):
    def put(features):
        features = features.astype(numpy.float64)
        features[7, 3] = value
        return features

    return put


def write_npz(path):
    with open(path, "wb") as file:
        numpy.savez(file, features=numpy.ones((3, 3)))


FEATURE_FILES = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "truncated, or not an .npy file"),
    "empty": (lambda path: path.write_bytes(b""), "truncated, or not an .npy file"),
    "truncated": (cut(0.9), "truncated, or not an .npy file"),
    "truncated header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "truncated"),
    "text": (lambda path: path.write_text("1 2 3\n"), "truncated, or not an .npy file"),
    "objects": (
        lambda path: path.write_bytes(npy(numpy.array([{}, None]), allow_pickle=True)),
        "truncated, or not an .npy file",
    ),
    "an archive": (write_npz, "an .npz archive"),
    "integers": (change(lambda f: f.astype(numpy.int64)), "dtype int64; expected one of float16"),
    "complex numbers": (change(lambda f: f.astype(numpy.complex64)), "dtype complex64"),
    "one dimension": (
        change(lambda f: f[0]),
        rf"shape \[{FEATURES}\]; expected \[rows, features\]",
    ),
    "no rows": (change(lambda f: f[:0]), rf"shape \[0, {FEATURES}\]; expected"),
    "NaN": (change(with_value(numpy.nan)), r"row 7, column 3 \(counted from 0\) is nan"),
    "infinity": (change(with_value(-numpy.inf)), "row 7, column 3 .* is -inf"),
    "too large for float32": (change(with_value(1e300)), "row 7, column 3 .* is inf in float32"),
    "a row too few": (
        change(lambda f: f[1:]),
        "15 rows do not match the 80 lines of dev_caps.txt; expected 5 lines for each row",
    ),
    "as many rows as captions, not repeated": (
        change(lambda f: numpy.arange(80 * FEATURES, dtype=numpy.float32).reshape(80, -1)),
        r"row 1 \(counted from 0\) differs from row 0",
    ),
    "other number of features": (
        change(lambda f: f[:, 1:]),
        f"{FEATURES - 1} features in a row, but train_ims.npy has {FEATURES}",
    ),
}
CAPTION_FILES = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "no lines": (lambda path: path.write_text(""), "line 1 is an empty caption"),
    "empty caption": (replace_line(13, b""), "line 13 is an empty caption"),
    "blank caption": (replace_line(80, b" \t "), "line 80 is an empty caption"),
    "blank line at the end": (
        lambda path: path.write_text(path.read_text() + "\n"),
        "line 81 is",
    ),
    "not UTF-8": (replace_line(5, b"caf\xe9 au lait"), "line 5 is not UTF-8"),
    "200 000 words": (replace_line(7, b"a " * 200_000), "line 7 has 200000 words; at most 1000"),
}


@pytest.mark.parametrize("case", FEATURE_FILES)
def test_bad_features(case, data, tmp_path, capsys):
    corrupt, message = FEATURE_FILES[case]
    corrupt(data / "dev_ims.npy")
    line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    assert re.search(f"dev_ims.npy: {message}", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", CAPTION_FILES)
def test_bad_captions(case, data, tmp_path, capsys):
    corrupt, message = CAPTION_FILES[case]
    corrupt(data / "dev_caps.txt")
    line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    assert re.search(f"dev_caps.txt: .*{message}", line)
    assert not (tmp_path / "run").exists()


def test_a_caption_too_many(data, tmp_path, capsys):
    path = data / "train_caps.txt"
    path.write_text(path.read_text() + "one more\n")
    line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    rows = IMAGES["train"]
    assert f"train_ims.npy: {rows} rows do not match the {5 * rows + 1} lines" in line


def test_missing_directory(tmp_path, capsys):
    assert "nowhere: no such directory" in fails(capsys, "--data", tmp_path / "nowhere")


FLAGS = [
    (("--batch-size", "1"), "--batch-size: '1' is not an integer of at least 2"),
    (("--epochs", "0"), "--epochs: '0' is not an integer of at least 1"),
    (("--epochs", "two"), "--epochs: 'two' is not an integer"),
    (
        ("--temperature", "0"),
        "--temperature: '0' is not a number of at least 1e-10 and below 1e+10",
    ),
    (("--temperature", "nan"), "--temperature: 'nan' is not a number of at least 1e-10"),
    (("--lr", "inf"), "--lr: 'inf' is not a number above 0"),
    (("--temperature", "1e300"), "--temperature: '1e300' is not a number of at least 1e-10"),
    (("--lr", "1e300"), "--lr: '1e300' is not a number above 0 and below 1e+10"),
    (("--margin", "-0.1"), "--margin"),
    (("--margin", "1e300"), "--margin: '1e300' is not a number of at least 0 and below 1e+30"),
    (("--image-dropout", "1"), "--image-dropout: '1' is not a number of at least 0 and below 1"),
    (("--seed", "-1"), "--seed"),
    (("--seed", str(2**63)), "--seed: '9223372036854775808' is not an integer of at least 0 and"),
    (("--threads", "5000"), "--threads: '5000' is not an integer of at least 1 and below 1025"),
    (("--hidden-size", str(2**40)), "--hidden-size: '1099511627776' is not an integer of"),
    (("--loss", "triplet"), "--loss: invalid choice: 'triplet'"),
    (("--backend", "abacus"), "--backend: invalid choice: 'abacus'"),
    (("--device", "abacus"), "--device abacus: "),
    (("--epochs", "3", "--warmup-epochs", "4"), "--warmup-epochs 4 exceeds --epochs 3"),
    (("--loss", "hinge", "--smooth"), "--smooth belongs to --loss hardest_negative, not to hinge"),
    (("--loss", "sigmoid", "--margin", "0.1"), "--margin 0.1: the sigmoid loss has none"),
    (("--loss", "hinge", "--bias", "-3"), "--bias belongs to --loss sigmoid, not to hinge"),
    (
        ("--select", "0.1", "--smooth"),
        "--select takes the mean of hinges over all negatives; leave it out",
    ),
    (("--select", "-0.1"), "--select: '-0.1' is not a number of at least 0"),
    (
        ("--loss", "sigmoid", "--false-negative-margin", "0"),
        "--false-negative-margin belongs to --loss all_negatives or hardest_negative or hinge or",
    ),
    (("--resume",), "--resume needs --output"),
    (("--validate", "--output", "x"), "--validate writes no files; leave out --output"),
    (("--validate", "--backend", "reference"), "--validate compares the reference with a fused"),
    (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    (("--batch", "64"), "unrecognized arguments: --batch 64"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=lambda value: " ".join(value)[:30])
def test_bad_flags(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *flags)
    assert not list(tmp_path.iterdir())


def test_missing_backend(capsys, monkeypatch):
    def unavailable(*args, backend):
        raise RuntimeError(f"backend={backend!r} is not available: no compiler; install one")

    monkeypatch.setattr("training.options.hinge_loss", unavailable)
    line = fails(capsys, "--backend", "cpu")
    assert "--backend cpu: backend='cpu' is not available: no compiler; install one" in line


def test_validate_where_auto_falls_back(data, tmp_path):
    """As in a pure-Python installation: whatever else there is, none takes tensors of the CPU."""
    for package in (fused_vse, training):
        source = Path(package.__file__).parent
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "train_reference.py", tmp_path)
    command = [sys.executable, tmp_path / "train_reference.py", "--validate", "--data", data]
    process = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert process.stderr.startswith("error: --validate: no fused backend for cpu (cpu: ")
    assert "was not built" in process.stderr
    assert process.stderr.count("\n") == 1
