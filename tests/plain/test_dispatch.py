"""Which backend computes an op: `choose`, with modules that stand in for backends."""

import subprocess
import sys
import types
import warnings

import pytest
import torch

import fused_vse
from fused_vse import all_negatives_loss, dispatch, hardest_negative_loss
from fused_vse.arguments import check_batch
from fused_vse.dispatch import choose

IMAGES, CAPTIONS = torch.randn(4, 3), torch.randn(4, 3)


def batch_of(rows=4, device="cpu"):
    pair = [torch.randn(rows, 3, device=device) for _ in range(2)]
    return check_batch(*pair, None, None, None, None, "dot", False)


def backend(device="cpu", unavailable=None, takes=None, prefers=True, **attributes):
    """A backend that says the same of every op and batch, unless a function says otherwise."""
    return types.SimpleNamespace(
        DEVICE=device,
        unavailable=lambda: unavailable,
        takes=takes if callable(takes) else lambda op, batch: takes,
        prefers=prefers if callable(prefers) else lambda op, batch: prefers,
        **attributes,
    )


@pytest.fixture
def among(monkeypatch):
    def replace(**backends):
        monkeypatch.setattr(dispatch, "_BACKENDS", backends)

    return replace


def test_auto_takes_the_first_that_takes_and_prefers_the_op(among):
    among(
        other=backend("cuda"),
        broken=backend(unavailable="broken"),
        narrow=backend(takes="takes nothing"),
        slow=backend(prefers=False),
        first=backend(),
        second=backend(),
    )
    assert choose("auto", "hinge_sum", batch_of()) == "first"


def test_auto_asks_for_every_op_and_batch(among):
    among(
        large=backend(prefers=lambda op, batch: op == "hinge_sum" and len(batch.images) > 8),
        small=backend(),
    )
    assert choose("auto", "hinge_sum", batch_of(9)) == "large"
    assert choose("auto", "hinge_sum", batch_of(8)) == "small"
    assert choose("auto", "hardest_negatives", batch_of(9)) == "small"


def test_auto_falls_back_with_all_reasons(among):
    among(a=backend(unavailable="it was not built"), b=backend(takes="has no hinges"))
    expected = (
        "no fused backend for cpu .a: it was not built; b: has no hinges.; using plain PyTorch"
    )
    with pytest.warns(UserWarning, match=expected):
        assert choose("auto", "hinge_sum", batch_of()) == "reference"
    among()
    with pytest.warns(UserWarning, match="none takes cpu tensors"):
        choose("auto", "hinge_sum", batch_of())


@pytest.mark.parametrize("requested", ["auto", "named"])
def test_a_whole_loss_is_composed_without_a_word(requested, among):
    among(named=backend(takes="has no whole losses", prefers=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(requested, "small_loss", batch_of()) == "reference"


def test_a_named_backend_is_that_one_even_if_auto_would_not(among):
    among(first=backend(), named=backend(prefers=False))
    assert choose("named", "hinge_sum", batch_of()) == "named"


def test_a_named_backend_never_falls_back(among):
    among(
        gone=backend(unavailable="no compiler; install one"),
        narrow=backend(takes=lambda op, batch: "has no hinges" if op == "hinge_sum" else None),
        wide=backend(),
        elsewhere=backend("cuda"),
    )
    with pytest.raises(RuntimeError, match="'gone' is not available: no compiler; install one"):
        choose("gone", "hinge_sum", batch_of())
    with pytest.raises(RuntimeError, match="'gone' is not available"):
        choose("gone", "small_loss", batch_of())
    message = "'narrow' has no hinges; use backend='wide' or 'reference'"
    with pytest.raises(RuntimeError, match=message):
        choose("narrow", "hinge_sum", batch_of())
    with pytest.raises(ValueError, match="'elsewhere' takes cuda tensors, got tensors on cpu"):
        choose("elsewhere", "hinge_sum", batch_of())
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'gone'"):
        choose("typo", "hinge_sum", batch_of())


@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_tensors_without_data(requested):
    with pytest.raises(ValueError, match="images and captions are on meta.*to_empty"):
        choose(requested, "hinge_sum", batch_of(device="meta"))


def test_backends_lists_all_with_their_reasons(among):
    among(a=backend(), b=backend(unavailable="no GPU"), c=backend(STATUS="available on request"))
    assert fused_vse.backends() == {
        "reference": "available",
        "a": "available",
        "b": "no GPU",
        "c": "available on request",
    }


@pytest.mark.parametrize("as_module", [False, True])
def test_the_warning_names_the_users_line(as_module, among):
    among()
    loss = fused_vse.HardestNegativeLoss() if as_module else hardest_negative_loss
    with pytest.warns(UserWarning, match="no fused backend") as record:
        loss(IMAGES, CAPTIONS)
    assert [warning.filename for warning in record] == [__file__]


def test_transforms_of_torch_func_are_refused_with_the_remedy():
    def loss(images, backend):
        return all_negatives_loss(images, CAPTIONS, backend=backend)

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="torch.func.*autograd.grad.*'reference'"):
            transform(loss)(IMAGES, "auto")
        gradient = transform(loss)(IMAGES, "reference")
    leaf = IMAGES.clone().requires_grad_()
    loss(leaf, "reference").backward()
    assert torch.allclose(gradient, leaf.grad)
    with pytest.raises(RuntimeError, match="torch.vmap.*'reference'"):
        torch.vmap(lambda x: loss(x, "auto"))(IMAGES[None])


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_that_decide_are_guards_of_the_compiled_graph(dynamic, among):
    """The sizes may be symbols; every batch still gets the backend that eager mode gives it."""
    if fused_vse.backends()["cpu"] != "available":
        pytest.skip(fused_vse.backends()["cpu"])
    from fused_vse.backends import cpu

    asked = []

    def prefers(op, batch):
        if not torch.compiler.is_compiling():
            asked.append(op)
        return op != "small_loss" and batch.images.shape[0] >= 40

    among(cpu=backend(takes=cpu.takes, prefers=prefers))
    torch.compiler.reset()
    compiled = torch.compile(
        all_negatives_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for rows in (44, 60, 52):
        images, captions = torch.randn(rows, 8), torch.randn(rows, 8)
        expected = all_negatives_loss(images, captions)
        assert torch.equal(compiled(images, captions), expected)
    assert asked


def test_availability_is_not_traced(among):
    """It may launch a kernel, or look at files: torch.compile takes its answer."""
    if fused_vse.backends()["cpu"] != "available":
        pytest.skip(fused_vse.backends()["cpu"])
    from fused_vse.backends import cpu

    def unavailable():
        with open(__file__) as file:
            return None if file.read(1) else "an empty file"

    among(cpu=types.SimpleNamespace(**vars(cpu) | {"unavailable": unavailable}))
    torch.compiler.reset()
    compiled = torch.compile(all_negatives_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IMAGES, CAPTIONS), all_negatives_loss(IMAGES, CAPTIONS))


def test_importing_the_package_imports_no_compiler():
    """torch._dynamo takes two seconds."""
    command = """
import sys, torch
before = "torch._dynamo" in sys.modules
import fused_vse
print(before or "torch._dynamo" not in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True
    )
    assert run.stdout == "True\n"
