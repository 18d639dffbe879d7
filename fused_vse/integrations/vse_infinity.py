"""VSE∞ (arXiv 2011.04305): `lib.loss.ContrastiveLoss`."""

from torch import Tensor

from ._checks import check_pairs
from ._triplet import TripletSwitch


class ContrastiveLoss(TripletSwitch):
    """Stand-in for VSE∞'s `ContrastiveLoss`; its trainer calls `max_violation_on` after one epoch."""

    def __init__(self, opt, margin=0, max_violation=False):
        super().__init__(margin, max_violation)
        self.opt = opt

    def forward(self, im: Tensor, s: Tensor) -> Tensor:
        """The loss of image embeddings [B, D] and caption embeddings [B, D]."""
        check_pairs(im=im, s=s)
        return self.hinges(im, s)
