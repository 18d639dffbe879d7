"""The Hopper kernels without a GPU: the arithmetic that they share with a model in plain C++, tested by
brute force, and the model's results, tile by tile in the kernel's order, against tests/ops_oracle.py."""

import ctypes
import itertools
import random

import hopper_model
import ops_oracle as oracle
import pytest
import torch
from cases import CASES, Case, integer_embeddings
from conftest import assert_close
from hopper_batches import BATCHES, Anchored, in_float64, thresholds
from hopper_model import Model
from hopper_protocol import Cluster

pytestmark = pytest.mark.skipif(
    hopper_model.why_missing() is not None, reason=str(hopper_model.why_missing())
)
SEVERAL = Anchored(Case("several cluster tiles", 700, 900, 650, 24))
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


def pieces_of(n, m, row_anchors, column_anchors, workspace):
    out, sizes = ints(*[0] * 30000), (ctypes.c_int64 * 2)()
    arguments = map(ctypes.c_int64, (n, m, row_anchors, column_anchors, workspace))
    count = hopper_model.library().pieces(*arguments, out, sizes)
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
    assert "32-bit" in obstacle(rows=2**30)
    assert "dimensions" in obstacle(dim=2**31 - 8, stride=2**31 - 8)
    assert "tiles" in obstacle(rows=2**29, captions={"rows": 2**29})


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


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_hardest_is_exact(case):
    batch = case.batch(integer_embeddings)
    score, index = Model(batch).hardest()
    expected, where = oracle.hardest_negatives(in_float64(batch))
    assert torch.equal(score.double(), expected) and torch.equal(index, where)


@pytest.mark.parametrize("workspace", [LARGE, SMALL])
@pytest.mark.parametrize(("scale", "one_exp"), [(10.0, True), (200.0, False)])
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_logsumexp(case, scale, one_exp, workspace):
    batch = case.batch()
    reference, log_sum, took_one = Model(batch, workspace).logsumexp(scale)
    assert took_one == one_exp
    expected = oracle.logsumexp(in_float64(batch), None, scale)
    # float32 rounding of a score times the scale, which is an error of the exponent.
    assert_close(scale * reference.double() + log_sum, expected, 4e-7)
    if not one_exp:
        score, _ = Model(batch).hardest()
        assert torch.equal(reference, score.nan_to_num(neginf=0.0))


def test_one_exponential_keeps_rows_far_below_the_others():
    """At temperature 0.012 exp spans e^167: what a reference taken from the whole tile would flush to 0."""
    batch = Anchored(CASES[2]).batch()
    images, captions = batch.images, batch.captions
    captions[1:] = -images[:1]
    images[1:] = images[:1]
    reference, log_sum, took_one = Model(batch).logsumexp(1 / 0.0125)
    assert took_one == 1 and (reference == 0).all()
    assert_close(log_sum, oracle.logsumexp(in_float64(batch), None, 1 / 0.0125), 4e-7)


@pytest.mark.parametrize("workspace", [LARGE, SMALL])
@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_large_offsets_do_not_absorb_the_logarithm(scale, workspace):
    """Logits of 3e7 and 3e10, where the floats are 2 and 2048 apart: c s would have lost the differences."""
    batch = Anchored(Case("large scores", 300, 300, 300, 4)).batch()
    batch.images.fill_(1e3), batch.captions.fill_(1e3)
    batch.captions[:, 3] = 1
    batch.images[::3, 3] += 0.25  # and so does the score
    reference, log_sum, _ = Model(batch, workspace).logsumexp(scale)
    wide = in_float64(batch)
    assert torch.equal(reference.double(), oracle.hardest_negatives(wide)[0])
    difference = wide._replace(images=wide.images - wide.images[1])
    largest, _ = oracle.hardest_negatives(difference)
    assert_close(log_sum, oracle.logsumexp(difference, None, scale) - scale * largest, 1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_noticed(scale):
    assert Model(Anchored(CASES[2]).batch()).logsumexp(scale)[2] == -1


@pytest.mark.parametrize("workspace", [LARGE, SMALL])
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_hinge_sum_is_exact(case, workspace):
    batch = case.batch(integer_embeddings)
    threshold = thresholds(batch)
    total, active = Model(batch, workspace).hinge(threshold)
    expected, count = oracle.hinge_sum(in_float64(batch), None, threshold)
    assert torch.equal(total.double(), expected) and torch.equal(active, count)


def test_the_number_of_clusters_does_not_matter():
    results = [Model(SEVERAL.batch(), clusters=n).logsumexp(10.0)[1] for n in (1, 4, 66)]
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
