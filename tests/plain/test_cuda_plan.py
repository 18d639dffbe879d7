"""The host's part of the CUDA kernels, in plain C++: what they take, in which pieces, who does what. The
kernels themselves run in emulator/ and on a GPU."""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fused_vse import ops
from fused_vse.backends import cuda

SOURCE = Path(__file__).with_name("cuda_plan.cpp")
CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
COMPILER = (os.environ.get("CXX") or "c++").split()
pytestmark = [
    pytest.mark.skipif(not CSRC.exists(), reason="needs a checkout, not an installed package"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler"),
]
LARGE = 256 << 20


@functools.cache
def plan() -> ctypes.CDLL:
    flags = ["-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", f"-I{CSRC}"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "plan.so")
        subprocess.run([*COMPILER, *flags, SOURCE, "-o", path], check=True)
        library = ctypes.CDLL(str(path))
    library.index_arithmetic_error.restype = ctypes.c_char_p
    return library


def text_of(function, *arguments) -> str:
    text = ctypes.create_string_buffer(1000)
    function(*arguments, text, 1000)
    return text.value.decode()


def int64s(numbers):
    numbers = list(numbers)
    return (ctypes.c_int64 * len(numbers))(*numbers)


# --- the small-batch loss


def test_the_preferred_cluster():
    """A power of two, at most 16 strips, and a chunk of D for each of its blocks."""
    for n, d, size in itertools.product(range(1, 513, 7), (1, 64, 65, 256, 1024, 1025), (2, 4)):
        cluster = plan().preferred_cluster_of(n, d, size)
        assert cluster in (1, 2, 4, 8)
        assert cluster * -(-n // 64) <= 16
        assert cluster == 1 or cluster * 128 <= d * size
    assert plan().preferred_cluster_of(128, 1024, 2) == 8


def test_index_arithmetic_against_brute_force():
    """Every element, byte, chunk and tile belongs to one thread, place, block and job."""
    assert plan().index_arithmetic_error() is None


GOOD_BATCH = dict(
    n=7, images_dim=4, m=9, captions_dim=4, image_ids=-1, caption_ids=-1, row_anchors=7,
    column_anchors=9, pair_row=0, pair_column=2, pair_count=7,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"image_ids": 7, "caption_ids": 9}, ""),
        ({"row_anchors": 0, "column_anchors": 0, "pair_count": 0}, ""),
        ({"n": 0}, "the number of images must be in 1 .. "),
        ({"m": 0}, "the number of captions must be in 1 .. "),
        ({"images_dim": 0}, "the dimension of images must be in 1 .. "),
        ({"captions_dim": 5}, "the dimension of captions must be in 4 .. 4, got 5"),
        ({"image_ids": 7}, "both ids or none"),
        ({"caption_ids": 9}, "both ids or none"),
        ({"image_ids": 9, "caption_ids": 9}, "the number of image_ids must be in 7 .. 7, got 9"),
        ({"image_ids": 7, "caption_ids": 7}, "the number of caption_ids must be in 9 .. 9, got 7"),
        ({"row_anchors": 8}, "row_anchors must be in 0 .. 7, got 8"),
        ({"row_anchors": -1}, "row_anchors must be in 0 .. 7, got -1"),
        ({"column_anchors": 10}, "column_anchors must be in 0 .. 9, got 10"),
        ({"pair_count": 8}, "pair_count must be in 0 .. 7, got 8"),
        ({"pair_count": -1}, "pair_count must be in 0 .. 7, got -1"),
        ({"pair_row": 1}, "pair_row must be in 0 .. 0, got 1"),
        ({"pair_column": 3}, "pair_column must be in 0 .. 2, got 3"),
        ({"pair_column": -1}, "pair_column must be in 0 .. 2, got -1"),
        ({"pair_row": 2**63 - 1, "pair_count": 1}, "pair_row must be in 0 .. 6, got 9"),
    ],
)
def test_mistakes_in_a_batch_are_named(change, message):
    found = text_of(plan().batch_mistake, int64s({**GOOD_BATCH, **change}.values()))
    assert message in found and bool(message) == bool(found)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((512, 512, 1 << 16, 512, 3), ""),
        (
            (513, 1, 1, 1, 0),
            "at most 512 images and captions of at most 65536 dimensions, got 513, 1",
        ),
        ((1, 513, 1, 1, 0), "got 1, 513 and 1"),
        ((1, 1, (1 << 16) + 1, 1, 0), "got 1, 1 and 65537"),
        ((1, 1, 1, 0, 0), "num_pairs must be at least 1, got 0"),
        ((1, 1, 1, 1, 4), "unknown kind of loss: 4"),
        ((1, 1, 1, 1, -1), "unknown kind of loss: -1"),
    ],
)
def test_obstacles_are_named(numbers, message):
    found = text_of(plan().small_obstacle, int64s(numbers))
    assert message in found and bool(message) == bool(found)


def test_limits_and_kinds_are_those_of_python():
    text = (CSRC / "small_plan.h").read_text()
    assert f"MAX_ROWS = {cuda.SMALL_ROWS};" in text
    assert "MAX_DIM = 1 << 16;" in text and cuda.SMALL_DIM == 1 << 16
    kinds = ops.ALL_NEGATIVES, ops.HARDEST, ops.HARDEST_SMOOTH, ops.HINGE_SUM
    assert kinds == tuple(range(4))
    assert "{ ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM }" in text


# --- the Hopper statistics


@pytest.mark.parametrize("clusters", [1, 2, 66])
@pytest.mark.parametrize("shape", [(0, 1, 1), (0, 128, 192), (5, 300, 193), (256, 5000, 2000)])
def test_every_tile_is_computed_once(shape, clusters):
    row_start, row_stop, columns = shape
    row_tiles, column_tiles = -(-(row_stop - row_start) // 128), -(-columns // 192)
    seen = []
    for cluster in range(clusters):
        mine = tiles_of(shape, cluster, clusters)
        for (row_0, column_0), (row_1, column_1) in zip(mine[::2], mine[1::2], strict=True):
            assert (row_1, column_1) == (row_0 + 1, column_0)  # the captions' rows are shared
        seen += mine
    inside = [(row, column) for row, column in seen if row < row_tiles]
    assert sorted(inside) == list(itertools.product(range(row_tiles), range(column_tiles)))
    assert all(row == row_tiles for row, _ in seen if row >= row_tiles)


def test_consecutive_clusters_share_operands():
    """At N = M = 32768 the 66 tiles in flight read far fewer distinct rows than 66 times their own."""
    tiles = [tiles_of((0, 32768, 32768), cluster, 66)[0] for cluster in range(66)]
    assert len({row for row, _ in tiles}) <= 8 and len({column for _, column in tiles}) <= 10


def tiles_of(shape, cluster, clusters):
    out = (ctypes.c_int * 100000)()
    count = plan().hopper_tiles(*shape, cluster, clusters, out)
    return list(zip(out[: 2 * count : 2], out[1 : 2 * count : 2], strict=True))


def pieces_of(n, m, row_anchors, column_anchors, workspace):
    out, sizes = (ctypes.c_int * 30000)(), (ctypes.c_int64 * 2)()
    arguments = map(ctypes.c_int64, (n, m, row_anchors, column_anchors, workspace))
    count = plan().hopper_pieces(*arguments, out, sizes)
    return [tuple(out[3 * i : 3 * i + 3]) for i in range(count)], list(sizes)


@pytest.mark.parametrize("workspace", [1, 1 << 20, LARGE])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (1000, 700, 600, 600),
        (600, 1000, 600, 600),
        (70000, 9000, 9, 9),
        (700, 900, 650, 800),
        (700, 900, 0, 300),
        (700, 900, 300, 0),
        (700, 900, 0, 0),
    ],
)
def test_pieces_cover_what_anchors_see(shape, workspace):
    n, m, r, c = shape
    pieces, sizes = pieces_of(n, m, r, c, workspace)
    for begin, end, columns in ((0, r, m), (r, n, c)):
        mine = [p for p in pieces if begin <= p[0] < end]
        assert all(p[0] < p[1] and p[2] == columns for p in mine)
        rows = [row for start, stop, _ in mine for row in range(start, stop)]
        assert rows == (list(range(begin, end)) if columns else [])
    of_rows = [8 * -(-columns // 192) * (stop - start) for start, stop, columns in pieces]
    of_columns = [8 * (-(-(stop - start) // 128) + 1) * c for start, stop, _ in pieces]
    assert sizes == [max(of_rows, default=0), max(of_columns, default=0)]


@pytest.mark.parametrize("size", [4096, 32768, 262144])
def test_partial_results_stay_within_the_workspace(size):
    pieces, sizes = pieces_of(size, size, size, size, LARGE)
    # One slot of the columns beyond those of the tiles carries over.
    assert sum(sizes) <= LARGE + 8 * size
    assert size > 32768 or len(pieces) == 1


GOOD = dict(rows=1000, dim=64, stride=64, inner=1, address=1 << 20, half=1)


def obstacle(capability=(9, 0), captions=None, **images):
    layouts = [int64s({**GOOD, **changes}.values()) for changes in (images, captions or {})]
    return text_of(plan().hopper_obstacle, *capability, *layouts)


def test_obstacles_of_hopper_name_what_is_in_the_way():
    assert obstacle() == ""
    assert obstacle(rows=1, stride=3) == ""  # the stride of a single row means nothing
    assert "compute capability 8.0" in obstacle(capability=(8, 0))
    assert "10.0" in obstacle(capability=(10, 0))
    assert "images must be bfloat16 or float16" in obstacle(half=0)
    assert "D = 60" in obstacle(dim=60, stride=64)
    assert "unit stride" in obstacle(inner=2)
    assert "65 elements apart" in obstacle(stride=65)
    assert "0 elements apart" in obstacle(stride=0)
    assert "16-byte" in obstacle(address=8)
    assert "captions" in obstacle(captions={"address": 2})
    assert "32-bit" in obstacle(rows=2**30)
    assert "dimensions" in obstacle(dim=2**31 - 8, stride=2**31 - 8)
    assert "tiles" in obstacle(rows=2**29, captions={"rows": 2**29})
