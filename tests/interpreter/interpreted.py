"""Imported by the tests in Triton's interpreter: makes it twice as fast.

In every call of a function by a kernel, the interpreter replaces all of triton.language again. Once, when the
kernel is launched, is enough for functions of ours; those of Triton itself name its parts differently.
"""

from triton.runtime.interpreter import InterpretedFunction

_call = InterpretedFunction.__call__


def _called(self, *args, **kwargs):
    if self.fn.__module__.startswith("triton."):
        return _call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


InterpretedFunction.__call__ = _called
