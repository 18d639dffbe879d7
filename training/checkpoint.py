"""Files that are whole or absent, whenever the process is killed, and checkpoints made of them."""

import contextlib
import hashlib
import io
import json
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .data import InputError
from .model import VSEModel
from .vocabulary import SPECIAL, Vocabulary

FORMAT = "fused_vse trainer 2"
CHECKPOINT, BEST, METRICS = "checkpoint.pt", "best.pt", "metrics.jsonl"
BEST_KEYS = {"sizes", "words", "model"}
CHECKPOINT_KEYS = BEST_KEYS | {
    "options",  # of the run, defaults filled in
    "fingerprint",  # of its data
    "history",  # a dict for each epoch done: the lines of metrics.jsonl
    "steps",  # done, in all epochs
    "sums",  # over the captions of the epoch begun
    "random",  # states of the generators in the middle of an epoch
    "optimizer",
    "best_model",
}

ABSENT = object()


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file as a whole: a reader, or a resumed run, sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # x: not through a link put there meanwhile
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # without it a power cut may undo the rename
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot write there: {error.strerror}") from None


def write_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "sha256": digest(content), **content}, buffer)
    write_atomically(path, buffer.getvalue())


def write_metrics(path: Path, lines: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def digest(content: object) -> str:
    """SHA-256 of tensors, numbers and strings in dicts and lists; torch.load checks no content."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {list(value.shape)}\n".encode())
            sha.update(value.cpu().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            add([part for item in value.items() for part in item])
        elif isinstance(value, list):
            sha.update(f"{len(value)} items\n".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r}\n".encode())

    add(content)
    return sha.hexdigest()


def read_checkpoint(path: Path, keys: set[str]) -> dict:
    """Returns the content, tensors on the CPU; raises InputError naming the file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(content, dict) and content.pop("format", None) == FORMAT
        checksum = content.pop("sha256", None) if ours else None
        whole = ours and checksum == digest(content)
    except Exception as error:  # noqa: BLE001 - torch.load raises many kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged, or not a checkpoint: {reason}") from None
    if not ours or content.keys() != keys:
        raise InputError(f"{path}: not a checkpoint of this trainer (expected {FORMAT!r})")
    if not whole:
        raise InputError(f"{path}: damaged, or edited: its checksum is not that of its content")
    return content


def check_like(found: object, expected: object, name: str, path: Path) -> None:
    """Raises InputError unless `found` has the keys, the types, the shapes of `expected`, all finite."""
    have, need = _kind(found), _kind(expected)
    if have != need:
        raise InputError(
            f"{path}: checkpoint of another run: {name} is {have}, but this run has {need}"
        )
    if isinstance(expected, list):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if isinstance(expected, dict):
        for key in [*expected, *(found.keys() - expected.keys())]:
            check_like(found.get(key, ABSENT), expected.get(key, ABSENT), f"{name}.{key}", path)
    elif isinstance(found, (float, Tensor)) and not torch.as_tensor(found).isfinite().all():
        raise InputError(f"{path}: {name} is not finite")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)}{'' if value.dtype == torch.float32 else f' {value.dtype}'}"
    if value is ABSENT:
        return "nothing"
    return "a dict" if isinstance(value, dict) else type(value).__name__


def load_best(output: Path) -> tuple[VSEModel, Vocabulary]:
    """Returns the best model of a run, ready to encode, and its vocabulary."""
    path = output / BEST
    content = read_checkpoint(path, BEST_KEYS)
    try:
        model = VSEModel(**content["sizes"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: sizes: {str(error).splitlines()[0]}") from None
    words = content["words"]
    needed = model.word_vectors.num_embeddings
    are_words = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not are_words or words[:2] != SPECIAL or not len(words) == len(set(words)) == needed:
        raise InputError(f"{path}: words: expected {needed} different ones, {SPECIAL} first")
    check_like(content["model"], model.state_dict(), "model", path)
    model.load_state_dict(content["model"])
    return model.eval(), Vocabulary(words)
