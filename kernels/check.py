"""Compile every kernel as production launches it, for GPUs that need not be there, and look at the machine code.

    python -m vapi_fast.kernels.check [--only NAME] [--arch sm_90 ...] [--output-dir DIR]

Prints for every kernel and architecture the registers of a thread, bytes spilled, shared memory, the matrix
instruction that a dot became and the widest global load. Exit code 1 if a kernel spills, needs more shared memory than
a block can have, or has a dot without a matrix instruction. `--output-dir` keeps the machine code as
`<architecture>/<kernel>-<n>.cubin`.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vapi_fast.ops.fused.launch import recorded
from vapi_fast.ops.fused.production import PRODUCTION, WITHOUT_FP8

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block can have
MATRIX_INSTRUCTION = re.compile(r"\b(UTC[A-Z]*MMA|[HQI]GMMA|HMMA|IMMA|QMMA)\b")
GLOBAL_LOAD = re.compile(r"\b(?:LDGSTS|LDG|UBLKCP|UTMALDG)\b(?:\.\w+)*")
POINTER_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel on one architecture looks like; sizes in bytes, load width in bits."""

    entry: str
    kernel: str
    architecture: str
    warps: int
    registers: int
    spilled: int
    shared: int
    dots: int
    matrix_instruction: str
    load_width: int

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
        return found


def source_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What `kernel[grid](*args, **constants)` would compile, specialised on 1, on multiples of 16, on alignment."""
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in constants.items() if k not in options}
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialise):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER_TYPES[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0  # allocations are aligned
        elif isinstance(value, bool):
            signature[parameter.name], divisible = "u1", False
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            signature[parameter.name], divisible = "fp32", False
        if divisible and specialise:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes), options


def tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA programs that the Triton wheel carries."""
    path = Path(triton.backends.__file__).parent / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def load_width(sass: str) -> int:
    """Bits of the widest global load; bulk copies count as 128."""
    widths = [0]
    for load in GLOBAL_LOAD.findall(sass):
        modifiers = load.split(".")
        if modifiers[0] in ("UBLKCP", "UTMALDG"):
            widths.append(128)
            continue
        sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        widths.append(next((sizes[m] for m in modifiers if m in sizes), 32))
    return max(widths)


def compile_entry(entry: str, architecture: str, output_dir: Path | None) -> list[Report]:
    """Compile the kernels of one production entry for one architecture."""
    with recorded(architecture) as recording:
        PRODUCTION[entry]()
    reports: dict[str, Report] = {}
    for kernel, _, args, constants in recording.launches:
        source, options = source_of(kernel, args, constants)
        if source.hash() + str(options) in reports:
            continue
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        compiled = triton.compile(source, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "--dump-resource-usage", file.name)
            sass = tool("nvdisasm", file.name)
        if output_dir is not None:
            name = f"{kernel.__name__}-{len(reports)}-{re.sub(r'[^0-9a-z]+', '-', entry)}.cubin"
            (output_dir / architecture).mkdir(parents=True, exist_ok=True)
            (output_dir / architecture / name).write_bytes(compiled.asm["cubin"])
        matrix = collections.Counter(MATRIX_INSTRUCTION.findall(sass))
        reports[source.hash() + str(options)] = Report(
            entry=entry,
            kernel=kernel.__name__,
            architecture=architecture,
            warps=compiled.metadata.num_warps,
            registers=int(re.search(r"REG:(\d+)", usage)[1]),
            spilled=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
            shared=compiled.metadata.shared,
            dots=len(re.findall(r"\btt\.dot", compiled.asm["ttir"])),
            matrix_instruction=matrix.most_common(1)[0][0] if matrix else "-",
            load_width=load_width(sass),
        )
    return list(reports.values())


def check(
    architectures: list[str], only: str = "", output_dir: Path | None = None, processes: int | None = None
) -> list[Report]:
    """Reports of all kernels whose entry or architecture was asked for, printed as they come."""
    entries = [entry for entry in PRODUCTION if only in entry]
    work = [
        (entry, architecture, output_dir)
        for entry in entries
        for architecture in architectures
        if not (entry.endswith("fp8") and architecture in WITHOUT_FP8)
    ]
    print(f"{'entry':<32} {'kernel':<32} {'arch':<7} warps  regs spill  shared  matrix  load")
    reports = []
    with ProcessPoolExecutor(processes) as pool:
        for batch in pool.map(compile_entry, *zip(*work, strict=True)):
            for r in batch:
                print(
                    f"{r.entry:<32} {r.kernel:<32} {r.architecture:<7} {r.warps:>5} {r.registers:>5} {r.spilled:>5} "
                    f"{r.shared:>7}  {r.matrix_instruction:<7} {r.load_width:>4}",
                    flush=True,
                )
            reports += batch
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vapi_fast.kernels.check", description="Compile every kernel and check its machine code."
    )
    parser.add_argument("--only", default="", metavar="NAME", help="only operations whose name contains NAME")
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT), help="default: all")
    parser.add_argument("--output-dir", type=Path, help="keep the machine code here")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
    if not any(options.only in entry for entry in PRODUCTION):
        parser.error(f"--only {options.only}: no such operation; there are {', '.join(PRODUCTION)}")
    reports = check(options.arch, options.only, options.output_dir, options.processes)
    problems = [f"{r.entry}: {r.kernel} on {r.architecture} {p}" for r in reports for p in r.problems]
    print(f"{len(reports)} kernels, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
