"""The small-batch loss of csrc/cuda on the CPU: builds cuda_emulation.cpp, calls it, gives torch its ops."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
KINDS = (
    "all_negatives",
    "hardest",
    "hardest_smooth",
    "hinge_sum",
)  # numbered as in fused_vse/ops.py
BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 0}  # 0: bfloat16


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("images", "captions", "image_ids", "caption_ids")),
        *((name, ctypes.c_int) for name in ("n", "m", "d", "k", "kind")),
        *((name, ctypes.c_float) for name in ("scale", "margin")),
        ("scale_tensor", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("image_weight", "caption_weight", "reduction")),
        *(
            (name, ctypes.c_int)
            for name in ("need_images", "need_captions", "cluster", "resident", "aligned", "backwards")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "d_images", "d_captions", "loss", "d_scale", "positive", "score", "index"
            )
        ),
    ]  # fmt: skip


class Result(NamedTuple):
    """What the op returns; the fields that follow `index` are what its backward op takes."""

    loss: Tensor
    positive: Tensor
    score: Tensor
    index: Tensor
    d_scale: Tensor
    d_images: Tensor
    d_captions: Tensor


def why_not() -> str | None:
    """Why it cannot be built here."""
    if not (ROOT / "csrc").exists():
        return "needs a checkout, not an installed package"
    compiler = os.environ.get("CXX") or "c++"
    return None if shutil.which(compiler.split()[0]) else f"no C++ compiler {compiler!r}"


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "cuda_emulation.so")
        command = [
            *(os.environ.get("CXX") or "c++").split(),
            "-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror",
            "-Wno-unknown-pragmas",
            f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}",
            "-isystem", str(Path(torch.__file__).parent / "include"),
            str(Path(__file__).with_name("cuda_emulation.cpp")),
            "-o", str(path),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        emulation = ctypes.CDLL(str(path))
    emulation.index_arithmetic_error.restype = ctypes.c_char_p
    return emulation


def small_loss(
    images: Tensor,
    captions: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    num_pairs: int,
    kind: str,
    scale: float = 1.0,
    margin: float = 0.0,
    weights: tuple[float, float] = (1.0, 1.0),
    mean: bool = True,
    scale_tensor: Tensor | None = None,
    need: tuple[bool, bool] = (True, True),
    cluster: int | None = None,
    resident: int = 132,
    aligned: bool = True,
    backwards: bool = False,
) -> Result:
    """torch.ops.fused_vse_cuda.small_loss, on a GPU that runs `resident` blocks at a time."""
    n, d, m, k = *images.shape, captions.shape[0], num_pairs
    images, captions = images.contiguous(), captions.contiguous()
    if cluster is None:
        cluster = library().preferred_cluster_of(max(n, m), d, images.element_size())
    largest = max(weights) or 1.0
    result = Result(
        torch.empty(()),
        torch.empty(k),
        torch.empty(2 * k),
        torch.empty(2 * k, dtype=torch.int64),
        torch.empty(()),
        torch.empty(images.shape if need[0] else 0),
        torch.empty(captions.shape if need[1] else 0),
    )
    pointer = lambda x: None if x is None else x.data_ptr()  # noqa: E731
    arguments = Arguments(
        *(pointer(x) for x in (images, captions, *ids)),
        *(n, m, d, k, KINDS.index(kind), scale, margin, pointer(scale_tensor)),
        *(weights[0] / largest, weights[1] / largest, largest / k if mean else largest),
        *(*need, cluster, resident, aligned, backwards),
        *(x.data_ptr() for x in (*result[5:], result.loss, result.d_scale, *result[1:4])),
    )
    library().small_loss(ctypes.byref(arguments), BITS[images.dtype])
    return result


def register() -> torch.library.Library:
    """The small-batch ops of fused_vse_cuda for CPU tensors; they last as long as what is returned."""
    library = torch.library.Library("fused_vse_cuda", "IMPL")
    library.impl("small_loss", _small_loss, "CPU")
    library.impl("small_loss_backward", _small_loss_backward, "CPU")
    return library


def _small_loss(
    images, captions, image_ids, caption_ids, num_pairs, kind, scale, scale_tensor, margin,
    image_weight, caption_weight, mean, need_images, need_captions,
):  # fmt: skip
    return small_loss(
        images, captions, (image_ids, caption_ids), num_pairs, KINDS[kind], scale, margin,
        (image_weight, caption_weight), mean, scale_tensor, (need_images, need_captions),
    )  # fmt: skip


def _small_loss_backward(
    images, captions, index, d_scale, saved_one, saved_two, upstream, need_images, need_captions
):
    gradients = [
        (upstream * x if need else x.new_empty(0)).to(images.dtype)
        for x, need in ((saved_one, need_images), (saved_two, need_captions))
    ]
    return *gradients, upstream * d_scale
