"""OpenCLIP: `open_clip.ClipLoss`, the symmetric InfoNCE loss of CLIP (arXiv 2103.00020).

    from fused_vse.integrations.open_clip import ClipLoss      # instead of open_clip's

With open_clip installed it is a subclass of the original; without, it stands by itself.
"""

import numbers

from torch import Tensor, distributed, nn

from ..arguments import check_temperature, describe
from ..distributed.peers import check_on_all
from ..losses import all_negatives_loss
from ..ops import accumulation_dtype
from ._checks import check_pairs

try:
    from open_clip.loss import ClipLoss as _Original
except ImportError:
    _Original = nn.Module


class ClipLoss(_Original):
    """Stand-in for `open_clip.ClipLoss`, whose arguments it has.

    On several ranks it is `all_negatives_loss` with `group=`, whatever `local_loss` and
    `gather_with_grad` say: value, and gradient after the averaging of DDP, are those of one process
    with the whole batch; each score is computed once, and only the texts travel.
    """

    def __init__(
        self,
        local_loss=False,
        gather_with_grad=False,
        cache_labels=False,
        rank=0,
        world_size=1,
        use_horovod=False,
    ):
        if not isinstance(world_size, numbers.Integral) or world_size < 1:
            raise ValueError(f"world_size must be an int >= 1, got {describe(world_size)}")
        if use_horovod:
            raise ValueError("use_horovod is not supported; use torch.distributed")
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = False

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [B, D] each, or {"contrastive_loss": loss}.

        `logit_scale` multiplies the scores. `logit_bias` cancels in a softmax and gets gradient 0.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
            RuntimeError: several ranks, but no process group.
        """
        if self.world_size > 1 and not distributed.is_initialized():
            raise RuntimeError(
                f"world_size is {self.world_size}, but there is no process group to gather from;"
                " call torch.distributed.init_process_group first"
            )
        group = distributed.group.WORLD if self.world_size > 1 else None

        def check() -> Tensor | float:
            if not isinstance(logit_bias, (Tensor, numbers.Real, type(None))):
                raise TypeError(
                    f"logit_bias must be a tensor, a float or None, got {describe(logit_bias)}"
                )
            check_pairs(image_features=image_features, text_features=text_features)
            return check_temperature(logit_scale, image_features.device, "logit_scale")

        scale = check_on_all(group, check)
        if isinstance(scale, Tensor):  # its reciprocal should not be rounded to 16 bits
            scale = scale.to(accumulation_dtype(scale.dtype))
        loss = all_negatives_loss(
            image_features,
            text_features,
            temperature=1 / scale,
            direction_weights=(0.5, 0.5),
            group=group,
        )
        if logit_bias is not None:
            loss = loss + 0 * (logit_bias.sum() if isinstance(logit_bias, Tensor) else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
