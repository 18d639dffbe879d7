"""Runs unmodified Triton kernels in the emulator: `with emulated(90): kernel[grid](cpu_tensor, ...)`."""

import contextlib
import ctypes
import inspect
import struct
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import _allocation

from . import ptxemu
from .build import CACHE

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
_INTEGERS = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
}  # fmt: skip


class _Utils:
    """What Triton asks its CUDA driver module for."""

    def __init__(self, capability: int):
        self.capability = capability
        self.edit_ptx: Callable[[str], str] | None = (
            None  # what is to be done to each kernel's code
        )

    def get_device_properties(self, _) -> dict:
        return {
            "max_shared_mem": SHARED_BYTES[self.capability],
            "multiprocessor_count": 1,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, *_):
        ptx = binary.decode()
        module = ptxemu.Module(ptx if self.edit_ptx is None else self.edit_ptx(ptx))
        return module, (module, name), 0, 0, 1024

    def unload_module(self, _) -> None:
        pass

    def fill_tma_descriptor_tiled(
        self, address, swizzle, element_bytes, element_type, block, shape, strides, padding
    ) -> ptxemu.TensorMap:
        return ptxemu.encode_tiled(
            element_type,
            address,
            list(reversed(shape)),
            [stride * element_bytes for stride in reversed(strides[:-1])],
            list(reversed(block)),
            swizzle,
            bool(padding),
        )

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name in Triton 3.6


class _Launcher:
    def __init__(self, source, metadata):
        self.metadata = metadata
        self.kinds = tuple(source.signature.values())

    def __call__(self, x, y, z, stream, function, *rest):
        metadata, driver = self.metadata, triton.runtime.driver.active
        arguments = rest[4:]  # after metadata and hooks
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        parameters = [_parameter(kind, value) for kind, value in _flat(self.kinds, arguments, maps)]
        # What a tensor map has instead of a pointer is its `base`.
        tensors = [getattr(value, "base", value) for _, value in _leaves(self.kinds, arguments)]
        programs = x * y * z * metadata.num_ctas
        scratch = _scratch(programs * metadata.global_scratch_size, metadata.global_scratch_align)
        parameters.append(ctypes.c_uint64(0 if scratch is None else scratch.data_ptr()))
        parameters.append(ctypes.c_uint64(0))  # no profiler
        module, name = function
        with _registered([t for t in (*tensors, scratch) if isinstance(t, torch.Tensor)]):
            module.launch(
                name,
                (x * metadata.num_ctas, y, z),
                (32 * metadata.num_warps, 1, 1),
                parameters,
                cluster=(metadata.num_ctas, 1, 1),
                dynamic_smem=metadata.shared,
                cooperative=bool(metadata.launch_cooperative_grid),
                seed=driver.next_seed(),
                races=driver.races,
            )
        if driver.on_launch is not None:
            driver.on_launch(name, (x, y, z))


def _leaves(kinds: tuple, values: tuple) -> Iterator[tuple[str, object]]:
    """Types and arguments of a kernel, of which some are tuples of others."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _leaves(kind, value)
        else:
            yield kind, value


def _flat(kinds: tuple, values: tuple, maps: Iterator) -> Iterator[tuple[str, object]]:
    """The same as the code takes them: a tensor descriptor as its map, or as its pointer, with its sizes."""
    for kind, value in _leaves(kinds, values):
        if kind.startswith("tensordesc"):
            parts = _make_tensordesc_arg(value, next(maps, None))
            ndim = len(value.shape)
            begins = (
                ["nvTmaDesc"]
                if isinstance(parts[0], ptxemu.TensorMap)
                else ["*", *["i64"] * 2 * ndim]
            )
            ends = ["i32"] * ndim + ["i64"] * ndim
            flags = ["i1"] * (len(parts) - len(begins) - len(ends))
            yield from zip([*begins, *flags, *ends], parts, strict=True)
        elif kind != "constexpr":
            yield kind, value


def _make_tensordesc_arg(value, description) -> list:
    make = nvidia_driver.make_tensordesc_arg
    more = [None] * (len(inspect.signature(make).parameters) - 2)  # Triton 3.6 takes none
    return make(value, description, *more)


def _parameter(kind: str, value):
    if kind == "nvTmaDesc":
        return value
    if kind[0] == "*":
        address = value.data_ptr() if hasattr(value, "data_ptr") else value or 0
        return ctypes.c_uint64(address)
    if kind in _INTEGERS:
        return _INTEGERS[kind](int(value))
    if kind in ("fp32", "f32"):
        return ctypes.c_float(value)
    if kind == "fp64":
        return ctypes.c_double(value)
    if kind == "fp16":
        return ctypes.c_uint16(struct.unpack("<H", struct.pack("<e", value))[0])
    if kind == "bf16":
        return ctypes.c_uint16(
            int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
        )
    raise TypeError(f"an argument of type {kind}")


def _scratch(num_bytes: int, align: int) -> torch.Tensor | None:
    if num_bytes == 0:
        return None
    allocated = _allocation._allocator.get()(num_bytes, align, None)
    return allocated if isinstance(allocated, torch.Tensor) else None


@contextlib.contextmanager
def _registered(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Only the storages of the arguments may be accessed."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    # With no pointer at all, nothing may be accessed: a range that no access is in.
    storages = {start: size for start, size in storages.items() if size} or {4096: 0}
    for start, size in storages.items():
        ptxemu.register_memory(start, size, "tensor")
    try:
        yield
    finally:
        for start in storages:
            ptxemu.unregister_memory(start)


class EmulatedDriver(DriverBase):
    launcher_cls = _Launcher

    def __init__(self, capability: int, seed: int, races: bool, on_launch: Callable | None):
        if capability not in SHARED_BYTES:
            raise ValueError(f"capability must be one of {list(SHARED_BYTES)}, got {capability}")
        self.capability, self.races = capability, races
        self.utils = _Utils(capability)
        self.on_launch = on_launch
        self._seed, self._launches = seed, 0

    def next_seed(self) -> int:
        """0 stays 0: the plain schedule; others differ from launch to launch."""
        self._launches += 1
        return self._seed and self._seed * 1_000_003 + self._launches

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached by it

    def get_current_stream(self, _) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia_driver.ty_to_cpp(ty)

    def get_benchmarker(self):
        raise NotImplementedError("an emulator has no time")


@contextlib.contextmanager
def emulated(
    capability: int, seed: int = 0, races: bool = False, on_launch: Callable | None = None
) -> Iterator[EmulatedDriver]:
    """Kernels launch in the emulator.

    Args:
        capability: 80 or 90, for which the kernels are compiled.
        seed: 0 for the plain schedule, anything else for a random one.
        races: whether races in shared memory are looked for.
        on_launch: is called with a kernel's name and grid after each launch.
    """
    driver = EmulatedDriver(capability, seed, races, on_launch)
    config, knobs = triton.runtime.driver, triton.knobs
    before = config._active, nvidia_compiler.CUDABackend.make_cubin
    config.set_active(driver)
    if config._default is None:
        config._default = driver  # for kernels that are unloaded at the end of the process
    # The emulator takes PTX: ptxas has nothing to do, and its cache is not for others.
    nvidia_compiler.CUDABackend.make_cubin = lambda self, source, *_: source.encode()
    try:
        with knobs.cache.scope():
            knobs.cache.dir = str(CACHE / "triton")
            yield driver
    finally:
        config._active, nvidia_compiler.CUDABackend.make_cubin = before
