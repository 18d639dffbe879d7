"""Bad input: one line naming the file and the place, exit code 2, earlier outputs untouched."""

import io
import re
import shutil

import numpy
import pytest
import torch
from tiny_data import FEATURES, IMAGES, TINY, train, write_tiny_data


def fails(capsys, *argv):
    """Runs the trainer and returns the one line of its complaint."""
    assert train(*argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    return shown.err


@pytest.fixture
def data(tmp_path):
    return write_tiny_data(tmp_path / "data")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory and its data."""
    directory = tmp_path_factory.mktemp("finished")
    data = write_tiny_data(directory / "data")
    assert train(*TINY, "--epochs", 1, "--data", data, "--output", directory / "run") == 0
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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


def replace_line(number, line):
    def corrupt(path):
        lines = path.read_bytes().split(b"\n")
        lines[number - 1] = line
        path.write_bytes(b"\n".join(lines))

    return corrupt


def write_npz(path):
    with open(path, "wb") as file:
        numpy.savez(file, features=numpy.ones((3, 3)))


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


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
    (("--temperature", "0"), "--temperature: '0' is not a number above 0"),
    (("--temperature", "nan"), "--temperature: 'nan' is not a number above 0"),
    (("--lr", "inf"), "--lr: 'inf' is not a number above 0"),
    (("--margin", "-0.1"), "--margin"),
    (("--image-dropout", "1"), "--image-dropout: '1' is not a number of at least 0 and below 1"),
    (("--seed", "-1"), "--seed"),
    (("--loss", "triplet"), "--loss: invalid choice: 'triplet'"),
    (("--backend", "abacus"), "--backend: invalid choice: 'abacus'"),
    (("--device", "abacus"), "--device abacus: "),
    (("--epochs", "3", "--warmup-epochs", "4"), "--warmup-epochs 4 exceeds --epochs 3"),
    (("--loss", "hinge", "--smooth"), "--smooth belongs to --loss hardest_negative, not to hinge"),
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


def test_validate_without_a_fused_backend(capsys, data, monkeypatch):
    states = {"reference": "available", "cpu": "not built"}
    monkeypatch.setattr("train_reference.backends", lambda: states)
    line = fails(capsys, "--validate", "--data", data)
    assert "no fused backend is available" in line
    assert "not built" in line


def test_output_is_not_overwritten(finished, capsys):
    before = contents(finished / "run")
    line = fails(capsys, *TINY, "--data", finished / "data", "--output", finished / "run")
    assert "checkpoint.pt: there is a run already; add --resume" in line
    assert contents(finished / "run") == before


@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl"])
def test_results_without_a_checkpoint_are_not_overwritten(name, data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    assert f"{name}: there is a run already" in line
    assert contents(tmp_path / "run") == {name: b"mine"}


def test_output_is_a_file(data, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    assert "run: cannot write there" in line
    assert (tmp_path / "run").read_text() == "mine"


def test_resume_without_a_checkpoint(tmp_path, capsys):
    line = fails(capsys, "--output", tmp_path / "run", "--resume")
    assert "checkpoint.pt: no checkpoint to resume from; start without --resume" in line
    assert not (tmp_path / "run").exists()


def edit_checkpoint(edit):
    def corrupt(directory):
        content = torch.load(directory / "checkpoint.pt", weights_only=True)
        edit(content)
        torch.save(content, directory / "checkpoint.pt")

    return corrupt


def of_another_model(content):
    content["model"]["image_projection.weight"] = torch.zeros(3, 4)


def without_a_layer(content):
    del content["model"]["gru.bias_hh_l0"]


class Custom:
    """Something that only a full unpickler would build."""


CHECKPOINTS = {
    "empty": (lambda run: (run / "checkpoint.pt").write_bytes(b""), "damaged, or not a"),
    "garbage": (lambda run: (run / "checkpoint.pt").write_bytes(b"x" * 99), "damaged, or not a"),
    "truncated": (lambda run: cut(0.7)(run / "checkpoint.pt"), "damaged, or not a"),
    "a pickle": (lambda run: torch.save(Custom(), run / "checkpoint.pt"), "damaged, or not a"),
    "a tensor": (
        lambda run: torch.save(torch.ones(2), run / "checkpoint.pt"),
        "not a checkpoint of",
    ),
    "best.pt": (
        lambda run: shutil.copy(run / "best.pt", run / "checkpoint.pt"),
        "not a checkpoint of",
    ),
    "another model": (
        edit_checkpoint(of_another_model),
        rf"checkpoint of another model: image_projection.weight is \[3, 4\], .* \[16, {FEATURES}\]",
    ),
    "a missing layer": (
        edit_checkpoint(without_a_layer),
        r"checkpoint of another model: gru.bias_hh_l0 is nothing, but this run has \[24\]",
    ),
    "other options": (
        edit_checkpoint(lambda content: content["options"].update(whiskers=9)),
        "checkpoint of another version: .*whiskers",
    ),
}


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case, run_copy, capsys):
    corrupt, message = CHECKPOINTS[case]
    corrupt(run_copy)
    before = contents(run_copy)
    line = fails(capsys, "--output", run_copy, "--resume")
    assert re.search(f"checkpoint.pt: {message}", line)
    assert contents(run_copy) == before


def test_resume_with_other_flags(run_copy, capsys):
    before = contents(run_copy)
    line = fails(capsys, "--output", run_copy, "--resume", "--batch-size", "64")
    assert "--batch-size 64: the run in" in line
    assert "has 32; leave it out" in line
    assert contents(run_copy) == before


def test_resume_with_other_data(run_copy, tmp_path, capsys):
    before = contents(run_copy)
    data = write_tiny_data(tmp_path / "data")
    replace_line(3, b"something else")(data / "train_caps.txt")
    line = fails(capsys, "--output", run_copy, "--resume", "--data", data)
    assert "checkpoint.pt: trained on other data than" in line
    assert contents(run_copy) == before


def test_resume_without_the_vocabulary(run_copy, capsys):
    (run_copy / "vocabulary.json").unlink()
    before = contents(run_copy)
    assert "vocabulary.json: no such file" in fails(capsys, "--output", run_copy, "--resume")
    assert contents(run_copy) == before
