"""Runs every CUDA kernel of csrc/cuda, host code included, in the PTX emulator and compares it with float64.

    python check_cuda.py --project PROJECT --folder BUILD [-k hopper] [--seeds 0,1,2] [--list] [--fail-fast]

A case is a batch, a GPU (compute capability and multiprocessors) and a seed: seed 0 completes asynchronous
operations at the latest legal moment, others choose random schedules. What the emulator reports (an access
out of bounds, a deadlock, a race) fails the case, and so does a write into a red zone. The ops are called as
they are; the oracle is tests/ops_oracle.py, on which small_loss is written out here. Scores of small
integers are exact, and then everything is compared with ==. Empty tensors are NaN, so that what no kernel
wrote shows.
"""

import argparse
import itertools
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cuda_ops
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import ops_oracle as oracle  # noqa: E402
from cases import Case, embeddings, integer_embeddings  # noqa: E402
from conftest import assert_close, assert_same  # noqa: E402
from hopper_batches import BATCHES, Anchored, in_float64, thresholds  # noqa: E402

from fused_vse.ops import ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM  # noqa: E402

AMPERE, HOPPER = (8, 0), (9, 0)
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
OPS = torch.ops.fused_vse_cuda


class Check(NamedTuple):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    seed: int
    run: Callable[[], None]


CHECKS: list[Check] = []
SEEDS = (0, 1, 2)
emulation: cuda_ops.Emulation = None


def add(name, machine, run, seeds=None):
    CHECKS.extend(Check(name, *machine, seed, run) for seed in (seeds or SEEDS))


def name_of(case, dtype) -> str:
    shape = case.case if isinstance(case, Anchored) else case
    return f"{shape}-{shape.rows}x{shape.columns}x{shape.dim}-{str(dtype).removeprefix('torch.')}"


def shape(n, m, k, d, ids=None) -> Case:
    return Case("batch", n, m, k, d, ids)


def expect_error(what: str, op, *arguments, **named) -> None:
    with pytest.raises(RuntimeError, match=re.escape(what)):
        op(*arguments, **named)


# --- Hopper statistics


def hopper(case: Anchored, dtype, scales=(10.0, 200.0), change=lambda batch: batch):
    """The three statistics of integers, which are exact, and log-sum-exp of unit rows, too."""

    def run():
        batch = change(case.batch(integer_embeddings, dtype))
        assert OPS.hopper_takes(*batch[:2])
        wide = in_float64(batch)
        score, index = OPS.hopper_hardest_negatives(*batch, None)
        expected, where = oracle.hardest_negatives(wide)
        assert_close(score, expected, 0, "score")
        assert torch.equal(index, where), "index"
        threshold = thresholds(batch)
        total, active, saved = OPS.hopper_hinge_sum(*batch, None, threshold, False)
        expected, count = oracle.hinge_sum(wide, None, threshold)
        assert_close(total, expected, 1e-7, "hinge_sum")
        assert torch.equal(active, count) and saved.numel() == 0, "active"
        unit = change(case.batch(embeddings, dtype))
        for scale in scales:
            check_logsumexp(unit, scale)

    return run


def check_logsumexp(batch, scale, tensor=True, bound=2e-6):
    wide = in_float64(batch)
    expected = oracle.logsumexp(wide, None, scale)
    options = (123.0, torch.tensor(scale, dtype=torch.float32)) if tensor else (scale, None)
    if tensor:  # which need not hold the same number
        expected = oracle.logsumexp(wide, None, options[1].double())
        scale = options[1].item()
    reference, log_sum, saved = OPS.hopper_negative_logsumexp(*batch, None, *options, False)
    assert reference.isfinite().all() and reference.dtype == FLOAT and saved.numel() == 0
    assert_close(scale * reference.double() + log_sum, expected, bound, f"logsumexp {scale}")


def hopper_values(case: Anchored, dtype, scale, normalize=True, factor=1.0):
    """Log-sum-exp alone, of rows of any length; no tensor."""

    def run():
        batch = case.batch(lambda *x: embeddings(*x, normalize=normalize), dtype)
        batch = batch._replace(images=batch.images * factor, captions=batch.captions * factor)
        check_logsumexp(batch, scale, tensor=False)

    return run


def hopper_large_logits(dtype, scale):
    """s differs by 4 where a s is 3e6 scale: the logarithm and the differences survive."""

    def run():
        batch = Anchored(shape(300, 300, 300, 8)).batch(dtype=dtype)
        batch.images.fill_(1e3), batch.captions.fill_(1e3)
        batch.captions[:, 3] = 1
        batch.images[::3, 3] += 4
        reference, log_sum, _ = OPS.hopper_negative_logsumexp(*batch, None, scale, None, False)
        wide = in_float64(batch)
        assert_close(reference, oracle.hardest_negatives(wide)[0], 0, "reference")
        difference = wide._replace(images=wide.images - wide.images[1])
        largest, _ = oracle.hardest_negatives(difference)
        want = oracle.logsumexp(difference, None, scale) - scale * largest
        assert_close(log_sum, want, 1e-6, "log_sum")

    return run


def hopper_poisoned(case: Anchored, dtype, side, row, column, value):
    def run():
        batch = case.batch(dtype=dtype)
        threshold = thresholds(batch)
        batch[side][row, column] = value
        score, index = OPS.hopper_hardest_negatives(*batch, None)
        assert score.isnan().all() and (index == -1).all(), "hardest"
        reference, log_sum, _ = OPS.hopper_negative_logsumexp(*batch, None, 10.0, None, False)
        assert reference.isnan().all() and log_sum.isnan().all(), "logsumexp"
        total, active, _ = OPS.hopper_hinge_sum(*batch, None, threshold, False)
        assert total.isnan().all() and (active == 0).all(), "hinge"

    return run


def hopper_bad_scale():
    batch = Anchored(shape(37, 37, 37, 24)).batch(dtype=BFLOAT)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        for options in ((value, None), (1.0, torch.tensor(value))):
            for result in OPS.hopper_negative_logsumexp(*batch, None, *options, False)[:2]:
                assert result.isnan().all(), value


def surrounded(batch):
    """Rows of a wider tensor, with NaN around them."""
    views = []
    for x in batch[:2]:
        around = torch.full((len(x) + 2, x.shape[1] + 24), torch.nan, dtype=x.dtype)
        around[1:-1, 8 : 8 + x.shape[1]] = x
        views.append(around[1:-1, 8 : 8 + x.shape[1]])
    return batch._replace(images=views[0], captions=views[1])


def hopper_repeats(case: Anchored, dtype):
    """The same bits on any number of multiprocessors and in any schedule."""

    def run():
        batch, first = case.batch(dtype=dtype), None
        for multiprocessors, seed in ((2, 0), (132, 1), (6, 2), (4, 3), (2, 4)):
            emulation.use(HOPPER, multiprocessors, seed)
            results = (
                *OPS.hopper_hardest_negatives(*batch, None),
                *OPS.hopper_negative_logsumexp(*batch, None, 30.0, None, False),
                *OPS.hopper_negative_logsumexp(*batch, None, 300.0, None, False),
                *OPS.hopper_hinge_sum(*batch, None, thresholds(batch), False),
            )
            first = first or results
            assert_same(results, first)

    return run


def hopper_refuses():
    good = Anchored(shape(16, 20, 16, 16)).batch(dtype=BFLOAT)
    assert OPS.hopper_takes(*good[:2])
    wrong = {
        "multiple of 8": torch.zeros(16, 20, dtype=BFLOAT),
        "bfloat16 or float16": torch.zeros(16, 16),
        "unit stride": torch.zeros(16, 32, dtype=BFLOAT)[:, ::2],
        "elements apart": torch.zeros(16, 20, dtype=BFLOAT)[:, :16],
        "16-byte boundary": torch.zeros(257, dtype=BFLOAT)[1:].view(16, 16),
    }
    for why, x in wrong.items():
        assert not OPS.hopper_takes(x, x), why
        expect_error(why, OPS.hopper_hardest_negatives, *good._replace(images=x, captions=x), None)
    ids = torch.zeros(16).long(), torch.zeros(20).long()
    for why, change in (
        ("captions must be given", {"captions": None}),
        ("similarity must be 0", {"similarity": 1}),
        ("both ids or none", {"image_ids": ids[0]}),
        ("number of image_ids must be in 16", {"image_ids": ids[1], "caption_ids": ids[1]}),
        ("number of caption_ids must be in 20", {"image_ids": ids[0], "caption_ids": ids[0]}),
        ("image_ids must be", {"image_ids": ids[0].int(), "caption_ids": ids[1]}),
        ("agree in dtype", {"captions": good.captions.half()}),
        ("row_anchors must be in 0 .. 16", {"row_anchors": 17}),
        ("column_anchors must be in 0 .. 20", {"column_anchors": -1}),
        ("pair_count must be in 0 .. 16", {"pair_count": 17}),
        ("pair_row must be in 0 .. 0", {"pair_row": 1}),
        ("pair_column must be in 0 .. 4", {"pair_column": 5}),
    ):
        expect_error(why, OPS.hopper_hardest_negatives, *good._replace(**change), None)
    zeros = torch.zeros(32)
    for x in (zeros[1:], zeros.double(), torch.zeros(33)):
        expect_error("threshold must hold 32", OPS.hopper_hinge_sum, *good, None, x, False)
    for x in (zeros, torch.zeros((), dtype=torch.float64)):
        expect_error(
            "scale_tensor must hold 1", OPS.hopper_negative_logsumexp, *good, None, 1.0, x, False
        )
    expect_error("no ceiling", OPS.hopper_hardest_negatives, *good, zeros)
    expect_error("no save_scores", OPS.hopper_hinge_sum, *good, None, zeros, True)
    emulation.use(AMPERE, 108)
    assert not OPS.hopper_takes(*good[:2])


def aligned(case: Anchored) -> Anchored:
    return case._replace(case=case.case._replace(dim=-(-case.case.dim // 8) * 8))


def hopper_checks():
    own = [
        shape(1, 1, 1, 8),
        shape(128, 192, 128, 64),
        shape(256, 192, 192, 64),
        shape(70, 201, 60, 136),
        shape(300, 500, 250, 72),
        shape(257, 385, 257, 328),
        shape(300, 400, 290, 136, "groups of five"),
        shape(140, 210, 130, 24, "extreme"),
        shape(260, 200, 190, 16, "all different"),
        shape(1, 300, 1, 16),
        shape(300, 1, 1, 16),
    ]
    for i, case in enumerate([*map(Anchored, own), *map(aligned, BATCHES)]):
        dtype, processors = (BFLOAT, HALF)[i % 2], (2, 4, 132)[i % 3]
        add(f"hopper-{name_of(case, dtype)}", (HOPPER, processors), hopper(case, dtype))
    many = Anchored(shape(520, 600, 510, 392))
    shifted = many._replace(anchors=(500, 590, 7, 80, 500))
    for dtype, case in itertools.product((BFLOAT, HALF), (many, shifted)):
        name = f"{name_of(case, dtype)}-{case.anchors}"
        for processors in (2, 4):
            add(f"hopper-many-{name}", (HOPPER, processors), hopper(case, dtype))
        run = hopper_values(case, dtype, 100.0, normalize=False)
        add(f"hopper-lse-unnormalised-{name}", (HOPPER, 4), run, (0, 1))
    # More than a group of cluster rows.
    tall = Anchored(shape(2200, 400, 390, 8, "groups of five"))
    for dtype, processors in ((BFLOAT, 4), (HALF, 132)):
        add(f"hopper-tall-{dtype}", (HOPPER, processors), hopper(tall, dtype, (5.0,)), (0, 1))
    # Temperatures at the edges of the one-exponential path.
    edge = Anchored(shape(200, 210, 190, 72))
    for scale in (1e-3, 80.0, 84.0, 86.0, 1000.0):
        add(f"hopper-lse-scale{scale}", (HOPPER, 4), hopper_values(edge, BFLOAT, scale), (0, 1))
    large = hopper_values(edge, HALF, 1.0, normalize=False, factor=30.0)
    add("hopper-lse-large", (HOPPER, 4), large, (0, 1))
    add("hopper-lse-tiny", (HOPPER, 4), hopper_values(edge, HALF, 1e6, factor=1e-3), (0, 1))
    for scale in (1.0, 0.01, 1e4):
        add(f"hopper-lse-logits{scale}", (HOPPER, 4), hopper_large_logits(BFLOAT, scale), (0, 1))
    add("hopper-lse-bad-scale", (HOPPER, 4), hopper_bad_scale, (0,))
    nasty = Anchored(shape(150, 210, 140, 72, "groups of five"), (120, 0, 0, 0, 0))
    for i, (side, row, column) in enumerate(((0, 0, 0), (0, 149, 71), (1, 209, 64), (1, 3, 5))):
        for value in (torch.nan, torch.inf, -torch.inf):
            run = hopper_poisoned(nasty, (BFLOAT, HALF)[i % 2], side, row, column, value)
            add(f"hopper-poison{side}.{row}.{column}-{value}", (HOPPER, 4), run, (0,))
    for dtype in (BFLOAT, HALF):
        case = Anchored(shape(150, 210, 140, 72))
        run = hopper(case, dtype, change=surrounded)
        add(f"hopper-views-{dtype}", (HOPPER, 4), run, (0, 1))
    for case in (
        Anchored(shape(300, 500, 250, 72, "groups of five")),
        Anchored(shape(270, 400, 270, 328), (270, 390, 0, 100, 270)),
    ):
        add(f"hopper-same-bits-{case.case.rows}", (HOPPER, 2), hopper_repeats(case, BFLOAT), (0,))
    add("hopper-refuses", (HOPPER, 4), hopper_refuses, (0,))


def pieces_checks():
    """For a library with a small workspace: S in pieces, and column totals carried from one to the next."""
    for case, dtype in (
        (Anchored(shape(700, 250, 240, 40)), BFLOAT),
        (Anchored(shape(600, 420, 400, 24, "groups of five")), HALF),
        (Anchored(shape(530, 300, 300, 72), (530, 290, 230, 0, 300)), HALF),
        (Anchored(shape(530, 300, 300, 24), (100, 290, 20, 100, 200)), BFLOAT),
        (Anchored(shape(530, 300, 300, 24), (0, 290, 0, 0, 0)), HALF),
    ):
        for processors in (2, 4, 6):
            name = f"pieces-{name_of(case, dtype)}-{case.anchors}"
            add(name, (HOPPER, processors), hopper(case, dtype), (0, 1))


# --- the small loss

LOSSES = {  # kind, alpha, margin
    "all_negatives": (ALL_NEGATIVES, 10.0, 0.0),
    "all_negatives_margin": (ALL_NEGATIVES, 10.0, 0.15),
    "all_negatives_cold": (ALL_NEGATIVES, 100.0, 0.0),
    "hardest": (HARDEST, 10.0, 0.2),
    "hardest_smooth": (HARDEST_SMOOTH, 10.0, 0.1),
    "hinge_sum": (HINGE_SUM, 1.0, 0.2),
    "hinge_max": (HARDEST, 1.0, 0.3),
}


class Options(NamedTuple):
    kind: int
    alpha: float
    margin: float
    weights: tuple[float, float] = (1.0, 1.0)
    mean: bool = True
    upstream: float = 1.0


def call_small(pair, ids, k, x: Options, tensor=False, need=(True, True)):
    scale = (123.0, torch.tensor(x.alpha)) if tensor else (x.alpha, None)
    return OPS.small_loss(*pair, *ids, k, x.kind, *scale, x.margin, *x.weights, x.mean, *need)


def small_step(case: Case, pair, x: Options, tensor=False):
    """loss, d_images, d_captions, d_scale; positive, score, index."""
    batch = Anchored(case).batch(lambda *_: pair)
    loss, positive, score, index, *saved = call_small(pair, batch[2:4], case.pairs, x, tensor)
    gradients = OPS.small_loss_backward(*pair, index, *saved, torch.tensor(x.upstream), True, True)
    return [loss, *gradients], [positive, score, index]


def expected_step(case: Case, pair, x: Options):
    """The same in float64, differentiated by autograd."""
    batch = Anchored(case).batch(lambda *_: pair)
    leaves = [y.double().requires_grad_() for y in pair]
    alpha = torch.tensor(x.alpha, dtype=torch.float64, requires_grad=True)
    attached, k = batch._replace(images=leaves[0], captions=leaves[1]), case.pairs
    positive = oracle.positive_scores(attached).repeat(2)
    score, index = oracle.hardest_negatives(attached)
    exists = index >= 0
    scores, where = oracle.scores_of(attached), index.clamp(min=0)
    anchor = torch.arange(k)
    hardest = torch.cat([scores.s[anchor, where[:k]], scores.s[where[k:], anchor]])
    if x.kind == HINGE_SUM:
        sides = [
            (oracle.anchors_of(batch, scores.s)[i], oracle.anchors_of(batch, negative)[i])
            for i, negative in enumerate(scores.counts)
        ]
        threshold = (positive[:k] - x.margin)[:, None]
        values = torch.cat([((s - threshold).relu() * negative).sum(1) for s, negative in sides])
    elif x.kind == ALL_NEGATIVES:
        lse = oracle.logsumexp(attached, None, alpha)
        z = torch.where(exists, lse, 0.0) + alpha * (x.margin - positive)
        values = torch.nn.functional.softplus(z, threshold=1e9)
    else:
        v = alpha * (hardest - positive + x.margin)
        smooth = torch.nn.functional.softplus(v, threshold=1e9)
        values = smooth if x.kind == HARDEST_SMOOTH else v.relu()
    values = torch.where(exists, values, 0.0).view(2, k)
    loss = (values.sum(1) * torch.tensor(x.weights, dtype=torch.float64)).sum()
    loss = loss / k if x.mean else loss
    results = torch.autograd.grad(loss, [*leaves, alpha], allow_unused=True)
    results = [
        torch.zeros_like(y) if g is None else g * x.upstream
        for g, y in zip(results, [*leaves, alpha], strict=True)
    ]
    return [loss.detach(), *results], [positive[:k].detach(), score, index]


def small(case: Case, dtype, name, change=lambda pair: pair, tensor=False, **options):
    def run():
        x = Options(*LOSSES[name])._replace(**options)
        pair = change(embeddings(case, dtype))
        actual, _ = small_step(case, pair, x, tensor)
        expected, _ = expected_step(case, pair, x)
        bound = 2e-6 * max(x.alpha, 10.0)
        assert_close(actual[0], expected[0], bound, "loss")
        what = "d_images", "d_captions", "d_scale"
        for name_, got, want in zip(what, actual[1:], expected[1:], strict=True):
            assert got.dtype == (FLOAT if name_ == "d_scale" else dtype)
            scale = max(float(want.abs().max()), 1e-3)
            assert_close(got / scale, want / scale, bound + 2 * torch.finfo(dtype).eps, name_)

    return run


def small_exact(case: Case, dtype):
    def run():
        pair = integer_embeddings(case, dtype)
        for kind, alpha, margin in (
            (HARDEST, 2.0, 1.0),
            (HARDEST, 1.0, 1.0),
            (HINGE_SUM, 1.0, 2.0),
        ):
            x = Options(kind, alpha, margin, mean=False)
            actual, statistics = small_step(case, pair, x)
            expected, wanted = expected_step(case, pair, x)
            assert_close(actual[0], expected[0], 0, "loss")
            for got, want in zip(actual[1:3], expected[1:3], strict=True):
                assert torch.equal(got, want.to(dtype)), "gradient"
            for what, got, want in zip(
                ("positive", "score", "index"), statistics, wanted, strict=True
            ):
                assert_close(got, want, 0, what)

    return run


def small_needs(case: Case, dtype):
    """Each of the gradients alone, weights of the directions, sum and mean."""

    def run():
        pair, ids = embeddings(case, dtype), Anchored(case).batch()[2:4]
        weights = ((1.0, 1.0), True), ((0.25, 2.0), False), ((1.0, 0.0), True), ((0.0, 0.0), True)
        for (kind, alpha, margin), (weight, mean) in itertools.product(LOSSES.values(), weights):
            x = Options(kind, alpha, margin, weight, mean)
            both = call_small(pair, ids, case.pairs, x)
            upstream = torch.tensor(0.3)
            for need in ((True, False), (False, True), (False, False)):
                some = call_small(pair, ids, case.pairs, x, need=need)
                assert_same(some[:5], both[:5])
                step = OPS.small_loss_backward(*pair, *some[3:], upstream, *need)
                for got, unit, gradient, needed in zip(
                    some[5:], both[5:], step[:2], need, strict=True
                ):
                    if needed:
                        assert torch.equal(got, unit)
                        assert torch.equal(gradient, (unit * upstream).to(dtype))
                    else:
                        assert got.numel() == 0 and gradient.shape == (0,)
                assert torch.equal(step[2], some[4] * upstream)

    return run


def small_poisoned(case: Case, dtype, side, row, column, value):
    def run():
        for kind, alpha, margin in LOSSES.values():
            pair = embeddings(case, dtype)
            pair[side][row, column] = value
            pair[1 - side][:, column] = 0  # 0 * inf
            results, statistics = small_step(case, pair, Options(kind, alpha, margin))
            assert all(x.isnan().all() for x in (*results, *statistics[:2])), kind
            assert (statistics[2] == -1).all()

    return run


def small_bad_temperature():
    case = shape(37, 37, 37, 24)
    pair = embeddings(case, FLOAT)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        x = Options(ALL_NEGATIVES, value, 0.0)
        loss, positive, score, index, *saved = call_small(pair, (None, None), 37, x, tensor=True)
        assert all(y.isnan().all() for y in (loss, positive, score, *saved)), value
        assert (index == -1).all()


def small_repeats(case: Case, dtype, capability, processors):
    """The same bits in any schedule and on any number of multiprocessors that leaves the cluster as it is."""

    def run():
        pair, ids = embeddings(case, dtype), Anchored(case).batch()[2:4]
        for kind, alpha, margin in LOSSES.values():
            first = None
            for multiprocessors, seed in zip(processors, (0, 1, 2, 3), strict=True):
                emulation.use(capability, multiprocessors, seed)
                result = call_small(pair, ids, case.pairs, Options(kind, alpha, margin))
                first = first or result
                assert_same(result, first)

    return run


def small_refuses():
    images, captions = torch.ones(5, 8).half(), torch.ones(6, 8).half()
    good = dict(
        images=images, captions=captions, image_ids=None, caption_ids=None, num_pairs=5, kind=0,
        scale=1.0, scale_tensor=None, margin=0.0, image_weight=1.0, caption_weight=1.0, mean=True,
        need_images=True, need_captions=True,
    )  # fmt: skip
    for why, change in (
        ("agree in dtype", {"captions": torch.ones(6, 8)}),
        ("[N, D] and [M, D]", {"captions": torch.ones(8).half()}),
        ("dimension of captions", {"captions": torch.ones(6, 9).half()}),
        ("both ids or none", {"image_ids": torch.arange(5)}),
        ("number of caption_ids", {"image_ids": torch.arange(5), "caption_ids": torch.arange(5)}),
        ("image_ids must", {"image_ids": torch.arange(5).int(), "caption_ids": torch.arange(6)}),
        ("image_ids must", {"image_ids": torch.ones(5, 1).long(), "caption_ids": torch.arange(6)}),
        ("row_anchors must be in 0 .. 5, got 6", {"num_pairs": 6}),
        ("num_pairs must be at least 1", {"num_pairs": 0}),
        ("unknown kind of loss: 4", {"kind": 4}),
        ("scale_tensor must hold 1", {"scale_tensor": torch.ones((), dtype=torch.float64)}),
        ("scale_tensor must hold 1", {"scale_tensor": torch.ones(2)}),
        ("takes float16", {"images": images.double(), "captions": captions.double()}),
        ("at most 512", {"captions": torch.ones(513, 8).half()}),
    ):
        expect_error(why, OPS.small_loss, **good | change)
    _, _, _, index, *saved = OPS.small_loss(**good)
    arguments = dict(
        zip(("index", "d_scale", "saved_one", "saved_two"), (index, *saved), strict=True),
        images=images, captions=captions, upstream=torch.ones(()), need_images=True,
        need_captions=True,
    )  # fmt: skip
    for why, change in (
        ("upstream must hold 1", {"upstream": torch.ones(2)}),
        ("upstream must hold 1", {"upstream": torch.ones((), dtype=torch.float64)}),
        ("d_scale must hold 1", {"d_scale": torch.ones(0)}),
        ("saved_one must hold 40", {"saved_one": saved[1][1:]}),
        ("saved_two must hold 48", {"saved_two": torch.ones(0)}),
        ("agree in dtype", {"captions": torch.ones(6, 8)}),
        ("[N, D] and [M, D]", {"images": torch.ones(40).half()}),
    ):
        expect_error(why, OPS.small_loss_backward, **arguments | change)


def strided(pair):
    images, captions = pair
    around = torch.full((len(images), 2 * images.shape[1] + 3), torch.nan, dtype=images.dtype)
    around[:, 3::2] = images
    shifted = torch.empty(captions.numel() + 1, dtype=captions.dtype)[1:].view(captions.shape)
    return around[:, 3::2], shifted.copy_(captions)


MACHINES = ((AMPERE, 3), (AMPERE, 108), (HOPPER, 3), (HOPPER, 132))
DTYPES = (BFLOAT, HALF, FLOAT)


def small_checks():
    few = [
        shape(1, 1, 1, 5),
        shape(2, 2, 2, 8),
        shape(37, 37, 37, 19),
        shape(9, 9, 9, 1),
        shape(12, 12, 12, 257),
        shape(21, 67, 21, 16),
        shape(67, 21, 21, 16),
        shape(45, 50, 33, 24),
        shape(30, 40, 1, 8),
        shape(50, 61, 34, 12, "groups of five"),
        shape(17, 17, 17, 6, "all equal"),
        shape(18, 18, 18, 10, "unrelated"),
        shape(33, 40, 20, 7, "extreme"),
    ]
    tiles = [
        shape(131, 70, 70, 33),
        shape(64, 64, 64, 64),
        shape(70, 130, 65, 72, "groups of five"),
    ]
    for (i, case), (j, dtype) in itertools.product(enumerate([*few, *tiles]), enumerate(DTYPES)):
        seeds = SEEDS[(i + j) % len(SEEDS) :][:1] if case in few else SEEDS
        for machine in (MACHINES[(i + j) % 2], MACHINES[2 + (i + j) % 2]):
            for name in LOSSES:
                run = small(case, dtype, name, tensor=i % 2 == 1, upstream=(1.0, 0.3)[j % 2])
                add(f"small-{name}-{name_of(case, dtype)}", machine, run, seeds)
        if case.dim <= 33:
            run = small_exact(case, dtype)
            add(f"small-exact-{name_of(case, dtype)}", MACHINES[(i + j) % 4], run, seeds[:1])
    # Clusters of 2, 4 and 8 that share D; more tiles than blocks.
    clusters = (
        shape(40, 70, 40, 136),
        shape(70, 60, 60, 264, "groups of five"),
        shape(60, 40, 33, 520),
    )
    for case, dtype, processors, name in itertools.product(clusters, DTYPES, (4, 7, 132), LOSSES):
        label = f"small-cluster-{name}-{name_of(case, dtype)}"
        add(label, (HOPPER, processors), small(case, dtype, name), (0, 1))
    # Several tiles of S for each cluster, one after the other.
    for case in (shape(130, 70, 70, 136, "groups of five"), shape(70, 130, 66, 520)):
        for i, name in enumerate(LOSSES):
            dtype = DTYPES[i % 3]
            label = f"small-tiles-{name}-{name_of(case, dtype)}"
            add(label, (HOPPER, 2), small(case, dtype, name), (0, 1, 2))
    for dtype in DTYPES:
        case = shape(70, 72, 65, 80, "groups of five")
        name = name_of(case, dtype)
        for machine in (MACHINES[1], MACHINES[2]):
            add(f"small-needs-{name}", machine, small_needs(case, dtype), (0,))
            for loss in LOSSES:
                options = dict(weights=(0.25, 2.0), mean=False, upstream=0.3)
                run = small(case, dtype, loss, tensor=True, **options)
                add(f"small-weights-{loss}-{name}", machine, run, (1,))
            for value, place in zip(
                (torch.nan, torch.inf, -torch.inf),
                ((0, 0, 0), (1, 71, 79), (0, 69, 33)),
                strict=True,
            ):
                run = small_poisoned(case, dtype, *place, value)
                add(f"small-poison-{value}-{name}", machine, run, (0,))
        for machine in (MACHINES[0], MACHINES[3]):
            run = small(case, dtype, "all_negatives", strided)
            add(f"small-views-{name}", machine, run, (0, 1))
        for capability, processors in ((AMPERE, (108, 1, 2, 5)), (HOPPER, (132, 132, 16, 8))):
            run = small_repeats(case, dtype, capability, processors)
            add(f"small-same-bits-{name}", (capability, processors[0]), run, (0,))
    # GPUs that run the code of sm_80, some with 100 KiB of shared memory: no clusters there.
    other = shape(70, 130, 65, 72)
    for capability, dtype, name in itertools.product(
        ((8, 6), (8, 9), (10, 0), (12, 0)), (BFLOAT, FLOAT), ("all_negatives", "hinge_sum")
    ):
        label = f"small-other-{name}-{name_of(other, dtype)}"
        add(label, (capability, 5), small(other, dtype, name), (0,))
    for machine in (MACHINES[1], MACHINES[3]):
        add("small-bad-temperature", machine, small_bad_temperature, (0,))
        add("small-refuses", machine, small_refuses, (0,))
    # More entries than threads: the loop over the grid.
    add("small-large", (HOPPER, 132), small(shape(40, 512, 40, 700), HALF, "hardest"), (0,))


def main() -> None:
    global emulation, SEEDS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--folder", type=Path, default=Path("build-emulated"))
    parser.add_argument(
        "--small-workspace", action="store_true", help="S in pieces of one row of cluster tiles"
    )
    parser.add_argument("--library", type=Path, help="one that was built before")
    parser.add_argument("-k", default="", help="what the names must contain; several with commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth case")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--fail-fast", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    SEEDS = tuple(int(x) for x in arguments.seeds.split(","))
    torch.set_num_threads(1)
    if arguments.small_workspace:
        pieces_checks()
    else:
        hopper_checks()
        small_checks()
    wanted = arguments.k.split(",")
    checks = [x for x in CHECKS if any(word in x.name for word in wanted)][:: arguments.every]
    if arguments.fail_fast:
        checks.sort(key=lambda x: x.seed)
    if arguments.list:
        print(
            *(f"{x.name} {x.capability} {x.multiprocessors} seed {x.seed}" for x in checks),
            sep="\n",
        )
        print(len(checks))
        return
    library = arguments.library or cuda_ops.build(
        arguments.project, arguments.folder, small_workspace=arguments.small_workspace
    )
    emulation = cuda_ops.Emulation(library)
    failed, seconds = [], time.time()
    for check in checks:
        emulation.use(check.capability, check.multiprocessors, check.seed)
        emulation.damage(), emulation.launches()
        major, minor = check.capability
        label = f"{check.name} sm_{major}{minor}x{check.multiprocessors} seed {check.seed}"
        started, why = time.time(), ""
        try:
            check.run()
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - any is a finding
            why = str(error).strip() or traceback.format_exc(limit=-1)
            if not isinstance(error, (AssertionError, RuntimeError)):
                why = traceback.format_exc(limit=-3)
        why += emulation.damage()
        if why:
            failed.append(label)
        if why or arguments.verbose:
            result = "FAILED" if why else "ok"
            print(result, f"{time.time() - started:6.2f} s", label, why[:1500], flush=True)
        if why and arguments.fail_fast:
            break
    print(f"{len(checks)} cases, {len(failed)} failed, {time.time() - seconds:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
