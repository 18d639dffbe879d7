"""`torchrun train_reference.py`: the run of one process, by any number of ranks, however it ends."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_data import TINY, train, write_tiny_data

ROOT = Path(__file__).parents[2]
FLAGS = (*TINY, "--loss", "hardest_negative", "--seed", "3")  # the second epoch leaves the warm-up
SECONDS = 240  # of a launch; none takes a tenth of it on an idle machine

# Runs the trainer and writes down each step's loss and each file written. At the n-th step, the given rank
# sends a signal to itself, or to torchrun.
RANK = """
import json, os, sys
import torch, train_reference
from training import checkpoint
notes, rank, number, of_torchrun, calls, *argv = sys.argv[1:]
mine, left, losses, written = os.environ.get("RANK", "0") == rank, int(calls), [], []
own = os.path.join(notes, os.environ.get("RANK", "0"))
write, steps = checkpoint.write_atomically, train_reference.run_epoch
def noted(path, content):
    written.append(path.name)
    write(path, content)
def counted(*args):
    global left
    for loss in steps(*args):
        losses.append(loss)
        left -= 1
        if mine and not left:
            os.kill(os.getppid() if of_torchrun == "True" else os.getpid(), int(number))
        yield loss
checkpoint.write_atomically = train_reference.write_atomically = noted
train_reference.run_epoch, train_reference.CHECKPOINT_SECONDS = counted, 0
code = train_reference.main(argv)
with open(own, "w") as file:
    json.dump([losses, written], file)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run of one process: its directory, the losses of its steps."""
    folder = tmp_path_factory.mktemp("one")
    done = on_ranks(1, folder, *FLAGS, "--data", data, "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", notes_of(folder, 0)[0]


def on_ranks(size, folder, *argv, rank=-1, number=0, of_torchrun=False, calls=0):
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable]
    if size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += [script, folder, rank, int(number), of_torchrun, calls, *argv]
    return launch(map(str, command))


def launch(command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(command), env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


def notes_of(folder, rank):
    return json.loads((folder / str(rank)).read_text())


def assert_same_to_rounding(run, expected):
    ours, theirs = (
        [json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()]
        for x in (run, expected)
    )
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        for line in (one, other):
            line.pop("seconds", None)
        for name in ("loss", "active_share"):
            value, other_value = (line.pop(name, None) or 0.0 for line in (one, other))
            assert value == pytest.approx(other_value, rel=1e-4), name
        assert one == other  # recalls, and which epoch was the best
    assert {p.name for p in run.iterdir()} == {p.name for p in expected.iterdir()}


def test_two_ranks_train_as_one_process_and_the_first_alone_writes(data, unbroken, tmp_path):
    done = on_ranks(2, tmp_path, *FLAGS, "--data", data, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    expected, losses = unbroken
    for rank in range(2):
        own_losses, written = notes_of(tmp_path, rank)
        assert own_losses == pytest.approx(losses, rel=1e-4)
        assert bool(written) == (rank == 0)
    assert len(losses) == 24
    assert_same_to_rounding(tmp_path / "run", expected)
    assert done.stdout.count("best epoch") == 1


def test_a_killed_rank_ends_all_and_any_number_of_ranks_resumes(data, unbroken, tmp_path):
    run = tmp_path / "run"
    argv = [*FLAGS, "--data", data, "--output", run]
    done = on_ranks(2, tmp_path, *argv, rank=1, number=signal.SIGKILL, calls=13)
    assert done.returncode != 0
    assert "this continues: " in done.stderr
    assert "SIGKILL" in done.stderr  # torchrun says which rank it was
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / ".lock").unlink(missing_ok=True)
    done = on_ranks(3, tmp_path, "--output", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert 8 < len(notes_of(tmp_path, 2)[0]) < 16  # it went on within the second epoch
    assert_same_to_rounding(run, unbroken[0])
    assert train("--output", tmp_path / "copy", "--resume") == 0
    assert_same_to_rounding(tmp_path / "copy", unbroken[0])


def test_an_interrupt_ends_all_and_says_what_resumes_the_run(data, unbroken, tmp_path):
    run = tmp_path / "a run"
    argv = [*FLAGS, "--data", data, "--output", run]
    done = on_ranks(2, tmp_path, *argv, rank=0, number=signal.SIGINT, of_torchrun=True, calls=13)
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if "this continues: " in line]
    command = shlex.split(message.split("this continues: ")[1])
    assert command[3] == "--nproc-per-node=2" and command[-3:] == ["--output", str(run), "--resume"]
    assert train(*command[-3:]) == 0
    assert_same_to_rounding(run, unbroken[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "239"), "error: --batch-size 239: of 240 captions, 1 are left for"),
        (("--output", "RUN"), "error: RUN/best.pt: there is a run already"),
    ],
)
def test_bad_input_is_one_message_of_all_ranks(flags, message, data, unbroken, tmp_path):
    flags = [str(unbroken[0]) if flag == "RUN" else flag for flag in flags]
    done = on_ranks(2, tmp_path, *FLAGS, "--data", data, *flags)
    assert [notes_of(tmp_path, rank) for rank in range(2)] == [[[], []]] * 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(message.replace("RUN/best.pt", f"{unbroken[0]}/checkpoint.pt"))
