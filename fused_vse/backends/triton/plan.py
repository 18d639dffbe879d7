"""Host side of the walk over S: operands, pieces, workspace and launches."""

import ctypes
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...ops import ORDER, Batch, accumulation_dtype
from . import configs, rows
from .tiles import INTERPRETED, SURVEY_PROGRAMS, Bounds, Ids, Piece, Scale, Scores, Terms

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


@functools.cache
def device_of(device: torch.device) -> configs.Device:
    if INTERPRETED.value:
        return configs.Device(multiprocessors=1, capability=0, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return configs.Device(properties.multi_processor_count, properties.major, amd=True)
    if properties.major < 8:
        raise RuntimeError(
            f"backend='triton' needs a GPU of compute capability 8.0 or higher, {device} is a"
            f" {properties.name} with {properties.major}.{properties.minor}; use backend='reference'"
        )
    return configs.Device(properties.multi_processor_count, properties.major)


class Plan(NamedTuple):
    """A batch as the kernels take it, and how they get the scores of a tile."""

    batch: Batch  # embeddings with unit inner stride, ids contiguous, nothing that requires grad
    # The embeddings as tiles take them: `dot_operand`, `order_operand`.
    operands: tuple[Tensor, Tensor]
    tiles: configs.Tiles
    source: str  # see tiles.score_tile
    equal_positive: bool = False  # see Ids

    @property
    def given(self) -> bool:
        return self.batch.captions is None

    @property
    def order(self) -> bool:
        return not self.given and self.batch.similarity == ORDER

    @property
    def num_rows(self) -> int:
        return self.batch.images.shape[0]

    @property
    def num_columns(self) -> int:
        return self.batch.images.shape[1] if self.given else self.batch.captions.shape[0]

    @property
    def num_anchors(self) -> int:
        return self.batch.row_anchors + self.batch.column_anchors

    @property
    def accumulation(self) -> torch.dtype:
        return accumulation_dtype(self.batch.images.dtype)

    @property
    def ids(self) -> Ids:
        batch = self.batch
        return Ids(
            batch.image_ids,
            batch.caption_ids,
            batch.pair_row,
            batch.pair_column,
            batch.pair_count,
            1 if self.equal_positive and batch.image_ids is not None else None,
        )

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.batch.images.new_empty(shape, dtype=dtype or self.accumulation)

    def pieces(self, bytes_per_row: int, row_anchors: int, columns: int) -> list[Piece]:
        """The first `row_anchors` rows of S, and `columns` columns of the others, in pieces whose rows fit
        into the workspace."""
        block = self.tiles.block_m
        height = max(workspace_bytes() // bytes_per_row // block * block, block)
        return [
            Piece(row, min(row + height, last), width, *self.batch[4:6])
            for first, last, width in (
                (0, row_anchors, self.num_columns),
                (row_anchors, self.num_rows, columns),
            )
            for row in range(first, last if width else first, height)
        ]

    def tile_counts(self, piece: Piece) -> tuple[int, int]:
        """How many tiles of rows and of columns a piece has."""
        tiles = self.tiles
        height = piece.row_stop - piece.row_start
        return triton.cdiv(height, tiles.block_m), triton.cdiv(piece.num_columns, tiles.block_n)

    def launch(self, kernel, piece: Piece, scores: Tensor | None, *arguments, **constants) -> None:
        """`scores`: [rows of the piece, >= num_columns], read, or where they are computed, kept."""
        tiles, device = self.tiles, device_of(self.batch.images.device)
        row_tiles, column_tiles = self.tile_counts(piece)
        programs = min(device.multiprocessors * tiles.programs_per_sm, SURVEY_PROGRAMS.value)
        images, captions = self.operands
        strides = (0, 1) if scores is None else scores.stride()
        num_dimensions = images.shape[0 if self.source == "order" else 1]
        where = Scores(scores, *strides, images.stride(0), captions.stride(0), num_dimensions)
        if tiles.tma:
            images = TensorDescriptor.from_tensor(images, [tiles.block_m, tiles.block_k])
            captions = TensorDescriptor.from_tensor(captions, [tiles.block_n, tiles.block_k])
        limits = {} if device.amd else {"maxnreg": tiles.registers}
        kernel[(min(row_tiles * column_tiles, programs),)](
            images, captions, where, self.ids, piece, *arguments,
            SOURCE=self.source, TILES=tiles, **constants,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **limits,
        )  # fmt: skip

    def multiply(self, piece: Piece, scores: Tensor) -> None:
        """scores = S of the piece, by torch.mm."""
        images = self.batch.images[piece.row_start : piece.row_stop]
        product(images, self.batch.captions[: piece.num_columns].t(), scores)

    def scores_of(
        self, pieces: list[Piece], kept: Tensor | None
    ) -> Iterator[tuple[Piece, Tensor | None]]:
        """Each piece, with where its scores are, or shall be left: in S where that is given or `kept`
        [N * M], else in one scratch for all of the pieces, or only in registers."""
        images = self.batch.images
        whole = images if self.given else None
        if kept is not None and kept.numel() > 0:
            whole = kept.view(self.num_rows, -1)
        scratch = None
        if self.source == "stored" and whole is None:
            largest = max((p.row_stop - p.row_start) * p.num_columns for p in pieces)
            scratch = self.new(largest)
        for piece in pieces:
            height, width = piece.row_stop - piece.row_start, piece.num_columns
            if whole is not None:
                yield piece, whole[piece.row_start : piece.row_stop, :width]
            elif scratch is not None:
                yield piece, scratch[: height * width].view(height, width)
            else:
                yield piece, None


def plan(
    batch: Batch, kind: str | None = None, crowded: bool = False, equal_positive: bool = False
) -> Plan:
    """
    Args:
        kind: of the tiles, where it is not to be chosen: "stored", if S is at hand from the forward pass, or
            "none", if it is not needed.
        crowded: see configs.tiles_for.
        equal_positive: see tiles.Ids.
    """
    batch = batch._replace(
        images=batch.images.detach(),
        captions=None if batch.captions is None else batch.captions.detach(),
        image_ids=None if batch.image_ids is None else batch.image_ids.contiguous(),
        caption_ids=None if batch.caption_ids is None else batch.caption_ids.contiguous(),
    )
    if batch.captions is not None:
        batch = batch._replace(
            images=unit_stride(batch.images), captions=unit_stride(batch.captions)
        )
    source = kind
    if kind is None:
        source, kind = _source(batch)
    num_columns = batch.images.shape[1] if batch.captions is None else len(batch.captions)
    tiles = configs.tiles_for(
        kind,
        len(batch.images),
        num_columns,
        device_of(batch.images.device),
        crowded or equal_positive,
    )
    return with_operands(Plan(batch, batch[:2], tiles, source, equal_positive))


def with_operands(plan: Plan) -> Plan:
    images, captions = plan.batch[:2]
    tiles = plan.tiles
    operands = images, images if captions is None else captions
    if plan.source == "dot":
        operands = dot_operand(images, tiles), dot_operand(captions, tiles)
    elif plan.source == "order":
        operands = (
            order_operand(images, tiles, tiles.block_m),
            order_operand(captions, tiles, tiles.block_n),
        )
    return plan._replace(operands=operands)


def _source(batch: Batch) -> tuple[str, str]:
    """Source of the scores and kind of tiles.

    The dot products of float32 at "highest" and of float64 come from torch.mm.
    """
    dtype = batch.images.dtype
    if batch.captions is None:
        return "given", "given" if dtype.itemsize == 2 else "stored"
    if batch.similarity == ORDER:
        return "order", "order_float64" if dtype == torch.float64 else "order"
    if dtype.itemsize == 2:
        return "dot", "bf16"
    is_exact = torch.get_float32_matmul_precision() == "highest"
    if dtype == torch.float32 and not is_exact and not device_of(batch.images.device).amd:
        return "dot", "tf32"
    return "stored", "stored"


def unit_stride(embeddings: Tensor) -> Tensor:
    """With neighbouring elements next to each other."""
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
    """[D, rows] in the accumulation type, with zeros up to a multiple of block_k and for a tile that
    begins at the last row."""
    num_rows, num_dimensions = embeddings.shape
    height = triton.cdiv(num_dimensions, tiles.block_k) * tiles.block_k
    width = triton.cdiv(num_rows + block, 16) * 16
    transposed = embeddings.new_zeros((height, width), dtype=accumulation_dtype(embeddings.dtype))
    transposed[:num_dimensions, :num_rows] = embeddings.t()
    return transposed


def survey(
    plan: Plan, block_k: int | None = None
) -> tuple[Bounds, rows.Rows | None, rows.Rows | None]:
    """Bounds on the input, and with block_k what the certified search takes: both sides rounded to bfloat16
    rows of a multiple of block_k elements, and the norms of the rest."""
    images, captions = plan.batch[:2]
    bits = torch.int64 if plan.accumulation == torch.float64 else torch.int32
    programs, candidates = SURVEY_PROGRAMS.value, max(plan.num_rows, plan.num_columns)
    if plan.given:
        # For the walk to find: a pass over S of their own would be a second one.
        bounds = images.new_zeros(programs, dtype=bits)
        return Bounds(bounds, programs, candidates, 0), None, None
    num_dimensions = images.shape[1]
    sides = []
    for x in (images, captions):
        rounded, norms, pitch = None, None, 0
        if block_k is not None:
            pitch = triton.cdiv(num_dimensions, block_k) * block_k
            rounded = x.new_zeros((len(x), pitch), dtype=torch.bfloat16)
            norms = x.new_empty(2, len(x))
        sides.append(rows.Rows(x, x.stride(0), len(x), rounded, norms, pitch))
    bounds = images.new_empty((2, 3, programs), dtype=bits)
    blocks = row_blocks(num_dimensions)
    num_bounds = min(triton.cdiv(candidates, blocks["BLOCK_R"]), programs)
    rows.survey_kernel[(num_bounds, 2)](*sides, bounds, num_dimensions, **blocks, num_warps=4)
    return Bounds(bounds, num_bounds, candidates, num_dimensions), *sides


def row_blocks(num_dimensions: int) -> dict[str, int]:
    """1024 elements a step: 8 a thread, which is one 16-byte load of 16-bit elements."""
    block_d = min(triton.next_power_of_2(num_dimensions), 1024)
    return {"BLOCK_R": 1024 // block_d, "BLOCK_D": block_d}


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b, in the precision of `out`: 16-bit operands may have a float32 result."""
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cpu":  # of the interpreter
            # Contiguous: torch 2.14 on a CPU with AMX reads what lies between rows of bfloat16, NaN and all.
            a, b = a.to(out.dtype).contiguous(), b.to(out.dtype).contiguous()
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
        elif accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def scale_of(scale: float, tensor: Tensor | None) -> Scale:
    rounded = ctypes.c_float(scale).value
    return Scale(None if tensor is None else tensor.detach(), rounded, scale - rounded)


def terms_of(scale: Scale | None = None, **vectors: Tensor | None) -> Terms:
    vectors = {name: None if x is None else x.detach().contiguous() for name, x in vectors.items()}
    return Terms(scale=scale, **vectors)
