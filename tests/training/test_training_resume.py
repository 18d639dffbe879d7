"""A run killed with SIGKILL and resumed ends with the bits of an unbroken one."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_data import TINY, train, write_tiny_data

ROOT = Path(__file__).parents[2]
FLAGS = (*TINY, "--loss", "hardest_negative", "--seed", "3")  # the second epoch leaves the warm-up

# Runs the trainer, and sends it a signal at the n-th call of a function.
SUICIDE = """
import os, signal, sys, torch
import train_reference
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
number, seconds, owner, name, calls, *argv = sys.argv[1:]
train_reference.CHECKPOINT_SECONDS = float(seconds)
owner = {"os": os, "Adam": torch.optim.Adam}[owner]
function, left = getattr(owner, name), int(calls)
def counted(*args, **kwargs):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), int(number))
    return function(*args, **kwargs)
setattr(owner, name, counted)
sys.argv[0] = train_reference.__file__
sys.exit(train_reference.main(argv))
"""


def run_until(kill, argv, number=signal.SIGKILL):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SUICIDE, int(number), *kill, *argv]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(*FLAGS, "--data", data, "--output", run) == 0
    return run


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


def assert_same_run(run, expected):
    assert metrics(run) == metrics(expected)
    for name in ("best.pt", "checkpoint.pt"):
        ours, theirs = (torch.load(d / name, weights_only=True) for d in (run, expected))
        for content in (ours, theirs):
            if name == "checkpoint.pt":
                del content["sha256"]  # which is that of the seconds, too
                for line in content["history"]:
                    del line["seconds"]
        assert_same(ours, theirs)
    assert {p.name for p in run.iterdir()} - {p.name for p in expected.iterdir()} == set()


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


# 8 steps an epoch. fsync is called twice a file (the file, then its directory), in this order:
# checkpoint, best; then for each epoch checkpoint, best, metrics, curves. With 0 seconds from one
# checkpoint to the next, there is another one after every step but an epoch's last.
KILLS = {
    "in the first epoch": (120, "Adam", "step", 3),
    "in the middle of the second epoch": (120, "Adam", "step", 13),
    "with half of a checkpoint written": (120, "os", "fsync", 13),
    "between the checkpoint and the best model": (120, "os", "fsync", 7),
    "before the metrics are renamed": (120, "os", "replace", 9),
    "before the last metrics": (120, "os", "fsync", 29),
    "after a checkpoint in the first epoch": (0, "Adam", "step", 3),
    "after the last step of an epoch": (0, "os", "fsync", 19),
    "with half of a checkpoint in the second epoch written": (0, "os", "fsync", 31),
}


@pytest.mark.expensive(few=4)
@pytest.mark.parametrize("kill", KILLS)
def test_sigkill_and_resume(kill, data, unbroken, tmp_path):
    run = tmp_path / "run"
    process = run_until(KILLS[kill], [*FLAGS, "--data", data, "--output", run])
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert metrics_are_whole(run)

    assert train("--output", run, "--resume") == 0
    assert_same_run(run, unbroken)


def test_a_resumed_run_goes_on_within_the_epoch(data, unbroken, tmp_path, monkeypatch, capsys):
    step, calls = torch.optim.Adam.step, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr("train_reference.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    run = tmp_path / "run"
    assert train(*FLAGS, "--data", data, "--output", run) == 130
    assert train("--output", run, "--resume") == 0
    assert len(calls) == 25  # the interrupted one was called twice
    assert_same_run(run, unbroken)


def test_an_interrupted_run_says_what_resumes_it(data, unbroken, tmp_path):
    run = tmp_path / "a run"
    argv = [*FLAGS, "--data", data, "--output", run]
    process = run_until((120, "Adam", "step", 13), argv, signal.SIGINT)
    assert process.returncode == 130, process.stderr
    message = process.stderr.splitlines()[-1]
    before, command = message.split("interrupted; this continues: ")
    assert not before.strip()
    assert subprocess.run(shlex.split(command), check=False).returncode == 0
    assert_same_run(run, unbroken)


def test_interrupted_before_there_is_anything_to_resume(data, tmp_path, monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("train_reference.load_data", interrupted)
    assert train(*FLAGS, "--data", data, "--output", tmp_path / "run") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "run").exists()


def metrics_are_whole(run):
    path = run / "metrics.jsonl"
    return not path.exists() or (path.read_text().endswith("\n") and metrics(run) is not None)


def test_killed_before_the_first_checkpoint(data, unbroken, tmp_path):
    run = tmp_path / "run"
    argv = [*FLAGS, "--data", str(data), "--output", str(run)]
    run_until((120, "os", "fsync", 1), argv)
    assert not (run / "checkpoint.pt").exists()
    assert train(*argv) == 0
    assert_same_run(run, unbroken)


def test_resuming_a_finished_run_shows_its_table_again(data, unbroken, tmp_path, capsys):
    run = tmp_path / "run"
    argv = [*FLAGS, "--data", str(data), "--output", str(run)]
    assert train(*argv) == 0
    first = capsys.readouterr().out
    before = metrics(run)
    assert train("--output", run, "--resume", "--batch-size", 32) == 0
    assert capsys.readouterr().out == first
    assert metrics(run) == before
    assert_same_run(run, unbroken)


def test_another_seed_gives_other_numbers(data, unbroken, tmp_path):
    run = tmp_path / "run"
    assert train(*FLAGS, "--seed", 4, "--data", data, "--output", run) == 0
    assert metrics(run) != metrics(unbroken)


def test_resume_after_the_data_moved(data, unbroken, tmp_path):
    run = tmp_path / "run"
    moved = write_tiny_data(tmp_path / "moved")
    argv = [*FLAGS, "--data", str(moved), "--output", str(run)]
    assert train(*argv) == 0
    moved.rename(tmp_path / "elsewhere")
    assert train("--output", run, "--resume", "--data", tmp_path / "elsewhere") == 0
    assert metrics(run) == metrics(unbroken)
