"""A small case of every kernel of csrc/cuda: `python every_kernel.py small` or `hopper`. Run under
compute-sanitizer by test_cuda_sanitizer.py."""

import itertools
import sys

import torch
from cases import embeddings
from hopper_batches import SEVERAL_TILES, thresholds

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss

KERNELS = {
    "small": (
        "small_loss_kernel",
        "small_loss_backward_kernel",
    ),
    "hopper": (
        "survey_kernel",
        "id_ranges_kernel",
        "statistics_kernel",
        "hardest_finish_kernel",
        "logsumexp_merge_kernel",
        "hinge_merge_kernel",
    ),
}


def small():
    # More than a tile; aligned rows, long enough for a cluster that shares D, and others.
    dtypes, shapes = (torch.bfloat16, torch.float16, torch.float32), ((70, 72, 264), (130, 129, 35))
    for dtype, (n, m, d), with_ids in itertools.product(dtypes, shapes, (False, True)):
        pair = [torch.randn(x, d, device="cuda").to(dtype).requires_grad_() for x in (n, m)]
        ids = [torch.arange(x, device="cuda") // 5 if with_ids else None for x in (n, m)]
        options = dict(image_ids=ids[0], caption_ids=ids[1], num_pairs=min(n, m) - 1)
        for loss in (all_negatives_loss, hardest_negative_loss, hinge_loss):
            loss(*pair, backend="cuda", **options).backward()


def hopper():
    ops = torch.ops.fused_vse_cuda
    for i, case in enumerate(SEVERAL_TILES):
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        dim = (8, 392)[i // 2 % 2]  # fewer steps along D than stages, and more
        case = case._replace(case=case.case._replace(dim=dim))
        batch = case.batch(embeddings, dtype, "cuda")
        ops.hopper_hardest_negatives(*batch, None)
        for scale in (1e-3, 1e3):  # one exponential, and two
            ops.hopper_negative_logsumexp(*batch, None, scale, None, False)
        ops.hopper_hinge_sum(*batch, None, thresholds(batch), False)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    torch.cuda.synchronize()
