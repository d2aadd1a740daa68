"""What is counted as one turn of a sweep, and that a sweep stays within its budget."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import instruction_counts as ic
from benchmarks.machine_code import parse_sass

ROOT = Path(__file__).parent.parent

# Two sweeps. The first may skip 40 to 50 (noise) and takes 90 only where it jumps to it (the end of
# a row); the second is straight.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P3 BRA 0x90 ;
        /*0020*/                   LDG.E.128 R8, desc[UR16][R2.64] ;
        /*0030*/               @P0 BRA 0x60 ;
        /*0040*/                   MUFU.EX2 R8, R8 ;
        /*0050*/                   MUFU.EX2 R9, R8 ;
        /*0060*/                   FFMA R1, R1, R1, R1 ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   BRA 0xb0 ;
        /*0090*/                   LDG.E.U16 R8, desc[UR16][R2.64] ;
        /*00a0*/                   BRA 0x30 ;
        /*00b0*/                   LDG.E.128 R8, desc[UR16][R2.64] ;
        /*00c0*/                   IMAD.WIDE R8, R8, R9, R10 ;
        /*00d0*/                   FSETP.GT.AND P0, PT, R8, R9, PT ;
        /*00e0*/               @P0 BRA 0xb0 ;
        /*00f0*/                   EXIT ;
"""


def test_a_turn_is_the_shortest_way_round():
    first, second = ic.sweeps(parse_sass(SASS))
    assert sorted(map(ic.name_of, first)) == ["BRA", "BRA", "BRA", "FFMA", "LDG"]
    assert [ic.name_of(x) for x in second] == ["LDG", "IMAD", "FSETP", "BRA"]
    with_noise = SASS.replace("@P0 BRA 0x60", "FADD R1, R1, R1")
    first, _ = ic.sweeps(parse_sass(with_noise))
    assert [ic.name_of(x) for x in first].count("MUFU") == 2
    straight = parse_sass(SASS[: SASS.index("/*0070*/")])
    assert ic.sweeps(straight) == [straight]


def test_counts_are_per_pair_and_cycles_those_of_the_busiest_unit():
    code = parse_sass(SASS)
    first, second = (ic.counts(turn, 2) for turn in ic.sweeps(code))
    assert first == {
        "instructions": 2.5, "fma": 0.5, "alu": 0, "mufu": 0, "memory": 0.5, "other": 1.5,
        "cycles": 2.5,
    }  # fmt: skip
    assert (second["fma"], second["alu"], second["cycles"]) == (0.5, 0.5, 2)
    busy = [x for x in code if ic.name_of(x) in ("MUFU", "FFMA")]
    assert ic.counts(busy, 1)["cycles"] == 16
    assert not set(ic.UNITS) - {*ic.UNIT_OF.values(), "other"}


@pytest.mark.slow
def test_the_main_sweeps_are_what_the_table_says(tmp_path):
    """Another compiler may count a little differently, another kernel would not."""
    table = tmp_path / "counts.csv"
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "instruction_counts.py", "--op", "switch_select",
         "--only", "draw_t=2", "draw_s=2", "metric=jsd", "bits", "phase=row", "--table", table],
        check=True, capture_output=True, timeout=600, env=kept | {"PYTHONPATH": path},
    )  # fmt: skip

    def read(path):
        with open(path, encoding="utf-8") as file:
            keys = ("op", "kernel", "variant", "target", "sweep")
            return {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}

    found, known = read(table), read(ic.TABLE)
    assert len(found) == 8  # of even and of ragged rows: scan, again for either token, divergence
    for key, row in found.items():
        assert float(row["cycles"]) <= 1.1 * float(known[key]["cycles"]), key
