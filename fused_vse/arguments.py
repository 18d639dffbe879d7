"""Checks of the arguments that every public function shares: what passes here never fails in a kernel."""

import math
import numbers
import reprlib

import numpy
import torch
from torch import Tensor

from .normalization import l2_normalize
from .ops import DOT, ORDER, Batch, accumulation_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Far beyond every use. Below, even float64 rounds logits of 1/τ by more than a gradient can bear, silently;
# above, float32 would no longer tell an excluded entry from a score. The same range holds for reciprocals.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-10, 1e10
SIMILARITIES = {"dot": DOT, "order": ORDER}
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shorten(value: object) -> str:
    """repr(value) on one line of at most 80 characters, whatever it is."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python writes no int of more than 4300 digits
        return "an int too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


def describe(value: object) -> str:
    """What an argument was, for the message of an error."""
    if isinstance(value, Tensor):
        if value.is_nested:  # has no shape
            return "a nested tensor"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, numpy.ndarray):
        return f"a {value.dtype} numpy array of shape {list(value.shape)}"
    return f"{shorten(value)} ({type(value).__name__})"


def check_dense(expected: str, tensor: Tensor) -> None:
    """Raises TypeError for a nested or sparse tensor, of which no other property may be looked at."""
    if tensor.is_nested:
        raise TypeError(f"{expected}, got a nested tensor; pad it with .to_padded_tensor()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{expected}, got layout {tensor.layout}; convert it with .to_dense()")


def check_matrix(name: str, value: object, shape: str = "[rows, D]") -> None:
    expected = f"{name} must be a floating-point tensor of shape {shape}"
    if not isinstance(value, Tensor):
        remedy = "" if value is None else "; wrap it in torch.tensor()"
        raise TypeError(f"{expected}, got {describe(value)}{remedy}")
    check_dense(expected, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{expected}, got {describe(value)}; convert it with .float()")
    if value.dim() != 2:
        raise ValueError(f"{expected}, got {describe(value)}")
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name} is empty: shape {list(value.shape)}; skip empty batches")


def check_ids(name: str, ids: object, embeddings_name: str, embeddings: Tensor) -> Tensor:
    # Without the number of rows: torch.compile would make a constant of it, and compile anew for each.
    expected = f"{name} must hold one integer for each row of {embeddings_name}"
    if not isinstance(ids, Tensor):
        raise TypeError(f"{expected}, got {describe(ids)}; wrap it in torch.tensor()")
    check_dense(expected, ids)
    if ids.dtype not in INTEGER:
        raise TypeError(f"{expected}, got {describe(ids)}; convert it with .long()")
    if ids.shape != (embeddings.shape[0],):
        raise ValueError(f"{expected}, {embeddings.shape[0]} in all, got {describe(ids)}")
    if ids.device != embeddings.device:
        raise ValueError(
            f"{name} is on {ids.device} but {embeddings_name} is on {embeddings.device}; move one of them"
        )
    return ids.long()


def check_comparable(
    images: object, captions: object, names: tuple[str, str] = ("images", "captions")
) -> None:
    """Raises unless both are embeddings of one space; `names` are those that the caller's user knows."""
    check_matrix(names[0], images)
    check_matrix(names[1], captions)
    one, other = names
    if images.shape[1] != captions.shape[1]:
        raise ValueError(
            f"{one} and {other} must share D, got {list(images.shape)} and {list(captions.shape)}"
        )
    if images.device != captions.device:
        raise ValueError(
            f"{one} are on {images.device} but {other} are on {captions.device}; move one of them"
        )


def check_embeddings(
    images: object, captions: object, names: tuple[str, str] = ("images", "captions")
) -> tuple[Tensor, Tensor]:
    """`check_comparable`; returns both in one dtype."""
    check_comparable(images, captions, names)
    if images.dtype != captions.dtype:
        if not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"{names[0]} are {images.dtype} but {names[1]} are {captions.dtype}; convert one of them"
            )
        # Autocast leaves each encoder's output in whatever dtype its last op prefers.
        dtypes = {images.dtype, captions.dtype}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        images, captions = images.to(dtype), captions.to(dtype)
    return images, captions


def check_batch(
    images: object,
    captions: object,
    scores: object,
    image_ids: object,
    caption_ids: object,
    num_pairs: object,
    similarity: object,
    normalize: object,
    least_pairs: int = 1,
) -> Batch:
    """Returns the checked batch of one process, normalised if asked to.

    Raises:
        TypeError, ValueError: names the offending argument.
    """
    if isinstance(similarity, str) and similarity == "cosine":
        raise ValueError(
            "similarity must be one of 'dot', 'order'; got 'cosine', which is 'dot' with normalize=True"
        )
    check_choice("similarity", similarity, tuple(SIMILARITIES))
    normalize = check_flag("normalize", normalize)
    if scores is not None:
        if images is not None or captions is not None:
            raise TypeError("pass either images and captions or scores, not both")
        check_matrix("scores", scores, "[N, M]")
        sides = ("scores", scores, "scores.T", scores.T)
        if normalize or similarity != "dot":
            raise ValueError(
                "normalize and similarity do not apply to given scores; leave them out"
            )
        images = scores
    else:
        missing = [name for name, x in (("images", images), ("captions", captions)) if x is None]
        if missing:
            raise TypeError(
                f"{' and '.join(missing)} are missing: pass both embeddings, or a score matrix as scores="
            )
        images, captions = check_embeddings(images, captions)
        if captions is images:
            captions = captions.view_as(captions)  # torch.compile takes no tensor twice
        if normalize:
            images, captions = l2_normalize(images), l2_normalize(captions)
        sides = ("images", images, "captions", captions)
    *ids, k = _check_pairs(image_ids, caption_ids, num_pairs, *sides, least_pairs)
    return Batch(images, captions, *ids, k, k, 0, 0, k, SIMILARITIES[similarity])


def _check_pairs(
    image_ids: object,
    caption_ids: object,
    num_pairs: object,
    images_name: str,
    images: Tensor,
    captions_name: str,
    captions: Tensor,
    least_pairs: int,
) -> tuple[Tensor | None, Tensor | None, int]:
    if (image_ids is None) != (caption_ids is None):
        missing = "caption_ids" if caption_ids is None else "image_ids"
        raise ValueError(
            f"{missing} is missing: pass ids for both sides or for neither"
            " (for a batch of pairs, the same tensor twice)"
        )
    if image_ids is not None:
        image_ids = check_ids("image_ids", image_ids, images_name, images)
        caption_ids = check_ids("caption_ids", caption_ids, captions_name, captions)
        if caption_ids is image_ids:
            caption_ids = caption_ids.view_as(caption_ids)  # torch.compile takes no tensor twice
    return image_ids, caption_ids, _check_num_pairs(num_pairs, images, captions, least_pairs)


def _check_num_pairs(num_pairs: object, images: Tensor, captions: Tensor, least: int) -> int:
    rows, columns = images.shape[0], captions.shape[0]
    if num_pairs is None:
        if rows != columns:
            raise ValueError(
                f"num_pairs must be given when the numbers of images ({rows}) and captions ({columns})"
                " differ: image k and caption k are a pair for k < num_pairs"
            )
        return rows
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"num_pairs must be an int, got {describe(num_pairs)}")
    if not least <= num_pairs <= min(rows, columns):
        raise ValueError(
            f"num_pairs must be between {least} and {min(rows, columns)}, the smaller number of rows of"
            f" images ({rows}) and captions ({columns}); got {shorten(num_pairs)}"
        )
    return num_pairs if isinstance(num_pairs, (int, torch.SymInt)) else int(num_pairs)


def check_temperature(
    temperature: object, device: torch.device, name: str = "temperature"
) -> float | Tensor:
    """Returns the temperature, or its reciprocal called `name`, as a positive float or a 0-d tensor.

    The value of a CUDA tensor is not looked at, since that would stall the GPU and break graph
    capture; neither is that of any tensor under torch.compile. `inverse_temperature` turns one that is
    out of range into NaN.
    """
    expected = f"{name} must be a float or a 0-d floating tensor"
    if not isinstance(temperature, Tensor):
        value = _check_number(expected, temperature)
        _check_range(name, value)
        return value
    temperature = _check_scalar(expected, name, temperature, device)
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(name, temperature.detach().item())
    return temperature


def _check_scalar(expected: str, name: str, value: Tensor, device: torch.device) -> Tensor:
    """0-d"""
    check_dense(expected, value)
    if value.numel() != 1 or value.dtype not in FLOATING:
        raise TypeError(f"{expected}, got {describe(value)}")
    if value.device != device and value.device.type != "cpu":
        raise ValueError(
            f"{name} is on {value.device} but images are on {device}; move one of them"
        )
    return value.reshape(())


def _check_number(expected: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        remedy = "; convert it with float()" if hasattr(value, "__float__") else ""
        raise TypeError(f"{expected}, got {describe(value)}{remedy}")
    try:
        return float(value)
    except OverflowError:  # an int such as 10**400
        return math.inf if value > 0 else -math.inf


def _check_range(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise ValueError(
            f"{name} must be between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}, beyond which rounding"
            f" would decide; got {value}"
        )


def inverse_temperature(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """1 / temperature; a tensor comes back 0-d on `like`'s device, in the dtype of the scores."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    temperature = temperature.to(like.device, accumulation_dtype(like.dtype))
    in_range = (temperature >= MIN_TEMPERATURE) & (temperature <= MAX_TEMPERATURE)
    return torch.where(in_range, temperature, torch.nan).reciprocal()


def check_finite(name: str, value: object, like: Tensor, least: float = -math.inf) -> float:
    """A number at least `least`, finite in the dtype of the scores."""
    value = _check_number(f"{name} must be a float", value)
    if not -_largest(like) <= value <= _largest(like):
        raise ValueError(
            f"{name} must be finite in {accumulation_dtype(like.dtype)}, the dtype of the scores; got {value}"
        )
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return value


def check_bias(bias: object, like: Tensor, name: str = "bias") -> float | Tensor:
    """A finite number, or a 0-d tensor on `like`'s device, whose value is only looked at on the CPU."""
    expected = f"{name} must be a float or a 0-d floating tensor"
    if not isinstance(bias, Tensor):
        return check_finite(name, _check_number(expected, bias), like)
    bias = _check_scalar(expected, name, bias, like.device)
    if bias.device.type == "cpu" and not torch.compiler.is_compiling():
        check_finite(name, bias.detach().item(), like)
    return bias.to(like.device, accumulation_dtype(like.dtype))


def _largest(like: Tensor) -> float:
    return torch.finfo(accumulation_dtype(like.dtype)).max


def check_direction_weights(weights: object, like: Tensor) -> tuple[float, float]:
    expected = "direction_weights must be two finite numbers >= 0: (image anchors, caption anchors)"
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise TypeError(f"{expected}, got {describe(weights)}")
    values = _check_number(expected, weights[0]), _check_number(expected, weights[1])
    if not all(0 <= value <= _largest(like) for value in values):
        raise ValueError(f"{expected}, got {shorten(weights)}")
    return values


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    expected = f"{name} must be one of {', '.join(map(repr, choices))}"
    check_string(expected, value)
    if value not in choices:
        raise ValueError(f"{expected}; got {shorten(value)}")
    return value


def check_string(expected: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{expected}; got {describe(value)}")


def check_flag(name: str, value: object) -> bool:
    """Also takes 0 and 1; anything else that Python calls true or false is likely a mistake."""
    if not isinstance(value, (bool, int, numpy.bool_)) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)
