"""Damage by chance: flipped bits and tampered content of a checkpoint, mutated headers of .npy files.

Every case has a number that decides everything in it. FUSED_VSE_FUZZ=3000 asks for more of them; a
failure shows the line that repeats it alone.
"""

import copy
import os
import random
import shutil

import pytest
import torch
from tiny_data import TINY, train, write_tiny_data

from training.checkpoint import CHECKPOINT_KEYS, digest, read_checkpoint, write_checkpoint
from training.data import InputError
from training.precomp import load_precomp

TOKENS = (b"(", b"'", b"\\", b"\n", b"{", b"9" * 30, b"\0", b"0x", b"e9")
CASES = range(int(os.environ.get("FUSED_VSE_FUZZ", "12")))


@pytest.fixture(autouse=True)
def repeat_line(request):
    """Shown with a failure: what is captured during the set-up."""
    _, name = request.node.nodeid.split("::")
    number = name.rpartition("[")[2].removesuffix("]")
    print(
        f"repeat: FUSED_VSE_FUZZ={int(number) + 1}"
        f" python -m pytest 'tests/test_training_fuzz.py::{name}'"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """A run that stopped in the middle of its second epoch."""
    run, step, calls = tmp_path_factory.mktemp("fuzz") / "run", torch.optim.Adam.step, []

    def stops(*args, **kwargs):
        calls.append(None)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stops)
        patch.setattr("train_reference.CHECKPOINT_SECONDS", 0)
        assert train(*TINY, "--epochs", 2, "--data", data, "--output", run) == 130
    return run


@pytest.fixture(scope="module")
def resumed(interrupted, tmp_path_factory):
    run = shutil.copytree(interrupted, tmp_path_factory.mktemp("resumed") / "run")
    assert train("--output", run, "--resume") == 0
    return weights(run)


@pytest.fixture
def damaged(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "training.report.curves", lambda history, plateaus: b""
    )  # not worth a second
    return shutil.copytree(interrupted, tmp_path / "run")


def weights(run):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    return digest([content["model"], content["best_model"], content["optimizer"]])


def resume(run, capsys):
    """Whether the run could be resumed; if not, the message is one line that names the file."""
    code, shown = train("--output", run, "--resume"), capsys.readouterr()
    if code == 0:
        return True
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {run / 'checkpoint.pt'}: ") and shown.err.count("\n") == 1
    return False


@pytest.mark.parametrize("case", CASES)
def test_flipped_bit(case, damaged, resumed, capsys):
    path = damaged / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    bit = random.Random(f"bit {case}").randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    if resume(damaged, capsys):
        assert weights(damaged) == resumed


@pytest.mark.parametrize("case", CASES)
def test_tampered_content(case, damaged, capsys):
    """With the right checksum: structure, types and options are refused by name."""
    rng = random.Random(f"tamper {case}")
    path = damaged / "checkpoint.pt"
    content = read_checkpoint(path, CHECKPOINT_KEYS)
    container, key = rng.choice(list(entries(content)))
    change, before = rng.choice((delete, add, nest, retype)), str(container[key])[:60]
    change(container, key)
    write_checkpoint(path, content)
    assert not resume(damaged, capsys), f"{change.__name__} {key!r}, which was {before}"


def entries(container):
    """(dict or list, key) of everything in nested dicts and lists."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        yield container, key
        if isinstance(value, (dict, list)):
            yield from entries(value)


def delete(container, key):
    del container[key]


def add(container, key):
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        container[f"{key}2"] = container[key]


def nest(container, key):
    for _ in range(50):
        container[key] = [container[key]]


def retype(container, key):
    value = container[key]
    if isinstance(value, torch.Tensor):
        changed = value.double() if value.is_floating_point() else value.short()
    else:
        changed = {str: 7, int: "7", float: "0.5", bool: 2, type(None): 0.5}.get(type(value), 7.5)
    container[key] = changed


@pytest.mark.parametrize("case", CASES)
def test_npy_header(case, data, tmp_path):
    rng = random.Random(f"header {case}")
    directory = shutil.copytree(data, tmp_path / "data")
    path = directory / "dev_ims.npy"
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.choice((rng.randrange(10), rng.randrange(128), rng.randrange(70)))
        content[at : at + 1] = rng.choice(
            [
                b"",
                bytes([rng.randrange(256)]),
                bytes([content[at] ^ 1 << rng.randrange(8)]),
                *TOKENS,
            ]
        )
    path.write_bytes(content)
    try:
        features = load_precomp(directory).dev.features
    except InputError as error:
        message = str(error)
        assert message.startswith(str(directory)) and "\n" not in message
    else:
        assert features.dtype == torch.float32 and features.isfinite().all()
