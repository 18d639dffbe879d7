"""Which batches the cuda backend takes, what `auto` makes of it, and which kernels compute its statistics.
Recorders stand in for the namespaces of the ops."""

from types import SimpleNamespace

import pytest
import torch
from cases import CASES, embeddings

from fused_vse import dispatch, ops
from fused_vse.backends import cuda, cuda_statistics


def batch_of(images, captions, anchors=None, similarity=ops.DOT):
    k = len(images)
    return ops.Batch(images, captions, None, None, *(anchors or (k, k, 0, 0, k)), similarity)


def test_auto_does_not_choose_what_was_never_measured(monkeypatch):
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert dispatch.backends()["cuda"] == (
        "available on request; not chosen by auto: never measured on a GPU"
    )
    monkeypatch.setattr(dispatch, "_BACKENDS", {"cuda": cuda})
    monkeypatch.setattr(cuda, "takes", lambda op, batch: None)  # some ops need Triton
    batch = batch_of(*embeddings(CASES[2], torch.float32))
    with pytest.warns(UserWarning, match="cuda: .*not chosen by auto: never measured"):
        assert dispatch.choose("auto", "hinge_sum", batch) == dispatch.REFERENCE


@pytest.mark.parametrize("op", ops.OPS)
def test_auto_prefers_nothing_that_was_never_measured(op):
    x = torch.empty(128, 1024, dtype=torch.bfloat16, device="meta")
    assert cuda.prefers(op, batch_of(x, x)) is False


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((512, 1 << 16), {}, None),
        ((513, 4), {}, "takes at most 512 images and captions"),
        ((4, 4), {"dtype": torch.float64}, "takes float16, bfloat16 and float32 embeddings"),
        ((2, (1 << 16) + 1), {}, "takes embeddings of at most 65536 dimensions"),
        ((4, 4), {"similarity": ops.ORDER}, "has small_loss for the dot product of embeddings"),
        ((4, 4), {"given": True}, "has small_loss for the dot product of embeddings"),
        ((4, 4), {"anchors": (4, 4, 0, 1, 3)}, "has small_loss for the pairs of one process"),
        ((4, 4), {"anchors": (4, 0, 0, 0, 4)}, "has small_loss for the pairs of one process"),
    ],
)
def test_what_small_loss_does_not_take_is_named(shape, options, message):
    options = dict(options)
    x = torch.empty(shape, dtype=options.pop("dtype", torch.float32), device="meta")
    captions = None if options.pop("given", False) else x
    assert cuda.takes("small_loss", batch_of(x, captions, **options)) == message


@pytest.mark.parametrize("op", ops.STATISTICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_statistics_need_triton(op, dtype, monkeypatch):
    x = torch.empty(600, 24, dtype=dtype, device="meta")
    for similarity, captions in ((ops.DOT, x), (ops.ORDER, x), (ops.DOT, None)):
        batch = batch_of(x, captions, similarity=similarity)
        monkeypatch.setattr(cuda, "_HAS_TRITON", True)
        assert cuda.takes(op, batch) is None
        monkeypatch.setattr(cuda, "_HAS_TRITON", False)
        assert (
            cuda.takes(op, batch)
            == f"has no {op} without Triton; install it with `pip install triton`"
        )


# --- which of the statistics the Hopper kernels compute


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


@each_statistic
def test_what_the_hopper_kernels_take_is_theirs(name, call):
    options = None, *OPTIONS[name]
    batch = batch_of(SMALL, SMALL)
    assert call(name, batch, *options) == (f"cuda hopper_{name}", options)
    assert call(name, batch, *options, takes=False) == (f"triton {name}", options)


@each_statistic
def test_ceilings_orders_and_given_scores_are_tritons(name, call):
    options = None, *OPTIONS[name]
    for batch in (batch_of(SMALL, SMALL, similarity=ops.ORDER), batch_of(SMALL, None)):
        assert call(name, batch, *options) == (f"triton {name}", options)
    options = LARGE, *OPTIONS[name]
    assert call(name, batch_of(SMALL, SMALL), *options) == (f"triton {name}", options)


@pytest.mark.parametrize("name", ["negative_logsumexp", "hinge_sum"])
def test_scores_to_be_saved_are_tritons(name, call):
    *options, _ = None, *OPTIONS[name]
    saved = call(name, batch_of(SMALL, SMALL), *options, True)
    assert saved == (f"triton {name}", (*options, True))
    # S is too large to be saved, and the Hopper kernels are not even asked to.
    called = call(name, batch_of(SMALL, LARGE), *options, True)
    assert called == (f"cuda hopper_{name}", (*options, False))


@pytest.mark.parametrize("name", sorted(set(ops.STATISTICS) - set(OPTIONS)))
def test_everything_else_is_tritons(name, call):
    assert call(name, batch_of(SMALL, SMALL), 1, 2, 3) == (f"triton {name}", (1, 2, 3))
