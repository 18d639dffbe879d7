"""The embedded data set: scenes of handwritten digits with English captions, nothing to download.

A scene is a 2 x 2 grid with a real 8 x 8 digit of scikit-learn's load_digits in two to four of its
cells. Its five captions say, in five ways, what stands where; some of them leave something out, as
captions do, and are true of other scenes, too. No digit and no arrangement occurs in two splits.
"""

import itertools
import random
from collections.abc import Callable, Hashable

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
# What a caption says, whatever words it says it in.
Claim = tuple[Hashable, ...]


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
    pictures, captions, claims = [], [], []
    for cells in scenes:
        pictures.append(_draw(cells, of_digit, rng))
        for wording in WORDINGS:
            caption, claim = wording(cells, rng)
            captions.append(caption)
            claims.append(claim)
    features = torch.from_numpy(numpy.stack(pictures).astype(numpy.float32)).flatten(1)
    owners = torch.arange(len(captions)) // CAPTIONS_PER_IMAGE
    return Split(features, captions, owners, claims, [_facts(cells) for cells in scenes])


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


def _rows(cells: Cells) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(digit for digit in row if digit is not None) for row in (cells[:2], cells[2:])
    )


def _directions(cell: int, other: int) -> tuple[str, ...]:
    """Where a cell is, seen from another one."""
    (y, x), (other_y, other_x) = divmod(cell, 2), divmod(other, 2)
    vertical = () if y == other_y else ("above" if y < other_y else "below",)
    return vertical + (() if x == other_x else ("left" if x < other_x else "right",))


def _occupied(cells: Cells) -> list[tuple[int, int]]:
    """(cell, digit) for each digit of the scene."""
    return [(cell, digit) for cell, digit in enumerate(cells) if digit is not None]


def _everything(cells: Cells, rng: random.Random) -> tuple[str, Claim]:
    parts = [
        f"{_a(digit)} {rng.choice(('at the', 'in the'))} {_place(cell, rng)}"
        for cell, digit in _occupied(cells)
    ]
    return f"{_list(parts)} .", ("everything", cells)


def _row_by_row(cells: Cells, rng: random.Random) -> tuple[str, Claim]:
    parts = []
    for y, row in enumerate(_rows(cells)):
        digits = [_a(digit) for digit in row]
        verb = rng.choice(("shows", "holds", "has"))
        content = _list(digits) if digits else rng.choice(("nothing", "no digit"))
        parts.append(f"the {rng.choice(ROWS[y])} row {verb} {content}")
    return f"{' , '.join(parts)} .", ("rows", _rows(cells))


def _relation(cells: Cells, rng: random.Random) -> tuple[str, Claim]:
    occupied = _occupied(cells)
    (first, digit), (second, other), *rest = rng.sample(occupied, len(occupied))
    synonyms = {"above": ("above", "over"), "below": ("below", "under")}
    directions = _directions(first, second)
    words = [rng.choice(synonyms[d]) if d in synonyms else f"{d} of" for d in directions]
    verb = rng.choice(("is", "stands", "is written"))
    others = [digit for _, digit in rest]
    besides = f" , besides {_list([_a(digit) for digit in others])}" if rest else ""
    caption = f"{_a(digit)} {verb} {' and '.join(words)} {_a(other)}{besides} ."
    return caption, ("relation", digit, directions, other, tuple(sorted(others)))


def _two_and_the_count(cells: Cells, rng: random.Random) -> tuple[str, Claim]:
    occupied = _occupied(cells)
    two = rng.sample(occupied, 2)
    parts = [f"{_a(digit)} at the {_place(cell, rng)}" for cell, digit in two]
    noun = rng.choice(("digits", "numbers"))
    caption = f"{NUMBERS[len(occupied)]} {noun} with {_list(parts)} ."
    return caption, ("two", len(occupied), tuple(sorted(two)))


def _inventory(cells: Cells, rng: random.Random) -> tuple[str, Claim]:
    digits = [digit for _, digit in _occupied(cells)]
    rng.shuffle(digits)
    opening = rng.choice(("somebody wrote", "a picture of", "handwritten digits :"))
    return f"{opening} {_list([_a(d) for d in digits])} .", ("inventory", tuple(sorted(digits)))


WORDINGS: tuple[Callable[[Cells, random.Random], tuple[str, Claim]], ...] = (
    _everything,
    _row_by_row,
    _relation,
    _two_and_the_count,
    _inventory,
)


def _facts(cells: Cells) -> set[Claim]:
    """Every claim that is true of a scene."""
    occupied = _occupied(cells)
    facts = {
        ("everything", cells),
        ("rows", _rows(cells)),
        ("inventory", tuple(sorted(digit for _, digit in occupied))),
    }
    facts |= {("two", len(occupied), two) for two in itertools.combinations(occupied, 2)}
    for (first, digit), (second, other), *rest in itertools.permutations(occupied):
        others = tuple(sorted(digit for _, digit in rest))
        directions = _directions(first, second)
        # What is above and left of something is above it.
        for said in {directions, directions[:1], directions[-1:]}:
            facts.add(("relation", digit, said, other, others))
    return facts
