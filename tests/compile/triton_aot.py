"""Compiles, without a GPU, exactly what the host code of the Triton backend launches.

`record_launches` replaces the launch of every kernel by a note of its arguments; `compiling` turns such
notes into machine code for a GPU architecture and reads what it needs of a multiprocessor.
"""

import contextlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

OPTIONS = ("num_warps", "num_stages", "maxnreg")
_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: (
        dict  # by name: kind, value if that is part of the code, whether it is a multiple of 16
    )
    options: dict
    tiles: object = None  # the configuration, where the kernel walks over tiles

    @property
    def key(self) -> tuple:
        """Launches of the same key compile to the same code, up to what is known of alignment: which
        pointers and integers are multiples of 16 varies between the rectangles of one call."""
        arguments = [(kind, str(value)) for kind, value, _ in self.arguments.values()]
        return self.kernel.__name__, *arguments, *self.options.items()

    @property
    def aligned(self) -> int:
        """How many of the pointers are."""
        return sum(kind[0] == "*" and divisible for _, kind, _, divisible in self.leaves())

    def leaves(self):
        """(path, kind, value, divisible) of every argument, those in tuples included."""
        for position, argument in enumerate(self.arguments.values()):
            yield from _leaves((position,), *argument)


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes a thread, in local memory: what does not fit into its registers
    shared: int  # bytes of shared memory
    threads: int
    ptx: str
    sass: str  # where there is a stack

    def programs_per_multiprocessor(self, registers: int, shared: int) -> int:
        """How many fit, by registers (allocated by the warp, 256 at a time) and shared memory."""
        warps = self.threads // 32
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(registers // (per_warp * warps), shared // (self.shared + 1024))

    def stack_accesses_in_inner_loops(self) -> list[str]:
        """The instructions, of the innermost loops and of those around tensor-core instructions. A loop is
        what a jump back spans."""
        code = re.findall(r"/\*([0-9a-f]+)\*/\s+(.*?)\s*;", self.sass)
        code = {int(address, 16): instruction for address, instruction in code}
        loops = []
        for address, instruction in code.items():
            jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", instruction)
            if jump and int(jump[1], 16) < address:
                loops.append(range(int(jump[1], 16), address))
        inner = [
            loop
            for loop in loops
            if not any(other != loop and other[0] in loop and other[-1] in loop for other in loops)
        ]
        for address, instruction in code.items():
            around = [loop for loop in loops if address in loop]
            if around and re.search(r"\b[HDI]G?MMA\b", instruction):
                inner.append(min(around, key=len))
        return [
            instruction
            for address, instruction in code.items()
            if re.search(r"\b(LDL|STL)\b", instruction) and any(address in loop for loop in inner)
        ]


def _leaves(path, kind, value, divisible):
    if not isinstance(kind, tuple):
        yield path, kind, value, divisible
        return
    for position, argument in enumerate(zip(kind, value, divisible, strict=True)):
        yield from _leaves((*path, position), *argument)


def _describe(name: str, value, is_constant: bool):
    if isinstance(value, tuple) and not is_constant:
        described = [_describe(name, element, False) for element in value]
        return tuple(type(value)(*each) for each in zip(*described, strict=True))
    if is_constant or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPES[value.dtype], None, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_DTYPES[value.base.dtype]}[{block}]>", None, False
    if isinstance(value, bool):
        return "i1", None, False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", 1, False
        return ("i32" if abs(value) < 2**31 else "i64"), None, value % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    raise TypeError(f"{name}: {value!r}")


@contextlib.contextmanager
def record_launches():
    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = kernel.signature.bind(*args, **kwargs).arguments
        constant = {p.name for p in kernel.params if p.is_constexpr}
        described = {
            name: _describe(name, value, name in constant) for name, value in bound.items()
        }
        launches.append(Launch(kernel, described, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def compile_launch(launch: Launch, capability: int) -> Compiled:
    kernel = compile_for(launch, GPUTarget("cuda", capability, 32))
    registers, stack, sass = _inspect(kernel.asm["cubin"])
    return Compiled(
        registers,
        stack,
        shared=kernel.metadata.shared,
        threads=32 * kernel.metadata.num_warps,
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


def compile_for(launch: Launch, target: GPUTarget):
    """Triton's own result."""
    signature = {name: kind for name, (kind, _, _) in launch.arguments.items()}
    constants, attributes = {}, {}
    for path, kind, value, divisible in launch.leaves():
        if kind == "constexpr":
            constants[path] = value
        if divisible:
            attributes[path] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


_launches: dict[tuple, Launch] = {}  # what the workers inherit; a kernel cannot be pickled


@contextlib.contextmanager
def compiling(launches: dict[tuple, Launch]) -> Iterator[dict[tuple, Future[Compiled]]]:
    """`compile_launch` for each, on all processors. The keys begin with the capability."""
    _launches.clear()
    _launches.update(launches)
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=fork)
    try:
        yield {key: pool.submit(_compile, key) for key in launches}
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(key: tuple) -> Compiled:
    return compile_launch(_launches[key], key[0])


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack and, where there is one, the instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            command = [tool, what, file.name]
            return subprocess.run(command, capture_output=True, check=True, text=True).stdout

        # Not LOCAL, which is 0 even where ptxas reports spills: they are on the stack.
        found = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        registers, stack = map(int, found.groups())
        return registers, stack, dump("--dump-sass") if stack else ""
