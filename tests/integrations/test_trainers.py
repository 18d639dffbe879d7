"""Two trainers' loops, with the original formula and with the drop-in, from the same seed.

Free runs amplify rounding: one flipped hardest negative or one bfloat16 weight on the other side of a
rounding boundary, and two runs of the very same mathematics part. So every loop is run three ways: free
in float64, where nothing has time to grow; free in the precision that users have; and in lock-step there,
where both losses see the same embeddings in every step of the original's run.
"""

import pytest
import torch
from test_integrations import dot_scores, hinges_of
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")

from trainers import open_clip, vsepp
from trainers.common import LockStep

from fused_vse.integrations.open_clip import ClipLoss
from fused_vse.integrations.vsepp import ContrastiveLoss

MARGIN = 0.2


class Hinges:
    """vsepp's formula."""

    max_violation = False

    def __call__(self, im, s):
        return hinges_of(dot_scores(im, s), MARGIN, self.max_violation)


class SymmetricCrossEntropy:
    """open_clip's formula, with the logits in the features' precision or, under autocast, in 16 bits."""

    def __init__(self, full_precision: bool):
        self.full_precision = full_precision

    def __call__(self, image_features, text_features, logit_scale, output_dict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.full_precision):
            if self.full_precision and image_features.dtype != torch.float64:
                image_features, text_features = image_features.float(), text_features.float()
            logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(curve, other):
    """The largest relative difference of two loss curves."""
    return ((curve - other).abs() / curve.abs()).max().item()


@pytest.fixture(scope="module")
def vsepp_run():
    return vsepp.train(Hinges())


def test_vsepp_in_double_precision():
    curve, recalls = vsepp.train(Hinges(), dtype=torch.float64)
    ours, our_recalls = vsepp.train(ContrastiveLoss(MARGIN), dtype=torch.float64)
    assert apart(curve, ours) < 1e-9
    assert recalls == our_recalls
    assert min(recalls) > 0.1, "it did not train"


def test_vsepp(vsepp_run):
    curve, recalls = vsepp_run
    ours, our_recalls = vsepp.train(ContrastiveLoss(MARGIN))
    # A hinge that rounding opens or closes changes a gradient by a whole row. Embeddings moved by one
    # unit in the last place send the original itself 3 % off its curve.
    assert apart(curve[:10], ours[:10]) < 1e-5
    assert apart(curve, ours) < 0.1
    assert recalls == pytest.approx(our_recalls, abs=0.05)


def test_vsepp_in_lock_step(vsepp_run):
    both = LockStep(Hinges(), ContrastiveLoss(MARGIN))
    curve, _ = vsepp.train(both)
    assert torch.equal(curve, vsepp_run[0])
    assert both.value_error < 1e-6
    # All steps but those in which rounding opens or closes a hinge.
    assert both.gradient_errors.quantile(0.9) < 1e-5


def test_open_clip_in_double_precision():
    curve, recalls = open_clip.train(SymmetricCrossEntropy(True), dtype=torch.float64, amp=False)
    ours, our_recalls = open_clip.train(ClipLoss(), dtype=torch.float64, amp=False)
    assert apart(curve, ours) < 1e-9
    assert recalls == our_recalls
    assert curve[-1] < 0.4 * curve[0], "it did not train"


def test_open_clip_in_single_precision():
    curve, recalls = open_clip.train(SymmetricCrossEntropy(True), amp=False)
    ours, our_recalls = open_clip.train(ClipLoss(), amp=False)
    assert apart(curve, ours) < 1e-5
    assert recalls == our_recalls


@pytest.mark.parametrize("full_precision", [True, False], ids=["float32 logits", "bfloat16 logits"])
def test_open_clip_with_amp(full_precision):
    """The rounding of bfloat16 is 4e-3; open_clip's own logits have it, too."""
    curve, recalls = open_clip.train(SymmetricCrossEntropy(full_precision))
    ours, our_recalls = open_clip.train(ClipLoss())
    assert apart(curve, ours) < 1e-2
    assert recalls == pytest.approx(our_recalls, abs=0.011)


def test_open_clip_with_amp_in_lock_step():
    both = LockStep(SymmetricCrossEntropy(True), ClipLoss())
    open_clip.train(both)
    assert both.value_error < 1e-6
    assert both.gradient_errors.max() < 2**-7  # each is rounded to bfloat16 at least once
