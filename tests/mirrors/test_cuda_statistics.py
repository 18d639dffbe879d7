"""Which statistics of the cuda backend the Hopper kernels compute: recorders stand in for both namespaces."""

from types import SimpleNamespace

import pytest
import torch

from fused_vse import ops
from fused_vse.backends import cuda_statistics


class Recorder:
    """Ops that note their names and arguments; `takes` is what hopper_takes answers."""

    def __init__(self, prefix: str, calls: list, takes: bool = True):
        self.prefix, self.calls, self.takes = prefix, calls, takes

    def hopper_takes(self, images, captions) -> bool:
        return self.takes

    def __getattr__(self, name):
        return SimpleNamespace(default=lambda *x: self.calls.append((self.prefix + name, x)))


@pytest.fixture
def call(monkeypatch):
    def run(name, batch, *options, takes=True):
        calls = []
        monkeypatch.setattr(torch.ops, "fused_vse_triton", Recorder("triton ", calls))
        monkeypatch.setattr(torch.ops, "fused_vse_cuda", Recorder("cuda ", calls, takes))
        cuda_statistics._op(name, *batch, *options)
        ((called, arguments),) = calls
        assert arguments[: len(batch)] == batch
        return called, arguments[len(batch) :]

    return run


SMALL = torch.empty(600, 8, device="meta")
LARGE = torch.empty(1 + ops.MAX_SAVED_SCORES // 600, 8, device="meta")
OPTIONS = {  # behind the ceiling
    "hardest_negatives": (),
    "negative_logsumexp": (10.0, None, False),
    "hinge_sum": (LARGE, False),
}
each_statistic = pytest.mark.parametrize("name", OPTIONS)


def batch_of(captions=SMALL, similarity=ops.DOT):
    return ops.Batch(SMALL, captions, None, None, 600, 600, 0, 0, 600, similarity)


@each_statistic
def test_what_the_hopper_kernels_take_is_theirs(name, call):
    options = None, *OPTIONS[name]
    assert call(name, batch_of(), *options) == (f"cuda hopper_{name}", options)
    assert call(name, batch_of(), *options, takes=False) == (f"triton {name}", options)


@each_statistic
def test_ceilings_orders_and_given_scores_are_tritons(name, call):
    options = None, *OPTIONS[name]
    for batch in (batch_of(similarity=ops.ORDER), batch_of(captions=None)):
        assert call(name, batch, *options) == (f"triton {name}", options)
    options = LARGE, *OPTIONS[name]
    assert call(name, batch_of(), *options) == (f"triton {name}", options)


@pytest.mark.parametrize("name", ["negative_logsumexp", "hinge_sum"])
def test_scores_to_be_saved_are_tritons(name, call):
    *options, _ = None, *OPTIONS[name]
    assert call(name, batch_of(), *options, True) == (f"triton {name}", (*options, True))
    # S is too large to be saved, and the Hopper kernels are not even asked to.
    called = call(name, batch_of(captions=LARGE), *options, True)
    assert called == (f"cuda hopper_{name}", (*options, False))


@pytest.mark.parametrize("name", sorted(set(cuda_statistics.OPS) - set(OPTIONS)))
def test_everything_else_is_tritons(name, call):
    assert call(name, batch_of(), 1, 2, 3) == (f"triton {name}", (1, 2, 3))


def test_every_op_has_an_implementation():
    assert set(cuda_statistics.OPS) | {"small_loss", "small_loss_backward"} == set(ops.OPS)
