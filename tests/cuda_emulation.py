"""The small-batch loss of csrc/cuda on the CPU: builds cuda_emulation.cpp and calls it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
KINDS = ("all_negatives", "hardest", "hardest_smooth", "hinge_sum")
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
                "d_images", "d_captions", "loss", "d_scale", "positive", "hardest", "index"
            )
        ),
    ]  # fmt: skip


class Result(NamedTuple):
    loss: Tensor
    d_images: Tensor
    d_captions: Tensor
    d_scale: Tensor
    positive: Tensor
    hardest: Tensor
    index: Tensor


def why_not() -> str | None:
    """Why it cannot be built here."""
    if not (ROOT / "csrc").exists():
        return "needs a checkout, not an installed package"
    compiler = os.environ.get("CXX") or "c++"
    return None if shutil.which(compiler.split()[0]) else f"no C++ compiler {compiler!r}"


def build(directory: Path) -> ctypes.CDLL:
    library = directory / "cuda_emulation.so"
    command = [
        *(os.environ.get("CXX") or "c++").split(),
        "-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas",
        f"-I{ROOT / 'csrc'}",
        "-isystem", str(Path(torch.__file__).parent / "include"),
        str(Path(__file__).with_name("cuda_emulation.cpp")),
        "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def small_loss(
    library: ctypes.CDLL,
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
    """torch.ops.fused_vse_cuda.small_loss (csrc/ops.h), on a GPU that runs `resident` blocks at a time."""
    n, d, m, k = *images.shape, captions.shape[0], num_pairs
    images, captions = images.contiguous(), captions.contiguous()
    if cluster is None:
        cluster = library.preferred_cluster_of(max(n, m), d, images.element_size())
    largest = max(weights) or 1.0
    result = Result(
        torch.empty(()),
        torch.empty_like(images, dtype=torch.float32),
        torch.empty_like(captions, dtype=torch.float32),
        torch.empty(()),
        torch.empty(k),
        torch.empty(2, k),
        torch.empty(2, k, dtype=torch.int64),
    )
    pointer = lambda x: None if x is None else x.data_ptr()  # noqa: E731
    arguments = Arguments(
        *(pointer(x) for x in (images, captions, *ids)),
        *(n, m, d, k, KINDS.index(kind), scale, margin, pointer(scale_tensor)),
        *(weights[0] / largest, weights[1] / largest, largest / k if mean else largest),
        *(*need, cluster, resident, aligned, backwards),
        *(x.data_ptr() for x in (result.d_images, result.d_captions, result.loss, *result[3:])),
    )
    library.small_loss(ctypes.byref(arguments), BITS[images.dtype])
    return result
