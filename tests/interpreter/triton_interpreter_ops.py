"""test_ops.py for the Triton backend in Triton's interpreter. Collected by test_triton_interpreter.py alone,
like triton_interpreter_cases.py."""

import os
import sys
from pathlib import Path

os.environ["FUSED_VSE_TEST_OPS"] = "triton"
sys.path.append(str(Path(__file__).parents[1] / "plain"))

import interpreted  # noqa: F401
import pytest
from test_ops import *  # noqa: F403

for name in (  # all cases of these take an hour
    "test_hardest_negatives",
    "test_hinge_sum",
    "test_negative_logsumexp",
    "test_opcheck",
    "test_opcheck_of_small_losses",
    "test_other_dtypes_and_the_accumulation_type",
    "test_poison",
    "test_positive_scores",
    "test_several_tiles",
    "test_ties_go_to_the_smallest_index",
):
    globals()[name] = pytest.mark.expensive(few=3)(globals()[name])
