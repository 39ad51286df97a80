"""Compile every kernel as production launches it, for GPUs that need not be there, and look at the machine code.

    python -m vapi_fast.kernels.check [--only NAME] [--arch sm_90 ...] [--output-dir DIR]

Prints for every kernel and architecture the registers of a thread, bytes spilled, shared memory, the matrix
instruction that a dot became, the widest global load, and what it was specialised on; of a kernel that goes through a
map by tiles of pixels and channels also the instructions that its loop takes for one element, and the barriers of one
iteration. Exit code 1 if a kernel spills, needs more shared memory than a block can have, or has a dot without a matrix
instruction or whose matrix instructions wait for each other. `--output-dir` leaves a library that VAPI_FAST_KERNELS can
name.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from .compile import ARCHITECTURES, compiled, in_parallel, wanted
from .launches import Descriptor, Pointer, Specialisation, load
from .library import keep, write_manifest

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block can have
MATRIX_INSTRUCTION = re.compile(r"\b(UTC[A-Z]*MMA|[HQI]GMMA|HMMA|IMMA|QMMA)\b")
HOPPER_PRODUCT = re.compile(r"\b[HQI]GMMA\b[^;]*;")
GLOBAL_LOAD = re.compile(r"\bld\.global(?:\.(?!v\d)[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
JUMP = re.compile(r"`?\(?(\.L_x_\d+)\)?\s*$")
ASYNCHRONOUS_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel on one architecture looks like; sizes in bytes, load width in bits.

    instructions: of one element, in the loop over a map's tiles; barriers: of one iteration of it. None without one.
    """

    kernel: str
    architecture: str
    warps: int
    registers: int
    spilled: int
    shared: int
    dots: int
    matrix_instruction: str
    serial: bool  # each of its instructions waits for the one before: the assembler found no way to overlap them
    load_width: int
    instructions: float | None
    barriers: int | None
    specialised: str  # arguments and constants that it was compiled for

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes a thread: use smaller blocks or more warps")
        if self.shared > SHARED_LIMIT[self.architecture]:
            limit = SHARED_LIMIT[self.architecture]
            found.append(
                f"needs {self.shared} bytes of shared memory, {limit} is the limit: use smaller blocks or stages"
            )
        if self.dots and self.matrix_instruction == "-":
            found.append("has a dot that did not become a matrix instruction: check its shape and precision")
        if self.serial:
            found.append("has matrix instructions that wait for each other: make its loop's length a constant")
        return found


def tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA programs that the Triton wheel carries."""
    path = Path(triton.backends.__file__).parent / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def load_width(ptx: str) -> int:
    """Bits of the widest load from global memory; bulk copies count as 128."""
    widths = [0] + [128] * ("cp.async.bulk" in ptx)
    widths += [8 * int(size, 0) for size in ASYNCHRONOUS_COPY.findall(ptx)]
    widths += [int(count or 1) * int(bits) for count, bits in GLOBAL_LOAD.findall(ptx)]
    return max(widths)


def matrix_instruction(code: str) -> str:
    """The commonest matrix instruction of the machine code, "-" if there is none."""
    found = collections.Counter(MATRIX_INSTRUCTION.findall(code))
    return found.most_common(1)[0][0] if found else "-"


def serial(code: str) -> bool:
    """Whether each asynchronous matrix instruction of the machine code (of Hopper's) waits until it has ended."""
    products = HOPPER_PRODUCT.findall(code)
    return len(products) > 1 and all("gsb0" in each for each in products)


def longest_loop(code: str) -> list[str]:
    """Instructions of the machine code's longest loop, from a label to the branch back to it, without operands."""
    instructions: list[str] = []
    places: dict[str, int] = {}  # of labels so far
    longest: list[str] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
            target = JUMP.search(found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in places:
                longest = max(longest, instructions[places[target[1]] :], key=len)
    return longest if len(longest) > 1 else []  # code ends with a branch to itself


def tile_elements(each: Specialisation) -> int:
    """Elements of one tile of a map, 0 for a kernel that goes through none."""
    constants = dict(each.constants)
    pixels = constants.get("BLOCK_P", 4 * constants.get("BLOCK_WINDOWS", 0))
    return pixels * constants.get("BLOCK_C", 0)


def report(each: Specialisation, architecture: str, library: Path | None) -> Report:
    """Compile one kernel for one architecture and read its machine code; into the library too, if there is one."""
    kernel = compiled(each, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        dots = len(re.findall(r"\btt\.dot", kernel.asm["ttir"]))
        elements = tile_elements(each)  # disassembling takes longer than compiling
        code = tool("nvdisasm", "--no-dataflow", file.name) if dots or elements else ""
    loop = longest_loop(code) if elements else []
    threads = 32 * kernel.metadata.num_warps
    if library is not None:
        keep(kernel, library)
    return Report(
        kernel=each.kernel,
        architecture=architecture,
        warps=kernel.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        dots=dots,
        matrix_instruction=matrix_instruction(code),
        serial=serial(code),
        load_width=load_width(kernel.asm["ptx"]),
        instructions=len(loop) * threads / elements if loop else None,
        barriers=sum(name.startswith("BAR") for name in loop) if loop else None,
        specialised=", ".join(map(shown, each.arguments)) + "; " + ", ".join(f"{n}={v}" for n, v in each.constants),
    )


def shown(argument: Any) -> str:
    """An argument as the table has it: a pointer by its dtype, 16 for a multiple of it, 3 for another integer."""
    if isinstance(argument, Pointer):
        return argument.dtype + ("" if argument.aligned else " unaligned")
    if isinstance(argument, Descriptor):
        return f"{argument.dtype} {'×'.join(map(str, argument.block))}"
    return str(argument)


def check(
    architectures: list[str], only: str = "", library: Path | None = None, processes: int | None = None
) -> list[Report]:
    """Reports of all kernels whose name and architecture were asked for, printed as they come."""
    work = [(each, arch, library) for arch in architectures for each in wanted(arch) if only in each.kernel]
    print(f"{'kernel':<40} arch    warps  regs spill  shared  matrix  load instr bars  arguments; constants")
    reports = []
    for r in in_parallel(report, work, processes):
        loop = f"{r.instructions:>5.1f} {r.barriers:>4}" if r.instructions else "    -    -"
        print(
            f"{r.kernel:<40} {r.architecture:<7} {r.warps:>5} {r.registers:>5} {r.spilled:>5} {r.shared:>7} "
            f" {r.matrix_instruction:<7} {r.load_width:>4} {loop}  {r.specialised}",
            flush=True,
        )
        reports.append(r)
    if library is not None:
        write_manifest(library, architectures, len(reports))
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vapi_fast.kernels.check", description="Compile every kernel and check its machine code."
    )
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--output-dir", type=Path, help="leave a library for VAPI_FAST_KERNELS here")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
    names = sorted({each.kernel for each in load()})
    if not any(options.only in name for name in names):
        parser.error(f"--only {options.only}: no such kernel; there are {', '.join(names)}")
    start = time.perf_counter()
    reports = check(options.arch, options.only, options.output_dir, options.processes)
    problems = [f"{r.kernel} on {r.architecture} {p} ({r.specialised})" for r in reports for p in r.problems]
    seconds = time.perf_counter() - start
    print(f"{len(reports)} kernels in {seconds:.0f} s, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
