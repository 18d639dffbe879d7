"""Host side of a walk over the tiles of S: operands, rectangles, workspace and launches."""

import ctypes
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...arguments import accumulation_dtype
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


def triton_accumulation(dtype: torch.dtype):
    return _TRITON_DTYPE[accumulation_dtype(dtype)]


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

    family: str  # of ops: "dot", "order" or "scores"
    images: Tensor  # [N, D], unit inner stride; of the family "scores" S itself, with any strides
    captions: Tensor  # [M, D], alike; S^t
    operands: tuple[
        Tensor, Tensor
    ]  # the same as the tiles take them: `dot_operand`, `order_operand`
    image_ids: Tensor | None
    caption_ids: Tensor | None
    num_pairs: int
    tiles: configs.Tiles
    source: str  # see tiles.score_tile
    precision: str

    def arguments(self) -> dict:
        """What every kernel takes that walks over S."""
        tiles = self.tiles
        images, captions = self.operands
        strides = {"stride_images": images.stride(0), "stride_captions": captions.stride(0)}
        num_dimensions = images.shape[0 if self.source == "order" else 1]
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
            "SOURCE": self.source,
            "PRECISION": self.precision,
            "TMA": tiles.tma,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "GROUP": tiles.group,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "maxnreg": tiles.registers,
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
        programs = device.multiprocessors * self.tiles.programs_per_sm
        return (min(num_tiles, programs, rows.SURVEY_PROGRAMS.value),)

    def num_tiles(self, rectangle: Rectangle) -> int:
        return self.row_tiles(rectangle) * self.column_tiles(rectangle)

    def row_tiles(self, rectangle: Rectangle) -> int:
        return triton.cdiv(rectangle.row_stop - rectangle.row_start, self.tiles.block_m)

    def column_tiles(self, rectangle: Rectangle) -> int:
        return triton.cdiv(rectangle.num_columns, self.tiles.block_n)

    def launch(self, kernel, rectangle: Rectangle, scores: Tensor | None, **arguments) -> None:
        """`scores`: [rows of the rectangle, >= num_columns], read or, if SAVE, written."""
        stride_rows, stride_columns = (0, 1) if scores is None else scores.stride()
        kernel[self.grid(rectangle)](
            **self.arguments(),
            scores_ptr=scores,
            stride_score_rows=stride_rows,
            stride_score_columns=stride_columns,
            row_start=rectangle.row_start,
            row_stop=rectangle.row_stop,
            num_columns=rectangle.num_columns,
            **arguments,
        )


def plan(
    family, images, captions, image_ids, caption_ids, num_pairs, saved_scores: bool = False
) -> Walk:
    """`saved_scores`: S is at hand from the forward pass."""
    source, kind, precision = _source(family, images.dtype)
    if saved_scores:
        source = kind = "stored"
    tiles = configs.tiles_for(kind, len(images), len(captions), device_of(images.device))
    if family != "scores":
        images, captions = unit_stride(images), unit_stride(captions)
    operands = images, captions
    if source == "dot":
        operands = dot_operand(images, tiles), dot_operand(captions, tiles)
    elif source == "order":
        operands = (
            order_operand(images, tiles, tiles.block_m),
            order_operand(captions, tiles, tiles.block_n),
        )
    return Walk(
        family,
        images,
        captions,
        operands,
        None if image_ids is None else image_ids.contiguous(),
        None if caption_ids is None else caption_ids.contiguous(),
        num_pairs,
        tiles,
        source,
        precision,
    )


def plan_scores(scores, image_ids, caption_ids, num_pairs) -> Walk:
    scores = scores.detach()
    return plan("scores", scores, scores.t(), image_ids, caption_ids, num_pairs)


def _source(family: str, dtype: torch.dtype) -> tuple[str, str, str]:
    """Source of the scores, kind of tiles and tl.dot precision.

    The dot products of float32 at "highest" and of float64 come from torch.mm.
    """
    is_double = dtype == torch.float64
    if family == "scores":
        return "given", "given" if dtype.itemsize == 2 else "stored", "ieee"
    if family == "order":
        return "order", "order_float64" if is_double else "order", "ieee"
    if dtype in (torch.float16, torch.bfloat16):
        return "dot", "bf16", "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "dot", "tf32", "tf32"
    return "stored", "stored", "ieee"


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


def order_operand(embeddings: Tensor, tiles: configs.Tiles, block: int) -> Tensor:
    """[D, rows] in the accumulation type, with zeros up to a multiple of BLOCK_K and for a tile that
    begins at the last row."""
    num_rows, num_dimensions = embeddings.shape
    height = triton.cdiv(num_dimensions, tiles.block_k) * tiles.block_k
    width = triton.cdiv(num_rows + block, 16) * 16
    transposed = embeddings.new_zeros((height, width), dtype=accumulation_dtype(embeddings.dtype))
    transposed[:num_dimensions, :num_rows] = embeddings.t()
    return transposed


class Survey(NamedTuple):
    """Positive scores, and how large the input is: see rows.survey_kernel and rows.is_poisoned."""

    positive: Tensor  # [K]
    bounds: Tensor  # [4, SURVEY_PROGRAMS] int32 or int64; for given scores [SURVEY_PROGRAMS]
    num_bounds: int


def survey(walk: Walk) -> Survey:
    images, captions = walk.images, walk.captions
    dtype = accumulation_dtype(images.dtype)
    positive = images.new_empty(walk.num_pairs, dtype=dtype)
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    programs = rows.SURVEY_PROGRAMS.value
    if walk.family == "scores":
        # The bounds are for the walk to find: a pass over S of their own would be a second one.
        positive.copy_(images.diagonal()[: walk.num_pairs])
        return Survey(positive, images.new_zeros(programs, dtype=bits), programs)
    bounds = images.new_empty((4, programs), dtype=bits)
    blocks = row_blocks(images.shape[1])
    num_rows = max(len(images), len(captions))
    num_bounds = min(triton.cdiv(num_rows, blocks["BLOCK_R"]), programs)
    rows.survey_kernel[(num_bounds,)](
        images, captions, positive, bounds, images.stride(0), captions.stride(0),
        len(images), len(captions), walk.num_pairs, images.shape[1],
        ORDER=walk.family == "order", **blocks, ACC=triton_accumulation(dtype), num_warps=4,
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


def matrix_of(walk: Walk, scores: Tensor | None) -> Tensor | None:
    """[N, M], where S is given or kept between the passes."""
    if walk.family == "scores":
        return scores.detach()
    if scores is None or scores.numel() == 0:
        return None
    return scores.view(len(walk.images), -1)


def score_scratch(walk: Walk, pieces: list[Rectangle], at_hand: Tensor | None) -> Tensor | None:
    """Room for the scores of any one of the rectangles, where they are neither at hand nor in registers."""
    if walk.source != "stored" or at_hand is not None:
        return None
    return walk.images.new_empty(piece_entries(pieces))


def piece_scores(piece: Rectangle, at_hand: Tensor | None, scratch: Tensor | None) -> Tensor | None:
    """Where the kernels find or leave the scores of a rectangle: `at_hand` [N, M] if any, else scratch."""
    height, width = piece.row_stop - piece.row_start, piece.num_columns
    if at_hand is not None:
        return at_hand[piece.row_start : piece.row_stop, :width]
    return None if scratch is None else scratch[: height * width].view(height, width)


def multiply(walk: Walk, piece: Rectangle, scores: Tensor) -> None:
    """scores = S of the rectangle, by torch.mm."""
    images = walk.images[piece.row_start : piece.row_stop]
    product(images, walk.captions[: piece.num_columns].t(), scores)
