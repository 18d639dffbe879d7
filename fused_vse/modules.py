"""nn.Module forms of the losses, with a fixed or a learnable temperature."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .arguments import check_finite, check_flag, check_temperature
from .losses import all_negatives_loss, hardest_negative_loss, hinge_loss, sigmoid_loss
from .ops import accumulation_dtype

# A learnable temperature is kept within these bounds, as CLIP keeps its logit scale below 100: below,
# float32 cannot resolve the scores; above, the loss is flat.
LOWEST_LEARNABLE = 0.01
HIGHEST_LEARNABLE = 10.0


class _Loss(nn.Module):
    """A functional loss with the keyword arguments that stay the same in every call."""

    function: Callable

    def __init__(self, options: dict):
        super().__init__()
        of_call = ("images", "captions", "scores")
        known = [
            name for name in inspect.signature(self.function).parameters if name not in of_call
        ]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} got an unknown argument {name!r}; it takes those of"
                    f" {self.function.__name__}: {', '.join(known)}"
                )
        self.options = options

    def forward(self, images: Tensor | None = None, captions: Tensor | None = None, **batch):
        """The functional loss; `batch` is what changes in every call: ids, `num_pairs`, `scores`."""
        return self.function(images, captions, **self.options, **batch)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _LossWithTemperature(_Loss):
    def __init__(self, temperature: float, learnable_temperature: bool, options: dict):
        super().__init__(options)
        learnable_temperature = check_flag("learnable_temperature", learnable_temperature)
        if isinstance(temperature, Tensor):
            if temperature.requires_grad:
                raise TypeError(
                    "temperature must be a float, got a tensor that requires grad, which the module would"
                    " not train; pass learnable_temperature=True, or give the tensor to the function"
                    f" {self.function.__name__}"
                )
            if temperature.is_meta:
                raise ValueError("temperature is on meta, where tensors hold no data; pass a float")
            temperature = temperature.cpu()
        temperature = float(check_temperature(temperature, torch.device("cpu")))
        self.fixed_temperature = None if learnable_temperature else temperature
        if learnable_temperature:
            if not LOWEST_LEARNABLE <= temperature <= HIGHEST_LEARNABLE:
                raise ValueError(
                    f"a learnable temperature must start between {LOWEST_LEARNABLE} and"
                    f" {HIGHEST_LEARNABLE}, got {temperature}"
                )
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a float, or a 0-d tensor if it is learnable."""
        if self.fixed_temperature is not None:
            return self.fixed_temperature
        # Of a model in 16 bits the parameter is rounded; its exponential need not be.
        return self.log_temperature.to(accumulation_dtype(self.log_temperature.dtype)).exp()

    def forward(self, images: Tensor | None = None, captions: Tensor | None = None, **batch):
        """The functional loss; `batch` is what changes in every call: ids, `num_pairs`, `scores`."""
        if self.fixed_temperature is None:
            # The parameter, not the value: outside the bounds its gradient would vanish for good. As data,
            # since autograd would take the change for one to what an earlier graph needs.
            self.log_temperature.data.clamp_(
                math.log(LOWEST_LEARNABLE), math.log(HIGHEST_LEARNABLE)
            )
        return super().forward(images, captions, temperature=self.temperature, **batch)

    def extra_repr(self) -> str:
        temperature = f"temperature={_shown(self.temperature)}"
        return ", ".join(filter(None, [temperature, super().extra_repr()]))


def _shown(value: float | Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"{value:.4g}"
    return f"{'?' if value.is_meta else format(value.item(), '.4g')}, learnable"


class AllNegativesLoss(_LossWithTemperature):
    """Module form of `all_negatives_loss`.

    Args:
        temperature: τ; the starting value if it is learnable.
        learnable_temperature: make log τ a parameter, `log_temperature`. Every forward first clamps
            it so that τ stays in [0.01, 10].
        **options: keyword arguments of `all_negatives_loss` that stay the same in every call.
    """

    function = staticmethod(all_negatives_loss)

    def __init__(self, temperature: float = 0.1, *, learnable_temperature: bool = False, **options):
        super().__init__(temperature, learnable_temperature, options)


class HardestNegativeLoss(_LossWithTemperature):
    """Module form of `hardest_negative_loss`; for its arguments see `AllNegativesLoss`."""

    function = staticmethod(hardest_negative_loss)

    def __init__(self, temperature: float = 0.1, *, learnable_temperature: bool = False, **options):
        super().__init__(temperature, learnable_temperature, options)


class HingeLoss(_Loss):
    """Module form of `hinge_loss`; `options` are those of its keyword arguments that stay the same."""

    function = staticmethod(hinge_loss)

    def __init__(self, **options):
        super().__init__(options)


class SigmoidLoss(_LossWithTemperature):
    """Module form of `sigmoid_loss`.

    Args:
        temperature: τ; the starting value if it is learnable.
        bias: b; the starting value if it is learnable.
        learnable_temperature: as of `AllNegativesLoss`.
        learnable_bias: make b a parameter, `bias`.
        **options: keyword arguments of `sigmoid_loss` that stay the same in every call.
    """

    function = staticmethod(sigmoid_loss)

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learnable_temperature: bool = False,
        learnable_bias: bool = False,
        **options,
    ):
        super().__init__(temperature, learnable_temperature, options)
        bias = check_finite("bias", bias, torch.empty(0))
        learnable = check_flag("learnable_bias", learnable_bias)
        self.bias = nn.Parameter(torch.tensor(bias)) if learnable else bias

    def forward(self, images: Tensor | None = None, captions: Tensor | None = None, **batch):
        """The functional loss; `batch` is what changes in every call: ids, `num_pairs`, `scores`."""
        return super().forward(images, captions, bias=self.bias, **batch)

    def extra_repr(self) -> str:
        return f"bias={_shown(self.bias)}, {super().extra_repr()}"
