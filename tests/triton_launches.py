"""Everything that the Triton backend launches on a GPU, noted without one: every op, in every
configuration that configs.py chooses for any size, in every dtype.

The tensors are on the meta device. Between batches, sizes and options vary together: "plain" ones are
multiples of 16, without ids and without a scale tensor, contiguous; "full" ones are ragged, with both,
and given scores transposed. sm_80 and float16 have full ones only: plain code does less of the same. Left
out are crossings of these: ids without a scale tensor, one pair among thousands of rows, and the like.
"""

import contextlib
import itertools
from typing import NamedTuple
from unittest import mock

import torch
from triton_aot import Launch, record_launches

from fused_vse.backends.triton import backward, configs, forward, gradients, walk

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


def noted(batch: Batch) -> Noted:
    device = configs.Device(multiprocessors=132, capability=batch.capability // 10)
    choose, launch_walk = configs.tiles_for, walk.Walk.launch
    chosen = set()

    def tiles_for(kind, rows, columns, device):
        tiles = choose(kind, rows, columns, device)
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
            for module in (walk, forward)
        ),
        # Library products, some of which know no meta tensors.
        *(mock.patch.object(module, "product", ignore) for module in (walk, gradients)),
        mock.patch.object(configs, "tiles_for", tiles_for),
        mock.patch.object(walk.Walk, "launch", launch),
    ]
    try:
        with contextlib.ExitStack() as stack, record_launches() as launches:
            for patch in patches:
                stack.enter_context(patch)
            for shape in batch.shapes:
                run = run_every_op_of_scores if batch.family == "scores" else run_every_op
                run(batch, dtype, *shape)
    finally:
        torch.set_float32_matmul_precision(before)
    return Noted({(batch.capability, *launch.key): launch for launch in launches}, chosen)


def ignore(*_, **__) -> None:
    pass


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device="meta")


def ids_and_scale(batch: Batch, dtype: torch.dtype, n: int, m: int):
    """(image_ids, caption_ids) and scale_tensor."""
    if not batch.full:
        return (None, None), None
    return (zeros(n), zeros(m)), zeros(dtype=torch.promote_types(dtype, torch.float32))


def run_every_op(batch: Batch, dtype: torch.dtype, n: int, m: int, k: int, d: int) -> None:
    """Every op of embeddings, in all variants that differ in code."""
    images, captions = zeros(n, d, dtype=dtype), zeros(m, d, dtype=dtype)
    ids, scale_tensor = ids_and_scale(batch, dtype, n, m)
    inputs, options = (images, captions, *ids), {"family": batch.family}
    positive, score, index = forward.hardest_negatives(*inputs, k, **options)
    for pairs in {k, configs.MAX_UNLISTED_PAIRS + 1}:
        upstream = score.new_zeros(pairs), score.new_zeros(2, pairs)
        backward.hardest_negatives_backward(
            *upstream, positive, index[:, :1].expand(2, pairs), images, captions, True, True, **options
        )  # fmt: skip
    for save in (True, False):
        positive, lse, scores = forward.negative_logsumexp(
            *inputs, k, 1.5, scale_tensor, save, **options
        )
        backward.negative_logsumexp_backward(
            positive, lse, lse, scores, *inputs, 1.5, scale_tensor, True, True, **options
        )
        positive, total, active, scores = forward.hinge_sum(*inputs, k, 0.2, save, **options)
        backward.hinge_sum_backward(
            positive, total, positive, active, scores, *inputs, 0.2, True, True, **options
        )
    if batch.family == "dot":
        normalized, inverse_norm = forward.l2_normalize(images)
        backward.l2_normalize_backward(normalized, normalized, inverse_norm)


def run_every_op_of_scores(batch: Batch, dtype: torch.dtype, n: int, m: int, k: int, _) -> None:
    ids, scale_tensor = ids_and_scale(batch, dtype, n, m)
    scores = zeros(m, n, dtype=dtype).t() if batch.full else zeros(n, m, dtype=dtype)
    positive, score, index = forward.hardest_negatives_of_scores(scores, *ids, k)
    backward.hardest_negatives_of_scores_backward(positive, score, positive, index, scores)
    positive, lse = forward.negative_logsumexp_of_scores(scores, *ids, k, 1.5, scale_tensor)
    backward.negative_logsumexp_of_scores_backward(
        positive, lse, lse, scores, *ids, 1.5, scale_tensor
    )
    positive, total, active = forward.hinge_sum_of_scores(scores, *ids, k, 0.2)
    backward.hinge_sum_of_scores_backward(positive, total, positive, active, scores, *ids, 0.2)
