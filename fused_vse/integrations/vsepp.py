"""VSE++, VSRN and the paper's own ConVSE: `model.ContrastiveLoss`.

Formulas: arXiv 1707.05612 (the hinges) and arXiv 2110.08872 (CCL, CCLHN and SimCLR).
"""

import torch
from torch import Tensor, nn

from ..arguments import check_flag, check_temperature
from ..losses import all_negatives_loss, hardest_negative_loss, hinge_loss
from ._checks import check_pairs


class ContrastiveLoss(nn.Module):
    """Stand-in for vsepp's, VSRN's and ConVSE's `ContrastiveLoss`.

    Args:
        margin: of the hinges and of "CCLHN".
        measure: "order" for the order similarity -‖max(0, s - im)‖₂; anything else: dot product.
        max_violation: the hinge of the hardest negative instead of the sum of hinges.
        loss_fn: "CCL" (all negatives), "CCLHN" (hardest negative), "SimCLR" (NT-Xent over the 2B
            embeddings); anything else: the hinge.
        temp: temperature of those three.
    """

    def __init__(self, margin=0, measure=False, max_violation=False, loss_fn="vsepp", temp=0.1):
        super().__init__()
        self.margin = margin
        self.measure = measure
        self.max_violation = max_violation
        self.loss_fn = loss_fn
        self.temp = temp

    def forward(self, im: Tensor, s: Tensor) -> Tensor:
        """The loss of image embeddings [B, D] and caption embeddings [B, D]."""
        check_pairs(im=im, s=s)
        if self.loss_fn in ("CCL", "CCLHN", "SimCLR"):
            check_temperature(self.temp, im.device, "temp")
        similarity = "order" if self.measure == "order" else "dot"
        if self.loss_fn == "CCL":
            return all_negatives_loss(im, s, temperature=self.temp, similarity=similarity)
        if self.loss_fn == "CCLHN":
            return hardest_negative_loss(
                im, s, temperature=self.temp, margin=self.margin, similarity=similarity
            )
        if self.loss_fn == "SimCLR":
            return self._nt_xent(im, s)
        hardest = check_flag("max_violation", self.max_violation)
        return hinge_loss(im, s, margin=self.margin, hardest=hardest, similarity=similarity)

    def _nt_xent(self, im: Tensor, s: Tensor) -> Tensor:
        # Embedding k of the 2B is compared with all of them; itself and its partner share its id and
        # are no negatives. The matrix is symmetric, so that one direction is the whole loss.
        ids = torch.arange(im.shape[0], device=im.device).repeat(2)
        return all_negatives_loss(
            torch.cat([im, s]),
            torch.cat([s, im]),
            temperature=self.temp,
            image_ids=ids,
            caption_ids=ids,
            direction_weights=(1, 0),
        )
