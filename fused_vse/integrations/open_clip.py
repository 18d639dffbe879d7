"""OpenCLIP: `open_clip.ClipLoss`, the symmetric InfoNCE loss of CLIP (arXiv 2103.00020), and
`open_clip.SigLipLoss` (arXiv 2303.15343).

    from fused_vse.integrations.open_clip import ClipLoss, SigLipLoss      # instead of open_clip's

With open_clip installed they are subclasses of the originals; without, they stand by themselves.
"""

import numbers

from torch import Tensor, distributed, nn

from ..arguments import check_bias, check_choice, check_temperature, describe
from ..distributed.peers import check_on_all
from ..losses import all_negatives_loss, sigmoid_loss
from ..ops import accumulation_dtype
from ._checks import check_pairs

try:
    from open_clip import loss as _originals
except ImportError:
    _originals = None
_ClipLoss, _SigLipLoss = (
    nn.Module if _originals is None else getattr(_originals, name)
    for name in ("ClipLoss", "SigLipLoss")
)


def _group(world_size: int) -> "distributed.ProcessGroup | None":
    if world_size > 1 and not distributed.is_initialized():
        raise RuntimeError(
            f"world_size is {world_size}, but there is no process group to gather from;"
            " call torch.distributed.init_process_group first"
        )
    return distributed.group.WORLD if world_size > 1 else None


def _check_world_size(world_size: object) -> None:
    if not isinstance(world_size, numbers.Integral) or world_size < 1:
        raise ValueError(f"world_size must be an int >= 1, got {describe(world_size)}")


def _temperature(logit_scale: Tensor | float, image_features: Tensor) -> Tensor | float:
    scale = check_temperature(logit_scale, image_features.device, "logit_scale")
    if isinstance(scale, Tensor):  # its reciprocal should not be rounded to 16 bits
        scale = scale.to(accumulation_dtype(scale.dtype))
    return 1 / scale


class ClipLoss(_ClipLoss):
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
        _check_world_size(world_size)
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
        group = _group(self.world_size)

        def check() -> Tensor | float:
            if not isinstance(logit_bias, (Tensor, numbers.Real, type(None))):
                raise TypeError(
                    f"logit_bias must be a tensor, a float or None, got {describe(logit_bias)}"
                )
            check_pairs(image_features=image_features, text_features=text_features)
            return _temperature(logit_scale, image_features)

        temperature = check_on_all(group, check)
        loss = all_negatives_loss(
            image_features,
            text_features,
            temperature=temperature,
            direction_weights=(0.5, 0.5),
            group=group,
        )
        if logit_bias is not None:
            loss = loss + 0 * (logit_bias.sum() if isinstance(logit_bias, Tensor) else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_SigLipLoss):
    """Stand-in for `open_clip.SigLipLoss`, whose arguments it has.

    On several ranks it is `sigmoid_loss` with `group=`, whatever `dist_impl` says, which no longer
    matters. As with the original, the value on a rank is the part of its own images, whose average over
    the ranks is that of one process; so is the gradient after the averaging of DDP.
    """

    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0):
        _check_world_size(world_size)
        if dist_impl is not None:
            check_choice("dist_impl", dist_impl, ("bidir", "shift", "reduce", "gather"))
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size  # of the original's memory; this one has no use for it

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [B, D] each, or {"contrastive_loss": loss}.

        `logit_scale` multiplies the scores, `logit_bias` is added to them.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
            RuntimeError: several ranks, but no process group.
        """
        group = _group(self.world_size)

        def check() -> tuple[Tensor | float, Tensor | float]:
            check_pairs(image_features=image_features, text_features=text_features)
            bias = 0.0 if logit_bias is None else logit_bias
            return (
                _temperature(logit_scale, image_features),
                check_bias(bias, image_features, "logit_bias"),
            )

        temperature, bias = check_on_all(group, check)
        loss = sigmoid_loss(
            image_features,
            text_features,
            temperature=temperature,
            bias=bias,
            reduction="mean" if group is None else "none",
            group=group,
        ).mean()
        return {"contrastive_loss": loss} if output_dict else loss
