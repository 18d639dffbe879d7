"""The Hopper kernels without a GPU: the arithmetic that they share with a model in plain C++, tested by
brute force, and the model's results, tile by tile in the kernel's order, against the reference."""

import ctypes
import itertools
import random

import hopper_model
import pytest
import torch
from cases import CASES, Case, embeddings, ids_of, integer_embeddings
from conftest import assert_close
from hopper_protocol import Cluster

from fused_vse import reference

pytestmark = pytest.mark.skipif(
    hopper_model.why_missing() is not None, reason=str(hopper_model.why_missing())
)
SEVERAL = Case("several cluster tiles", 700, 900, 650, 24)
SEVERAL_WITH_IDS = Case("several cluster tiles with ids", 700, 420, 400, 24, "groups of five")
UNRELATED_IDS = Case("ids meet in every tile", 300, 400, 280, 16, "unrelated")
MODEL_CASES = [*CASES, SEVERAL, SEVERAL_WITH_IDS, UNRELATED_IDS]
LARGE = 256 << 20
SMALL = 1  # one row of cluster tiles at a time


def ints(*values: int):
    return (ctypes.c_int * len(values))(*values)


# --- which thread holds which score


def test_fragment_matches_the_manual_and_covers_the_tile():
    model = hopper_model.library()
    sizes = [hopper_model.constant(x) for x in ("LANE_ROWS", "CHUNKS", "LANE_COLS")]
    kernel, manual = ints(0, 0), ints(0, 0)
    seen = set()
    for warp, lane in itertools.product(range(4), range(32)):
        for slot, chunk, item in itertools.product(*map(range, sizes)):
            model.fragment(warp, lane, slot, chunk, item, kernel, manual)
            assert tuple(kernel) == tuple(manual), (warp, lane, slot, chunk, item)
            seen.add(tuple(kernel))
    rows, columns = hopper_model.constant("TILE_ROWS"), hopper_model.constant("TILE_COLS")
    assert seen == set(itertools.product(range(rows), range(columns)))


def test_slots_and_items_ascend():
    """Or the first of equal scores would not be the one of the smallest index."""
    model = hopper_model.library()
    kernel, manual = ints(0, 0), ints(0, 0)
    for lane in range(32):
        rows, columns = [], []
        for slot in range(4):
            model.fragment(1, lane, slot, 0, 0, kernel, manual)
            rows.append(kernel[0])
        for chunk, item in itertools.product(range(hopper_model.constant("CHUNKS")), range(8)):
            model.fragment(1, lane, 0, chunk, item, kernel, manual)
            columns.append(kernel[1])
        assert rows == sorted(set(rows)) and columns == sorted(set(columns))


@pytest.mark.parametrize(("function", "width", "stride"), [("rows", 4, 1), ("columns", 8, 4)])
def test_swap_shuffle_gives_each_lane_the_total_of_its_item(function, width, stride):
    """The lanes that hold the same rows or columns differ in their number's bits of `width * stride`."""
    reduce = getattr(hopper_model.library(), f"swap_{function}")
    totals = torch.empty(32, dtype=torch.int64)
    # Sums are linear: it is enough to follow each item of each lane on its own.
    for lane, item in itertools.product(range(32), range(width)):
        values = torch.zeros(32, width, dtype=torch.int64)
        values[lane, item] = 1
        reduce(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(totals.data_ptr()))
        mates = [x for x in range(32) if (x ^ lane) & ~((width - 1) * stride) == 0]
        assert len(mates) == width
        assert totals.nonzero().flatten().tolist() == [
            x for x in mates if x // stride % width == item
        ]


# --- which block computes which tile, and from which stage


@pytest.mark.parametrize("clusters", [1, 2, 66])
@pytest.mark.parametrize("shape", [(0, 1, 1), (0, 128, 192), (5, 300, 193), (256, 5000, 2000)])
def test_every_tile_is_computed_once(shape, clusters):
    row_start, row_stop, columns = shape
    row_tiles, column_tiles = -(-(row_stop - row_start) // 128), -(-columns // 192)
    out = ints(*[0] * (3 * 2 * (row_tiles + 2) * column_tiles))
    seen = []
    for cluster in range(clusters):
        count = hopper_model.library().tiles(*shape, cluster, clusters, out)
        mine = [tuple(out[3 * i : 3 * i + 3]) for i in range(count)]
        for (row_0, column_0, _), (row_1, column_1, _) in zip(mine[::2], mine[1::2], strict=True):
            assert (row_1, column_1) == (row_0 + 1, column_0)  # the captions' rows are shared
        seen += mine
    inside = [(row, column) for row, column, _ in seen if row < row_tiles]
    assert sorted(inside) == list(itertools.product(range(row_tiles), range(column_tiles)))
    assert all(row == row_tiles for row, _, _ in seen if row >= row_tiles)


def test_consecutive_clusters_share_operands():
    """At N = M = 32768 the 66 tiles in flight read far fewer distinct rows than 66 times their own."""
    out = ints(*[0] * 100000)
    tiles = [
        out[:2]
        for cluster in range(66)
        if hopper_model.library().tiles(0, 32768, 32768, cluster, 66, out)
    ]
    assert len({row for row, _ in tiles}) <= 8 and len({column for _, column in tiles}) <= 10


def test_ring_position_counts_like_an_integer():
    stages = hopper_model.constant("STAGES")
    stage, phase = ctypes.c_int(0), ctypes.c_int(0)
    random.seed(2)
    total = 0
    for _ in range(300):
        steps = random.choice([1, 1, 2, stages, random.randrange(5000)])
        hopper_model.library().advance(ctypes.byref(stage), ctypes.byref(phase), steps)
        total += steps
        assert (stage.value, phase.value) == (total % stages, total // stages % 2)


# --- pieces and workspace


def pieces_of(n, m, k, workspace):
    out, floats = ints(*[0] * 30000), (ctypes.c_int64 * 2)()
    arguments = map(ctypes.c_int64, (n, m, k, workspace))
    count = hopper_model.library().pieces(*arguments, out, floats)
    return [tuple(out[3 * i : 3 * i + 3]) for i in range(count)], list(floats)


@pytest.mark.parametrize("workspace", [1, 1 << 20, LARGE])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1000, 700, 600), (600, 1000, 600), (70000, 9000, 9)])
def test_pieces_cover_what_anchors_see(shape, workspace):
    n, m, k = shape
    pieces, floats = pieces_of(n, m, k, workspace)
    assert [p[0] for p in pieces] == [0, *(p[1] for p in pieces[:-1])] and pieces[-1][1] == n
    for start, stop, columns in pieces:
        assert start < stop and columns == (m if start < k else k)
        assert stop <= k or start >= k
    row_floats = max(2 * -(-columns // 192) * (stop - start) for start, stop, columns in pieces)
    column_floats = max(2 * (-(-(stop - start) // 128) + 1) * k for start, stop, _ in pieces)
    assert floats == [row_floats, column_floats]


@pytest.mark.parametrize("size", [4096, 32768, 262144])
def test_partial_results_stay_within_the_workspace(size):
    pieces, floats = pieces_of(size, size, size, LARGE)
    # One slot of the columns beyond those of the tiles carries over.
    assert 4 * sum(floats) <= LARGE + 8 * size
    assert size > 32768 or len(pieces) == 1


# --- what is taken

GOOD = dict(rows=1000, dim=64, stride=64, inner=1, address=1 << 20, half=1)


def obstacle(capability=(9, 0), captions=None, **images):
    text = ctypes.create_string_buffer(1000)
    layouts = [
        (ctypes.c_int64 * 6)(*{**GOOD, **changes}.values()) for changes in (images, captions or {})
    ]
    hopper_model.library().obstacle_of(*capability, *layouts, text, 1000)
    return text.value.decode()


def test_obstacles_name_what_is_in_the_way():
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
    assert "32-bit" in obstacle(rows=2**31 - 100)
    assert "tiles" in obstacle(rows=2**30, captions={"rows": 2**30})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 1.0, 1024), False),
        ((float("nan"), 1.0, 8), True),
        ((0.0, float("inf"), 8), True),
        ((1e19, 1e19, 8), True),
    ],
)
def test_poisoned(values, expected):
    assert hopper_model.library().poisoned(*values) == expected


# --- arg-max keys


def test_keys_order_by_score_and_then_by_smaller_index():
    model = hopper_model.library()
    scores = [-3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 0.25, 3e38]
    pairs = [(s, i) for s in scores for i in (0, 1, 2**31 - 1)]
    for (s, i), (t, j) in itertools.product(pairs, pairs):
        a, b = model.key_of(s, i), model.key_of(t, j)
        s, t = (ctypes.c_float(x).value for x in (s, t))
        assert a > 0 and (a > b) == (s > t or (s == t and i < j)), (s, i, t, j)
    for s, i in pairs:
        assert model.key_score(model.key_of(s, i)) == ctypes.c_float(s).value
        assert model.key_index(model.key_of(s, i)) == i
    assert model.key_score(0) == -float("inf") and model.key_index(0) == -1


# --- the whole pass


def expected_batch(case, images, captions):
    return images.double(), captions.double(), *ids_of(case), case.pairs


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_hardest_is_exact(case):
    images, captions = integer_embeddings(case)
    score, index = hopper_model.Batch(images, captions, ids_of(case), case.pairs).hardest()
    _, *expected = reference.hardest_negatives(*expected_batch(case, images, captions))
    assert torch.equal(score.double(), expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize("workspace", [LARGE, SMALL])
@pytest.mark.parametrize(("scale", "one_exp"), [(10.0, True), (200.0, False)])
@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_logsumexp(case, scale, one_exp, workspace):
    images, captions = embeddings(case, torch.float32)
    batch = hopper_model.Batch(images, captions, ids_of(case), case.pairs)
    result, took_one = batch.logsumexp(scale, workspace)
    assert took_one == one_exp
    _, expected = reference.negative_logsumexp(*expected_batch(case, images, captions), scale)
    # float32 rounding of a score times the scale, which is an error of the exponent.
    assert_close(result, expected.double(), 4e-7)


def test_one_exponential_keeps_rows_far_below_the_others():
    """At temperature 0.012 exp spans e^167: what a reference taken from the whole tile would flush to 0."""
    images, captions = embeddings(CASES[2], torch.float32)
    captions[1:] = -images[:1]
    images[1:] = images[:1]
    batch = hopper_model.Batch(images, captions, (None, None), len(images))
    result, took_one = batch.logsumexp(1 / 0.0125, LARGE)
    assert took_one
    _, expected = reference.negative_logsumexp(
        images.double(), captions.double(), None, None, len(images), 1 / 0.0125
    )
    assert_close(result, expected.double(), 4e-7)


@pytest.mark.parametrize("workspace", [LARGE, SMALL])
@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_hinge_sum_is_exact(case, workspace):
    images, captions = integer_embeddings(case)
    positive = (images[: case.pairs] * captions[: case.pairs]).sum(1)
    batch = hopper_model.Batch(images, captions, ids_of(case), case.pairs)
    total, active = batch.hinge(positive, 0.25, workspace)
    _, *expected = reference.hinge_sum(*expected_batch(case, images, captions), 0.25)
    assert torch.equal(total.double(), expected[0]) and torch.equal(active, expected[1])


def test_the_number_of_clusters_does_not_matter():
    images, captions = embeddings(SEVERAL, torch.float32)
    results = [
        hopper_model.Batch(images, captions, (None, None), SEVERAL.pairs, clusters).logsumexp(
            10.0, LARGE
        )[0]
        for clusters in (1, 4, 66)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- who waits for whom


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 16])  # fewer than the stages, as many, more
@pytest.mark.parametrize("tiles", [1, 2, 3, 6])
def test_no_interleaving_deadlocks_or_overwrites(tiles, steps):
    for seed in range(4):
        Cluster(tiles, steps, hopper_model.constant("STAGES")).run(seed)


@pytest.mark.parametrize(
    ("rule", "symptom"),
    [
        ("release to own block only", "deadlock"),
        ("no turns", "another step's data|both consumers"),
        ("release before the wait", "overwritten"),
    ],
)
def test_the_protocol_model_notices_a_broken_rule(rule, symptom):
    with pytest.raises(AssertionError, match=symptom):
        Cluster(5, 6, hopper_model.constant("STAGES"), rule).run(0)
