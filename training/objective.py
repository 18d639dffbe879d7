"""The losses by their names on the command line, and the plateau of the hardest ones."""

import math
from typing import NamedTuple

from torch import Tensor, distributed

from fused_vse import (
    LossStatistics,
    all_negatives_loss,
    hardest_negative_loss,
    hinge_loss,
    sigmoid_loss,
)

DEFAULT_MARGINS = {
    "all_negatives": 0.0,
    "hardest_negative": 0.2,
    "hinge": 0.2,
    "hinge_hardest": 0.2,
    "sigmoid": 0.0,
}
LOSSES = tuple(DEFAULT_MARGINS)
# Options that only some losses have.
OPTIONS = {
    "smooth": ("hardest_negative",),
    "select": ("hardest_negative",),
    "hardness": ("all_negatives",),
    "false_negative_margin": ("all_negatives", "hardest_negative", "hinge", "hinge_hardest"),
    "bias": ("sigmoid",),
}
# These collapse from scratch, and start with epochs of all_negatives instead.
HARDEST_LOSSES = ("hardest_negative", "hinge_hardest")
# On the plateau the positive and the hardest score of an anchor differ by less than this share of
# the margin, on average over the anchors of one direction: it is enough that all captions, or all
# images, are alike. Seen on the digits (margin 0.2): 0.14 and more in epochs that learn, 0.05 and
# less in those that do not. A loss near 2m/τ alone says little: healthy runs cross it.
PLATEAU_GAP = 0.1


class Objective(NamedTuple):
    """A loss with its options; calling it gives the mean loss of a batch of pairs."""

    name: str
    temperature: float
    margin: float
    options: dict[str, object]  # of OPTIONS, those that are not their defaults
    backend: str
    group: distributed.ProcessGroup | None = None  # the ranks whose pairs are one batch

    def __call__(
        self,
        images: Tensor,  # [K, D]
        captions: Tensor,  # [K, D]
        ids: Tensor,  # [K], the image of each pair
    ) -> tuple[Tensor, LossStatistics | None]:
        """Returns the loss, and the statistics where they come for free."""
        keywords = {
            "image_ids": ids,
            "caption_ids": ids,
            "reduction": "mean",
            "backend": self.backend,
            "group": self.group,
            **self.options,
        }
        if self.name != "sigmoid":
            keywords["margin"] = self.margin
        if self.name == "hinge_hardest":
            keywords["hardest"] = True
        if not self.name.startswith("hinge"):
            keywords["temperature"] = self.temperature
        loss = {
            "all_negatives": all_negatives_loss,
            "hardest_negative": hardest_negative_loss,
            "sigmoid": sigmoid_loss,
        }.get(self.name, hinge_loss)
        if self.name in HARDEST_LOSSES:
            return loss(images, captions, return_statistics=True, **keywords)
        return loss(images, captions, **keywords), None

    @property
    def slope(self) -> float:
        """The largest derivative of an anchor's loss by a score."""
        return 1.0 if self.name.startswith("hinge") else 1 / self.temperature

    @property
    def plateau(self) -> float | None:
        """The loss of a hardest-negative loss where all similarities are equal, h = p."""
        if self.name == "hinge_hardest":
            return 2 * self.margin
        if self.name != "hardest_negative":
            return None
        logit = self.margin / self.temperature
        smooth = self.options.get("smooth")
        return 2 * (math.log1p(math.exp(-logit)) + logit) if smooth else 2 * logit

    def on_plateau(self, gap: float) -> bool:
        """Whether an epoch's mean |h - p|, of the direction where it is smaller, says that all
        similarities of an anchor are about equal."""
        return self.plateau is not None and gap < PLATEAU_GAP * self.margin
