"""PCME++ (arXiv 2305.18171): `criterions.triplet.TripletLoss` and `criterions.infonce.InfoNCELoss`."""

import warnings

import torch
from torch import Tensor, nn

from ..losses import all_negatives_loss, hinge_loss
from ._triplet import TripletSwitch

Embeddings = Tensor | dict[str, Tensor]


def _mean(embeddings: Embeddings) -> Tensor:
    return embeddings["mean"] if isinstance(embeddings, dict) else embeddings


class TripletLoss(TripletSwitch):
    """Stand-in for pcmepp's `TripletLoss`."""

    def __init__(self, margin=0, max_violation=False):
        super().__init__(margin, max_violation)

    def forward(self, im: Embeddings, s: Embeddings, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of embeddings [B, D], or of the entries "mean" of dicts, and what to log."""
        loss = hinge_loss(_mean(im), _mean(s), margin=self.margin, hardest=self.max_violation)
        return loss, {"loss": loss.detach()}


class InfoNCELoss(nn.Module):
    """Stand-in for pcmepp's `InfoNCELoss`, whose parameter `tau` multiplies the scores."""

    def __init__(self, init_tau=1, **kwargs):
        super().__init__()
        self.tau = nn.Parameter(init_tau * torch.ones(1))

    def max_violation_on(self) -> None:
        warnings.warn("InfoNCELoss has no max_violation; nothing changes", stacklevel=2)

    max_violation_off = max_violation_on

    def forward(
        self, img_emb: Embeddings, cap_emb: Embeddings, distributed: bool = False, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log; `distributed`: images [B, D], captions [W B, D], the own first."""
        images, captions = _mean(img_emb), _mean(cap_emb)
        loss = all_negatives_loss(
            images,
            captions,
            temperature=self.tau.reciprocal(),
            num_pairs=images.shape[0] if distributed else None,
            direction_weights=(1, 0) if distributed else (0.5, 0.5),
        )
        return loss, {"loss/loss": loss, "criterion/tau": self.tau}
