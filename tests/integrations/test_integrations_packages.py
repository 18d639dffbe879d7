"""The stand-ins for packages, against the real ones, which come with the extra "peers"."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_integrations import BATCHES, B, D, assert_same, random_batch, unit_rows

LABELS = torch.arange(B)


def require(package: str):
    return pytest.importorskip(
        package, reason=f"{package} is not installed: pip install '.[peers]'"
    )


# --------------------------------------------------------------------------------------------- open_clip
@pytest.fixture
def clip_losses():
    theirs = require("open_clip.loss").ClipLoss
    from fused_vse.integrations.open_clip import ClipLoss

    return ClipLoss, theirs


def with_scale(loss, scale=100.0, **options):
    """A function of features and of the scale, which is a parameter in CLIP."""
    return lambda im, s, x: loss(im, s, x.reshape(()) * scale, **options)


UNIT_BATCHES = [
    name for name in BATCHES if name not in ("unnormalised", "all scores below -1", "ties")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.25, 100.0])
@pytest.mark.parametrize("batch", UNIT_BATCHES)
def test_clip_loss(clip_losses, batch, scale, dtype):
    ours, theirs = (make() for make in clip_losses)
    inputs = (*BATCHES[batch], torch.ones(1))
    assert_same(with_scale(ours, scale), with_scale(theirs, scale), inputs, dtype)


def test_clip_loss_is_what_the_trainer_expects(clip_losses):
    make_ours, make_theirs = clip_losses
    ours = make_ours(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1
    )
    assert isinstance(ours, make_theirs)
    assert (ours.local_loss, ours.gather_with_grad, ours.cache_labels) == (True, True, True)
    im, s = (x.float() for x in random_batch())
    output = {"image_features": im, "text_features": s, "logit_scale": torch.tensor(20.0)}
    losses = ours(**output, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    assert torch.isclose(sum(losses.values()), make_theirs()(**output), atol=1e-6)


def test_clip_loss_in_a_task(clip_losses):
    """The trainer of open_clip 4; docs/open_clip.md has both ways of giving it the loss."""
    task = pytest.importorskip("open_clip.task", reason="needs open_clip 4").CLIPTask

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.visual, self.text = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
            self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, image, text):
            features = {"image_features": self.visual(image), "text_features": self.text(text)}
            return {**features, "logit_scale": self.logit_scale.exp()}

    make_ours, make_theirs = clip_losses
    replaced = task(Model(), verbose=False)
    assert type(replaced.loss) is make_theirs
    replaced.loss = make_ours()
    tasks = task(Model(), verbose=False), replaced, task(Model(), loss=make_ours(), verbose=False)
    batch = dict(zip(("image", "text"), (x.float() for x in random_batch()), strict=True))
    theirs, *ours = (
        (loss, *torch.autograd.grad(loss, list(task.parameters())))
        for task in tasks
        for loss in [task.training_forward(batch)[0]["loss"]]
    )
    for answer in ours:
        torch.testing.assert_close(answer, theirs)


def test_clip_loss_takes_pairs_only(clip_losses):
    im, s = (x.float() for x in random_batch())
    for make in clip_losses:
        with pytest.raises(ValueError, match="batch_size|must be pairs"):
            make()(im[:4], s, torch.tensor(20.0))


def test_clip_loss_does_not_train_without_its_other_ranks(clip_losses):
    im, s = (x.float() for x in random_batch())
    for make in clip_losses:
        with pytest.raises((RuntimeError, ValueError), match="process group"):
            make(local_loss=True, world_size=2)(im, s, torch.tensor(20.0))


def test_clip_loss_with_bias(clip_losses):
    bias = torch.tensor(-10.0, requires_grad=True)
    im, s = (x.float() for x in random_batch())
    ours, theirs = (make()(im, s, torch.tensor(20.0), bias) for make in clip_losses)
    assert torch.isclose(ours, theirs, atol=1e-6)
    ours.backward()
    assert bias.grad == 0  # theirs is a rounding error


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(
            ({"logit_scale": scale}, error, f"logit_scale must be .*got {got}")
            for scale, error, got in (
                (0, ValueError, "0"),
                (-1, ValueError, "-1"),
                (torch.tensor(-1.0), ValueError, "-1"),
                (None, TypeError, "None"),
                ("100", TypeError, "'100'"),
                (torch.ones(2), TypeError, r"a float32 tensor of shape \[2\]"),
            )
        ),
        ({"logit_bias": "1"}, TypeError, "logit_bias must be .*got '1'"),
        ({"image_features": [[1.0]]}, TypeError, "image_features must be .*list"),
        ({"text_features": np.ones((9, 9))}, TypeError, "text_features must be .*numpy array"),
        ({"text_features": torch.ones(B, D + 1)}, ValueError, "image_features and .* share D"),
        ({"text_features": torch.ones(B, D).double()}, TypeError, "image_features are .*float32"),
    ],
)
def test_clip_loss_names_bad_arguments(clip_losses, change, error, message):
    im, s = (x.float() for x in random_batch())
    arguments = {"image_features": im, "text_features": s, "logit_scale": 20.0} | change
    with pytest.raises(error, match="^" + message):
        clip_losses[0]()(**arguments)


@pytest.mark.parametrize("world_size", [0, None, "2", 2.0])
def test_clip_loss_names_a_bad_world_size(clip_losses, world_size):
    with pytest.raises(ValueError, match=f"world_size must be an int >= 1, got {world_size!r}"):
        clip_losses[0](world_size=world_size)


def test_clip_loss_takes_numbers(clip_losses):
    im, s = (x.float() for x in random_batch())
    for scale in (20, np.float32(20), torch.tensor([20.0])):
        for bias in (None, -10.0, np.float32(-10), torch.tensor([-10.0])):
            ours, theirs = (make()(im, s, scale, bias) for make in clip_losses)
            assert torch.isclose(ours, theirs, atol=1e-6)
    assert clip_losses[0]()(im, s, 20.0, float("nan")).isnan()


@pytest.fixture
def siglip_losses():
    theirs = require("open_clip.loss").SigLipLoss
    from fused_vse.integrations.open_clip import SigLipLoss

    return SigLipLoss, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("batch", UNIT_BATCHES)
def test_siglip_loss(siglip_losses, batch, scale, dtype):
    """Scale and bias are parameters of the model."""

    def with_parameters(loss):
        return lambda im, s, x, bias: loss(im, s, x.reshape(()) * scale, bias.reshape(()))

    inputs = (*BATCHES[batch], torch.ones(1), torch.full((1,), -scale))
    ours, theirs = (with_parameters(make()) for make in siglip_losses)
    assert_same(ours, theirs, inputs, dtype)


def test_siglip_loss_is_what_the_trainer_expects(siglip_losses):
    make_ours, make_theirs = siglip_losses
    ours = make_ours(True, 0, 1, dist_impl="shift", chunk_size=4096)
    assert isinstance(ours, make_theirs)
    im, s = (x.float() for x in random_batch())
    output = {"image_features": im, "text_features": s, "logit_scale": torch.tensor(10.0)}
    for bias in (torch.tensor(-10.0), -10.0):
        losses = ours(**output, logit_bias=bias, output_dict=True)
        assert list(losses) == ["contrastive_loss"]
        expected = make_theirs()(**output, logit_bias=bias)
        assert torch.isclose(losses["contrastive_loss"], expected, atol=1e-6)
    with pytest.raises(ValueError, match="dist_impl must be one of .*'ring'"):
        make_ours(dist_impl="ring")
    with pytest.raises(TypeError, match="logit_bias must be a float.*'wrong'"):
        ours(**output, logit_bias="wrong")


# --------------------------------------------------------------------------------- sentence_transformers
JOINT = ["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
RANKING_OPTIONS = {
    "one direction": {},
    "both directions": {"directions": JOINT[:2], "partition_mode": "per_direction"},
    "both jointly": {"directions": JOINT[:2]},
    "queries, too": {"directions": ["query_to_doc", "query_to_query"]},
    "documents, too": {"directions": ["query_to_doc", "doc_to_doc"]},
    "everything": {"directions": JOINT, "scale": 50.0},
    "one, per direction": {"partition_mode": "per_direction"},
    "hardness of others": {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0},
    "hardness of its own": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    "hardness of all": {
        "hardness_mode": "all_negatives",
        "hardness_strength": 3.0,
        "directions": JOINT,
    },
    "hardness in both directions": {
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 9.0,
        "directions": JOINT[:2],
        "partition_mode": "per_direction",
    },
    "no hardness": {"hardness_mode": "all_negatives", "hardness_strength": 0.0},
}


@pytest.fixture
def ranking_losses():
    require("sentence_transformers")
    from fused_vse.integrations.sentence_transformers import MultipleNegativesRankingLoss

    return MultipleNegativesRankingLoss, MultipleNegativesRankingLoss.__base__


def imported(*folders: Path) -> str:
    """What the import of the stand-in prints, warnings included, with these folders first in the path."""
    path = os.pathsep.join(map(str, [*folders, Path(__file__).parents[2]]))
    code = "import fused_vse.integrations.sentence_transformers"
    command = [sys.executable, "-W", "default::DeprecationWarning", "-c", code]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stderr


def test_ranking_loss_is_imported_from_where_the_library_has_it_now(ranking_losses):
    assert "'sentence_transformers." not in imported()


def test_ranking_loss_names_the_version_that_it_needs(tmp_path):
    old = tmp_path / "sentence_transformers"  # of 5.2: no directions, no hardness
    old.mkdir()
    (old / "__init__.py").touch()
    (old / "util.py").write_text("all_gather_with_grad = cos_sim = dot_score = None\n")
    (old / "losses.py").write_text("class MultipleNegativesRankingLoss:\n    pass\n")
    needed = "needs sentence-transformers 5.3 or newer"
    remedy = "pip install -U 'sentence-transformers>=5.3'"
    assert f"{needed} (the installed one is older): {remedy}\n" in imported(tmp_path)
    (old / "util.py").write_text("")
    assert f"{needed} (cannot import name" in imported(tmp_path)


def from_embeddings(loss):
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two hard negatives"])
@pytest.mark.parametrize("options", RANKING_OPTIONS)
@pytest.mark.parametrize("batch", [name for name in BATCHES if name != "all scores below -1"])
def test_ranking_loss(ranking_losses, batch, options, columns):
    ours, theirs = (make(None, **RANKING_OPTIONS[options]) for make in ranking_losses)
    assert isinstance(ours, type(theirs)) and ours.get_config_dict() == theirs.get_config_dict()
    queries, documents = BATCHES[batch]
    if batch == "ties":
        queries, documents = (
            queries + 0.1,
            documents + 0.1,
        )  # the gradient at a zero row is not defined
    more = [documents.roll(1, 0) + 0.1, documents.flip(0) - 0.1][: columns - 2]
    assert_same(from_embeddings(ours), from_embeddings(theirs), [queries, documents, *more])


def test_ranking_loss_with_dot_product(ranking_losses):
    from sentence_transformers.util import dot_score, manhattan_sim

    for similarity in (dot_score, manhattan_sim):  # the second runs the library's own code
        ours, theirs = (make(None, 1.0, similarity) for make in ranking_losses)
        assert_same(from_embeddings(ours), from_embeddings(theirs), BATCHES["unnormalised"])


def test_ranking_loss_through_a_model(ranking_losses):
    """The whole path of the library: features in, columns embedded, loss and gradients of the weights."""
    results = []
    for make in ranking_losses:
        torch.manual_seed(0)
        linear = torch.nn.Linear(D, D)
        model = lambda features, linear=linear: {  # noqa: E731
            "sentence_embedding": linear(features["x"])
        }
        loss = make(
            model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )
        value = loss([{"x": x.float()} for x in random_batch()], None)
        results.append((value, *torch.autograd.grad(value, linear.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_ranking_loss_names_bad_arguments(ranking_losses):
    queries, positives = (x.float() for x in random_batch())

    def call(*columns, **options):
        return from_embeddings(ranking_losses[0](None, **options))(*columns)

    with pytest.raises(ValueError, match=rf"a positive for each of the {B} queries, got 3 rows"):
        call(queries, positives[:3], positives)  # with enough negatives to fill up
    with pytest.raises(ValueError, match="scale must be between .*got 1e-39"):
        call(queries, positives, scale=1e-39)
    with pytest.raises(ValueError, match="scale must be positive and finite, got inf"):
        call(queries, positives, scale=float("inf"))


# ------------------------------------------------------------------------------- pytorch_metric_learning
@pytest.fixture
def ntxent_losses():
    losses = require("pytorch_metric_learning.losses")
    from fused_vse.integrations.pytorch_metric_learning import NTXentLoss

    return NTXentLoss, losses.NTXentLoss


def paired(loss, labels, ref_labels):
    return lambda im, s: loss(im, labels, ref_emb=s, ref_labels=ref_labels)


PAIRINGS = {
    "pairs": (LABELS, LABELS.clone()),
    # One tensor for both: the library takes it for one set of embeddings and finds no positives.
    "the same tensor": (LABELS, LABELS),
    "captions share images": (LABELS, LABELS // 3),
    "images repeat": (LABELS % 7, LABELS % 7 + 0),
    "some match nothing": (LABELS, LABELS + B // 2),
    "everything matches": (LABELS * 0, LABELS * 0),
    "nothing matches": (LABELS, LABELS + B),
    "arbitrary numbers": (LABELS * 991 % 17 - 8, LABELS * 57 % 13 - 8),
}


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("batch", ["random", "duplicates", "all equal", "unnormalised"])
def test_ntxent(ntxent_losses, batch, pairing):
    ours, theirs = (paired(make(temperature=0.1), *PAIRINGS[pairing]) for make in ntxent_losses)
    assert_same(ours, theirs, BATCHES[batch])


@pytest.mark.parametrize("images", [1, 2, 5, 70])
def test_ntxent_of_unequal_numbers(ntxent_losses, images):
    labels = torch.arange(images) % B
    im = unit_rows(images, seed=3)
    ours, theirs = (paired(make(), labels, LABELS) for make in ntxent_losses)
    assert_same(ours, theirs, (im, random_batch()[1]))


def test_ntxent_of_two_views_in_one_batch(ntxent_losses):
    def of_both(make):
        loss = make(temperature=0.2)
        return lambda im, s: loss(torch.cat([im, s]), LABELS.repeat(2))

    assert_same(*map(of_both, ntxent_losses), random_batch())


def test_ntxent_in_the_librarys_wrapper(ntxent_losses):
    from pytorch_metric_learning.losses import SelfSupervisedLoss

    for symmetric in (True, False):
        ours, theirs = (SelfSupervisedLoss(make(), symmetric=symmetric) for make in ntxent_losses)
        assert_same(ours, theirs, random_batch())


@pytest.fixture
def supcon_losses():
    losses = require("pytorch_metric_learning.losses")
    from fused_vse.integrations.pytorch_metric_learning import SupConLoss

    return SupConLoss, losses.SupConLoss


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("batch", ["random", "duplicates", "all equal", "unnormalised"])
def test_supcon(supcon_losses, batch, pairing):
    ours, theirs = (paired(make(temperature=0.1), *PAIRINGS[pairing]) for make in supcon_losses)
    assert_same(ours, theirs, BATCHES[batch])


@pytest.mark.parametrize("images", [1, 2, 5, 70])
def test_supcon_of_unequal_numbers(supcon_losses, images):
    labels = torch.arange(images) % B
    im = unit_rows(images, seed=3)
    ours, theirs = (paired(make(), labels, LABELS) for make in supcon_losses)
    assert_same(ours, theirs, (im, random_batch()[1]))


@pytest.mark.parametrize("labels", [LABELS.repeat(2), LABELS.repeat(2) % 3, LABELS.repeat(2) * 0])
def test_supcon_of_views_in_one_batch(supcon_losses, labels):
    def of_both(make):
        loss = make(temperature=0.2)
        return lambda im, s: loss(torch.cat([im, s]), labels)

    assert_same(*map(of_both, supcon_losses), random_batch())


def test_supcon_with_the_librarys_parts(supcon_losses):
    """Mined pairs, other distances and reducers are the library's."""
    from pytorch_metric_learning import distances, reducers

    mined = (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 1]), torch.tensor([5, 6]))
    for options in ({"distance": distances.LpDistance()}, {"reducer": reducers.MeanReducer()}, {}):
        results = []
        for make in supcon_losses:
            im, _ = (x.float().requires_grad_() for x in random_batch())
            value = make(**options)(im, LABELS % 5, None if options else mined)
            results.append((value, *torch.autograd.grad(value, [im])))
        for got, want in zip(*results, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_ntxent_with_the_librarys_parts(ntxent_losses):
    """Miners, other distances and regularizers run as they do in the library."""
    from pytorch_metric_learning import distances, reducers, regularizers

    mined = (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 1]), torch.tensor([5, 6]))
    for options in (
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
        {"distance": distances.LpDistance()},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer()},
    ):
        ours, theirs = (make(temperature=0.5, **options) for make in ntxent_losses)
        assert isinstance(ours, type(theirs))
        assert_same(
            paired(ours, *PAIRINGS["pairs"]), paired(theirs, *PAIRINGS["pairs"]), random_batch()
        )
        with_miner = [
            lambda im, s, loss=loss: loss(im, LABELS, mined, s, LABELS) for loss in (ours, theirs)
        ]
        assert_same(*with_miner, random_batch())


def test_ntxent_leaves_miners_and_cross_batch_memory_to_the_library(ntxent_losses, monkeypatch):
    """As docs/pytorch_metric_learning.md says."""
    from pytorch_metric_learning.losses import CrossBatchMemory
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    make_ours, make_theirs = ntxent_losses
    calls, compute_loss = [], make_theirs.compute_loss
    monkeypatch.setattr(
        make_theirs, "compute_loss", lambda *args: calls.append(None) or compute_loss(*args)
    )
    im, labels = random_batch()[0], LABELS // 2
    make_ours()(im, labels)
    assert len(calls) == 0
    make_ours()(im, labels, MultiSimilarityMiner()(im, labels))
    assert len(calls) == 1
    CrossBatchMemory(make_ours(), D, memory_size=2 * B)(im, labels)
    assert len(calls) == 2


def test_ntxent_where_the_library_gives_up(ntxent_losses):
    """The library adds 1e-38 inside its logarithm: it cuts a loss above 87 off, with gradient 0."""
    im = torch.eye(2)
    ours, theirs = (
        make(temperature=0.01)(
            im, torch.tensor([0, 1]), ref_emb=im, ref_labels=torch.tensor([1, 0])
        )
        for make in ntxent_losses
    )
    assert torch.isclose(ours, torch.tensor(100.0)) and theirs < 88


@pytest.mark.parametrize("dtypes", ["bool bool", "uint16 uint16", "int64 int32", "uint8 int64"])
def test_ntxent_with_labels_of_any_dtype(ntxent_losses, dtypes):
    labels, others = ((LABELS % 2).to(getattr(torch, dtype)) for dtype in dtypes.split())
    ours, theirs = (paired(make(), labels, others) for make in ntxent_losses)
    assert_same(ours, theirs, random_batch())
