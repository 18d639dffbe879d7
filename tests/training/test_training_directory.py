"""A run directory that is damaged, tampered with, in use or read-only: one line that names the file."""

import errno
import os
import re
import resource
import shutil
import socket

import pytest
import torch
from tiny_data import (
    FEATURES,
    TINY,
    contents,
    cut,
    fails,
    replace_line,
    train,
    write_tiny_data,
)

from fused_vse import all_negatives_loss
from train_reference import make_directory
from training.checkpoint import (
    BEST_KEYS,
    CHECKPOINT_KEYS,
    load_best,
    read_checkpoint,
    write_checkpoint,
)
from training.data import InputError
from training.options import Options


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


def edit_checkpoint(edit, name="checkpoint.pt", keys=CHECKPOINT_KEYS):
    """Edits the content and gives it the right checksum."""

    def corrupt(directory):
        content = read_checkpoint(directory / name, keys)
        edit(content)
        write_checkpoint(directory / name, content)

    return corrupt


def without_its_checksum(directory):
    content = torch.load(directory / "checkpoint.pt", weights_only=True)
    content["model"]["gru.bias_hh_l0"][3] += 1e-3
    torch.save(content, directory / "checkpoint.pt")


def change_entry(*path, to):
    def edit(content):
        *outer, last = path
        for key in outer:
            content = content[key]
        content[last] = to(content[last])

    return edit_checkpoint(edit)


def as_integers(weights):
    return weights.long()


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
        "checkpoint of another run: model.image_projection.weight is "
        rf"\[3, 4\], but this run has \[16, {FEATURES}\]",
    ),
    "a missing layer": (
        edit_checkpoint(without_a_layer),
        r"checkpoint of another run: model.gru.bias_hh_l0 is nothing, but this run has \[24\]",
    ),
    "edited": (without_its_checksum, "damaged, or edited: its checksum is not that of its content"),
    "a bad best model": (
        change_entry("best_model", "gru.bias_hh_l0", to=lambda bias: bias[1:]),
        r"checkpoint of another run: best_model.gru.bias_hh_l0 is \[23\], but this run has \[24\]",
    ),
    "integer weights": (
        change_entry("model", "gru.bias_hh_l0", to=as_integers),
        r"checkpoint of another run: model.gru.bias_hh_l0 is \[24\] torch.int64, but",
    ),
    "NaN": (
        change_entry("best_model", "mean", to=lambda mean: mean * torch.nan),
        "best_model.mean is not finite",
    ),
    "a missing option": (
        edit_checkpoint(lambda content: content["options"].pop("margin")),
        "checkpoint of another version: other options: margin",
    ),
    "an impossible option": (
        change_entry("options", "batch_size", to=lambda size: -size),
        "options: argument --batch-size: '-32' is not an integer of at least 2",
    ),
    "an option as text": (
        change_entry("options", "temperature", to=str),
        "options: --temperature cannot be '0.05'",
    ),
    "options at odds": (
        change_entry("options", "warmup_epochs", to=lambda _: 4),
        "options: --warmup-epochs 4 exceeds --epochs 1",
    ),
    "a history too short": (
        change_entry("history", to=lambda lines: lines[:0]),
        "history has 0 lines, but 1 epochs are done",
    ),
    "a history too long": (
        change_entry("history", to=lambda lines: 2 * lines),
        "history has 2 lines, but 1 epochs are done",
    ),
    "no history": (change_entry("history", to=lambda _: None), "history has no lines, but"),
    "another history": (
        change_entry("history", 0, "phase", to=lambda _: "hinge"),
        "history.0.phase is hinge, expected all_negatives",
    ),
    "a history line without a rank": (
        edit_checkpoint(lambda content: content["history"][0]["dev"]["text_to_image"].pop("R@5")),
        "checkpoint of another run: history.0.dev.text_to_image.R@5 is nothing, but",
    ),
    "too many steps": (change_entry("steps", to=lambda _: 99), "steps is 99, of 1 x 8"),
    "fewer steps than the optimiser": (
        change_entry("steps", to=lambda _: 0),
        "checkpoint of another run: optimizer.0 is a dict, but this run has nothing",
    ),
    "another optimiser": (
        change_entry("optimizer", 2, "step", to=lambda step: step + 1),
        "optimizer: not that of step 8",
    ),
    "an optimiser without state": (
        change_entry("optimizer", to=lambda _: {}),
        "checkpoint of another run: optimizer.0 is nothing, but this run has a dict",
    ),
    "a word swapped": (
        change_entry("words", 5, to=lambda _: "whiskers"),
        "checkpoint of another run: its words are not this run's",
    ),
    "words in another order": (
        change_entry("words", to=lambda words: words[::-1]),
        "checkpoint of another run: its words are not this run's",
    ),
    "other options": (
        edit_checkpoint(lambda content: content["options"].update(whiskers=9)),
        "checkpoint of another version: .*whiskers",
    ),
}
BEST_MODELS = {
    "no special words": (
        lambda content: content["words"].reverse(),
        r"words: expected \d+ different ones",
    ),
    "numbers for words": (
        lambda content: content.update(words=3),
        r"words: expected \d+ different ones",
    ),
    "a word twice": (
        lambda content: content["words"].__setitem__(3, content["words"][4]),
        r"words: expected \d+ different ones, .*'<padding>', '<unknown>'.* first",
    ),
    "a word too few": (
        lambda content: content["words"].pop(),
        r"words: expected \d+ different ones",
    ),
    "a size too few": (lambda content: content["sizes"].pop("words"), "sizes: .*'words'"),
    "a negative size": (lambda content: content["sizes"].update(hidden_size=-3), "sizes: "),
    "another size": (
        lambda content: content["sizes"].update(joint_size=3),
        "checkpoint of another run: model.image_projection.weight is",
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


@pytest.mark.parametrize("case", BEST_MODELS)
def test_bad_best_model(case, run_copy):
    edit, message = BEST_MODELS[case]
    edit_checkpoint(edit, "best.pt", BEST_KEYS)(run_copy)
    with pytest.raises(InputError, match=f"best.pt: {message}"):
        load_best(run_copy)


# ------------------------------------------------------------------------- the run directory
def test_a_link_in_the_place_of_a_partial_file_is_not_followed(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("checkpoint.pt", "best.pt", "metrics.jsonl", "curves.png", "retrieved.txt"):
        (tmp_path / "run" / f".{name}.partial").symlink_to(tmp_path / "mine")
    assert train(*TINY, "--epochs", 1, "--data", data, "--output", tmp_path / "run") == 0
    assert (tmp_path / "mine").read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "run").iterdir())


def test_a_link_in_the_place_of_the_lock_is_not_followed(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    assert "run: cannot write there: Too many levels of symbolic links" in line
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("second", ["a new run", "--resume"])
def test_one_trainer_at_a_time(second, data, tmp_path, capsys, monkeypatch):
    """The second one starts in the first step of the first one."""
    run, codes = tmp_path / "run", []
    argv = [*TINY, "--data", data, "--output", run] if second == "a new run" else None

    def meanwhile(images, captions, **options):
        if not codes:
            codes.append(None)
            monkeypatch.setattr(
                "train_reference.refuse_run", lambda output: None
            )  # as if just made
            codes.append(train(*(argv or ["--output", run, "--resume"])))
        return all_negatives_loss(images, captions, **options)

    monkeypatch.setattr("training.objective.all_negatives_loss", meanwhile)
    assert train(*TINY, "--data", data, "--output", run) == 0
    assert codes == [None, 2]
    error = next(line for line in re.split("[\r\n]", capsys.readouterr().err) if "error: " in line)
    holder = rf"{os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(rf"run: in use by process {holder}.*; wait for it, or choose another", error)
    assert not (run / ".lock").exists()


def test_the_lock_of_a_killed_process_does_not_hold(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("1 on another machine since yesterday")
    assert train(*TINY, "--epochs", 1, "--data", data, "--output", tmp_path / "run") == 0


def test_new_runs_never_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {make_directory(None, Options()) for _ in range(3)}
    assert sorted(map(str, made)) == [f"runs/digits-hardest_negative-{i}" for i in (1, 2, 3)]


def test_full_disk(data, tmp_path, capsys):
    """A limit on the size of a file stands in for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        line = fails(capsys, *TINY, "--data", data, "--output", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint.pt: cannot write there: File too large" in line
    assert not list((tmp_path / "run").iterdir())


def test_no_memory(data, tmp_path, capsys):
    sizes = ("--hidden-size", 2**20 - 1, "--joint-size", 8)
    assert train(*TINY, *sizes, "--data", data, "--output", tmp_path / "run") == 1
    line = capsys.readouterr().err
    assert line.startswith("failed: ") and "can't allocate memory" in line
    assert line.count("\n") == 1


def test_resume_in_a_read_only_directory(run_copy, capsys, monkeypatch):
    opened = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    line = fails(capsys, "--output", run_copy, "--resume")
    assert "run: cannot write there: Read-only file system" in line


@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl", "curves.png", ".best.pt.partial"])
def test_a_directory_in_the_place_of_a_file(name, run_copy, capsys):
    path = run_copy / name
    path.unlink(missing_ok=True)
    path.mkdir()
    line = fails(capsys, "--output", run_copy, "--resume")
    file = name.removeprefix(".").removesuffix(".partial")
    assert f"{file}: cannot write there: Is a directory" in line
