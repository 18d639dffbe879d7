"""The op of the small-batch loss around its kernel, without a GPU: schedule, index arithmetic, workspace,
argument checks, who takes what, and what the compiler is told."""

import ctypes
import itertools

import cuda_emulation
import pytest
import torch
from cases import CASES, embeddings
from conftest import assert_close, differentiated

from fused_vse import all_negatives_loss, dispatch, hardest_negatives, hinge_loss
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
    function(*map(ctypes.c_int64, numbers), text, 500)
    return text.value.decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"num_image_ids": 7, "num_caption_ids": 9}, ""),
        ({"n": 0}, "there must be images and captions"),
        ({"m": 0}, "there must be images and captions"),
        ({"images_dim": 0}, "there must be images and captions"),
        ({"captions_dim": 5}, "must share D, got 4 and 5"),
        ({"num_pairs": 0}, "num_pairs must be in 1 .. min(N, M), got 0"),
        ({"num_pairs": 8}, "num_pairs must be in 1 .. min(N, M), got 8"),
        ({"num_image_ids": 7}, "both ids or none"),
        ({"num_caption_ids": 9}, "both ids or none"),
        (
            {"num_image_ids": 9, "num_caption_ids": 7},
            "an id for each image and caption, got 9 and 7",
        ),
    ],
)
def test_mistakes_in_a_batch_are_named(change, message):
    good = dict(n=7, images_dim=4, m=9, captions_dim=4, num_pairs=7)
    numbers = {**good, "num_image_ids": -1, "num_caption_ids": -1, **change}.values()
    found = text_of(cuda_emulation.library().batch_mistake, *numbers)
    assert message in found and bool(message) == bool(found)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((512, 512, 1 << 16, 3), ""),
        ((513, 1, 1, 0), "at most 512 images and captions of at most 65536 dimensions, got 513, 1"),
        ((1, 513, 1, 0), "got 1, 513 and 1"),
        ((1, 1, (1 << 16) + 1, 0), "got 1, 1 and 65537"),
        ((1, 1, 1, 4), "unknown kind of loss: 4"),
        ((1, 1, 1, -1), "unknown kind of loss: -1"),
    ],
)
def test_obstacles_are_named(numbers, message):
    found = text_of(cuda_emulation.library().small_obstacle, *numbers)
    assert message in found and bool(message) == bool(found)


def test_limits_agree_with_the_kernel():
    plan = (cuda_emulation.ROOT / "csrc" / "cuda" / "small_plan.h").read_text()
    assert f"MAX_ROWS = {cuda.SMALL_ROWS};" in plan
    assert "MAX_DIM = 1 << 16;" in plan and cuda.SMALL_DIM == 1 << 16


def test_auto_takes_only_what_was_measured(monkeypatch):
    images = torch.empty(128, 1024, dtype=torch.bfloat16, device="meta")
    assert cuda.MEASURED == () and not cuda.is_measured_ahead("small_loss", images, images)
    monkeypatch.setattr(cuda, "DEVICE", "meta")
    monkeypatch.setattr(cuda, "_unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    bucket = cuda.Bucket("small_loss", (9, 0), torch.bfloat16, rows=(64, 128), dims=(1, 1024))
    monkeypatch.setattr(cuda, "MEASURED", (bucket,))
    assert cuda.is_measured_ahead("small_loss", images, images)
    assert not cuda.is_measured_ahead("other", images, images)
    assert not cuda.is_measured_ahead("small_loss", images.half(), images.half())
    assert not cuda.is_measured_ahead("small_loss", images, torch.cat([images, images]))
    assert not cuda.is_measured_ahead("small_loss", images, images[:63])
    assert not cuda.is_measured_ahead("small_loss", *[torch.cat([images, images], 1)] * 2)
    monkeypatch.setattr(cuda, "MEASURED", (bucket._replace(capability=(8, 0)),))
    assert not cuda.is_measured_ahead("small_loss", images, images)


def test_auto_does_not_choose_what_was_never_measured(on_cpu, monkeypatch):
    assert dispatch.backends()["cuda"] == (
        "available on request; not chosen by auto: never measured on a GPU"
    )
    monkeypatch.setattr(dispatch, "_FUSED", {"cuda": cuda})
    with pytest.warns(UserWarning, match="cuda: not chosen by auto: never measured"):
        assert dispatch.select("auto", torch.device("cpu")) == dispatch.REFERENCE


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((513, 4), {}, r"at most 512 images and captions, got .* \[513, 4\] and .*triton"),
        ((4, 4), {"reduction": "none"}, "no reduction='none'"),
        ((4, 4), {"dtype": torch.float64}, "float32 embeddings, got torch.float64"),
        ((2, (1 << 16) + 1), {}, "65536 dimensions, got .*65537"),
        ((4, 4), {"similarity": "order"}, "no order similarity"),
    ],
)
def test_what_it_does_not_take_is_named(shape, options, message, on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "FAMILIES", ("loss",))  # as without Triton
    options = dict(options)
    x = torch.ones(shape, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=message):
        hinge_loss(x, x, backend="cuda", **options)


def test_scores_and_statistics_are_not_taken(on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "FAMILIES", ("loss",))  # as without Triton
    with pytest.raises(RuntimeError, match="no score-matrix losses"):
        hinge_loss(scores=torch.ones(2, 2), backend="cuda")
    with pytest.raises(RuntimeError, match="no statistics of the dot product"):
        hardest_negatives(torch.ones(2, 2), torch.ones(2, 2), backend="cuda")


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", cuda.SMALL_DTYPES, ids=str)
def test_fakes_describe_the_results(dtype, need, emulated_ops):
    images, captions = embeddings(CASES[7], dtype)
    batch = images, captions, None, None, 33
    options = 0, 1.0, torch.tensor(10.0), 0.0, 1.0, 1.0, True, *need
    checks = "test_schema", "test_faketensor"
    op = torch.ops.fused_vse_cuda.small_loss.default
    torch.library.opcheck(op, (*batch, *options), test_utils=checks)
    gradients = op(*batch, *options)[1:4]
    scale = torch.ops.fused_vse_cuda.scale_gradients.default
    torch.library.opcheck(scale, (torch.tensor(2.0), *gradients, images), test_utils=checks)


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
