"""test_ops.py for the Triton backend in Triton's interpreter. Collected by test_triton_interpreter.py alone,
like triton_interpreter_cases.py."""

import os

os.environ["FUSED_VSE_TEST_OPS"] = "triton"

from test_ops import *  # noqa: F403
