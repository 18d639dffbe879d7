"""A data set in vsepp's layout that trains in a second, with the flags of a tiny model for it."""

import random
from pathlib import Path

import numpy
import torch

from train_reference import main

IMAGES = {"train": 48, "dev": 16, "test": 16}
FEATURES = 24
NOUNS = ("dog", "child", "boat", "horse", "car", "bird", "tree", "ball")
PLACES = ("on a beach", "in the snow", "by a lake", "in a street")

TINY = (
    *("--epochs", "3", "--batch-size", "32", "--word-size", "12", "--hidden-size", "8"),
    *("--joint-size", "16", "--lr", "0.01", "--threads", "1"),
)


def train(*argv: object) -> int:
    """Runs the trainer, keeps its number of threads from other tests, returns its exit code."""
    threads = torch.get_num_threads()
    try:
        return main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


def fails(capsys, *argv):
    """Runs the trainer and returns the one line of its complaint."""
    assert train(*argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    return shown.err


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def replace_line(number, line):
    def corrupt(path):
        lines = path.read_bytes().split(b"\n")
        lines[number - 1] = line
        path.write_bytes(b"\n".join(lines))

    return corrupt


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def write_tiny_data(directory: Path, repeated: bool = False) -> Path:
    """Features are a noisy code of a noun and a place; captions name them in five ways."""
    directory.mkdir(parents=True)
    rng = random.Random(0)
    codes = numpy.random.default_rng(0).random((len(NOUNS) + len(PLACES), FEATURES))
    for split, images in IMAGES.items():
        rows, captions = [], []
        for _ in range(images):
            noun, place = rng.randrange(len(NOUNS)), rng.randrange(len(PLACES))
            noise = [0.1 * rng.random() for _ in range(FEATURES)]
            rows += [codes[noun] + codes[len(NOUNS) + place] + noise] * (5 if repeated else 1)
            n, p = NOUNS[noun], PLACES[place]
            captions += [
                f"A {n} {p} .",
                f"the {n}",
                f"{p} , a {n}",
                f"One {n} {p}",
                f"{p} stands a {n}",
            ]
        numpy.save(directory / f"{split}_ims.npy", numpy.array(rows, dtype=numpy.float16))
        (directory / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
    return directory
