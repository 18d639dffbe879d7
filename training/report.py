"""What the trainer shows: tables, curves, and scenes with the captions retrieved for them."""

import io

import matplotlib
import torch
from torch import Tensor

from fused_vse.retrieval import Retrieval

from .data import Split

matplotlib.use("Agg")
from matplotlib import pyplot

KS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
EPOCH_HEADER = (
    "epoch  phase                loss   image to text  R@1   R@5  R@10  median"
    "   text to image  R@1   R@5  R@10  median   rsum    time"
)
SCENES_SHOWN, CAPTIONS_SHOWN = 6, 5


def as_json(retrieval: Retrieval) -> dict:
    """Recalls in percent, ranks from 1, and the recalls' sum, for metrics.jsonl."""
    result = {}
    for direction, ranking in zip(DIRECTIONS, retrieval, strict=True):
        result[direction] = {f"R@{k}": recall for k, recall in ranking.recalls.items()}
        result[direction] |= {"median_rank": ranking.median_rank, "mean_rank": ranking.mean_rank}
    return result | {"rsum": retrieval.rsum}


def _recalls(ranking: dict) -> str:
    return "".join(f"{ranking[f'R@{k}']:6.1f}" for k in KS) + f"{ranking['median_rank']:8.1f}"


def epoch_line(line: dict) -> str:
    """One line of the table under EPOCH_HEADER; a star marks the best dev rsum so far."""
    dev = line["dev"]
    return (
        f"{line['epoch']:5}  {line['phase']:16}{line['loss']:9.4f}{'':14}"
        f"{_recalls(dev['image_to_text'])}{'':15}{_recalls(dev['text_to_image'])}"
        f"{dev['rsum']:7.1f}{'*' if line['best'] else ' '}{line['seconds']:6.0f}s"
    )


def final_table(results: dict[str, dict]) -> str:
    """The last table: a row for each direction of each named result of `as_json`."""
    lines = [f"{'':28}   R@1   R@5  R@10  median    rsum"]
    for name, result in results.items():
        for direction in DIRECTIONS:
            rsum = f"{result['rsum']:8.1f}" if direction == DIRECTIONS[-1] else ""
            label = f"{name} {direction.replace('_', ' ')}"
            lines.append(f"{label:28}{_recalls(result[direction])}{rsum}")
    return "\n".join(lines)


def curves(history: list[dict]) -> bytes:
    """A PNG of the loss and of the dev recalls over the epochs."""
    epochs = [line["epoch"] for line in history]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for phase in dict.fromkeys(line["phase"] for line in history):
        chosen = [line for line in history if line["phase"] == phase]
        left.plot(
            [line["epoch"] for line in chosen], [line["loss"] for line in chosen], "o-", label=phase
        )
    left.set(title="training loss", xlabel="epoch", ylabel="loss")
    for direction, style in zip(DIRECTIONS, ("-", "--"), strict=True):
        for k, color in zip(KS, ("C0", "C1", "C2"), strict=True):
            values = [line["dev"][direction][f"R@{k}"] for line in history]
            label = f"{direction.replace('_', ' ')} R@{k}"
            right.plot(epochs, values, style, marker="o", color=color, label=label)
    right.set(title="dev set", xlabel="epoch", ylabel="recall (%)", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def retrieved_captions(
    split: Split,
    shape: tuple[int, int],
    images: Tensor,  # [N, D]
    captions: Tensor,  # [M, D]
) -> bytes:
    """A PNG of scenes with their top captions; right ones are green and ticked."""
    shown = torch.linspace(0, len(images) - 1, SCENES_SHOWN).long()
    top = (images[shown] @ captions.T).topk(CAPTIONS_SHOWN).indices
    figure, grid = pyplot.subplots(
        SCENES_SHOWN, 2, figsize=(11, 1.5 * SCENES_SHOWN), width_ratios=(1, 7), layout="constrained"
    )
    for (picture, text), scene, found in zip(grid, shown.tolist(), top.tolist(), strict=True):
        picture.imshow(split.features[scene].reshape(shape).numpy(), cmap="gray_r")
        picture.set(xticks=[], yticks=[])
        text.axis("off")
        for place, j in enumerate(found):
            right = split.owners[j] == scene
            line = f"{place + 1}. {'✓' if right else '✗'} {split.captions[j]}"
            height = 1 - (place + 0.5) / CAPTIONS_SHOWN
            text.text(
                0, height, line, va="center", fontsize=9, color="green" if right else "firebrick"
            )
    figure.suptitle("test scenes and their top captions")
    return _png(figure)


def _png(figure: pyplot.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
