"""Reads vsepp's precomputed layout: {train,dev,test}_ims.npy and {train,dev,test}_caps.txt.

Line 5i + k of a caption file (counted from 0) is caption k of image i. The features hold one row
for each image, or the same row five times.
"""

import warnings
from pathlib import Path

import numpy
import torch

from .data import CAPTIONS_PER_IMAGE, Dataset, InputError, Split
from .vocabulary import tokenize

DTYPES = ("float16", "float32", "float64")
LONGEST_CAPTION = 1000  # words: the GRU of a batch takes memory and time by its longest caption


def load_precomp(directory: Path) -> Dataset:
    """Returns the three splits; raises InputError naming the file and the row or line."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    splits = {name: _load_split(directory, name) for name in ("train", "dev", "test")}
    size = splits["train"].features.shape[1]
    for name in ("dev", "test"):
        if splits[name].features.shape[1] != size:
            raise InputError(
                f"{directory / f'{name}_ims.npy'}: {splits[name].features.shape[1]} features in a"
                f" row, but train_ims.npy has {size}"
            )
    return Dataset(**splits)


def _load_split(directory: Path, name: str) -> Split:
    features_path, captions_path = directory / f"{name}_ims.npy", directory / f"{name}_caps.txt"
    captions = _read_captions(captions_path)
    features = _read_features(features_path)
    rows, lines = len(features), len(captions)
    if rows == lines and lines % CAPTIONS_PER_IMAGE == 0:
        features = _one_row_per_image(features_path, features)
    elif rows * CAPTIONS_PER_IMAGE != lines:
        raise InputError(
            f"{features_path}: {rows} rows do not match the {lines} lines of {captions_path.name};"
            f" expected {CAPTIONS_PER_IMAGE} lines for each row, or as many rows as lines with each"
            f" row {CAPTIONS_PER_IMAGE} times"
        )
    owners = torch.arange(lines) // CAPTIONS_PER_IMAGE
    claims = [" ".join(tokenize(caption)) for caption in captions]
    facts = [
        set(claims[first : first + CAPTIONS_PER_IMAGE])
        for first in range(0, lines, CAPTIONS_PER_IMAGE)
    ]
    return Split(torch.from_numpy(features), captions, owners, claims, facts)


def _read_features(path: Path) -> numpy.ndarray:
    """[rows, F] float32, finite."""
    try:
        # mmap_mode lets NumPy compare the size of the file with its header before it allocates.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            features = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - NumPy evaluates the header, which may fail in any way
        reason = str(error).splitlines()[0] if str(error) else "empty file"
        raise InputError(f"{path}: truncated, or not an .npy file of numbers: {reason}") from None
    if not isinstance(features, numpy.ndarray):
        raise InputError(f"{path}: an .npz archive; expected a single array in .npy format")
    if features.dtype.name not in DTYPES:
        raise InputError(f"{path}: dtype {features.dtype}; expected one of {', '.join(DTYPES)}")
    if features.ndim != 2 or features.size == 0:
        raise InputError(f"{path}: shape {list(features.shape)}; expected [rows, features]")
    with numpy.errstate(over="ignore"):  # too large for float32 becomes inf, reported below
        features = numpy.array(features, dtype=numpy.float32, order="C")
    bad = numpy.argwhere(~numpy.isfinite(features))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{path}: row {row}, column {column} (counted from 0) is {features[row, column]} in"
            f" float32; {len(bad)} such values"
        )
    return features


def _one_row_per_image(path: Path, features: numpy.ndarray) -> numpy.ndarray:
    groups = features.reshape(-1, CAPTIONS_PER_IMAGE, features.shape[1])
    odd = numpy.argwhere((groups != groups[:, :1]).any(2))
    if len(odd):
        group, row = odd[0]
        first = group * CAPTIONS_PER_IMAGE
        raise InputError(
            f"{path}: row {first + row} (counted from 0) differs from row {first}; with as many"
            f" rows as captions, every image's row must be there {CAPTIONS_PER_IMAGE} times"
        )
    return numpy.ascontiguousarray(groups[:, 0])


def _read_captions(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8 ({error.reason})") from None
    captions = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in captions:
        raise InputError(f"{path}: line {captions.index('') + 1} is an empty caption")
    for line, caption in enumerate(captions, 1):
        words = len(tokenize(caption))
        if words > LONGEST_CAPTION:
            raise InputError(f"{path}: line {line} has {words} words; at most {LONGEST_CAPTION}")
    return captions
