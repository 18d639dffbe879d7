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

for name, few in {  # all cases of these take an hour, one of test_opcheck a minute
    "test_hardest_negatives": 3,
    "test_hinge_sum": 3,
    "test_negative_logsumexp": 3,
    "test_opcheck": 1,
    "test_opcheck_of_small_losses": 1,
    "test_other_dtypes_and_the_accumulation_type": 2,
    "test_poison": 2,
    "test_positive_scores": 2,
    "test_several_tiles": 2,
    "test_softplus_sum": 3,
    "test_ties_go_to_the_smallest_index": 2,
}.items():
    globals()[name] = pytest.mark.expensive(few=few)(globals()[name])
