"""The small-batch loss of csrc/cuda on the CPU: builds cuda_emulation.cpp, calls it, gives torch its ops."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_vse.backends import cuda, fakes

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


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "cuda_emulation.so")
        command = [
            *(os.environ.get("CXX") or "c++").split(),
            "-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror",
            "-Wno-unknown-pragmas",
            f"-I{ROOT / 'csrc'}",
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
    """torch.ops.fused_vse_cuda.small_loss (csrc/ops.h), on a GPU that runs `resident` blocks at a time."""
    n, d, m, k = *images.shape, captions.shape[0], num_pairs
    images, captions = images.contiguous(), captions.contiguous()
    if cluster is None:
        cluster = library().preferred_cluster_of(max(n, m), d, images.element_size())
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
    library().small_loss(ctypes.byref(arguments), BITS[images.dtype])
    return result


def schema(name: str) -> str:
    """As csrc/ops.h has it, its string literals put together."""
    text = (ROOT / "csrc" / "ops.h").read_text()
    literals = re.search(rf"#define {name}_SCHEMA((?:[^\n]*\\\n)*[^\n]*)", text)[1]
    return "".join(re.findall(r'"([^"]*)"', literals))


def register() -> torch.library.Library:
    """The ops of fused_vse_cuda for CPU tensors; they last as long as what is returned."""
    namespace = torch.library.Library(cuda.NAMESPACE, "FRAGMENT")
    if not hasattr(torch.ops.fused_vse_cuda, "small_loss"):  # the library was not built
        for name in ("SMALL_LOSS", "SCALE_GRADIENTS", "L2_NORMALIZE", "L2_NORMALIZE_BACKWARD"):
            namespace.define(schema(name))
        fakes.register_normalize_fakes(cuda.NAMESPACE)
        fakes.register_small_loss_fakes(cuda.NAMESPACE)
    for name, op in _OPS.items():
        namespace.impl(name, op, "CPU")
    return namespace


def _small_loss(
    images, captions, image_ids, caption_ids, num_pairs, kind, scale, scale_tensor, margin,
    image_weight, caption_weight, mean, need_images, need_captions,
):  # fmt: skip
    loss, d_images, d_captions, *rest = small_loss(
        images, captions, (image_ids, caption_ids), num_pairs, KINDS[kind], scale, margin,
        (image_weight, caption_weight), mean, scale_tensor, (need_images, need_captions),
    )  # fmt: skip
    d_images = d_images if need_images else d_images.new_empty(0)
    d_captions = d_captions if need_captions else d_captions.new_empty(0)
    return loss, d_images, d_captions, *rest


def _scale_gradients(upstream, d_images, d_captions, d_scale, like):
    scaled = [(upstream * x).to(like.dtype) for x in (d_images, d_captions)]
    return *scaled, upstream * d_scale


def _l2_normalize(rows):
    rows = rows.contiguous()
    normalized, inverse_norm = torch.empty_like(rows), torch.empty(len(rows))
    outputs = (ctypes.c_void_p(x.data_ptr()) for x in (normalized, inverse_norm))
    library().l2_normalize(
        ctypes.c_void_p(rows.data_ptr()), *rows.shape, BITS[rows.dtype], *outputs
    )
    return normalized, inverse_norm


def _l2_normalize_backward(d_normalized, normalized, inverse_norm):
    d_rows, d_normalized = torch.empty_like(normalized), d_normalized.contiguous()
    inputs = (ctypes.c_void_p(x.data_ptr()) for x in (d_normalized, normalized, inverse_norm))
    library().l2_normalize_backward(
        *inputs, *normalized.shape, BITS[normalized.dtype], ctypes.c_void_p(d_rows.data_ptr())
    )
    return d_rows


_OPS = {
    "small_loss": _small_loss,
    "scale_gradients": _scale_gradients,
    "l2_normalize": _l2_normalize,
    "l2_normalize_backward": _l2_normalize_backward,
}
