"""What the trainers that descend from VSE++ share: a margin and a switch for hardest negatives."""

from torch import Tensor, nn

from ..arguments import check_flag
from ..losses import hinge_loss


class TripletSwitch(nn.Module):
    """Sum of hinges, or with `max_violation` the hardest negative's hinge only.

    Trainers set the attributes or call the methods, often after a first epoch with the sum.
    """

    def __init__(self, margin: float, max_violation: bool):
        super().__init__()
        self.margin = margin
        self.max_violation = max_violation

    def hinges(self, *embeddings: Tensor, **options) -> Tensor:
        """The loss of embeddings, or of `scores`."""
        hardest = check_flag("max_violation", self.max_violation)
        return hinge_loss(*embeddings, margin=self.margin, hardest=hardest, **options)

    def max_violation_on(self) -> None:
        self.max_violation = True

    def max_violation_off(self) -> None:
        self.max_violation = False
