"""Everything that the Triton backend launches on a GPU, noted without one: every op, in every
configuration that configs.py chooses for any size, in every dtype.

The tensors are on the meta device. Between batches, sizes and options vary together: "plain" ones are
multiples of 16, without ids, ceilings and a scale tensor, contiguous; "full" ones are ragged, with all of
these, and given scores transposed. sm_80 and float16 have full ones only: plain code does less of the same.
Left out are crossings: ids without a scale tensor, one pair among thousands of rows, and the like.
"""

import contextlib
import itertools
from typing import NamedTuple
from unittest import mock

import torch
from triton_aot import Launch, record_launches

from fused_vse import ops
from fused_vse.backends.triton import backward, configs, forward, plan

# Name and float32 matmul precision; the order similarity and given scores know no tf32.
DTYPES = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float64": (torch.float64, "highest"),
}
# N, M, K, D: plain and full. test_triton_compile.py checks that no size leads to other tiles.
SIZES = {
    "small": ((256, 256, 256, 1024), (45, 50, 33, 1031)),
    "medium": ((768, 768, 768, 64), (763, 771, 750, 72)),
    "large": ((2304, 2304, 2304, 64), (2300, 2311, 2297, 72)),
}
# Integers of 1 become part of the code: it has to compile, nobody waits for it.
ONES = [("dot", "bfloat16"), ("dot", "float32"), ("order", "float32"), ("scores", "float32")]
# The certified search with as many slots as it takes.
LARGEST_SEARCH = (128 * 1000, 128 * 1000, 128 * 1000, 64)


class Batch(NamedTuple):
    """What one test compiles; its name is the test's."""

    capability: int
    family: str
    dtype: str  # of DTYPES
    size: str
    full: bool

    def __str__(self) -> str:
        return "-".join(map(str, (*self[:4], "full" if self.full else "plain")))

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        if self.size == "one":
            return [(1, 1, 1, 1)]
        searches = (self.family, self.dtype, self.size) == ("dot", "float32", "large")
        return [SIZES[self.size][self.full], *([LARGEST_SEARCH] * (searches and not self.full))]


def batches() -> list[Batch]:
    families = ("dot", "order", "scores")
    return [
        Batch(capability, family, dtype, size, full)
        for capability, family, dtype, size, full in itertools.product(
            (80, 90), families, DTYPES, SIZES, (False, True)
        )
        if (family == "dot" or dtype != "tf32")
        and (full or (capability == 90 and dtype != "float16"))
    ] + [Batch(90, family, dtype, "one", False) for family, dtype in ONES]


class Noted(NamedTuple):
    launches: dict[tuple, Launch]  # by what they compile to
    chosen: set[tuple]  # (kind, capability, tiles) of configs.tiles_for


def noted(batch: Batch, amd: bool = False) -> Noted:
    device = configs.Device(multiprocessors=132, capability=batch.capability // 10, amd=amd)
    choose, launch_walk = configs.tiles_for, plan.Plan.launch
    chosen = set()

    def tiles_for(kind, rows, columns, device, *crowded):
        tiles = choose(kind, rows, columns, device, *crowded)
        chosen.add((kind, batch.capability, tiles))
        return tiles

    def launch(self, *args, **kwargs):
        launch_walk(self, *args, **kwargs)
        launches[-1] = launches[-1]._replace(tiles=self.tiles)

    dtype, precision = DTYPES[batch.dtype]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    patches = [
        *(
            mock.patch.object(module, "device_of", return_value=device)
            for module in (plan, forward)
        ),
        # Library products, some of which know no meta tensors.
        *(mock.patch.object(module, "product", ignore) for module in (plan, backward)),
        mock.patch.object(configs, "tiles_for", tiles_for),
        mock.patch.object(plan.Plan, "launch", launch),
    ]
    try:
        with contextlib.ExitStack() as stack, record_launches() as launches:
            for patch in patches:
                stack.enter_context(patch)
            for shape in batch.shapes:
                run_every_op(batch, dtype, *shape)
    finally:
        torch.set_float32_matmul_precision(before)
    return Noted({(batch.capability, *launch.key): launch for launch in launches}, chosen)


def ignore(*_, **__) -> None:
    pass


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device="meta")


def run_every_op(batch: Batch, dtype: torch.dtype, n: int, m: int, k: int, d: int) -> None:
    """Every op, in all variants that differ in code."""
    captions = None
    if batch.family != "scores":
        images, captions = zeros(n, d, dtype=dtype), zeros(m, d, dtype=dtype)
    else:
        images = zeros(m, n, dtype=dtype).t() if batch.full else zeros(n, m, dtype=dtype)
    wide = ops.accumulation_dtype(dtype)
    ids = (zeros(n), zeros(m)) if batch.full else (None, None)
    similarity = ops.ORDER if batch.family == "order" else ops.DOT
    inputs = ops.Batch(images, captions, *ids, k, k, 0, 0, k, similarity)
    scale = 1.5, zeros(dtype=wide) if batch.full else None
    vector, threshold = zeros(2 * k, dtype=wide), zeros(2 * k, dtype=wide)
    upstream, needs = (zeros(k, dtype=wide), vector), (True, True, False)
    forward.positive_scores(inputs)
    # Where registers are scarce, ids without ceilings, too: they may have other tiles.
    ceilings = [vector] * batch.full + [None] * (not batch.full or batch.size == "large")
    for ceiling in ceilings:
        forward.hardest_negatives(inputs, ceiling)
        for save in (True, False):
            *lse, scores = forward.negative_logsumexp(inputs, ceiling, *scale, save)
            backward.negative_logsumexp_backward(
                inputs, ceiling, *scale, *lse, scores, upstream[0], lse[1], *needs
            )
            total, _, scores = forward.hinge_sum(inputs, ceiling, threshold, save)
            backward.hinge_sum_backward(
                inputs, ceiling, threshold, total, scores, *upstream, *needs
            )
    for equal_positive in (False, True)[: 1 + batch.full]:
        for save in (True, False):
            entries = inputs, *scale, zeros(dtype=wide), equal_positive
            total, _, scores = forward.softplus_sum(*entries, save)
            backward.softplus_sum_backward(*entries, total, scores, *upstream, *needs)
    backward.hardest_negatives_backward(inputs, vector, zeros(2 * k), *upstream, *needs)
    if batch.size == "large" and captions is not None:
        # Few anchors among many rows look through all of each other.
        few = inputs._replace(row_anchors=1, column_anchors=1, pair_count=1)
        upstream = zeros(1, dtype=wide), vector[:2]
        backward.hardest_negatives_backward(few, vector[:2], zeros(2), *upstream, *needs)
