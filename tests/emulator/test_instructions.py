"""Single instructions: values at the edges of their ranges, and what the emulator does not know."""

import math

import pytest
import torch

from . import ptxemu
from .snippets import HEADER, error_of, results


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 result, x, 1;", -(2**31)),
        ("sub.s32 result, -2, x;", 2**31 - 1),
        ("sad.s32 result, x, -1, 0;", -(2**31)),
        ("shl.b32 result, x, 32;", 0),
        ("div.s32 result, x, 0;", -1),
        ("bfe.s32 result, x, 4, 8;", -1),
        ("prmt.b32 result, x, 0, 0x3b3b;", 0x7F007F00),
        ("lop3.b32 result, x, 5, 3, 0xc0;", 5),
        ("dp4a.s32.s32 result, x, 0x01010101, 0;", 127 - 3),
    ],
)
def test_integers(code, expected):
    assert results(f".reg .b32 result, x; mov.b32 x, 0x7fffffff; {code}")[0] == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Infinity and 2 by 2^126 and by 2^127.
        ("div.approx.f32 result, 0f7f800000, 0f7e800000;", math.inf),
        ("div.approx.f32 result, 0f7f800000, 0f7f000000;", math.nan),
        ("div.approx.f32 result, 0f40000000, 0f7f000000;", 0.0),
        ("min.f32 result, 0f7fc00000, 0f3f800000;", 1.0),
        ("min.NaN.f32 result, 0f7fc00000, 0f3f800000;", math.nan),
        ("max.f32 result, 0f80000000, 0f00000000;", 0.0),
        ("add.rz.f32 result, 0f3f800000, 0fb3000000;", 1 - 2**-24),
        ("mul.ftz.f32 result, 0f00400000, 0f40800000;", 0.0),
        ("cvt.sat.f32.f32 result, 0f40000000;", 1.0),
    ],
)
def test_floats(code, expected):
    value = results(f".reg .f32 result; {code}", torch.float32)[0].item()
    assert math.isnan(value) if math.isnan(expected) else value == expected


@pytest.mark.parametrize(
    ("conversion", "value", "dtype", "expected"),
    [
        ("rzi.s32.f32", "0f7fc00000", torch.int32, 0),
        ("rzi.s64.f32", "0f7fc00000", torch.int64, -(2**63)),
        ("rzi.s32.f64", "0d7ff8000000000000", torch.int32, -(2**31)),
        ("rni.s32.f32", "0f40200000", torch.int32, 2),
        ("rpi.s32.f32", "0f4f800000", torch.int32, 2**31 - 1),
        ("sat.s8.s32", "300", torch.int32, 127),
        ("u8.s32", "-1", torch.int32, 255),
        ("rz.bf16.f32", "0f3fffffff", torch.int16, 0x3FFF),
        ("rn.bf16.f32", "0f3fffffff", torch.int16, 0x4000),
    ],
)
def test_conversions(conversion, value, dtype, expected):
    bits = 64 if ".f64" in conversion else 32
    code = f"""
        .reg .b{bits} x; .reg .b{8 * dtype.itemsize} result;
        mov.b{bits} x, {value}; cvt.{conversion} result, x;"""
    assert results(code, dtype)[0] == expected


def test_exchanges_of_half_warps():
    """Lanes with different member masks meet at one instruction, and take part in different exchanges."""
    code = """
        .reg .pred p, low; .reg .b32 result, lane, mask;
        mov.u32 lane, %laneid; setp.lt.u32 low, lane, 16;
        selp.b32 mask, 0x0000ffff, 0xffff0000, low;"""
    odd = "and.b32 result, lane, 1; setp.ne.u32 p, result, 0;"
    ballots = results(f"{code} {odd} vote.sync.ballot.b32 result, p, mask;")
    assert ballots[0] == 0x0000AAAA and ballots[16] & 0xFFFFFFFF == 0xAAAA0000
    sums = results(f"{code} redux.sync.add.u32 result, lane, mask;")
    assert sums[0] == sum(range(16)) and sums[31] == sum(range(16, 32))
    assert "not in their own member mask" in error_of(
        """.reg .b32 t; mov.u32 t, %laneid; shfl.sync.bfly.b32 t, t, 1, 31, 0x0000ffff; ret;"""
    )


def test_address_spaces():
    code = """
        .local .align 8 .b8 mine[8]; .shared .align 8 .b8 ours[8];
        .reg .b64 a; .reg .pred p; .reg .b32 result;
        mov.u64 a, {variable}; cvta.{space}.u64 a, a; isspacep.{asked} p, a;
        selp.b32 result, 1, 0, p;"""
    for variable, space in (("mine", "local"), ("ours", "shared")):
        for asked in ("local", "shared", "global"):
            got = results(code.format(variable=variable, space=space, asked=asked))
            assert got.unique().tolist() == [space == asked]


def test_variables_of_the_module():
    values = ".global .align 64 .f32 table[4] = {0f3f800000, -0f40000000, 0f40400000};"
    load = ".reg .b64 a; .reg .f32 result; mov.u64 a, table; ld.global.f32 result, [a+{}];"
    got = [results(load.format(4 * i), torch.float32, globals=values)[0].item() for i in range(4)]
    assert got == [1.0, -2.0, 3.0, 0.0]
    address = ".reg .b64 a; .reg .b32 result; mov.u64 a, table; cvt.u32.u64 result, a;"
    assert results(address, globals=values)[0] % 64 == 0


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("frobnicate.b32 a, b; ret;", "unknown instruction"),
        (".reg .b32 a; add.s32.bogus a, a, a; ret;", "add.s32.bogus"),
        (".reg .b32 a; .reg .b64 b; add.s32 a, b, a; ret;", "unsupported operands"),
        (".reg .pred p, q; and.pred p, !q, p; ret;", "can be negated"),
        (".reg .b32 a; add.s32 a, a, -a; ret;", "expected a number"),
        (".reg .b32 a; .reg .pred p; setp.lt.f16x2 p, a, a; ret;", "unsupported type"),
        (".reg .pred p; @p ret;", "does not end with an exit"),
        (".reg .b32 a; bar.sync 0;", "does not end with an exit"),
        ("bra NOWHERE; ret;", "unknown label NOWHERE"),
        (".reg .b32 a; mov.b32 a, %nosuch; ret;", "unknown symbol %nosuch"),
        (".shared .q32 x; ret;", "no known type"),
        (
            ".reg .b64 a; mbarrier.arrive_drop.expect_tx.shared.b64 a, [a], 8; ret;",
            "an unsupported form",
        ),
    ],
)
def test_unknown_code_is_refused(body, why):
    """When it is loaded, with its line, and never skipped."""
    error = error_of(body)
    assert why in error and ("line" in error or "does not end" in error)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (".func f", "expected ';'"),
        (".global .attribute(.managed", "expected ')'"),
        (".visible .entry k(", "expected '.param'"),
        (".visible .entry k() { ret;", "unknown item of a kernel"),
        (".global .u32 x[2] = {1, 2, 3};", "more initial values"),
        (".global .f32 x = 1.5;", "an initial value of another size"),
        ('.pragma "', "unterminated string"),
    ],
)
def test_broken_text_is_refused(text, why):
    with pytest.raises(ptxemu.Error, match=why.replace("(", r"\(").replace(")", r"\)")):
        ptxemu.Module(HEADER + text)
