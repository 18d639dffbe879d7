"""One epoch of a small model on Flickr8k: it learns. The data is not ours to ship."""

import json
import os

import pytest
from tiny_data import TINY, train

DIRECTORY = os.environ.get("FUSED_VSE_FLICKR8K")
# Chance is at 3.2. The whole recipe, ten epochs, is too long for a test: README.md has its numbers.
LEAST_RSUM = 6


@pytest.mark.skipif(
    not DIRECTORY, reason="set FUSED_VSE_FLICKR8K to a directory with Flickr8k in vsepp's layout"
)
def test_one_epoch(tmp_path):
    run = tmp_path / "run"
    options = (*TINY, "--epochs", 1, "--batch-size", 256, "--loss", "all_negatives")
    assert train("--data", DIRECTORY, *options, "--output", run) == 0
    *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert last["test"]["rsum"] >= LEAST_RSUM
