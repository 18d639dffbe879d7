"""Bad arguments of the stand-ins: each error names them as the project's users know them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_integrations import unit_rows

from fused_vse.integrations import chan, hrem, pcmepp, sgraf, vse_infinity, vsepp

IM, S = unit_rows(4).float(), unit_rows(4, seed=1).float()
ARRAY = np.zeros((1000, 4))
REPEATS = SimpleNamespace(mask_repeat=True)
BAD = [
    (lambda: vsepp.ContrastiveLoss()([[1.0]], S), TypeError, "im must be.*list"),
    (lambda: vsepp.ContrastiveLoss()(IM, ARRAY), TypeError, "s must be.*numpy array of shape"),
    (lambda: vsepp.ContrastiveLoss()(IM, S[:, :3]), ValueError, "im and s must share D"),
    (lambda: vsepp.ContrastiveLoss()(IM, S.double()), TypeError, "im are torch.float32 but s are"),
    (
        lambda: vsepp.ContrastiveLoss(margin="a")(IM, S),
        TypeError,
        "margin must be a float, got 'a'",
    ),
    (lambda: vsepp.ContrastiveLoss(max_violation="no")(IM, S), TypeError, "max_violation must be"),
    (
        lambda: vsepp.ContrastiveLoss(loss_fn="CCL", temp=0)(IM, S),
        ValueError,
        "temp must be positive",
    ),
    (lambda: vsepp.ContrastiveLoss(loss_fn="CCLHN", temp=None)(IM, S), TypeError, "temp must be a"),
    (lambda: vsepp.ContrastiveLoss(loss_fn="SimCLR")(IM, [S]), TypeError, "s must be.*list"),
    (lambda: vsepp.ContrastiveLoss(loss_fn="SimCLR")(IM, S[:3]), ValueError, "im and s .* 4 and 3"),
    (lambda: vsepp.ContrastiveLoss(loss_fn="SimCLR", temp=-1)(IM, S), ValueError, "temp must be"),
    (lambda: vse_infinity.ContrastiveLoss(None)(IM, None), TypeError, "s must be.*None"),
    (lambda: hrem.ContrastiveLoss(None), TypeError, "opt must have the attribute 'mask_repeat'"),
    (lambda: hrem.ContrastiveLoss(REPEATS)([IM], S), TypeError, "im must be.*list"),
    (
        lambda: hrem.ContrastiveLoss(REPEATS)(IM, S, [0, 1, 2, 3]),
        TypeError,
        "img_ids must hold one",
    ),
    (lambda: hrem.ContrastiveLoss(REPEATS)(IM, S, IM), TypeError, r"img_ids.*\.long\(\)"),
    (lambda: sgraf.ContrastiveLoss()([[1.0]]), TypeError, "scores must be.*list"),
    (lambda: sgraf.ContrastiveLoss(max_violation="yes")(IM @ S.T), TypeError, "max_violation must"),
    (lambda: chan.ContrastiveLoss(SimpleNamespace()), TypeError, "opt must have .*'margin'"),
    (lambda: chan.ContrastiveLoss()(None), TypeError, "sims must be.*None"),
    (lambda: chan.InfoNCELoss()(IM), ValueError, r"sims must be a matrix \[B, B\]"),
    (lambda: chan.InfoNCELoss(temperature=0)(IM @ S.T), ValueError, "temperature must be positive"),
    (
        lambda: pcmepp.TripletLoss()({"mu": IM}, S),
        TypeError,
        r"im must be .*'mean', got .*\['mu'\]",
    ),
    (lambda: pcmepp.TripletLoss()(IM, {"mean": [1]}), TypeError, "s must be.*list"),
    (lambda: pcmepp.InfoNCELoss(0), ValueError, "init_tau must be positive and finite, got 0"),
    (lambda: pcmepp.InfoNCELoss(-1), ValueError, "init_tau must be positive"),
    (lambda: pcmepp.InfoNCELoss("1"), TypeError, "init_tau must be a float.*'1'"),
    (lambda: pcmepp.InfoNCELoss()(IM, S[:3]), ValueError, "img_emb and cap_emb must be pairs"),
    (lambda: pcmepp.InfoNCELoss()(IM, S[:3], distributed=True), ValueError, "cap_emb must start"),
    (lambda: pcmepp.InfoNCELoss()(IM, S, distributed="no"), TypeError, "distributed must be True"),
    # What the projects compute, and docs/differences.md lists.
    *(
        (
            lambda flag=flag: vsepp.ContrastiveLoss(max_violation=flag)(IM, S),
            TypeError,
            "max_violation must be True or False",
        )
        for flag in (None, 2.5, 0.0, torch.tensor(True))
    ),
    *(
        (lambda margin=margin: vsepp.ContrastiveLoss(margin)(IM, S), error, "margin must be")
        for margin, error in (
            (torch.tensor(0.2), TypeError),
            (float("nan"), ValueError),
            (float("inf"), ValueError),
        )
    ),
    *(
        (
            lambda temp=temp: vsepp.ContrastiveLoss(loss_fn="CCL", temp=temp)(IM, S),
            ValueError,
            "temp",
        )
        for temp in (-0.1, float("nan"), float("inf"))
    ),
    (lambda: vsepp.ContrastiveLoss()(IM[:0], S[:0]), ValueError, "im is empty.*skip empty"),
    (lambda: vsepp.ContrastiveLoss()(IM.long(), S.long()), TypeError, r"im must.*\.float\(\)"),
    (lambda: vsepp.ContrastiveLoss()(IM.to_sparse(), S), TypeError, r"im must.*\.to_dense\(\)"),
    (lambda: vsepp.ContrastiveLoss()(IM.to("meta"), S.to("meta")), ValueError, ".* on meta"),
    (lambda: negative_tau()(IM, S), ValueError, "tau must be positive and finite, got -1"),
]


def negative_tau():
    """As training could leave it."""
    loss = pcmepp.InfoNCELoss()
    loss.tau.data.fill_(-1)
    return loss


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match="^" + message) as caught:
        call()
    assert len(str(caught.value)) < 250


def test_flags_as_numbers():
    for flag in (0, 1, np.bool_(True)):
        loss = vsepp.ContrastiveLoss(margin=np.float32(0.25), max_violation=flag)(IM, S)
        assert loss == vsepp.ContrastiveLoss(margin=0.25, max_violation=bool(flag))(IM, S)


def test_stand_ins_compile():
    torch.compiler.reset()
    info_nce = pcmepp.InfoNCELoss()
    for loss in (
        vsepp.ContrastiveLoss(loss_fn="SimCLR"),
        vse_infinity.ContrastiveLoss(None, 0.2),
        lambda im, s: info_nce(im, s)[0],
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(IM, S), loss(IM, S))
