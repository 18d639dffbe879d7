"""ctypes bindings of the emulator, which is built when first used."""

import ctypes
import functools
from collections.abc import Sequence

from .build import emulator_library

_ERROR_BYTES = 1 << 16


class Error(RuntimeError):
    """What the emulator found: in the PTX when it is loaded, in a kernel while it runs."""


class Config(ctypes.Structure):
    """ptxemu_config."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("dynamic_smem", ctypes.c_uint),
        ("cooperative", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("races", ctypes.c_int),
    ]


class TensorMap(ctypes.Structure):
    """CUtensorMap, with contents of our own."""

    _fields_ = [("opaque", ctypes.c_uint8 * 128)]


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(emulator_library()))
    pointer, text, size, number = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
    )  # fmt: skip
    for function, result, arguments in (
        (lib.ptxemu_load, pointer, (text, text, size)),
        (lib.ptxemu_unload, None, (pointer,)),
        (lib.ptxemu_launch, number, (pointer, text, pointer, pointer, text, size)),
        (lib.ptxemu_register_memory, None, (pointer, size, text)),
        (lib.ptxemu_unregister_memory, None, (pointer,)),
        (
            lib.ptxemu_encode_tiled,
            text,
            (pointer, number, ctypes.c_uint, *[pointer] * 5, *[number] * 4),
        ),
        (lib.ptxemu_counts, text, ()),
    ):
        function.restype, function.argtypes = result, arguments
    return lib


class Module:
    def __init__(self, ptx: str):
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._lib = library()
        self._handle = self._lib.ptxemu_load(ptx.encode(), error, _ERROR_BYTES)
        if not self._handle:
            raise Error(error.value.decode())

    def __del__(self):
        if getattr(self, "_handle", None):
            self._lib.ptxemu_unload(self._handle)

    def launch(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], parameters: Sequence,
        cluster: Sequence[int] = (1, 1, 1), dynamic_smem: int = 0, cooperative: bool = False, seed: int = 0,
        races: bool = False,
    ) -> None:  # fmt: skip
        """`parameters`: ctypes objects, one for each .param."""

        def three(sizes):
            return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))

        config = Config(
            three(grid), three(block), three(cluster), dynamic_smem, cooperative, seed, races
        )
        addresses = (ctypes.c_void_p * max(1, len(parameters)))(*map(ctypes.addressof, parameters))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._lib.ptxemu_launch(
            self._handle, kernel.encode(), ctypes.byref(config), addresses, error, _ERROR_BYTES
        ):
            raise Error(error.value.decode())


def counts() -> dict[str, tuple[int, int]]:
    """Opcode to (warps, lanes) that the last launch executed."""
    return parsed_counts(library().ptxemu_counts())


def parsed_counts(text: bytes) -> dict[str, tuple[int, int]]:
    lines = text.decode().splitlines()
    return {opcode: (int(warps), int(lanes)) for opcode, warps, lanes in map(str.split, lines)}


def register_memory(address: int, num_bytes: int, name: str = "memory") -> None:
    library().ptxemu_register_memory(address, num_bytes, name.encode())


def unregister_memory(address: int) -> None:
    library().ptxemu_unregister_memory(address)


def encode_tiled(
    element_type: int, address: int, dims: Sequence[int], strides_bytes: Sequence[int],
    box: Sequence[int], swizzle: int, fill_nan: bool = False,
) -> TensorMap:  # fmt: skip
    """Innermost dimension first; `strides_bytes` of all dimensions but that one."""
    rank = len(dims)
    result = TensorMap()
    refused = library().ptxemu_encode_tiled(
        ctypes.byref(result), element_type, rank, address,
        (ctypes.c_uint64 * rank)(*dims), (ctypes.c_uint64 * max(1, rank - 1))(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        0, swizzle, 0, int(fill_nan),
    )  # fmt: skip
    if refused:
        raise Error(
            f"no tensor map: {refused.decode()}; type {element_type}, address {address:#x}, {dims=},"
            f" {strides_bytes=}, {box=}, {swizzle=}"
        )
    return result
