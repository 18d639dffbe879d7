"""Files that are whole or absent, whenever the process is killed, and checkpoints made of them."""

import io
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import InputError
from .model import VSEModel
from .vocabulary import Vocabulary

FORMAT = "fused_vse trainer 1"
CHECKPOINT, BEST = "checkpoint.pt", "best.pt"
VOCABULARY, METRICS = "vocabulary.json", "metrics.jsonl"
BEST_KEYS = {"format", "sizes", "model"}
CHECKPOINT_KEYS = BEST_KEYS | {
    "options",  # of the run, defaults filled in
    "fingerprint",  # of its data
    "history",  # a dict for each epoch done: the lines of metrics.jsonl
    "optimizer",
    "best_model",
}


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file as a whole: a reader, or a resumed run, sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # without it a power cut may undo the rename
    finally:
        os.close(directory)


def write_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def write_metrics(path: Path, lines: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_checkpoint(path: Path, keys: set[str]) -> dict:
    """Returns the content, tensors on the CPU; raises InputError naming the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - torch.load raises many kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged, or not a checkpoint: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() != keys:
        raise InputError(f"{path}: not a checkpoint of this trainer (expected {FORMAT!r})")
    return content


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copies weights read from `path` into the model; raises InputError for another model's."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        ours, theirs = expected.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            have, need = ("nothing" if t is None else list(t.shape) for t in (theirs, ours))
            raise InputError(
                f"{path}: checkpoint of another model: {name} is {have}, but this run has {need}"
            )
    model.load_state_dict(weights)


def load_best(output: Path) -> tuple[VSEModel, Vocabulary]:
    """Returns the best model of a run, ready to encode, and its vocabulary."""
    content = read_checkpoint(output / BEST, BEST_KEYS)
    model = VSEModel(**content["sizes"])
    load_weights(model, content["model"], output / BEST)
    return model.eval(), Vocabulary.from_json(output / VOCABULARY)
