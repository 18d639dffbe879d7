"""Tables of recalls, and the curves of a run."""

import io

import matplotlib

from fused_vse.retrieval import Retrieval

matplotlib.use("Agg")
from matplotlib import pyplot

KS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
EPOCH_HEADER = (
    "epoch  phase                loss   image to text  R@1   R@5  R@10  median"
    "   text to image  R@1   R@5  R@10  median   rsum    time"
)


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


def curves(history: list[dict], plateaus: dict[str, float | None]) -> bytes:
    """A PNG over the epochs: a panel for the loss of each phase, then what all phases share.

    `plateaus` are those of the phases' losses, or None.
    """
    epochs = [line["epoch"] for line in history]
    best = [line["epoch"] for line in history if line["best"]][-1]
    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels = list(grid.flat)

    def panel(title: str, **limits: object) -> pyplot.Axes:
        axes = panels.pop(0)
        axes.set(title=title, xlabel="epoch", xlim=(0.5, max(len(epochs), 2) + 0.5), **limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        return axes

    for phase, plateau in plateaus.items():
        chosen = [line for line in history if line["phase"] == phase]
        axes = panel(f"training loss: {phase}")
        axes.plot([line["epoch"] for line in chosen], [line["loss"] for line in chosen], "o-")
        if plateau is not None:
            axes.axhline(
                plateau,
                color="gray",
                linestyle="--",
                label=f"plateau {plateau:.4g}: all scores equal",
            )
            _legend_below(axes)
    axes = panel("dev rsum")
    axes.plot(epochs, [line["dev"]["rsum"] for line in history], "o-")
    axes.axvline(best, color="C2", linestyle=":", label=f"best epoch: {best}")
    _legend_below(axes)
    axes = panel("dev recall (%)", ylim=(-3, 103))
    for direction, style in zip(DIRECTIONS, ("-", "--"), strict=True):
        for k, color in zip(KS, ("C0", "C1", "C2"), strict=True):
            values = [line["dev"][direction][f"R@{k}"] for line in history]
            label = f"{direction.replace('_', ' ')} R@{k}"
            axes.plot(epochs, values, style, marker="o", color=color, label=label)
    _legend_below(axes, columns=2)
    with_statistics = [line for line in history if line["active_share"] is not None]
    if with_statistics:
        axes = panel("active share (%): anchors with a violation", ylim=(-3, 103))
        shares = [100 * line["active_share"] for line in with_statistics]
        axes.plot([line["epoch"] for line in with_statistics], shares, "o-")
    panel("learning rate at the start").plot(
        epochs, [line["learning_rate"] for line in history], "o-"
    )
    for axes in panels:
        axes.axis("off")
    return png(figure)


def _legend_below(axes: pyplot.Axes, columns: int = 1) -> None:
    # Beside the panel, never on the data.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def png(figure: pyplot.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
