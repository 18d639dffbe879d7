"""Fused losses for visual-semantic embeddings; see README.md."""

from .dispatch import backends
from .losses import (
    LossStatistics,
    all_negatives_loss,
    hardest_negative_loss,
    hinge_loss,
    sigmoid_loss,
)
from .modules import AllNegativesLoss, HardestNegativeLoss, HingeLoss, SigmoidLoss
from .statistics import (
    HardestNegatives,
    NegativeLogsumexp,
    hardest_negatives,
    negative_logsumexp,
)

__version__ = "0.1.0"

__all__ = [
    "AllNegativesLoss",
    "HardestNegativeLoss",
    "HardestNegatives",
    "HingeLoss",
    "LossStatistics",
    "NegativeLogsumexp",
    "SigmoidLoss",
    "all_negatives_loss",
    "backends",
    "hardest_negative_loss",
    "hardest_negatives",
    "hinge_loss",
    "negative_logsumexp",
    "sigmoid_loss",
]
