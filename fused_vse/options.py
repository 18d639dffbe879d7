"""The options of the losses, checked."""

from typing import NamedTuple

from torch import Tensor

from .arguments import (
    check_bias,
    check_choice,
    check_direction_weights,
    check_finite,
    check_flag,
    check_temperature,
    inverse_temperature,
)
from .ops import HARDEST_SMOOTH, Batch

REDUCTIONS = ("mean", "sum", "none")
SIGMOID = "sigmoid"  # beside the kinds of ops.py


class Options(NamedTuple):
    """What all ranks must share. losses.py explains them."""

    loss: int | str
    reduction: str
    return_statistics: bool
    inverse_temperature: float | Tensor = 1.0
    margin: float = 0.0
    direction_weights: tuple[float, float] = (1.0, 1.0)
    false_negative_margin: float | None = None
    equal_positive: bool = False
    hardness: float = 0.0
    select: float | None = None
    bias: float | Tensor = 0.0

    @property
    def has_whole_loss(self) -> bool:
        """Whether the op small_loss knows all that is asked for."""
        asked = self.false_negative_margin, self.select, self.equal_positive, self.hardness
        return self.loss != SIGMOID and asked == (None, None, False, 0.0)


def checked_options(
    kind: int | str,
    batch: Batch,
    *,
    reduction: str,
    return_statistics: bool,
    temperature: float | Tensor = 1.0,
    margin: float = 0.0,
    direction_weights: tuple[float, float] = (1.0, 1.0),
    false_negative_margin: float | None = None,
    equal_ids: str = "ignore",
    hardness: float = 0.0,
    select: float | None = None,
    bias: float | Tensor = 0.0,
) -> Options:
    images = batch.images
    temperature = check_temperature(temperature, images.device)
    check_choice("equal_ids", equal_ids, ("ignore", "positive"))
    equal_positive = equal_ids == "positive"
    if false_negative_margin is not None:
        false_negative_margin = check_finite("false_negative_margin", false_negative_margin, images)
    if select is not None:
        select = check_finite("select", select, images, 0.0)
    options = Options(
        kind,
        check_choice("reduction", reduction, REDUCTIONS),
        check_flag("return_statistics", return_statistics),
        inverse_temperature(temperature, images),
        check_finite("margin", margin, images),
        check_direction_weights(direction_weights, images),
        false_negative_margin,
        equal_positive and batch.image_ids is not None,
        check_finite("hardness", hardness, images, 0.0) if hardness != 0.0 else 0.0,
        select,
        check_bias(bias, images) if kind == SIGMOID else 0.0,
    )
    if false_negative_margin is None and select is None and not equal_positive:
        return options  # nothing that another option could contradict
    for together, why in (
        (equal_positive and options.margin, "equal_ids='positive' knows no margin; leave it 0"),
        (equal_positive and options.hardness, "equal_ids='positive' knows no hardness; leave it 0"),
        (
            equal_positive and false_negative_margin is not None,
            "with equal_ids='positive' an anchor has several positives, so that none sets the bar for"
            " false_negative_margin; leave one of them out",
        ),
        (
            select is not None and kind == HARDEST_SMOOTH,
            "select is for the hinge; leave smooth or select out",
        ),
        (
            select is not None and false_negative_margin is not None,
            "select takes the mean over all negatives; leave false_negative_margin or select out",
        ),
    ):
        if together:
            raise ValueError(why)
    return options
