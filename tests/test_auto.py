"""What "auto" chooses between Triton and CUDA for the statistics: the ops of both stand in for a GPU here,
with the cpu backend's arithmetic, and note which of them was called."""

import pytest
import torch
from cases import Case, embeddings

import fused_vse
from fused_vse import all_negatives_loss, dispatch, hardest_negative_loss, hinge_loss
from fused_vse.backends import cpu, cuda, triton

if not triton.INSTALLED or triton.DEVICE != "cuda":
    pytest.skip("needs Triton, and not in its interpreter", allow_module_level=True)
pytestmark = pytest.mark.skipif(cpu.UNAVAILABLE is not None, reason=str(cpu.UNAVAILABLE))

STATISTICS = {
    "hardest_negatives": hardest_negative_loss,
    "negative_logsumexp": all_negatives_loss,
    "hinge_sum": hinge_loss,
}
OPS = ("l2_normalize", *STATISTICS)
BACKWARD = [f"{op}_backward" for op in OPS]
HOPPER = (9, 0)
BUCKET = cuda.Bucket("hardest_negatives", HOPPER, torch.bfloat16, rows=(40, 50), dims=(16, 32))
INSIDE = Case("inside", 40, 50, 33, 24)

statistics = pytest.mark.parametrize("op", STATISTICS)


@pytest.fixture(scope="session", autouse=True)
def statistics_of_cuda():
    """Their ops, where the CUDA library was not built. Once and to the end: torch 2.10 takes no second fake
    of an op whose library is gone, and can compile nothing any more."""
    if hasattr(torch.ops.fused_vse_cuda, "hinge_sum"):
        yield
    else:
        from fused_vse.backends import cuda_statistics

        library = cuda_statistics.register()
        yield
        library._destroy()


@pytest.fixture
def calls(monkeypatch):
    """CPU tensors stand in for those of a Hopper GPU; the forward ops called, with their backends."""
    called, libraries = [], []
    for name in ("triton", "cuda"):
        namespace = getattr(torch.ops, f"fused_vse_{name}")
        library = torch.library.Library(f"fused_vse_{name}", "IMPL")
        for op in (*OPS, *BACKWARD):
            if hasattr(namespace, op):
                library.impl(op, noting(called, name, op), "CPU", allow_override=True)
        libraries.append(library)
    monkeypatch.setattr(triton, "DEVICE", "cpu")
    monkeypatch.setattr(triton, "_unavailable", lambda: None)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "FAMILIES", ("loss", "dot"))
    monkeypatch.setattr(cuda, "_unavailable", lambda: None)
    monkeypatch.setattr(dispatch, "_FUSED", {"triton": triton, "cuda": cuda})
    for module in (cpu, cuda):
        monkeypatch.setattr(module, "SMALL_ROWS", 0)  # no whole losses
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    torch.compiler.reset()
    yield called
    for library in libraries:
        library._destroy()


def noting(called: list, backend: str, op: str):
    def run(*arguments):
        if not op.endswith("_backward"):
            called.append((backend, op))
        return getattr(torch.ops.fused_vse_cpu, op)(*arguments)

    return run


def step(op, backend="auto", case=INSIDE, dtype=torch.bfloat16, loss=None, **options):
    pair = [x.requires_grad_() for x in embeddings(case, dtype)]
    loss = loss or STATISTICS[op]
    loss(*pair, num_pairs=case.pairs, backend=backend, **options).backward()
    return [x.grad for x in pair]


def measured(monkeypatch, *buckets):
    monkeypatch.setattr(cuda, "MEASURED", buckets)


@statistics
def test_nothing_measured_is_triton(op, calls, monkeypatch):
    assert cuda.MEASURED == ()
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)  # not even looked at
    monkeypatch.setattr(dispatch, "select_for_op", None)
    step(op, normalize=True)
    assert calls == [("triton", "l2_normalize")] * 2 + [("triton", op)]


@statistics
def test_a_bucket_is_cuda_for_its_op_alone(op, calls, monkeypatch):
    expected = step(op, "triton")
    for other in STATISTICS:
        calls.clear()
        measured(monkeypatch, BUCKET._replace(op=other))
        gradients = step(op)
        assert calls == [("cuda" if op == other else "triton", op)]
        assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"rows": 39, "pairs": 33}, torch.bfloat16),
        ({"columns": 51}, torch.bfloat16),
        ({"dim": 15}, torch.bfloat16),
        ({"dim": 33}, torch.bfloat16),
        ({}, torch.float16),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_outside_a_bucket_is_triton(change, dtype, calls, monkeypatch):
    measured(monkeypatch, BUCKET)
    step("hardest_negatives", case=INSIDE._replace(**change), dtype=dtype)
    assert calls == [("triton", "hardest_negatives")]


@pytest.mark.parametrize("dim", [16, 32])
@pytest.mark.parametrize("rows", [40, 50])
def test_a_bucket_holds_its_ends(rows, dim, calls, monkeypatch):
    measured(monkeypatch, BUCKET)
    step("hardest_negatives", case=Case("end", rows, rows, rows, dim))
    assert calls == [("cuda", "hardest_negatives")]


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)], ids=str)
def test_another_architecture_is_triton(capability, calls, monkeypatch):
    """That of the tensors' own GPU counts."""
    measured(monkeypatch, BUCKET)
    asked = []

    def of(device):
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    step("hardest_negatives")
    assert calls == [("triton", "hardest_negatives")]
    assert set(asked) == {torch.device("cpu")}  # the tensors'


@statistics
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_by_name_is_that_one(backend, op, calls, monkeypatch):
    for buckets in ((), (BUCKET._replace(op=op),)):
        calls.clear()
        measured(monkeypatch, *buckets)
        step(op, backend)
        assert calls == [(backend, op)]


@pytest.mark.parametrize("logged", ["triton", "cuda"])
def test_the_statistics_to_log_have_their_own_measurement(logged, calls, monkeypatch):
    ahead = [BUCKET._replace(op="negative_logsumexp")] + [BUCKET] * (logged == "cuda")
    measured(monkeypatch, *ahead)
    pair = embeddings(INSIDE, torch.bfloat16)
    all_negatives_loss(*pair, num_pairs=INSIDE.pairs, return_statistics=True)
    assert calls == [("cuda", "negative_logsumexp"), (logged, "hardest_negatives")]


def test_the_public_statistics_ask_too(calls, monkeypatch):
    measured(monkeypatch, BUCKET, BUCKET._replace(op="negative_logsumexp"))
    pair = embeddings(INSIDE, torch.bfloat16)
    fused_vse.hardest_negatives(*pair, num_pairs=INSIDE.pairs)
    fused_vse.negative_logsumexp(*pair, num_pairs=INSIDE.pairs, normalize=True)
    normalized = [("triton", "l2_normalize")] * 2
    expected = [("cuda", "hardest_negatives"), *normalized, ("cuda", "negative_logsumexp")]
    assert calls == expected


def test_families_without_a_measurement_stay_with_triton(calls, monkeypatch):
    measured(monkeypatch, BUCKET)
    for family in ("order", "scores"):
        assert dispatch.select("auto", torch.device("cpu"), family) == "triton"


def test_without_triton_the_backward_pass_is_missing(calls, monkeypatch):
    """A bucket does not make cuda the fallback for everything."""
    measured(monkeypatch, BUCKET)
    monkeypatch.setattr(triton, "_unavailable", lambda: "does not compile")
    with pytest.warns(UserWarning, match="triton: does not compile; cuda: chosen by auto only for"):
        step("hardest_negatives")
    assert calls == []


def test_an_unavailable_backend_is_never_ahead(monkeypatch):
    images = torch.empty(45, 24, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(cuda, "DEVICE", "meta")
    monkeypatch.setattr(cuda, "_unavailable", lambda: "not here")
    measured(monkeypatch, BUCKET)
    assert not cuda.is_measured_ahead("hardest_negatives", images, images)


def test_backends_says_what_auto_takes(calls, monkeypatch):
    measured(monkeypatch, BUCKET, BUCKET._replace(op="small_loss", rows=(1, 128)))
    assert fused_vse.backends() == {
        "reference": "available",
        "triton": "available",
        "cuda": "available on request; chosen by auto only for hardest_negatives of bfloat16, 40 - 50 rows"
        " of 16 - 32, on compute capability 9.0; small_loss of bfloat16, 1 - 128 rows of 16 - 32, on"
        " compute capability 9.0",
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_compiles_without_graph_breaks(ahead, dynamic, calls, monkeypatch):
    """The sizes may be symbols: each range of a bucket is then a guard."""
    measured(monkeypatch, *[BUCKET] * ahead)
    compiled = torch.compile(
        hardest_negative_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for rows, backend in ((36, "triton"), (44, "cuda" if ahead else "triton"), (60, "triton")):
        calls.clear()
        case = Case("symbols", rows, rows, rows, 24)
        gradients = step(None, case=case, loss=compiled)
        assert calls == [(backend, "hardest_negatives")]
        expected = step("hardest_negatives", backend, case=case)
        assert all(map(torch.equal, gradients, expected))
