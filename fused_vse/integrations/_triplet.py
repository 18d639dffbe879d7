"""What the trainers that descend from VSE++ share: a margin and a switch for hardest negatives."""

from torch import nn


class TripletSwitch(nn.Module):
    """Sum of hinges, or with `max_violation` the hardest negative's hinge only.

    Trainers set the attributes or call the methods, often after a first epoch with the sum.
    """

    def __init__(self, margin: float, max_violation: bool):
        super().__init__()
        self.margin = margin
        self.max_violation = max_violation

    def max_violation_on(self) -> None:
        self.max_violation = True

    def max_violation_off(self) -> None:
        self.max_violation = False
