"""PCME++ (arXiv 2305.18171): `criterions.triplet.TripletLoss` and `criterions.infonce.InfoNCELoss`."""

import warnings

import torch
from torch import Tensor, nn

from ..arguments import check_embeddings, check_flag, check_temperature
from ..losses import all_negatives_loss
from ._checks import check_pairs, mean_of
from ._triplet import TripletSwitch

Embeddings = Tensor | dict[str, Tensor]


class TripletLoss(TripletSwitch):
    """Stand-in for pcmepp's `TripletLoss`."""

    def __init__(self, margin=0, max_violation=False):
        super().__init__(margin, max_violation)

    def forward(self, im: Embeddings, s: Embeddings, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of embeddings [B, D], or of the entries "mean" of dicts, and what to log."""
        im, s = mean_of("im", im), mean_of("s", s)
        check_pairs(im=im, s=s)
        loss = self.hinges(im, s)
        return loss, {"loss": loss.detach()}


class InfoNCELoss(nn.Module):
    """Stand-in for pcmepp's `InfoNCELoss`, whose parameter `tau` multiplies the scores."""

    def __init__(self, init_tau=1, **kwargs):
        super().__init__()
        init_tau = check_temperature(init_tau, torch.device("cpu"), "init_tau")
        self.tau = nn.Parameter(init_tau * torch.ones(1))

    def max_violation_on(self) -> None:
        warnings.warn("InfoNCELoss has no max_violation; nothing changes", stacklevel=2)

    max_violation_off = max_violation_on

    def forward(
        self, img_emb: Embeddings, cap_emb: Embeddings, distributed: bool = False, **kwargs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log; `distributed`: images [B, D], captions [W B, D], the own first."""
        images, captions = mean_of("img_emb", img_emb), mean_of("cap_emb", cap_emb)
        if check_flag("distributed", distributed):
            check_embeddings(images, captions, ("img_emb", "cap_emb"))
            if captions.shape[0] < images.shape[0]:
                raise ValueError(
                    "cap_emb must start with the captions of all rows of img_emb, got"
                    f" {captions.shape[0]} rows for {images.shape[0]}"
                )
        else:
            check_pairs(img_emb=images, cap_emb=captions)
        check_temperature(self.tau, images.device, "tau")
        loss = all_negatives_loss(
            images,
            captions,
            temperature=self.tau.reciprocal(),
            num_pairs=images.shape[0] if distributed else None,
            direction_weights=(1, 0) if distributed else (0.5, 0.5),
        )
        return loss, {"loss/loss": loss, "criterion/tau": self.tau}
