"""CHAN (CVPR 2023): `lib.loss.ContrastiveLoss` and `lib.loss.InfoNCELoss`, on score matrices."""

from torch import Tensor, nn

from ..losses import all_negatives_loss
from ._checks import check_square, option
from ._triplet import TripletSwitch


class ContrastiveLoss(TripletSwitch):
    """Stand-in for CHAN's `ContrastiveLoss`; `opt` takes precedence over the other arguments."""

    def __init__(self, opt=None, margin=0.2, max_violation=False):
        if opt is not None:
            margin, max_violation = option(opt, "margin"), option(opt, "max_violation")
        super().__init__(margin, max_violation)
        self.opt = opt

    def forward(self, sims: Tensor) -> Tensor:
        """The loss of a score matrix [B, B], images by captions."""
        check_square(sims=sims)
        return self.hinges(scores=sims)


class InfoNCELoss(nn.Module):
    """Stand-in for CHAN's `InfoNCELoss`: all negatives, both directions summed."""

    def __init__(self, temperature=0.01, margin=0):
        super().__init__()
        self.temperature = temperature
        self.margin = margin

    def max_violation_on(self) -> None:
        """Nothing, as in CHAN."""

    def max_violation_off(self) -> None:
        """Nothing, as in CHAN."""

    def forward(self, sims: Tensor) -> Tensor:
        """The loss of a score matrix [B, B], images by captions."""
        check_square(sims=sims)
        return all_negatives_loss(scores=sims, temperature=self.temperature, margin=self.margin)
