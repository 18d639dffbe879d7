"""What benchmarks.gpu compares, and at which sizes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
from fused_vse.backends.cuda import SMALL_ROWS


class Case(NamedTuple):
    loss: str
    size: int  # N = M = K
    dim: int
    dtype: str


class Contender(NamedTuple):
    name: str
    function: Callable  # (images, captions) -> scalar loss, or a tensor without gradient
    differentiable: bool
    entry_bytes: (
        float  # memory for each of the N^2 entries of S, roughly: to leave out what cannot fit
    )
    mode: str = "eager"  # "graph": replayed as one CUDA graph
    always_fresh: bool = False  # compiled anew for every case


# For the choice between the cuda backend and Triton: one size for each that a trainer takes.
SMALL_BUCKETS = [
    ("all_negatives", 256, "bfloat16"),
    ("all_negatives", 512, "bfloat16"),
    ("hardest", 256, "bfloat16"),
    ("hardest", 512, "bfloat16"),
    ("all_negatives", 128, "float32"),
    ("hardest", 128, "float32"),
]

# The numbers that decide come first: the budget may not reach the end.
CASES = [
    Case("hardest", 32768, 1024, "bfloat16"),
    Case("all_negatives", 32768, 1024, "bfloat16"),
    Case("hardest", 128, 1024, "bfloat16"),
    Case("all_negatives", 128, 1024, "bfloat16"),
    Case("hardest", 32768, 1024, "float32"),
    Case("hardest", 131072, 1024, "bfloat16"),
    Case("all_negatives", 131072, 1024, "bfloat16"),
    Case("hardest", 32768, 256, "bfloat16"),
    Case("all_negatives", 8192, 512, "bfloat16"),
    Case("hinge_sum", 32768, 1024, "bfloat16"),
    Case("hardest", 1024, 1024, "bfloat16"),
    Case("all_negatives", 1024, 1024, "bfloat16"),
    Case("all_negatives", 32768, 256, "bfloat16"),
    Case("all_negatives", 8192, 1024, "float32"),
    Case("hardest", 8192, 512, "bfloat16"),
    Case("hinge_sum", 128, 1024, "bfloat16"),
    *(Case(loss, n, 1024, dtype) for loss, n, dtype in SMALL_BUCKETS),
    Case("all_negatives", 32768, 512, "bfloat16"),
    Case("hardest", 32768, 512, "bfloat16"),
    Case("hinge_sum", 8192, 512, "bfloat16"),
    Case("hardest", 512, 256, "float32"),
    Case("all_negatives", 512, 256, "float32"),
]
TINY_CASES = [Case(loss, 8, 4, "float32") for loss in ("hardest", "all_negatives", "hinge_sum")]
# Where the launches, not the GPU, take the time.
SMALL = 1024


def scores_of(images, captions):
    scores = images @ captions.T
    eye = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores, eye


def eager_hardest(images, captions):
    scores, eye = scores_of(images, captions)
    negative = scores.masked_fill(eye, -torch.inf)
    positive = scores.diagonal()
    hinges = [(0.2 + negative.max(d).values - positive).relu() for d in (1, 0)]
    return (hinges[0] + hinges[1]).mean() / 0.1


def eager_all_negatives(images, captions):
    logits = images @ captions.T / 0.1
    labels = torch.arange(len(logits), device=logits.device)
    return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)


def eager_hinge_sum(images, captions):
    scores, eye = scores_of(images, captions)
    positive = scores.diagonal()
    rows = (0.2 + scores - positive[:, None]).relu().masked_fill(eye, 0).sum()
    columns = (0.2 + scores - positive[None, :]).relu().masked_fill(eye, 0).sum()
    return rows + columns


EAGER = {
    "hardest": eager_hardest,
    "all_negatives": eager_all_negatives,
    "hinge_sum": eager_hinge_sum,
}
FUSED = {
    "hardest": hardest_negative_loss,
    "all_negatives": all_negatives_loss,
    "hinge_sum": hinge_loss,
}


def fused_backend() -> str:
    return "triton" if torch.cuda.is_available() else "reference"


def takes_cuda(case: Case) -> bool:
    """One launch for a small batch; 16 bits for a large one, whose kernels are for Hopper."""
    has_kernels = case.size <= SMALL_ROWS or case.dtype == "bfloat16"
    return has_kernels and fused_vse.backends()["cuda"].startswith("available")


def bare_gemm(images, captions):
    return images @ captions.T


def gemm_and_one_pass(images, captions):
    return (images @ captions.T).amax(1)


def contenders_of(case: Case) -> Iterator[Contender]:
    backend, width = fused_backend(), 2 if case.dtype == "bfloat16" else 4

    def fused(images, captions):
        return FUSED[case.loss](images, captions, backend=backend)

    eager = EAGER[case.loss]
    yield Contender("bare GEMM", bare_gemm, False, width)
    yield Contender("GEMM + one pass", gemm_and_one_pass, False, width)
    yield Contender("fused", fused, True, 0)
    yield Contender("eager", eager, True, 6 * width)
    compiled = torch.compile(eager) if torch.cuda.is_available() else eager
    yield Contender("torch.compile", compiled, True, 4 * width, always_fresh=True)
    if case.size <= SMALL:
        yield Contender("fused, graph", fused, True, 0, "graph")
        yield Contender("torch.compile, graph", compiled, True, 0, "graph", always_fresh=True)
        both = torch.compile(fused, fullgraph=True) if torch.cuda.is_available() else fused
        yield Contender("torch.compile of fused, graph", both, True, 0, "graph", always_fresh=True)
    if takes_cuda(case):

        def fused_cuda(images, captions):
            return FUSED[case.loss](images, captions, backend="cuda")

        yield Contender("fused (cuda)", fused_cuda, True, 0)
        if case.size <= SMALL_ROWS:
            yield Contender("fused (cuda), graph", fused_cuda, True, 0, "graph")
