"""Every op of fused_vse/ops.py against ops_oracle.py: anchors and pairs of any kind, ceilings, thresholds,
statistics merged from parts, gradients in the accumulation type."""

import itertools
import os

import ops_oracle as oracle
import pytest
import torch
from conftest import assert_close

import fused_vse
from fused_vse.ops import DOT, ORDER, Batch

NAME = os.environ.get("FUSED_VSE_TEST_OPS", "cpu")
OPS = getattr(torch.ops, f"fused_vse_{NAME}")
pytestmark = pytest.mark.skipif(
    fused_vse.backends()[NAME] != "available", reason=f"{NAME}: {fused_vse.backends()[NAME]}"
)

N, M, D = 45, 70, 24
ANCHORS = {  # (row_anchors, column_anchors, pair_row, pair_column, pair_count)
    "one process": (33, 33, 0, 0, 33),
    "all pairs": (45, 45, 0, 0, 45),
    "one pair": (1, 1, 0, 0, 1),
    "own rows, columns of all ranks": (30, 64, 0, 17, 30),
    "a chunk with some of the pairs": (40, 50, 25, 0, 15),
    "a chunk without a pair": (45, 70, 0, 0, 0),
    "a chunk of extra columns": (45, 0, 0, 0, 0),
    "a rank without a pair": (0, 64, 0, 0, 0),
}
SOURCES = ["dot", "order", "given"]
# Scores of this size are several tiles of every backend; few dimensions keep that fast.
LARGE = dict(n=1100, m=300, d=7, anchors=(700, 260, 300, 10, 250))
if os.environ.get("TRITON_INTERPRET") == "1":  # whose tiles are smaller, and slow
    LARGE = dict(n=150, m=70, d=7, anchors=(100, 60, 40, 10, 50))


def make(source, anchors, dtype=torch.float64, ids=None, n=N, m=M, d=D, seed=0, integers=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, m)] if source == "given" else [(n, d), (m, d)]
    if integers:
        tensors = [torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes]
    else:
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        tensors = [torch.nn.functional.normalize(x).to(dtype) for x in tensors]
    images, captions = (tensors[0], None) if source == "given" else tensors
    image_ids = caption_ids = None
    if ids == "groups":
        image_ids, caption_ids = torch.arange(n) // 5, torch.arange(m) // 5
    elif ids == "one":
        image_ids, caption_ids = torch.zeros(n).long(), torch.zeros(m).long()
    similarity = ORDER if source == "order" else DOT
    return Batch(images, captions, image_ids, caption_ids, *anchors, similarity)


def vector(batch, seed, dtype=None):
    """One number an anchor, about as large as the scores."""
    generator = torch.Generator().manual_seed(seed)
    size = batch.row_anchors + batch.column_anchors
    spread = oracle.scores_of(batch).s.std()
    center = oracle.scores_of(batch).s.mean()
    x = center + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    if dtype is None:
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
    return x.to(dtype)


def ceilings(batch):
    ceiling = vector(batch, 7)
    ceiling[::7], ceiling[3::7] = -torch.inf, torch.inf
    return ceiling


def upstream(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(batch.row_anchors + batch.column_anchors, generator=generator).double()
    g[::3] = 0
    d_positive = torch.randn(batch.pair_count, generator=generator).double()
    dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
    return d_positive.to(dtype), g.to(dtype)


def weighted(values, weights):
    """Where a weight is 0, so is the term, even for -inf."""
    return (torch.where(weights != 0, values, 0.0) * weights.double()).sum()


def pairs_objective(batch, d_positive):
    return (oracle.positive_scores(batch) * d_positive.double()).sum()


def check_gradients(batch, got, objective, tolerance, needs=(True, True, False)):
    want = oracle.gradients(batch, objective)
    wide = needs[2] and batch.captions is not None
    for g, w, x, need in zip(got, want, batch[:2], needs[:2], strict=True):
        if not need or x is None:
            assert g.numel() == 0
            continue
        accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert g.dtype == (accumulation if wide else x.dtype)
        scale = max(w.abs().max().item(), 1e-30)
        assert_close(g.double() / scale, w / scale, tolerance, "gradient")


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
each_source = pytest.mark.parametrize("source", SOURCES)
each_anchors = pytest.mark.parametrize("anchors", ANCHORS.values(), ids=ANCHORS)
each_ids = pytest.mark.parametrize("ids", [None, "groups", "one"])
each_ceiling = pytest.mark.parametrize("with_ceiling", [False, True], ids=["", "ceiling"])


@each_source
@each_anchors
def test_positive_scores(source, anchors):
    batch = make(source, anchors)
    assert_close(OPS.positive_scores(*batch), oracle.positive_scores(batch), 1e-12)


@each_source
@each_anchors
@each_ids
@each_ceiling
def test_hardest_negatives(source, anchors, ids, with_ceiling):
    batch = make(source, anchors, ids=ids)
    ceiling = ceilings(batch) if with_ceiling else None
    score, index = OPS.hardest_negatives(*batch, ceiling)
    expected, where = oracle.hardest_negatives(batch, ceiling)
    assert_close(score, expected, 1e-12, "score")
    assert torch.equal(index, where)

    d_positive, g = upstream(batch, 1)
    index[5::11] = -1  # found elsewhere

    def objective(attached):
        s, total = oracle.scores_of(attached).s, pairs_objective(attached, d_positive)
        r = batch.row_anchors
        for a in (index >= 0).nonzero()[:, 0].tolist():
            i, j = (a, index[a]) if a < r else (index[a], a - r)
            total = total + g[a].double() * s[i, j]
        return total

    got = OPS.hardest_negatives_backward(*batch, score, index, d_positive, g, True, True, False)
    check_gradients(batch, got, objective, 1e-10)


@each_source
@each_anchors
@each_ceiling
def test_ties_go_to_the_smallest_index(source, anchors, with_ceiling):
    """Scores are exact: values and indices must be equal."""
    batch = make(source, anchors, torch.float32, integers=True)
    ceiling = ceilings(batch).round() if with_ceiling else None
    if with_ceiling and source == "order":
        ceiling = None  # roots of integers are rounded
    score, index = OPS.hardest_negatives(*batch, ceiling)
    expected, where = oracle.hardest_negatives(batch, ceiling)
    assert torch.equal(index, where)
    assert_close(score, expected.float(), 1e-6 if source == "order" else 0)


@each_source
@each_anchors
@each_ids
@each_ceiling
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_negative_logsumexp(source, anchors, ids, with_ceiling, kept):
    batch = make(source, anchors, ids=ids)
    check_logsumexp(batch, ceilings(batch) if with_ceiling else None, kept)


def check_logsumexp(batch, ceiling, kept=False, needs=(True, True, False)):
    tolerance = TOLERANCE[batch.images.dtype]
    accumulation = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
    scale = torch.tensor(12.5, dtype=accumulation)
    for options in ((1.0, scale), (12.5, None)):
        reference, log_sum, saved = OPS.negative_logsumexp(*batch, ceiling, *options, kept)
        expected = oracle.logsumexp(batch, ceiling, 12.5)
        assert log_sum.dtype == torch.float64 and reference.isfinite().all()
        assert_close(
            12.5 * reference.double() + log_sum, expected, min(tolerance, 2e-5), "logsumexp"
        )
        d_positive, g = upstream(batch, 2)

        def objective(attached, d_positive=d_positive, g=g):
            total = pairs_objective(attached, d_positive)
            return total + weighted(oracle.logsumexp(attached, ceiling, 12.5), g)

        *got, d_scale = OPS.negative_logsumexp_backward(
            *batch, ceiling, *options, reference, log_sum, saved, d_positive, g, *needs
        )
        check_gradients(batch, got, objective, tolerance, needs)
        factor = torch.tensor(12.5, dtype=torch.float64, requires_grad=True)
        value = weighted(oracle.logsumexp(batch, ceiling, factor), g)
        want = torch.autograd.grad(value, factor)[0] - weighted(
            torch.where(log_sum > -torch.inf, reference.double(), 0.0), g
        )
        assert_close(d_scale, want, max(tolerance, 1e-10) * max(1, g.abs().sum().item()), "d_scale")


@each_source
@each_anchors
@each_ids
@each_ceiling
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_hinge_sum(source, anchors, ids, with_ceiling, kept):
    batch = make(source, anchors, ids=ids)
    check_hinge(batch, ceilings(batch) if with_ceiling else None, kept)


def check_hinge(batch, ceiling, kept=False, needs=(True, True, False)):
    tolerance = TOLERANCE[batch.images.dtype]
    threshold = vector(batch, 3)
    total, active, saved = OPS.hinge_sum(*batch, ceiling, threshold, kept)
    expected, count = oracle.hinge_sum(batch, ceiling, threshold)
    assert_close(total, expected, min(tolerance, 2e-5), "hinge_sum")
    assert torch.equal(active, count)
    d_positive, g = upstream(batch, 4)

    def objective(attached):
        sums, _ = oracle.hinge_sum(attached, ceiling, threshold)
        return pairs_objective(attached, d_positive) + (sums * g.double()).sum()

    got = OPS.hinge_sum_backward(*batch, ceiling, threshold, total, saved, d_positive, g, *needs)
    check_gradients(batch, got, objective, tolerance, needs)


@each_source
@each_anchors
@each_ids
@pytest.mark.parametrize("equal_positive", [False, True], ids=["", "positive"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_softplus_sum(source, anchors, ids, equal_positive, kept):
    check_softplus(make(source, anchors, ids=ids), equal_positive, kept)


def check_softplus(batch, equal_positive, kept=False, needs=(True, True, False)):
    tolerance = TOLERANCE[batch.images.dtype]
    accumulation = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
    bias, scale = (torch.tensor(x, dtype=accumulation) for x in (-3.0, 12.5))
    d_positive, g = upstream(batch, 9)
    slopes = [x.double().requires_grad_() for x in (scale, bias)]
    expected = oracle.softplus_sum(batch, *slopes, equal_positive)
    d_slopes = [torch.zeros(()).double()] * 2
    if len(g):
        d_slopes = torch.autograd.grad((expected * g.double()).sum(), slopes)

    def objective(attached):
        sums = oracle.softplus_sum(attached, 12.5, -3.0, equal_positive)
        return pairs_objective(attached, d_positive) + (sums * g.double()).sum()

    for factor in ((1.0, scale), (12.5, None)):
        options = *factor, bias, equal_positive
        total, slope, saved = OPS.softplus_sum(*batch, *options, kept)
        assert_close(total, expected, min(tolerance, 2e-5), "softplus_sum")
        size = max(1, g.abs().sum().item())
        assert_close((slope * g).sum(), d_slopes[1], max(tolerance, 1e-10) * size, "d_bias")
        *got, d_scale = OPS.softplus_sum_backward(
            *batch, *options, total, saved, d_positive, g, *needs
        )
        check_gradients(batch, got, objective, tolerance, needs)
        assert_close(d_scale, d_slopes[0], max(tolerance, 1e-10) * size, "d_scale")


@each_source
@each_ceiling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [(True, True, False), (True, True, True), (False, True, True)])
def test_other_dtypes_and_the_accumulation_type(source, with_ceiling, dtype, needs):
    if source == "given" and not needs[0]:
        needs = (True, False, False)
    batch = make(source, ANCHORS["own rows, columns of all ranks"], dtype)
    ceiling = ceilings(batch) if with_ceiling else None
    check_logsumexp(batch, ceiling, needs=needs)
    check_hinge(batch, ceiling, needs=needs)
    check_softplus(batch, False, needs=needs)
    score, index = OPS.hardest_negatives(*batch, ceiling)
    assert_close(score, oracle.hardest_negatives(batch, ceiling)[0], 1e-5)
    d_positive, g = upstream(batch, 5)
    d_images, d_captions = OPS.hardest_negatives_backward(
        *batch, score, index, d_positive, g, *needs
    )
    wide = torch.float32 if needs[2] and batch.captions is not None else dtype
    for gradient, need in zip((d_images, d_captions), needs[:2], strict=True):
        assert gradient.dtype == wide or not need


@each_source
@each_ceiling
@pytest.mark.parametrize("ids", [None, "groups"])
def test_several_tiles(source, ids, with_ceiling):
    batch = make(source, ids=ids, **LARGE)
    ceiling = ceilings(batch) if with_ceiling else None
    check_logsumexp(batch, ceiling)
    check_hinge(batch, ceiling)
    check_softplus(batch, with_ceiling)
    score, index = OPS.hardest_negatives(*batch, ceiling)
    expected, where = oracle.hardest_negatives(batch, ceiling)
    assert_close(score, expected, 1e-12)
    assert torch.equal(index, where)


@pytest.mark.parametrize("source", ["dot", "order"])
def test_statistics_merged_from_parts_of_the_columns(source):
    """Own rows against the columns in two chunks; the merged statistics go into the backward ops."""
    r, c, offset = 30, 64, 17
    whole = make(source, (r, c, 0, offset, r))
    cuts = [0, 40, M]

    def chunk(begin, end):
        pairs = range(max(begin, offset), min(end, offset + r))
        first = (pairs.start - offset, pairs.start - begin) if pairs else (0, 0)
        anchors = (r, max(0, min(c, end) - begin), *first, len(pairs))
        captions = whole.captions[begin:end]
        return Batch(whole.images, captions, None, None, *anchors, whole.similarity)

    parts = [chunk(a, b) for a, b in itertools.pairwise(cuts)]
    _, g = upstream(whole, 6)
    scale = 9.0
    results = [OPS.negative_logsumexp(*part, None, scale, None, False)[:2] for part in parts]
    rows = torch.stack([scale * a[:r].double() + b[:r] for a, b in results]).logsumexp(0)
    reference = torch.zeros(r, dtype=torch.float64)
    d_images = torch.zeros_like(whole.images)
    d_captions = []
    for part, (a, b), begin in zip(parts, results, cuts, strict=False):
        own = slice(r + begin, r + begin + part.column_anchors)
        merged = torch.cat([reference, a[r:]]), torch.cat([rows, b[r:]])
        d_positive = torch.zeros(part.pair_count, dtype=torch.float64)
        to_rows, to_columns, _ = OPS.negative_logsumexp_backward(
            *part, None, scale, None, *merged, torch.empty(0, dtype=torch.float64), d_positive,
            torch.cat([g[:r], g[own]]), True, True, True,
        )  # fmt: skip
        d_images += to_rows
        d_captions.append(to_columns)

    def objective(attached):
        return weighted(oracle.logsumexp(attached, None, scale), g)

    check_gradients(whole, (d_images, torch.cat(d_captions)), objective, 1e-10)


@each_source
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 32, 44])
def test_poison(source, value, row):
    """Row 44 is an extra negative; with given scores, column 3 of it is an anchor's."""
    batch = make(source, ANCHORS["own rows, columns of all ranks"], torch.float32)
    batch.images[row, 3] = value
    ceiling, threshold = (
        ceilings(make(source, batch[4:9], torch.float32)),
        vector(make(source, batch[4:9], torch.float32), 3),
    )
    d_positive, g = upstream(batch, 8)
    needs = True, batch.captions is not None, False
    score, index = OPS.hardest_negatives(*batch, None)
    assert score.isnan().all()
    assert OPS.hardest_negatives(*batch, ceiling)[0].isnan().all()
    got = OPS.hardest_negatives_backward(*batch, score, index, d_positive, g, *needs)
    assert all(x.isnan().all() for x in got)
    reference, log_sum, saved = OPS.negative_logsumexp(*batch, ceiling, 3.0, None, False)
    assert log_sum.isnan().all()
    got = OPS.negative_logsumexp_backward(
        *batch, ceiling, 3.0, None, reference, log_sum, saved, d_positive, g, *needs
    )
    assert all(x.isnan().all() for x in got)
    total, active, saved = OPS.hinge_sum(*batch, ceiling, threshold, False)
    assert total.isnan().all() and (active == 0).all()
    got = OPS.hinge_sum_backward(*batch, ceiling, threshold, total, saved, d_positive, g, *needs)
    assert all(x.isnan().all() for x in got)
    entries = 3.0, None, torch.tensor(-2.0), True
    total, slope, saved = OPS.softplus_sum(*batch, *entries, False)
    assert total.isnan().all() and slope.isnan().all()
    got = OPS.softplus_sum_backward(*batch, *entries, total, saved, d_positive, g, *needs)
    assert all(x.isnan().all() for x in got)


@pytest.mark.parametrize("scale", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_scale_out_of_range_poisons(scale):
    batch = make("dot", ANCHORS["one process"], torch.float32)
    tensor = torch.tensor(scale)
    for options in ((scale, None), (1.0, tensor)):
        assert OPS.negative_logsumexp(*batch, None, *options, False)[1].isnan().all()
        total, slope, _ = OPS.softplus_sum(*batch, *options, torch.tensor(1.0), False, False)
        assert total.isnan().all() and slope.isnan().all()


@pytest.mark.parametrize("source", ["dot", "given"])
def test_large_offsets_do_not_absorb_the_logarithm(source):
    """Logits of 1e7: the sum of reference and logarithm would lose the latter."""
    batch = make(source, (300, 300, 0, 0, 300), torch.float32, n=300, m=300, d=4)
    batch.images.fill_(1e3 if source == "dot" else 4e6)
    if batch.captions is not None:
        batch.captions.fill_(1e3)
    reference, log_sum, _ = OPS.negative_logsumexp(*batch, None, 10.0, None, False)
    assert torch.equal(reference, torch.full_like(reference, 4e6))
    assert_close(log_sum, torch.full_like(log_sum, 299.0).log(), 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        dict(captions=torch.zeros(M, D - 1)),
        dict(captions=torch.zeros(M, D, dtype=torch.float64)),
        dict(row_anchors=N + 1),
        dict(column_anchors=M + 1),
        dict(row_anchors=-1),
        dict(pair_count=N + 1),
        dict(pair_row=N - 3),
        dict(pair_column=M - 3),
        dict(image_ids=torch.zeros(N - 1).long(), caption_ids=torch.zeros(M).long()),
        dict(image_ids=torch.zeros(N).long()),
        dict(similarity=2),
    ],
    ids=lambda change: "-".join(change),
)
def test_direct_calls_check_shapes(change):
    """Nothing is read out of bounds, whoever calls."""
    batch = make("dot", ANCHORS["one process"], torch.float32)._replace(**change)
    size = max(0, batch.row_anchors + batch.column_anchors)
    with pytest.raises(RuntimeError):
        OPS.hardest_negatives(*batch, None)
    with pytest.raises(RuntimeError):
        OPS.negative_logsumexp(*batch, None, 1.0, None, False)
    with pytest.raises(RuntimeError):
        OPS.hinge_sum(*batch, None, torch.zeros(size), False)
    with pytest.raises(RuntimeError):
        OPS.softplus_sum(*batch, 1.0, None, torch.tensor(0.0), False, False)


def test_direct_calls_check_vectors():
    batch = make("dot", ANCHORS["one process"], torch.float32)
    for wrong in (torch.zeros(65), torch.zeros(66, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            OPS.hardest_negatives(*batch, wrong)
        with pytest.raises(RuntimeError):
            OPS.hinge_sum(*batch, None, wrong, False)


@each_source
@pytest.mark.parametrize("needs", [(True, True, False), (True, False, False), (False, True, True)])
def test_opcheck(source, needs):
    """Schemas and fakes say what the kernels do."""
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    batch = make(source, ANCHORS["own rows, columns of all ranks"], torch.bfloat16, "groups")
    ceiling, threshold = ceilings(batch), vector(batch, 3)
    d_positive, g = upstream(batch, 1)

    def check(name, *options):
        op = getattr(OPS, name).default
        torch.library.opcheck(op, (*batch, *options), **checks)
        return op(*batch, *options)

    check("positive_scores")
    score, index = check("hardest_negatives", ceiling)
    check("hardest_negatives_backward", score, index, d_positive, g, *needs)
    for save in (True, False):
        scaled = ceiling, 0.0, torch.tensor(10.0)
        saved = check("negative_logsumexp", *scaled, save)
        check("negative_logsumexp_backward", *scaled, *saved, d_positive, g, *needs)
        total, _, scores = check("hinge_sum", ceiling, threshold, save)
        check("hinge_sum_backward", ceiling, threshold, total, scores, d_positive, g, *needs)
        entries = 0.0, torch.tensor(10.0), torch.tensor(-2.0), True
        total, _, scores = check("softplus_sum", *entries, save)
        check("softplus_sum_backward", *entries, total, scores, d_positive, g, *needs)


@pytest.mark.skipif(NAME != "cpu", reason="the cpu backend's saved tensors")
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_opcheck_of_small_losses(kind, need):
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    batch = make("dot", ANCHORS["one process"], torch.bfloat16, "groups")
    options = 33, kind, 0.0, torch.tensor(10.0), 0.2, 1.0, 0.5, True, True, True
    torch.library.opcheck(OPS.small_loss.default, (*batch[:4], *options), **checks)
    _, _, _, index, *saved = OPS.small_loss(*batch[:4], *options)
    arguments = *batch[:2], index, *saved, torch.tensor(2.0), *need
    torch.library.opcheck(OPS.small_loss_backward.default, arguments, **checks)
