"""The losses of a small batch in plain PyTorch, on any device: the error that is allowed."""

import torch
from cases import Case, ids_of
from torch import Tensor


def differentiated(
    name: str, pair, case: Case, temperature: float = 0.1, upstream: float | None = None
) -> list[Tensor]:
    """The loss and both gradients, at the embeddings' own dtype.

    With an upstream gradient as in mixed precision: S at the embeddings' dtype, all else in float32.
    """
    images, captions = [x.detach().requires_grad_() for x in pair]
    ids = [None if x is None else x.to(images.device) for x in ids_of(case)]
    if ids[0] is None:
        ids = [torch.arange(len(x), device=x.device) for x in (images, captions)]
    scores = images @ captions.T
    if upstream is not None:
        scores = scores.float()
    masked = scores.masked_fill(ids[0][:, None] == ids[1], -torch.inf)
    k, total = case.pairs, 0
    p = scores.diagonal()[:k]
    for s in (masked[:k], masked[:, :k].T):
        if name.startswith("all_negatives"):
            logsumexp = (torch.cat([p[:, None], s], 1) / temperature).logsumexp(1)
            total = total + logsumexp - p / temperature
        elif name == "hinge_sum":
            total = total + (0.2 + s - p[:, None]).relu().sum(1)
        else:
            v = 0.2 + s.max(1).values - p
            smooth = torch.nn.functional.softplus(v / temperature)
            total = total + {"hardest": v.relu() / temperature, "hardest_smooth": smooth}.get(
                name, v.relu()
            )
    value = total.mean()
    (value if upstream is None else value * upstream).backward()
    return [value.detach(), images.grad, captions.grad]


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
