"""The kernels compile for four GPUs without one, do not spill and load wide; and that shows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.jit import JITFunction

from benchmarks import kernel_resources as kr

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "kernel_resources.py"

# A stand-in for the package: a kernel as it should be, one that needs more registers than a thread
# has on NVIDIA or on AMD, one that reads from addresses that are not multiples of 16 bytes, and one
# that the interpreter runs and the compiler refuses.
STAND_IN = """
import sys

import torch
import triton
import triton.language as tl

from benchmarks import kernel_resources as kr


@triton.jit
def _rows_kernel(x_ptr, V, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, V // BLOCK * BLOCK, BLOCK):
        total += tl.load(x_ptr + SHIFT + first + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(x_ptr + tl.arange(0, BLOCK), total / tl.sum(total, 0))


@triton.jit
def _broken_kernel(x_ptr, V, BLOCK: tl.constexpr):
    x = tl.load(x_ptr)
    for first in tl.range(0, V, BLOCK):
        x = tl.load(x_ptr + first + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


def broken(dtype, vocab):
    _broken_kernel[(1,)](torch.zeros(vocab, dtype=dtype), vocab, BLOCK=64)


def call(shift, block):
    def run(dtype, vocab):
        x = torch.zeros(vocab + 1, dtype=dtype)
        _rows_kernel[(1,)](x, vocab, SHIFT=shift, BLOCK=block, num_warps=1)

    return run, {}


kr.CALLS = {"good": call(0, 1024), "narrow": call(1, 1024)}
kr.CALLS |= {"hungry": call(0, 8192), "hungry_amd": call(0, 16384), "broken": (broken, {})}
sys.exit(kr.main())
"""


def _run(command, **environment):
    """Out of this process, whose kernels are interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600,
        env=kept | {"PYTHONPATH": path} | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_the_package_launches_what_the_table_says_and_its_main_kernels_are_good():
    """Compiles every kernel for every target in its main variants; the script alone does them all.
    The names of the rows are compared for all variants. No launch leaves it to Triton whether a
    product and a sum become one instruction."""
    done = _run([SCRIPT, "--quick"], PYTHONWARNINGS="error:TRITON_DEFAULT_FP_FUSION")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_spill_a_narrow_load_and_another_set_of_rows_are_found(tmp_path):
    module, table = tmp_path / "stand_in.py", tmp_path / "table.csv"
    module.write_text(STAND_IN)

    def run(*args):
        return _run([module, "--table", table, *args], TRITON_CACHE_DIR=str(tmp_path / "cache"))

    only = "--op", "good", "--target", "sm_90"
    written = run(*only)
    assert written.returncode == 0, written.stderr
    rows = list(csv.DictReader(table.open()))
    assert [row["dtype"] for row in rows] == ["bf16", "fp16", "fp32", "bf16", "fp32"]
    assert {row["kernel"] for row in rows} == {"rows_kernel"} and rows[0]["warps"] == "1"
    assert rows[0]["variant"] == "shift=0 block=1024 V=151936" and rows[0]["load_bits"] == "128"
    checked = run("--check", *only)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    table.write_text(table.read_text().replace("V=50257,bf16", "V=50258,bf16"))
    checked = run("--quick", *only)
    assert checked.returncode == 1
    row = "good rows_kernel shift=0 block=1024"
    assert f"not in the table: {row} V=50257 bf16 sm_90" in checked.stdout
    assert f"in the table, not launched: {row} V=50258 bf16 sm_90" in checked.stdout

    everything = "good", "hungry", "narrow", "broken"
    for ops, target in ((everything, "sm_90"), (("hungry_amd",), "gfx942")):
        checked = run("--quick", "--op", *ops, "--target", target)
        assert checked.returncode == 1, checked.stderr
        lines = checked.stdout.splitlines()
        spilling = [line.split()[0] for line in lines if "bytes spilled" in line]
        narrow = [line.split()[0] for line in lines if "loads of" in line]
        assert spilling == [op for op in ops if "hungry" in op]
        broken = [line.split()[0] for line in lines if "does not compile: AssertionError" in line]
        assert narrow == [op for op in ops if op == "narrow"]
        assert broken == [op for op in ops if op == "broken"]


def _kernel(x_ptr, y_ptr, n, stride, flag, number, seed: tl.int64, MODE: tl.constexpr,
            FAST: tl.constexpr, T_STREAM: tl.constexpr):  # fmt: skip
    pass


def test_a_launch_is_specialised_as_triton_does():
    x = torch.zeros(65, dtype=torch.bfloat16)
    kernel = JITFunction(_kernel)
    args = x, None, 32, 1, True, 0.5, 2**40
    kwargs = dict(MODE=0, FAST=True, T_STREAM=3, num_warps=8, enable_fp_fusion=True)
    source, options = kr.specialise(kernel, args, kwargs, kr.TARGETS["sm_90"])
    assert list(source.signature.values()) == [
        "*bf16", "constexpr", "i32", "constexpr", "u1", "fp32", "i64",
        "constexpr", "constexpr", "constexpr",
    ]  # fmt: skip
    assert source.constants == {(1,): None, (3,): 1, (7,): 0, (8,): True, (9,): 3}
    aligned = [["tt.divisibility", 16]]
    assert source.attrs[(0,)] == aligned and source.attrs[(2,)] == aligned
    assert options["num_warps"] == 8
    assert kr.describe(source) == "mode=0 fast"

    args = x[1:], x, 33, 2**31, False, 1, 5
    source, _ = kr.specialise(kernel, args, kwargs | {"FAST": False}, kr.TARGETS["sm_90"])
    kinds = list(source.signature.values())
    assert kinds[:6] == ["*bf16", "*bf16", "i32", "i64", "u1", "constexpr"] and kinds[6] == "i64"
    assert not source.attrs.get((0,)) and not source.attrs.get((2,))
    assert kr.describe(source) == "mode=0"


def test_launches_are_recorded_and_nothing_stays_patched():
    run, refuses, hip = JITFunction.run, kr.backend.triton_refuses, torch.version.hip
    kernel, tensor = JITFunction(_kernel), torch.zeros(1)
    with kr.recording(kr.TARGETS["gfx942"], 132) as launches:
        kernel[(1,)](tensor, MODE=1)
        assert torch.version.hip
        assert kr.backend.triton_refuses(tensor) is None
        assert kr.backend.multiprocessors(tensor.device) == 132
    assert launches == [(kernel, (tensor,), {"MODE": 1})]
    with kr.recording(kr.TARGETS["sm_90"], 132):
        assert not torch.version.hip
    assert JITFunction.run is run and kr.backend.triton_refuses is refuses
    assert torch.version.hip == hip


# The load at 40 is in a loop inside another, that at 20 in the outer one alone; control leaves 60
# for shared code far below and comes back.
SASS = """
 Function f:
  REG:73 STACK:0 SHARED:1024 LOCAL:8 CONSTANT[0]:1080 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                            /* 0x000e220000000800 */
        /*0010*/               @P3 BRA 0xa0 ;               /* 0x0 */
        /*0020*/                   LDG.E.U16 R8, desc[UR16][R2.64] ;
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/              @!P0 LDG.E.128 R8, desc[UR16][R8.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.64 [R4], desc[UR16][R8.64] ;
        /*0060*/                   BRA.DIV UR4, 0xc0 ;
        /*0070*/                   FADD R1, R1, R1 ;
        /*0080*/              @!P0 BRA 0x40 ;
        /*0090*/               @P1 BRA 0x20 ;
        /*00a0*/                   LDG.E R3, desc[UR16][R8.64] ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SHFL.BFLY PT, R1, R1, 0x10, 0x1f ;
        /*00d0*/                   BRA 0x70 ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def test_sass_is_read():
    code = kr.parse_sass(SASS)
    assert [i.load_bits for i in code] == [0, 0, 16, 0, 128, 64, 0, 0, 0, 0, 32, 0, 0, 0, 0]
    jumps = {place: i.jump for place, i in enumerate(code) if i.jump is not None}
    assert jumps == {1: 10, 6: 12, 8: 4, 9: 2, 13: 7, 14: 14}
    assert [place for place, i in enumerate(code) if not i.falls] == [11, 13, 14]
    assert kr.load_bits(code) == 64  # not 16, which is not in the inner loop
    assert kr.load_bits(kr.parse_sass(SASS.replace(".LTC128B.64", ".LTC128B.128"))) == 128
    assert kr.load_bits(kr.parse_sass(SASS.replace("BRA 0x40", "BRA 0x90"))) == 16
    either = SASS.replace("@!P0 LDG.E.128 R8, desc[UR16][R8.64]", "@!P0 BRA 0x60")
    either = either.replace("FADD R1, R1, R1", "LDG.E.128 R8, desc[UR16][R8.64]")
    assert kr.load_bits(kr.parse_sass(either)) == 128  # the turn that skips the narrow load
    straight = SASS.replace("BRA 0x40", "BRA 0x90").replace("BRA 0x20", "BRA 0xb0")
    assert kr.load_bits(kr.parse_sass(straight)) == 128  # without a loop the widest
    assert kr.parse_usage(SASS) == (73, 8)


AMDGCN = """
\t.text
kernel:
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_3
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tv_add_f32_e32 v1, v2, v3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[4:7], v[2:3], off
\tbuffer_load_dwordx2 v[0:1], v1, s[0:3], 0 offen
\ts_cbranch_scc0 .LBB0_1                ; a comment
.LBB0_3:
\tglobal_load_ushort v4, v[2:3], off
\tglobal_load_short_d16_hi v4, v[2:3], off
\ts_endpgm
\t.section .rodata
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 1
    .vgpr_count:     90
    .vgpr_spill_count: 5
"""


def test_amd_assembly_is_read():
    code = kr.parse_amdgcn(AMDGCN)
    assert [i.load_bits for i in code] == [0, 0, 0, 0, 128, 64, 0, 16, 16, 0]
    jumps = {place: i.jump for place, i in enumerate(code) if i.jump is not None}
    assert jumps == {1: 7, 2: 4, 6: 3}
    assert kr.load_bits(code) == 64
    assert kr.parse_usage(AMDGCN) == (90, 20)
    assert kr.parse_usage(AMDGCN.replace("spill_count: 5", "spill_count: 0")) == (90, 12)
    assert kr.parse_usage(AMDGCN.replace("size: 12", "size: 0")) == (90, 20)


def test_unaligned_rows_may_load_narrow_but_not_spill():
    key = "op", "kernel", "variant", "bf16", "sm_90"
    row = {"spill_bytes": 0, "load_bits": 16}
    assert kr.problems(kr.Variant(key, None, {}, False, True), row) == []
    assert kr.problems(kr.Variant(key, None, {}, True, True), row) == [
        "op kernel variant bf16 sm_90: loads of 16 bits"
    ]
    broken = kr.problems(kr.Variant(key, None, {}, True, True), {"error": "why"})
    assert broken == ["op kernel variant bf16 sm_90: does not compile: why"]
    row = {"spill_bytes": 8, "load_bits": 128}
    assert len(kr.problems(kr.Variant(key, None, {}, False, True), row)) == 1
