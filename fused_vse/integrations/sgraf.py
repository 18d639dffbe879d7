"""SGRAF (arXiv 2101.01368) and others that score pairs by cross-attention: `ContrastiveLoss(scores)`."""

from torch import Tensor

from ._checks import check_square
from ._triplet import TripletSwitch


class ContrastiveLoss(TripletSwitch):
    """Stand-in for SGRAF's `ContrastiveLoss`."""

    def __init__(self, margin=0, max_violation=False):
        super().__init__(margin, max_violation)

    def forward(self, scores: Tensor) -> Tensor:
        """The loss of a score matrix [B, B], images by captions."""
        check_square(scores=scores)
        return self.hinges(scores=scores)
