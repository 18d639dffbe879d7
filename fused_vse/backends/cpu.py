"""The C++ backend for CPU tensors: loads csrc/cpu and describes its ops to the compiler."""

from . import native
from .fakes import register_fakes, register_score_fakes, register_statistic_fakes

DEVICE = "cpu"
NAMESPACE = "fused_vse_cpu"
FAMILIES = ("dot", "order", "scores")

UNAVAILABLE = native.load("_cpu", "C++", "install a C++17 compiler, and install again")
if UNAVAILABLE is None:
    register_fakes(NAMESPACE)
    register_statistic_fakes(f"{NAMESPACE}_order")
    register_score_fakes(f"{NAMESPACE}_scores")
