"""Host side of a walk over the tiles of S: operands, rectangles, workspace and launches."""

import ctypes
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, rows
from .tiles import INTERPRETED

_TRITON_DTYPE = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
_workspace_bytes = 256 << 20


def set_workspace_bytes(num_bytes: int) -> None:
    """Sets how much memory a pass may take for partial results, scores and gradients of S.

    The default of 256 MiB holds a gradient of 4096 rows at M = 32768 in 16 bits. Larger chunks write the
    float32 sum of d_captions less often (8 M D bytes a chunk). Values near 0 still work, with one tile
    row at a time. Not thread-safe; do not change it between a graph's capture and its warm-up.
    """
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int):
        raise TypeError(f"num_bytes must be an int, got {num_bytes!r}")
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")
    global _workspace_bytes
    _workspace_bytes = num_bytes


def workspace_bytes() -> int:
    return _workspace_bytes


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def triton_accumulation(dtype: torch.dtype):
    return _TRITON_DTYPE[accumulation(dtype)]


@functools.cache
def device_of(device: torch.device) -> configs.Device:
    if INTERPRETED.value:
        return configs.Device(multiprocessors=1, capability=0, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        raise RuntimeError(
            f"backend='triton' needs a GPU of compute capability 8.0 or higher, {device} is a"
            f" {properties.name} with {properties.major}.{properties.minor}; use backend='reference'"
        )
    return configs.Device(properties.multi_processor_count, properties.major)


class Rectangle(NamedTuple):
    row_start: int
    row_stop: int
    num_columns: int


class Walk(NamedTuple):
    """A batch as the kernels take it, and how they get the scores of a tile."""

    images: Tensor  # [N, D], unit inner stride
    captions: Tensor  # [M, D], alike
    operands: tuple[Tensor, Tensor]  # the same as tl.dot takes them, see `dot_operand`
    image_ids: Tensor | None
    caption_ids: Tensor | None
    num_pairs: int
    tiles: configs.Tiles
    stored: bool  # S comes from memory: by torch.mm, or saved by the forward pass
    precision: str

    def arguments(self) -> dict:
        """What every kernel takes that walks over S."""
        tiles = self.tiles
        images, captions = self.operands
        strides = {"stride_images": images.stride(0), "stride_captions": captions.stride(0)}
        num_dimensions = images.shape[1]
        if tiles.tma:
            images = TensorDescriptor.from_tensor(images, [tiles.block_m, tiles.block_k])
            captions = TensorDescriptor.from_tensor(captions, [tiles.block_n, tiles.block_k])
        return {
            "images_ptr": images,
            "captions_ptr": captions,
            "image_ids_ptr": self.image_ids,
            "caption_ids_ptr": self.caption_ids,
            **strides,
            "num_pairs": self.num_pairs,
            "D": num_dimensions,
            "STORED": self.stored,
            "PRECISION": self.precision,
            "TMA": tiles.tma,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "GROUP": tiles.group,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    def rectangles(self, bytes_per_row: int) -> Iterator[Rectangle]:
        """S without the scores among extra negatives, in pieces whose rows fit into the workspace."""
        num_images, num_captions, num_pairs = len(self.images), len(self.captions), self.num_pairs
        block = self.tiles.block_m
        height = max(workspace_bytes() // bytes_per_row // block * block, block)
        for first, last, num_columns in (
            (0, num_pairs, num_captions),
            (num_pairs, num_images, num_pairs),
        ):
            for row in range(first, last, height):
                yield Rectangle(row, min(row + height, last), num_columns)

    def grid(self, rectangle: Rectangle) -> tuple[int]:
        num_tiles = self.num_tiles(rectangle)
        device = device_of(self.images.device)
        return (min(num_tiles, device.multiprocessors * self.tiles.programs_per_sm),)

    def num_tiles(self, rectangle: Rectangle) -> int:
        return self.row_tiles(rectangle) * self.column_tiles(rectangle)

    def row_tiles(self, rectangle: Rectangle) -> int:
        return triton.cdiv(rectangle.row_stop - rectangle.row_start, self.tiles.block_m)

    def column_tiles(self, rectangle: Rectangle) -> int:
        return triton.cdiv(rectangle.num_columns, self.tiles.block_n)

    def launch(self, kernel, rectangle: Rectangle, scores: Tensor | None, **arguments) -> None:
        """`scores`: [rows of the rectangle, >= num_columns], read if `stored`, written if SAVE."""
        kernel[self.grid(rectangle)](
            **self.arguments(),
            scores_ptr=scores,
            stride_scores=0 if scores is None else scores.stride(0),
            row_start=rectangle.row_start,
            row_stop=rectangle.row_stop,
            num_columns=rectangle.num_columns,
            **arguments,
        )


def plan(images, captions, image_ids, caption_ids, num_pairs, saved_scores: bool = False) -> Walk:
    """`saved_scores`: S is at hand from the forward pass."""
    kind, precision = _kind(images.dtype)
    if saved_scores:
        kind = "stored"
    tiles = configs.tiles_for(kind, len(images), len(captions), device_of(images.device))
    images, captions = unit_stride(images), unit_stride(captions)
    operands = images, captions
    if kind != "stored":
        operands = dot_operand(images, tiles), dot_operand(captions, tiles)
    return Walk(
        images,
        captions,
        operands,
        None if image_ids is None else image_ids.contiguous(),
        None if caption_ids is None else caption_ids.contiguous(),
        num_pairs,
        tiles,
        kind == "stored",
        precision,
    )


def _kind(dtype: torch.dtype) -> tuple[str, str]:
    """Tile family and tl.dot precision. float32 at "highest" and float64 multiply in torch.mm."""
    if dtype in (torch.float16, torch.bfloat16):
        return "bf16", "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32", "tf32"
    return "stored", "ieee"


def unit_stride(embeddings: Tensor) -> Tensor:
    """Without autograd, and with neighbouring elements next to each other."""
    embeddings = embeddings.detach()
    if embeddings.stride(1) == 1 or embeddings.shape[1] == 1:
        return embeddings
    return embeddings.contiguous()


def dot_operand(embeddings: Tensor, tiles: configs.Tiles) -> Tensor:
    """The rows as wgmma, TMA and loads of 16 bytes need them: aligned, and no remainder along D.

    Where they are not so, a copy with zeros at the end is; TMA puts those zeros there itself.
    """
    num_rows, num_dimensions = embeddings.shape
    step = 16 // embeddings.element_size() if tiles.tma else 16
    remainder = num_dimensions % tiles.block_k != 0 and not tiles.tma
    pitch, element = embeddings.stride()
    # An expanded row has pitch 0, which a tensor descriptor cannot express.
    regular = element == 1 and pitch >= num_dimensions
    if regular and not remainder and pitch % step == 0 and embeddings.data_ptr() % 16 == 0:
        return embeddings
    width = triton.cdiv(num_dimensions, tiles.block_k) * tiles.block_k
    padded = embeddings.new_zeros(num_rows, width)
    padded[:, :num_dimensions] = embeddings
    return padded


class Survey(NamedTuple):
    """What one look at the rows of the embeddings tells: see rows.survey_kernel."""

    positive: Tensor  # [K]
    bounds: Tensor  # [4, SURVEY_PROGRAMS] int32 or int64
    num_bounds: int


def survey(walk: Walk) -> Survey:
    images, captions = walk.images, walk.captions
    dtype = accumulation(images.dtype)
    positive = images.new_empty(walk.num_pairs, dtype=dtype)
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    bounds = images.new_empty((4, rows.SURVEY_PROGRAMS.value), dtype=bits)
    blocks = row_blocks(images.shape[1])
    num_rows = max(len(images), len(captions))
    num_bounds = min(triton.cdiv(num_rows, blocks["BLOCK_R"]), rows.SURVEY_PROGRAMS.value)
    rows.survey_kernel[(num_bounds,)](
        images, captions, positive, bounds, images.stride(0), captions.stride(0),
        len(images), len(captions), walk.num_pairs, images.shape[1],
        **blocks, ACC=triton_accumulation(dtype), num_warps=4,
    )  # fmt: skip
    return Survey(positive, bounds, num_bounds)


def row_blocks(num_dimensions: int) -> dict[str, int]:
    """1024 elements a step: 8 a thread, which is one 16-byte load of 16-bit elements."""
    block_d = min(triton.next_power_of_2(num_dimensions), 1024)
    return {"BLOCK_R": 1024 // block_d, "BLOCK_D": block_d}


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b, in the precision of `out`: 16-bit operands may have a float32 result."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype != out.dtype and a.device.type == "cpu":
            a, b = a.to(out.dtype), b.to(out.dtype)
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
        elif accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def scale_arguments(scale: float, scale_tensor: Tensor | None) -> dict:
    """The scale in two parts, since Triton takes Python floats as float32."""
    rounded = ctypes.c_float(scale).value
    return {
        "scale": rounded,
        "scale_rest": scale - rounded,
        "scale_ptr": None if scale_tensor is None else scale_tensor.detach(),
    }


def piece_entries(pieces: list[Rectangle]) -> int:
    """How many scores the largest of the rectangles holds."""
    return max((p.row_stop - p.row_start) * p.num_columns for p in pieces)


def score_scratch(walk: Walk, pieces: list[Rectangle], saved: Tensor | None) -> Tensor | None:
    """Room for the scores of any one of the rectangles, where they are neither saved nor in registers."""
    if not walk.stored or saved is not None:
        return None
    return walk.images.new_empty(piece_entries(pieces))


def piece_scores(
    walk: Walk, piece: Rectangle, saved: Tensor | None, scratch: Tensor | None
) -> Tensor | None:
    """Where the kernels find or leave the scores of a rectangle: `saved` [N, M] if given, else scratch."""
    height, width = piece.row_stop - piece.row_start, piece.num_columns
    if saved is not None:
        return saved[piece.row_start : piece.row_stop, :width]
    return None if scratch is None else scratch[: height * width].view(height, width)


def multiply(walk: Walk, piece: Rectangle, scores: Tensor) -> None:
    """scores = S of the rectangle, by torch.mm."""
    images = walk.images[piece.row_start : piece.row_stop]
    product(images, walk.captions[: piece.num_columns].t(), scores)
