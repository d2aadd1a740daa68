"""What the machine code of a kernel says without a GPU: registers, widths of loads, its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import networkx  # comes with torch
import triton


class Instruction(NamedTuple):
    load_bits: int = 0  # 0: no load from global memory
    jump: int | None = None  # where it may go
    falls: bool = True  # whether it may go on to the next
    opcode: str = ""


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
_AMD_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?")
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


def parse_sass(text: str) -> list[Instruction]:
    """NVIDIA's disassembly, without the padding at its end."""
    lines = [line for line in _SASS.findall(text) if line[2] != "NOP"]
    places = {int(line[0], 16): place for place, line in enumerate(lines)}
    code = []
    for _, guard, opcode, operands in lines:
        name, *modifiers = opcode.split(".")
        bits, jump = 0, None
        if name in ("LDG", "LDGSTS"):
            widths = (re.fullmatch(r"[US]?(\d+)", modifier) for modifier in modifiers)
            bits = max((int(width[1]) for width in widths if width), default=32)
        if name in ("BRA", "CALL") and (address := re.search(r"0x([0-9a-f]+)\W*$", operands)):
            jump = places.get(int(address[1], 16))
        always = not guard and "," not in operands
        falls = not (always and name in ("BRA", "EXIT", "RET"))
        code.append(Instruction(bits, jump, falls, opcode))
    return code


def parse_amdgcn(text: str) -> list[Instruction]:
    """The assembly that LLVM writes for AMD."""
    places, lines = {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            places[label[1]] = len(lines)
        elif instruction := re.match(r"\t([a-z]\w+)\s*([^;\n]*)", line):
            lines.append(instruction.groups())
    code = []
    for opcode, operands in lines:
        load = _AMD_LOAD.match(opcode)
        bits = _AMD_BITS[load[1]] * int(load[2] or 1) if load else 0
        jump = places.get(operands.strip()) if "branch" in opcode else None
        code.append(Instruction(bits, jump, opcode not in ("s_branch", "s_endpgm"), opcode))
    return code


def flow_of(code: list[Instruction]) -> networkx.DiGraph:
    """Which instruction, by its place, may follow which."""
    flow = networkx.DiGraph()
    for place, (_, jump, falls, _) in enumerate(code):
        following = [place + 1] if falls and place + 1 < len(code) else []
        flow.add_edges_from((place, to) for to in (*following, jump) if to is not None)
    return flow


def _cycles(code: list[Instruction], flow: networkx.DiGraph, nodes) -> Iterator[set[int]]:
    """The cyclic parts of some instructions that load from global memory."""
    for part in networkx.strongly_connected_components(flow.subgraph(nodes)):
        if len(part) > 1 and any(code[n].load_bits for n in part):
            yield part


def _entries(flow: networkx.DiGraph, part: set[int]) -> set[int]:
    return {n for n in part if any(p not in part for p in flow.predecessors(n))}


def innermost_loops(code: list[Instruction], flow: networkx.DiGraph, nodes=None):
    """The places of each innermost loop that loads from global memory."""
    for part in _cycles(code, flow, flow if nodes is None else nodes):
        yield from list(innermost_loops(code, flow, part - _entries(flow, part))) or [part]


def load_bits(code: list[Instruction]) -> int:
    """The narrowest load that no turn of an innermost loop avoids: these loops read logits, and the
    end of a row by loads of its own; without a loop the widest load."""
    flow = flow_of(code)

    def best(loop):  # the narrowest load of the turn that has the widest
        for bits in sorted({code[n].load_bits for n in loop}, reverse=True):
            wide = {n for n in loop if code[n].load_bits == 0 or code[n].load_bits >= bits}
            if any(_cycles(code, flow, wide)):
                return bits

    widest = max((instruction.load_bits for instruction in code), default=0)
    return min(map(best, innermost_loops(code, flow)), default=widest)


def shortest_turn(flow: networkx.DiGraph, loop: set[int]) -> list[int]:
    """The places that the turn of a loop with the fewest instructions goes through: no end of a
    row, and nothing that a kernel does in few of its blocks."""
    inside = flow.subgraph(loop)
    turns = [
        networkx.shortest_path(inside, entry, last)
        for entry in _entries(flow, loop)
        for last in inside.predecessors(entry)
        if networkx.has_path(inside, entry, last)
    ]
    return min(turns, key=len)


def disassemble(cubin: bytes) -> str:
    """Resource usage and machine code, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_usage(text: str) -> tuple[int, int]:
    """(registers, spilled bytes) from `cuobjdump --dump-resource-usage` or from AMD assembly."""

    def field(name: str) -> int:
        return max(map(int, re.findall(rf"{re.escape(name)}:\s*(\d+)", text)), default=0)

    if ".vgpr_count" in text:
        spilled, scratch = field(".vgpr_spill_count"), field(".private_segment_fixed_size")
        return field(".vgpr_count"), max(4 * spilled, scratch)
    return field("REG"), max(field("STACK"), field("LOCAL"))
