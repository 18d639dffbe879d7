"""Benchmarks, one module a command: `python -m benchmarks.cpu` in a checkout."""

import sys
from importlib.util import find_spec


def need(*modules: str) -> None:
    """Ends the program with exit code 2 and the remedy if one of these modules is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        names = " and ".join(module.replace("_", "-") for module in missing)
        print(f"the benchmark needs {names}: pip install -e '.[test]'", file=sys.stderr)
        raise SystemExit(2)
