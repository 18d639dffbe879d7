"""Backends as a fixture, poisoned memory, what tests on a GPU share, and an assertion that shows the worst
element."""

import pytest
import torch
from cases import ids_of

import fused_vse
from fused_vse.backends import cpu

pytest_plugins = ["emulator.plugin", "few_cases"]


def _backend_parameters():
    for name, status in fused_vse.backends().items():
        # A backend for another device has tests of its own.
        if name in ("reference", "cpu"):
            skip = () if status == "available" else (pytest.mark.skip(reason=status),)
            yield pytest.param(name, marks=skip)


@pytest.fixture(params=_backend_parameters())
def backend(request) -> str:
    """Every backend that takes CPU tensors; a missing one skips with its reason."""
    return request.param


@pytest.fixture(params=[*_backend_parameters(), "cpu, composed"])
def loss_backend(request, monkeypatch) -> str:
    """The same for the losses, which the cpu backend computes in two ways: small ones as one op, others
    composed of the statistics. "cpu, composed" takes all of them the second way."""
    if request.param == "cpu, composed":
        if reason := cpu.unavailable():
            pytest.skip(reason)
        monkeypatch.setattr(cpu, "SMALL_ROWS", 0)
        return "cpu"
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch.empty gives NaN: an element that no kernel wrote shows. On a GPU, what PyTorch cannot do
    deterministically (its own backward) only warns."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    yield
    torch.use_deterministic_algorithms(False)


def ids_on(device, case):
    return [None if x is None else x.to(device) for x in ids_of(case)]


def differentiated(loss, pair, case, backend, upstream=1.0, **options):
    """The loss and both gradients."""
    pair = [x.detach().requires_grad_() for x in pair]  # no copy: a view stays one
    ids = ids_on(pair[0].device, case)
    keywords = {"image_ids": ids[0], "caption_ids": ids[1], "num_pairs": case.pairs}
    value = loss(*pair, backend=backend, **keywords, **options)
    (value.sum() * upstream).backward()
    return [value.detach(), *(x.grad for x in pair)]


def captured(step):
    """A CUDA graph of step(), and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    return graph, value


def assert_same(results, expected):
    """The same bits."""
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = ""
) -> None:
    """|actual - expected| <= tolerance * max(1, max |expected|), elementwise; names the worst element."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs()).nan_to_num(nan=torch.inf)
    finite = expected[expected.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    worst = int(error.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.flatten()[worst] <= tolerance * scale, (
        f"{what}: worst element at {position}: {actual.flatten()[worst]:.9g}, expected"
        f" {expected.flatten()[worst]:.9g}, tolerance {tolerance * scale:.3g}"
    )
