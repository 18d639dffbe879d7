"""HREM (CVPR 2023): `lib.loss.ContrastiveLoss`, which can leave out repeated images."""

from torch import Tensor

from ..arguments import check_flag, check_ids
from ._checks import check_pairs, option
from ._triplet import TripletSwitch


class ContrastiveLoss(TripletSwitch):
    """Stand-in for HREM's `ContrastiveLoss`; `opt.mask_repeat` selects masking by `img_ids`."""

    def __init__(self, opt, margin=0.2, max_violation=False):
        super().__init__(margin, max_violation)
        self.opt = opt
        self.mask_repeat = option(opt, "mask_repeat")

    def forward(self, im: Tensor, s: Tensor, img_ids: Tensor | None = None) -> Tensor:
        """The loss of embeddings [B, D] each; `img_ids` [B] are the image of every pair."""
        check_pairs(im=im, s=s)
        ids = None
        if check_flag("mask_repeat", self.mask_repeat):
            if img_ids is None:
                raise ValueError("img_ids must be given when opt.mask_repeat is set")
            ids = img_ids.to(im.device) if isinstance(img_ids, Tensor) else img_ids
            ids = check_ids("img_ids", ids, "im", im)
        return self.hinges(im, s, image_ids=ids, caption_ids=ids)
