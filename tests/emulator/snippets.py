"""A few lines of PTX as a kernel."""

import ctypes

import torch
from torch import Tensor

from . import ptxemu

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def run(body: str, parameters: list = (), threads: int = 32, globals: str = "", **options) -> None:
    """One block of a kernel with that body, whose parameters p0, p1, .. are 64 bits each."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(len(parameters)))
    text = f"{HEADER}{globals}\n.visible .entry k({declared}) {{ {body} }}"
    grid = options.pop("grid", (1,))
    ptxemu.Module(text).launch("k", grid, (threads,), parameters, **options)


def error_of(*args, **options) -> str:
    """What the emulator says of it; empty if nothing."""
    try:
        run(*args, **options)
    except ptxemu.Error as error:
        return str(error)
    return ""


def pointer(tensor: Tensor) -> ctypes.c_uint64:
    return ctypes.c_uint64(tensor.data_ptr())


def results(body: str, dtype: torch.dtype = torch.int32, threads: int = 32, **options) -> Tensor:
    """`result`, a register that the body has declared and written, of each thread."""
    out = torch.zeros(threads, dtype=dtype)
    bits = 8 * dtype.itemsize
    store = f"""
        .reg .b64 out; .reg .b32 thread;
        ld.param.u64 out, [p0];
        mov.u32 thread, %tid.x;
        mad.wide.u32 out, thread, {dtype.itemsize}, out;
        st.global.b{bits} [out], result;
        ret;"""
    run(body + store, [pointer(out)], threads, **options)
    return out
