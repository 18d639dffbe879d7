"""Builds tests/hopper_model.cpp, the Hopper kernel in plain C++, with the C++ compiler at hand."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("hopper_model.cpp")
HEADERS = SOURCE.parent.parent / "csrc" / "cuda"


def why_missing() -> str | None:
    if not HEADERS.exists():
        return "the kernels' sources are not beside the tests"
    return None if compiler() else "no C++ compiler"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.so")
        flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler(), *flags, SOURCE, "-o", path], check=True)
        model = ctypes.CDLL(str(path))
    model.key_of.restype = ctypes.c_uint64
    model.key_of.argtypes = [ctypes.c_float, ctypes.c_int]
    model.key_score.restype = ctypes.c_float
    model.key_score.argtypes = [ctypes.c_uint64]
    model.key_index.restype = ctypes.c_int64
    model.key_index.argtypes = [ctypes.c_uint64]
    model.poisoned.argtypes = [ctypes.c_float, ctypes.c_float, ctypes.c_int64]
    return model


def constant(name: str) -> int:
    value = library().constant(name.encode())
    assert value > 0
    return value


def _pointer(x: Tensor | None):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


class Batch:
    """A batch as the model takes it. The tensors must outlive the calls."""

    def __init__(self, images: Tensor, captions: Tensor, ids, num_pairs: int, clusters: int = 3):
        self.images, self.captions = (x.float().contiguous() for x in (images, captions))
        self.ids = ids
        self.num_pairs, self.clusters = num_pairs, clusters

    def _arguments(self, workspace_bytes: int):
        images, captions = self.images, self.captions
        return (
            _pointer(images), ctypes.c_int64(len(images)),
            _pointer(captions), ctypes.c_int64(len(captions)),
            ctypes.c_int64(images.shape[1]), ctypes.c_int64(self.num_pairs),
            *map(_pointer, self.ids), ctypes.c_int64(workspace_bytes), ctypes.c_int(self.clusters),
        )  # fmt: skip

    def hardest(self) -> tuple[Tensor, Tensor]:
        score = torch.empty(2, self.num_pairs)
        index = torch.empty(2, self.num_pairs, dtype=torch.int64)
        library().model_hardest(*self._arguments(1), _pointer(score), _pointer(index))
        return score, index

    def logsumexp(self, scale: float, workspace_bytes: int) -> tuple[Tensor, bool]:
        result = torch.empty(2, self.num_pairs, dtype=torch.float64)
        squares = [x.square().sum(1).max().item() for x in (self.images, self.captions)]
        one_exp = library().model_logsumexp(
            *self._arguments(workspace_bytes), ctypes.c_double(scale),
            *map(ctypes.c_float, squares), _pointer(result),
        )  # fmt: skip
        return result, bool(one_exp)

    def hinge(self, positive: Tensor, margin: float, workspace_bytes: int) -> tuple[Tensor, Tensor]:
        total = torch.empty(2, self.num_pairs)
        active = torch.empty(2, self.num_pairs, dtype=torch.int64)
        positive = positive.float().contiguous()
        library().model_hinge(
            *self._arguments(workspace_bytes), _pointer(positive), ctypes.c_float(margin),
            _pointer(total), _pointer(active),
        )  # fmt: skip
        return total, active
