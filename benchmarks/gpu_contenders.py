"""What benchmarks.gpu compares, and at which sizes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
from fused_vse.backends.cuda import SMALL_ROWS
from fused_vse.ops import MAX_SAVED_SCORES


class Case(NamedTuple):
    loss: str  # with ", order" or ", scores" after it, where it is not of dot products
    size: int  # N = M = K
    dim: int  # 0 for given scores
    dtype: str


class Contender(NamedTuple):
    name: str
    function: (
        Callable  # (images, captions) or (scores) -> scalar loss, or a tensor without gradient
    )
    differentiable: bool
    entry_bytes: (
        float  # memory for each of the N^2 entries of S, roughly: to leave out what cannot fit
    )
    mode: str = "eager"  # "graph": replayed as one CUDA graph, and timed without Python
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
    Case("hardest, scores", 8192, 0, "bfloat16"),
    Case("all_negatives, scores", 8192, 0, "bfloat16"),
    Case("hinge_sum, scores", 128, 0, "float32"),
    Case("hardest, order", 128, 1024, "float32"),
    Case("hinge_sum, order", 128, 1024, "float32"),
    Case("hinge_sum, order", 1024, 1024, "float32"),
    Case("hardest, order", 8192, 1024, "bfloat16"),
]
TINY_CASES = [
    Case(loss + family, 8, 0 if family == ", scores" else 4, "float32")
    for family in ("", ", order", ", scores")
    for loss in ("hardest", "all_negatives", "hinge_sum")
]
# Where the launches, not the GPU, take the time.
SMALL = 1024


def dot_scores(images, captions):
    return images @ captions.T


def order_scores(images, captions):
    """As the trainers have it, by the tensor of all differences; the constant keeps the root off 0."""
    excess = (captions[None] - images[:, None]).clamp(min=0)
    return -(excess.square().sum(2) + 1e-12).sqrt()


def given_scores(scores):
    return scores


def eye_like(scores):
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)


def eager_hardest(scores):
    negative = scores.masked_fill(eye_like(scores), -torch.inf)
    positive = scores.diagonal()
    hinges = [(0.2 + negative.max(d).values - positive).relu() for d in (1, 0)]
    return (hinges[0] + hinges[1]).mean() / 0.1


def eager_all_negatives(scores):
    logits = scores / 0.1
    labels = torch.arange(len(logits), device=logits.device)
    return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)


def eager_hinge_sum(scores):
    positive, eye = scores.diagonal(), eye_like(scores)
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


# How eager PyTorch gets S.
SCORES = {"dot": dot_scores, "order": order_scores, "scores": given_scores}


def family_of(case: Case) -> str:
    """One of the keys of SCORES."""
    return case.loss.partition(", ")[2] or "dot"


def input_bytes(case: Case) -> int:
    """For each entry of S: the score and its gradient."""
    return 2 * width_of(case) if family_of(case) == "scores" else 0


def width_of(case: Case) -> int:
    return getattr(torch, case.dtype).itemsize


def eager_loss(case: Case) -> Callable:
    loss, scores = EAGER[case.loss.partition(", ")[0]], SCORES[family_of(case)]
    return lambda *inputs: loss(scores(*inputs))


def fused_loss(case: Case, backend: str) -> Callable:
    loss, family = FUSED[case.loss.partition(", ")[0]], family_of(case)
    if family == "scores":
        return lambda scores: loss(scores=scores, backend=backend)
    return lambda images, captions: loss(images, captions, similarity=family, backend=backend)


def fused_backend() -> str:
    return "triton" if torch.cuda.is_available() else "reference"


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def takes_cuda(case: Case) -> bool:
    """Where its own kernels compute a step: of small batches, and on Hopper of large ones in 16 bits, unless
    S is kept for the backward pass. It leaves the others to Triton, which contends already.
    """
    keeps_scores = case.loss != "hardest" and case.size**2 <= MAX_SAVED_SCORES
    takes_large = case.dtype == "bfloat16" and is_hopper() and not keeps_scores
    return (
        (case.size <= SMALL_ROWS or takes_large)
        and family_of(case) == "dot"
        and fused_vse.backends()["cuda"].startswith("available")
    )


def bare_gemm(images, captions):
    return images @ captions.T


def gemm_and_one_pass(images, captions):
    return (images @ captions.T).amax(1)


def contenders_of(case: Case) -> Iterator[Contender]:
    width, family = width_of(case), family_of(case)
    fused, eager = fused_loss(case, fused_backend()), eager_loss(case)
    # Eager PyTorch and its gradients hold several copies of S, and of all differences.
    eager_bytes = 6 * width + (4 * width * case.dim if family == "order" else 0)
    if family == "dot":
        yield Contender("bare GEMM", bare_gemm, False, width)
        yield Contender("GEMM + one pass", gemm_and_one_pass, False, width)
    yield Contender("fused", fused, True, 0)
    yield Contender("eager", eager, True, eager_bytes)
    compiled = torch.compile(eager) if torch.cuda.is_available() else eager
    yield Contender("torch.compile", compiled, True, eager_bytes - 2 * width, always_fresh=True)
    if case.size <= SMALL and family == "dot":
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
