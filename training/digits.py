"""The embedded data set: scenes of handwritten digits with English captions, nothing to download.

A scene is a 2 x 2 grid with a real 8 x 8 digit of scikit-learn's load_digits in two to four of its
cells. Its five captions say, in five ways, what stands where; some of them leave something out, as
captions do. No digit and no arrangement occurs in two splits.
"""

import itertools
import random
from collections.abc import Callable

import numpy
import torch
from sklearn.datasets import load_digits

from .data import CAPTIONS_PER_IMAGE, Dataset, Split

SCENES = {"train": 1800, "dev": 400, "test": 400}
DIGITS = {"train": 1197, "dev": 300, "test": 300}  # of the 1797 in load_digits
CELL, PITCH = 8, 10  # pixels: size of a digit, distance from one to the next
SIDE = PITCH + CELL
SEED = 2110

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = (("top", "upper"), ("bottom", "lower"))
COLUMNS = ("left", "right")

# The digit in each cell in reading order, or None.
Cells = tuple[int | None, int | None, int | None, int | None]


def load_digit_scenes() -> Dataset:
    """Returns the same scenes, captions and splits every time."""
    rng = random.Random(SEED)
    source = load_digits()
    handwriting = list(range(len(source.images)))
    rng.shuffle(handwriting)
    arrangements = _arrangements()
    rng.shuffle(arrangements)

    splits = {}
    for name, scenes in SCENES.items():
        of_digit = [[] for _ in NUMBERS]  # the pictures this split may use for each digit
        for index in handwriting[: DIGITS[name]]:
            of_digit[source.target[index]].append(source.images[index])
        splits[name] = _split(arrangements[:scenes], of_digit, rng)
        del handwriting[: DIGITS[name]], arrangements[:scenes]
    return Dataset(**splits, picture_shape=(SIDE, SIDE))


def _arrangements() -> list[Cells]:
    choices = [None, *range(10)]
    return [
        cells
        for cells in itertools.product(choices, repeat=4)
        if sum(c is not None for c in cells) >= 2
    ]


def _split(scenes: list[Cells], of_digit: list[list[numpy.ndarray]], rng: random.Random) -> Split:
    pictures, captions = [], []
    for cells in scenes:
        pictures.append(_draw(cells, of_digit, rng))
        captions += [wording(cells, rng) for wording in WORDINGS]
    features = torch.from_numpy(numpy.stack(pictures).astype(numpy.float32)).flatten(1)
    return Split(features, captions, torch.arange(len(captions)) // CAPTIONS_PER_IMAGE)


def _draw(cells: Cells, of_digit: list[list[numpy.ndarray]], rng: random.Random) -> numpy.ndarray:
    picture = numpy.zeros((SIDE, SIDE))  # ink from 0 to 16
    for place, digit in enumerate(cells):
        if digit is not None:
            y, x = divmod(place, 2)
            top, left = y * PITCH, x * PITCH
            picture[top : top + CELL, left : left + CELL] = rng.choice(of_digit[digit])
    return picture


def _a(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {NUMBERS[digit]}"


def _place(cell: int, rng: random.Random) -> str:
    y, x = divmod(cell, 2)
    return f"{rng.choice(ROWS[y])} {COLUMNS[x]}"


def _list(parts: list[str]) -> str:
    return " and ".join([" , ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _occupied(cells: Cells) -> list[tuple[int, int]]:
    """(cell, digit) for each digit of the scene."""
    return [(cell, digit) for cell, digit in enumerate(cells) if digit is not None]


def _everything(cells: Cells, rng: random.Random) -> str:
    parts = [
        f"{_a(digit)} {rng.choice(('at the', 'in the'))} {_place(cell, rng)}"
        for cell, digit in _occupied(cells)
    ]
    return f"{_list(parts)} ."


def _row_by_row(cells: Cells, rng: random.Random) -> str:
    parts = []
    for y in range(2):
        digits = [_a(digit) for digit in cells[2 * y : 2 * y + 2] if digit is not None]
        verb = rng.choice(("shows", "holds", "has"))
        content = _list(digits) if digits else rng.choice(("nothing", "no digit"))
        parts.append(f"the {rng.choice(ROWS[y])} row {verb} {content}")
    return f"{' , '.join(parts)} ."


def _relation(cells: Cells, rng: random.Random) -> str:
    occupied = _occupied(cells)
    (first, digit), (second, other), *rest = rng.sample(occupied, len(occupied))
    (y, x), (other_y, other_x) = divmod(first, 2), divmod(second, 2)
    words = []
    if y != other_y:
        words.append(rng.choice(("above", "over") if y < other_y else ("below", "under")))
    if x != other_x:
        words.append("left of" if x < other_x else "right of")
    verb = rng.choice(("is", "stands", "is written"))
    besides = f" , besides {_list([_a(digit) for _, digit in rest])}" if rest else ""
    return f"{_a(digit)} {verb} {' and '.join(words)} {_a(other)}{besides} ."


def _two_and_the_count(cells: Cells, rng: random.Random) -> str:
    occupied = _occupied(cells)
    parts = [f"{_a(digit)} at the {_place(cell, rng)}" for cell, digit in rng.sample(occupied, 2)]
    noun = rng.choice(("digits", "numbers"))
    return f"{NUMBERS[len(occupied)]} {noun} with {_list(parts)} ."


def _inventory(cells: Cells, rng: random.Random) -> str:
    digits = [_a(digit) for _, digit in _occupied(cells)]
    rng.shuffle(digits)
    opening = rng.choice(("somebody wrote", "a picture of", "handwritten digits :"))
    return f"{opening} {_list(digits)} ."


WORDINGS: tuple[Callable[[Cells, random.Random], str], ...] = (
    _everything,
    _row_by_row,
    _relation,
    _two_and_the_count,
    _inventory,
)
