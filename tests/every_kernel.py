"""A small case of every kernel of csrc/cuda: `python every_kernel.py small` or `hopper`. Run under
compute-sanitizer by test_cuda_sanitizer.py."""

import itertools
import sys

import torch

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss

KERNELS = {
    "small": (
        "small_loss_kernel",
        "scale_gradients_kernel",
        "l2_normalize_kernel",
        "l2_normalize_backward_kernel",
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


def batches(dtypes, shapes):
    """Images, captions, ids of each, or None for both; all pairs but the last."""
    for dtype, (n, m, d), with_ids in itertools.product(dtypes, shapes, (False, True)):
        pair = [torch.randn(rows, d, device="cuda").to(dtype) for rows in (n, m)]
        ids = [torch.arange(rows, device="cuda") // 5 if with_ids else None for rows in (n, m)]
        yield *pair, *ids, min(n, m) - 1


def small():
    # More than a tile; aligned rows, long enough for a cluster that shares D, and others.
    dtypes, shapes = (torch.bfloat16, torch.float16, torch.float32), ((70, 72, 264), (130, 129, 35))
    for images, captions, image_ids, caption_ids, pairs in batches(dtypes, shapes):
        options = dict(image_ids=image_ids, caption_ids=caption_ids, num_pairs=pairs)
        leaves = [x.requires_grad_() for x in (images, captions)]
        all_negatives_loss(*leaves, normalize=True, backend="cuda", **options).backward()
        for loss in (hardest_negative_loss, hinge_loss):
            loss(*leaves, backend="cuda", **options).backward()


def hopper():
    # Several tiles, ragged, an odd number of rows of them; fewer steps along D than stages, and more.
    ops, shapes = torch.ops.fused_vse_cuda, ((300, 400, 8), (300, 200, 392))
    for batch in batches((torch.bfloat16, torch.float16), shapes):
        ops.hopper_hardest_negatives(*batch)
        for scale in (1e-3, 1e3):  # one exponential, and two
            ops.hopper_negative_logsumexp(*batch, scale, None)
        ops.hopper_hinge_sum(*batch, 0.2)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    torch.cuda.synchronize()
