"""The op of the small-batch loss around its kernel, without a GPU: schedule, index arithmetic, workspace,
argument checks, who takes what, and what the compiler is told."""

import ctypes
import itertools

import cuda_emulation
import pytest
import torch
from cases import CASES, embeddings
from conftest import assert_close, differentiated
from torch._subclasses import FakeTensorMode

from fused_vse import all_negatives_loss, dispatch, ops
from fused_vse.backends import cuda

REASON = cuda_emulation.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def test_the_preferred_cluster():
    """A power of two, at most 16 strips, and a chunk of D for each of its blocks."""
    for n, d, size in itertools.product(range(1, 513, 7), (1, 64, 65, 256, 1024, 1025), (2, 4)):
        cluster = cuda_emulation.library().preferred_cluster_of(n, d, size)
        assert cluster in (1, 2, 4, 8)
        assert cluster * -(-n // 64) <= 16
        assert cluster == 1 or cluster * 128 <= d * size
    assert cuda_emulation.library().preferred_cluster_of(128, 1024, 2) == 8


def test_index_arithmetic_against_brute_force():
    """Every element, byte, chunk and tile belongs to one thread, place, block and job."""
    assert cuda_emulation.library().index_arithmetic_error() is None


def text_of(function, *numbers: int) -> str:
    text = ctypes.create_string_buffer(500)
    function((ctypes.c_int64 * len(numbers))(*numbers), text, 500)
    return text.value.decode()


GOOD = dict(
    n=7, images_dim=4, m=9, captions_dim=4, image_ids=-1, caption_ids=-1, row_anchors=7,
    column_anchors=9, pair_row=0, pair_column=2, pair_count=7,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"image_ids": 7, "caption_ids": 9}, ""),
        ({"row_anchors": 0, "column_anchors": 0, "pair_count": 0}, ""),
        ({"n": 0}, "the number of images must be in 1 .. "),
        ({"m": 0}, "the number of captions must be in 1 .. "),
        ({"images_dim": 0}, "the dimension of images must be in 1 .. "),
        ({"captions_dim": 5}, "the dimension of captions must be in 4 .. 4, got 5"),
        ({"image_ids": 7}, "both ids or none"),
        ({"caption_ids": 9}, "both ids or none"),
        ({"image_ids": 9, "caption_ids": 9}, "the number of image_ids must be in 7 .. 7, got 9"),
        ({"image_ids": 7, "caption_ids": 7}, "the number of caption_ids must be in 9 .. 9, got 7"),
        ({"row_anchors": 8}, "row_anchors must be in 0 .. 7, got 8"),
        ({"row_anchors": -1}, "row_anchors must be in 0 .. 7, got -1"),
        ({"column_anchors": 10}, "column_anchors must be in 0 .. 9, got 10"),
        ({"pair_count": 8}, "pair_count must be in 0 .. 7, got 8"),
        ({"pair_count": -1}, "pair_count must be in 0 .. 7, got -1"),
        ({"pair_row": 1}, "pair_row must be in 0 .. 0, got 1"),
        ({"pair_column": 3}, "pair_column must be in 0 .. 2, got 3"),
        ({"pair_column": -1}, "pair_column must be in 0 .. 2, got -1"),
        ({"pair_row": 2**63 - 1, "pair_count": 1}, "pair_row must be in 0 .. 6, got 9"),
    ],
)
def test_mistakes_in_a_batch_are_named(change, message):
    found = text_of(cuda_emulation.library().batch_mistake, *{**GOOD, **change}.values())
    assert message in found and bool(message) == bool(found)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((512, 512, 1 << 16, 512, 3), ""),
        (
            (513, 1, 1, 1, 0),
            "at most 512 images and captions of at most 65536 dimensions, got 513, 1",
        ),
        ((1, 513, 1, 1, 0), "got 1, 513 and 1"),
        ((1, 1, (1 << 16) + 1, 1, 0), "got 1, 1 and 65537"),
        ((1, 1, 1, 0, 0), "num_pairs must be at least 1, got 0"),
        ((1, 1, 1, 1, 4), "unknown kind of loss: 4"),
        ((1, 1, 1, 1, -1), "unknown kind of loss: -1"),
    ],
)
def test_obstacles_are_named(numbers, message):
    found = text_of(cuda_emulation.library().small_obstacle, *numbers)
    assert message in found and bool(message) == bool(found)


def test_limits_agree_with_the_kernel():
    plan = (cuda_emulation.ROOT / "csrc" / "cuda" / "small_plan.h").read_text()
    assert f"MAX_ROWS = {cuda.SMALL_ROWS};" in plan
    assert "MAX_DIM = 1 << 16;" in plan and cuda.SMALL_DIM == 1 << 16


def test_kinds_are_those_of_the_op_table():
    numbers = ops.ALL_NEGATIVES, ops.HARDEST, ops.HARDEST_SMOOTH, ops.HINGE_SUM
    plan = (cuda_emulation.ROOT / "csrc" / "cuda" / "small_plan.h").read_text()
    assert (
        numbers == tuple(range(4))
        and "{ ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM }" in plan
    )


def test_auto_does_not_choose_what_was_never_measured(on_cpu, monkeypatch):
    assert dispatch.backends()["cuda"] == (
        "available on request; not chosen by auto: never measured on a GPU"
    )
    monkeypatch.setattr(dispatch, "_BACKENDS", {"cuda": cuda})
    monkeypatch.setattr(cuda, "takes", lambda op, batch: None)  # some ops need Triton
    batch = batch_of(*embeddings(CASES[2], torch.float32))
    with pytest.warns(UserWarning, match="cuda: .*not chosen by auto: never measured"):
        assert dispatch.choose("auto", "hinge_sum", batch) == dispatch.REFERENCE


def batch_of(images, captions, anchors=None, similarity=ops.DOT):
    k = len(images)
    return ops.Batch(images, captions, None, None, *(anchors or (k, k, 0, 0, k)), similarity)


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


@pytest.mark.parametrize("op", [name for name in ops.OPS if not name.startswith("small_loss")])
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


@pytest.mark.parametrize("op", ops.OPS)
def test_auto_prefers_nothing_that_was_never_measured(op):
    x = torch.empty(128, 1024, dtype=torch.bfloat16, device="meta")
    assert cuda.prefers(op, batch_of(x, x)) is False


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", cuda.SMALL_DTYPES, ids=str)
def test_fakes_describe_the_results(dtype, need, emulated_ops):
    images, captions = embeddings(CASES[7], dtype)
    batch = images, captions, None, None, 33
    check_fake("small_loss", *batch, 0, 1.0, torch.tensor(10.0), 0.0, 1.0, 1.0, True, *need)
    _, _, _, index, *saved = torch.ops.fused_vse_cuda.small_loss(
        *batch, 0, 1.0, None, 0.0, 1.0, 1.0, True, *need
    )
    check_fake("small_loss_backward", images, captions, index, *saved, torch.tensor(2.0), *need)


def check_fake(name, *arguments):
    """opcheck would compare what the CPU tensors of the emulation give with the fake of the cpu backend."""
    op = getattr(torch.ops.fused_vse_cuda, name).default
    torch.library.opcheck(op, arguments, test_utils="test_schema")
    with FakeTensorMode():
        fakes = op(
            *(
                torch.empty(x.shape, dtype=x.dtype, device="cuda:0") if torch.is_tensor(x) else x
                for x in arguments
            )
        )
    for fake, real in zip(fakes, op(*arguments), strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.is_contiguous() and real.is_contiguous()


def test_full_graph_compilation(on_cpu):
    torch.compiler.reset()  # other tests compile other versions of the same code
    pair = embeddings(CASES[7], torch.float32)
    expected = differentiated(all_negatives_loss, pair, CASES[7], "cuda")
    compiled = torch.compile(all_negatives_loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(differentiated(compiled, pair, CASES[7], "cuda"), expected, strict=True):
        assert_close(got, want, 1e-6)


def test_double_backward_raises(on_cpu):
    pair = [x.requires_grad_() for x in embeddings(CASES[2], torch.float32)]
    gradients = torch.autograd.grad(
        all_negatives_loss(*pair, backend="cuda"), pair, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        gradients[0].sum().backward()
