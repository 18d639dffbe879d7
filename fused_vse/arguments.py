"""Checks of the arguments that every public function shares: what passes here never fails in a kernel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Batch(NamedTuple):
    """Checked embeddings, ids and number of pairs, as the statistics take them."""

    images: Tensor  # [N, D]
    captions: Tensor  # [M, D]
    image_ids: Tensor | None  # [N] int64
    caption_ids: Tensor | None  # [M] int64
    num_pairs: int  # K

    @property
    def tensor(self) -> Tensor:
        """Has the device and the dtype of the input."""
        return self.images


class ScoreMatrix(NamedTuple):
    """A checked score matrix in place of embeddings, with ids and number of pairs."""

    scores: Tensor  # [N, M]
    image_ids: Tensor | None  # [N] int64
    caption_ids: Tensor | None  # [M] int64
    num_pairs: int  # K

    @property
    def tensor(self) -> Tensor:
        """Has the device and the dtype of the input."""
        return self.scores


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def _check_matrix(name: str, value: object, shape: str = "[rows, D]") -> None:
    expected = f"{name} must be a floating-point tensor of shape {shape}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{expected}, got {_describe(value)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{expected}, got {_describe(value)}; convert it with .float()")
    if value.layout != torch.strided:
        raise TypeError(f"{expected}, got layout {value.layout}; convert it with .to_dense()")
    if value.dim() != 2:
        raise ValueError(f"{expected}, got {_describe(value)}")
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name} is empty: shape {list(value.shape)}; skip empty batches")


def _check_ids(name: str, ids: object, embeddings_name: str, embeddings: Tensor) -> Tensor:
    expected = f"{name} must hold one integer for each of the {embeddings.shape[0]} rows of {embeddings_name}"
    if not isinstance(ids, Tensor):
        raise TypeError(f"{expected}, got {_describe(ids)}; wrap it in torch.tensor()")
    if ids.dtype not in INTEGER:
        raise TypeError(f"{expected}, got {_describe(ids)}; convert it with .long()")
    if ids.shape != (embeddings.shape[0],):
        raise ValueError(f"{expected}, got {_describe(ids)}")
    if ids.device != embeddings.device:
        raise ValueError(
            f"{name} is on {ids.device} but {embeddings_name} is on {embeddings.device}; move one of them"
        )
    return ids.long()


def check_batch(
    images: object,
    captions: object,
    image_ids: object = None,
    caption_ids: object = None,
    num_pairs: object = None,
    scores: object = None,
) -> Batch | ScoreMatrix:
    """Returns the checked batch; raises TypeError or ValueError naming the offending argument."""
    if scores is not None:
        if images is not None or captions is not None:
            raise TypeError("pass either images and captions or scores, not both")
        _check_matrix("scores", scores, "[N, M]")
        sides = ("scores", scores, "scores.T", scores.T)
        return ScoreMatrix(scores, *_check_pairs(image_ids, caption_ids, num_pairs, *sides))
    _check_matrix("images", images)
    _check_matrix("captions", captions)
    if images.shape[1] != captions.shape[1]:
        raise ValueError(
            f"images and captions must share D, got {list(images.shape)} and {list(captions.shape)}"
        )
    if images.device != captions.device:
        raise ValueError(
            f"images are on {images.device} but captions are on {captions.device}; move one of them"
        )
    if images.dtype != captions.dtype:
        if not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"images are {images.dtype} but captions are {captions.dtype}; convert one of them"
            )
        # Autocast leaves each encoder's output in whatever dtype its last op prefers.
        dtype = torch.promote_types(images.dtype, captions.dtype)
        images, captions = images.to(dtype), captions.to(dtype)
    if captions is images:
        captions = captions.view_as(captions)  # torch.compile takes no tensor twice
    sides = ("images", images, "captions", captions)
    return Batch(images, captions, *_check_pairs(image_ids, caption_ids, num_pairs, *sides))


def _check_pairs(
    image_ids: object,
    caption_ids: object,
    num_pairs: object,
    images_name: str,
    images: Tensor,
    captions_name: str,
    captions: Tensor,
) -> tuple[Tensor | None, Tensor | None, int]:
    if (image_ids is None) != (caption_ids is None):
        missing = "caption_ids" if caption_ids is None else "image_ids"
        raise ValueError(
            f"{missing} is missing: pass ids for both sides or for neither"
            " (for a batch of pairs, the same tensor twice)"
        )
    if image_ids is not None:
        image_ids = _check_ids("image_ids", image_ids, images_name, images)
        caption_ids = _check_ids("caption_ids", caption_ids, captions_name, captions)
        if caption_ids is image_ids:
            caption_ids = caption_ids.view_as(caption_ids)  # torch.compile takes no tensor twice
    return image_ids, caption_ids, _check_num_pairs(num_pairs, images, captions)


def _check_num_pairs(num_pairs: object, images: Tensor, captions: Tensor) -> int:
    rows, columns = images.shape[0], captions.shape[0]
    if num_pairs is None:
        if rows != columns:
            raise ValueError(
                f"num_pairs must be given when the numbers of images ({rows}) and captions ({columns})"
                " differ: image k and caption k are a pair for k < num_pairs"
            )
        return rows
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, (int, torch.SymInt)):
        raise TypeError(f"num_pairs must be an int, got {_describe(num_pairs)}")
    if not 1 <= num_pairs <= min(rows, columns):
        raise ValueError(
            f"num_pairs must be between 1 and {min(rows, columns)}, the smaller number of rows of"
            f" images ({rows}) and captions ({columns}); got {num_pairs}"
        )
    return num_pairs


def check_temperature(temperature: object, device: torch.device) -> float | Tensor:
    """Returns the temperature as a positive float or as a 0-d tensor.

    The value of a CUDA tensor is not looked at, since that would stall the GPU and break graph
    capture; neither is that of any tensor under torch.compile. `inverse_temperature` turns a
    non-positive one into NaN.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise TypeError(
                f"temperature must be a float or a 0-d floating tensor, got {_describe(temperature)}"
            )
        if temperature.device != device and temperature.device.type != "cpu":
            raise ValueError(
                f"temperature is on {temperature.device} but images are on {device}; move one of them"
            )
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_positive("temperature", temperature.detach().item())
        return temperature.reshape(())
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature must be a float or a 0-d floating tensor, got {_describe(temperature)}"
        )
    _check_positive("temperature", temperature)
    return float(temperature)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def inverse_temperature(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """1 / temperature; a tensor comes back 0-d on `like`'s device, in the dtype of the scores."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    dtype = torch.promote_types(like.dtype, torch.float32)
    temperature = temperature.to(like.device, dtype)
    return torch.where(temperature > 0, temperature, torch.nan).reciprocal()


def check_margin(margin: object) -> float:
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"margin must be a float, got {_describe(margin)}")
    if not -math.inf < margin < math.inf:  # torch.compile traces comparisons, not math.isfinite
        raise ValueError(f"margin must be finite, got {margin}")
    return float(margin)


def check_direction_weights(weights: object) -> tuple[float, float]:
    expected = "direction_weights must be two finite numbers >= 0: (image anchors, caption anchors)"
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise TypeError(f"{expected}, got {_describe(weights)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{expected}, got {_describe(weights)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"{expected}, got {weights!r}")
    return float(weights[0]), float(weights[1])


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
