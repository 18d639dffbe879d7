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
    return None if x is None else x.data_ptr()


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("images", "captions", "image_ids", "caption_ids")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "n", "m", "d", "row_anchors", "column_anchors", "pair_row", "pair_column",
                "pair_count", "workspace_bytes", "clusters",
            )
        ),
    ]  # fmt: skip


class Model:
    """The statistics of an `ops.Batch`, with S in pieces for so many bytes of partial results."""

    def __init__(self, batch, workspace_bytes: int = 256 << 20, clusters: int = 3):
        self.tensors = [x.float().contiguous() for x in batch[:2]]
        self.anchors = batch.row_anchors + batch.column_anchors
        images, captions = self.tensors
        self.arguments = ctypes.byref(
            _Arguments(
                *map(_pointer, (*self.tensors, *batch[2:4])),
                *(len(images), len(captions), images.shape[1], *batch[4:9]),
                *(workspace_bytes, clusters),
            )
        )

    def _call(self, name: str, *arguments, results: tuple[torch.dtype, ...]):
        tensors = [torch.empty(self.anchors, dtype=dtype) for dtype in results]
        outputs = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        returned = getattr(library(), f"model_{name}")(self.arguments, *arguments, *outputs)
        return *tensors, returned

    def hardest(self) -> tuple[Tensor, Tensor]:
        return self._call("hardest", results=(torch.float32, torch.int64))[:2]

    def logsumexp(self, scale: float) -> tuple[Tensor, Tensor, int]:
        """reference, log_sum, and whether it took one exponential (-1: the scale is none)."""
        squares = [x.square().sum(1).max().item() for x in self.tensors]
        options = ctypes.c_double(scale), *map(ctypes.c_float, squares)
        return self._call("logsumexp", *options, results=(torch.float32, torch.float64))

    def hinge(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        threshold = threshold.float().contiguous()
        pointer = ctypes.c_void_p(threshold.data_ptr())
        return self._call("hinge", pointer, results=(torch.float32, torch.int64))[:2]
