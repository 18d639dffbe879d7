"""What a model retrieves from the test set: captions for images and images for captions.

Recall counts an answer as right if it is the query's own. Others may be true of it as well, and are
shown as such where the data tell (`Split.is_true`): for scenes of digits, whatever a caption
claims; for other data, captions with the same words.
"""

from typing import NamedTuple

import torch
from matplotlib import pyplot
from torch import Tensor

from .data import Split
from .report import png

QUERIES, ANSWERS = 6, 5
RIGHT, ALSO_TRUE, WRONG = "right", "also true", "wrong"
COLOURS = {RIGHT: "green", ALSO_TRUE: "darkorange", WRONG: "firebrick"}
SIGNS = {RIGHT: "✓", ALSO_TRUE: "≈", WRONG: "✗"}


class Answer(NamedTuple):
    image: int
    caption: int
    score: float  # cosine
    verdict: str


class Retrieved(NamedTuple):
    """The best answers to each query."""

    captions: list[list[Answer]]  # for images
    images: list[list[Answer]]  # for captions


def retrieve(split: Split, images: Tensor, captions: Tensor) -> Retrieved:
    """The answers to QUERIES images and captions, spread evenly over the split."""
    rows, columns = (torch.arange(QUERIES) * (len(x) // QUERIES) for x in (images, captions))
    by_image = zip(rows.tolist(), _best(images[rows] @ captions.T), strict=True)
    by_caption = zip(columns.tolist(), _best(captions[columns] @ images.T), strict=True)
    return Retrieved(
        [[Answer(i, j, score, _verdict(split, i, j)) for score, j in best] for i, best in by_image],
        [
            [Answer(i, j, score, _verdict(split, i, j)) for score, i in best]
            for j, best in by_caption
        ],
    )


def _best(scores: Tensor) -> list[list[tuple[float, int]]]:
    values, items = scores.topk(min(ANSWERS, scores.shape[1]))
    rows = zip(values.tolist(), items.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def _verdict(split: Split, image: int, caption: int) -> str:
    if split.owners[caption] == image:
        return RIGHT
    return ALSO_TRUE if split.is_true(caption, image) else WRONG


def true_at_1(split: Split, images: Tensor, captions: Tensor) -> dict[str, float]:
    """How many percent of the first answers are true of their query, its own or not."""
    best_caption = torch.cat([(block @ captions.T).argmax(1) for block in images.split(1024)])
    best_image = torch.cat([(block @ images.T).argmax(1) for block in captions.split(1024)])
    forward = [split.is_true(j, i) for i, j in enumerate(best_caption.tolist())]
    backward = [split.is_true(j, i) for j, i in enumerate(best_image.tolist())]
    return {
        "image_to_text": 100 * sum(forward) / len(forward),
        "text_to_image": 100 * sum(backward) / len(backward),
    }


def as_text(split: Split, retrieved: Retrieved) -> str:
    """Captions only: for images that cannot be shown, their own captions stand."""
    own = [[] for _ in split.facts]
    for caption, image in zip(split.captions, split.owners.tolist(), strict=True):
        own[image].append(caption)
    lines = []
    for answers in retrieved.captions:
        image = answers[0].image
        lines += [f"image {image} (its captions: {' | '.join(own[image])})"]
        lines += [_line(answer, split.captions[answer.caption]) for answer in answers] + [""]
    for answers in retrieved.images:
        lines += [f"caption {answers[0].caption}: {split.captions[answers[0].caption]}"]
        lines += [_line(a, f"image {a.image}: {own[a.image][0]}") for a in answers] + [""]
    return "\n".join(lines)


def _line(answer: Answer, text: str) -> str:
    return f"  {answer.score:6.3f}  {answer.verdict:9}  {text}"


def as_picture(split: Split, shape: tuple[int, int], retrieved: Retrieved) -> bytes:
    """A PNG: images with the captions found for them, and captions with the images found."""
    figure = pyplot.figure(figsize=(20, 1.7 * QUERIES), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(10, 9))
    legend = ", ".join(f"{SIGNS[verdict]} {verdict}" for verdict in COLOURS)
    left.suptitle(f"image to text: test scenes and their best captions ({legend})")
    right.suptitle("text to image: captions and their best scenes")

    grid = left.subplots(QUERIES, 2, width_ratios=(1, 6))
    for (picture, text), answers in zip(grid, retrieved.captions, strict=True):
        _draw(picture, split, shape, answers[0].image)
        text.axis("off")
        for place, answer in enumerate(answers):
            line = f"{answer.score:.2f} {SIGNS[answer.verdict]} {split.captions[answer.caption]}"
            height = 1 - (place + 0.5) / ANSWERS
            text.text(0, height, line, va="center", fontsize=9, color=COLOURS[answer.verdict])

    for row, answers in zip(right.subfigures(QUERIES, 1), retrieved.images, strict=True):
        row.suptitle(split.captions[answers[0].caption], fontsize=9)
        for picture, answer in zip(
            row.subplots(1, len(answers), squeeze=False)[0], answers, strict=True
        ):
            _draw(picture, split, shape, answer.image)
            colour = COLOURS[answer.verdict]
            label = f"{answer.score:.2f} {SIGNS[answer.verdict]}"
            picture.set_xlabel(label, color=colour, fontsize=9)
            picture.spines[:].set(color=colour, linewidth=2)
    return png(figure)


def _draw(axes: pyplot.Axes, split: Split, shape: tuple[int, int], image: int) -> None:
    axes.imshow(split.features[image].reshape(shape).numpy(), cmap="gray_r")
    axes.set(xticks=[], yticks=[])
