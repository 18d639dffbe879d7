"""The losses by their names on the command line, and the plateau of the hardest ones."""

import math
from typing import NamedTuple

from torch import Tensor, distributed

from fused_vse import LossStatistics, all_negatives_loss, hardest_negative_loss, hinge_loss

DEFAULT_MARGINS = {
    "all_negatives": 0.0,
    "hardest_negative": 0.2,
    "hinge": 0.2,
    "hinge_hardest": 0.2,
}
LOSSES = tuple(DEFAULT_MARGINS)
# These collapse from scratch, and start with epochs of all_negatives instead.
HARDEST_LOSSES = ("hardest_negative", "hinge_hardest")
# On the plateau the positive and the hardest score of an anchor differ by less than this share of
# the margin, on average. Seen on the digits (margin 0.2): 0.36 and more in runs that learn, 0.18 and
# falling in those that collapse. A loss near 2m/τ alone says little: healthy runs cross it.
PLATEAU_GAP = 0.2


class Objective(NamedTuple):
    """A loss with its options; calling it gives the mean loss of a batch of pairs."""

    name: str
    temperature: float
    margin: float
    smooth: bool
    backend: str
    group: distributed.ProcessGroup | None = None  # the ranks whose pairs are one batch

    def __call__(
        self,
        images: Tensor,  # [K, D]
        captions: Tensor,  # [K, D]
        ids: Tensor,  # [K], the image of each pair
    ) -> tuple[Tensor, LossStatistics | None]:
        """Returns the loss, and the statistics where they come for free."""
        shared = {
            "margin": self.margin,
            "image_ids": ids,
            "caption_ids": ids,
            "reduction": "mean",
            "return_statistics": self.name in HARDEST_LOSSES,
            "backend": self.backend,
            "group": self.group,
        }
        if self.name == "all_negatives":
            return all_negatives_loss(
                images, captions, temperature=self.temperature, **shared
            ), None
        if self.name == "hinge":
            return hinge_loss(images, captions, **shared), None
        if self.name == "hinge_hardest":
            return hinge_loss(images, captions, hardest=True, **shared)
        return hardest_negative_loss(
            images, captions, temperature=self.temperature, smooth=self.smooth, **shared
        )

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
        return 2 * (math.log1p(math.exp(-logit)) + logit) if self.smooth else 2 * logit

    def on_plateau(self, gap: float) -> bool:
        """Whether an epoch's mean |h - p| says that all similarities are about equal."""
        return self.plateau is not None and gap < PLATEAU_GAP * self.margin
