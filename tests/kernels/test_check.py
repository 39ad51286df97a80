"""The kernels' machine code, what the check calls a problem, and the library that it leaves."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import gone, wait_until

import vapi_fast
from vapi_fast import kernels
from vapi_fast.kernels import check, compile, launches

COMPILER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
GOOD = check.Report(
    kernel="rms_norm.rms_norm_forward_kernel",
    architecture="sm_90",
    warps=4,
    registers=64,
    spilled=0,
    shared=1024,
    dots=1,
    matrix_instruction="HGMMA",
    serial=False,
    load_width=128,
    instructions=None,
    barriers=None,
    specialised="bfloat16, bfloat16; BLOCK_D=2048",
)


def run(*arguments: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=COMPILER | variables, capture_output=True, text=True)


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "vapi_fast.kernels.check", *arguments)


@pytest.fixture(scope="module")
def checked() -> list[str]:
    """What the check of everything on sm_90 prints."""
    ended = run_check("--arch", "sm_90")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


def test_every_launch_compiles_without_a_problem(checked: list[str]) -> None:
    assert re.fullmatch(r"\d+ kernels in \d+ s, 0 problems", checked[-1])
    rows = [line.split()[:2] for line in checked]
    wanted = collections.Counter(each.kernel for each in compile.wanted("sm_90"))
    assert wanted == collections.Counter(kernel for kernel, architecture in rows[1:-1] if architecture == "sm_90")
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    defined = {
        f"{m.__name__.rpartition('.')[2]}.{name}" for m in modules for name in vars(m) if name.endswith("_kernel")
    }
    assert defined == {each.kernel for each in launches.load()}


def test_what_architectures_have_of_their_own_compiles_for_the_others() -> None:
    """Descriptors, on sm_80 pointers; all the rest is one code, which `ctest` compiles for all of them."""
    ended = run_check("--arch", "sm_80", "sm_100", "--only", "convolution")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {line.split()[1] for line in ended.stdout.splitlines()[1:-1]} == {"sm_80", "sm_100"}


# Instructions an element at most, in the loops of GroupNorm's kernels: what is launched first that fits.
MOST_INSTRUCTIONS = [
    ("statistics", "None, None, None", 7.0),
    ("statistics", "PHASES=False", 14.5),
    ("statistics", "PHASES=True", 17.5),
    ("silu_apply", "SILU=False", 5.5),
    ("silu_apply", "float8_e4m3fn", 12.0),
    ("silu_apply", "SILU=True", 10.5),
    ("silu_reduce", "", 21.0),
    ("silu_backward", "", 21.0),
]


def test_loops_over_maps_are_short_and_wait_at_no_barrier(checked: list[str]) -> None:
    rows = [line for line in checked if re.match(r"group_norm\.\S+ +sm_90 ", line)]
    seen = set()
    for row in rows:
        limits = [each for each in MOST_INSTRUCTIONS if f"norm_{each[0]}_kernel" in row and each[1] in row]
        instructions, barriers = row.split()[8:10]
        if not limits:
            assert "group_norm_finish_kernel" in row
            assert (instructions, barriers) == ("-", "-")
            continue
        seen.add(limits[0])
        assert float(instructions) <= limits[0][2], row
        assert barriers == "0", row
    assert seen == set(MOST_INSTRUCTIONS)


def test_longest_loop_reads_the_machine_code() -> None:
    code = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @P0  BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/             @!PT  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/             @!P1  BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""
    assert check.longest_loop(code) == ["LDG.E.128", "BAR.SYNC.DEFER_BLOCKING", "FFMA", "BRA"]
    assert check.longest_loop(code.replace("`(.L_x_0)", "`(.L_x_1)")) == []


def test_products_that_wait_for_each_other_are_seen() -> None:
    product = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;\n"
    waits = product.replace(" ;", ", gsb0 ;")
    assert check.serial(waits + "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n" + waits)
    assert not check.serial(product + product + waits)  # one wait for all
    assert not check.serial(waits)
    assert not check.serial("HMMA.16816.F32 R4, R8, R12, R4 ;\n")


# Compiles one specialisation, if it has to.
LAUNCH = """
import sys
from triton.compiler import ASTSource
from vapi_fast.kernels import compile, library
served = library.served()
if sys.argv[1:] == ["never"]:
    ASTSource.make_ir = None
each = next(each for each in compile.wanted("sm_90") if each.kernel == "rms_norm.rms_norm_forward_kernel")
print(len(compile.compiled(each, "sm_90").asm["cubin"]), "sm_90" in served)
"""


def test_a_library_takes_the_compilers_place(tmp_path: Path) -> None:
    library = tmp_path / "kernels"
    assert run_check("--arch", "sm_90", "--only", "rms_norm", "--output-dir", str(library)).returncode == 0
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "VAPI_FAST_KERNELS": str(library)}
    compiled = run("-c", LAUNCH, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert compiled.returncode == 0, compiled.stderr
    shutil.rmtree(tmp_path / "cache")
    without = run("-c", LAUNCH, "never", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert "'NoneType' object is not callable" in without.stderr
    taken = run("-c", LAUNCH, "never", **variables)
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout.split() == [compiled.stdout.split()[0], "True"]

    other = tmp_path / "other"
    shutil.copytree(library, other)
    record = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(record | {"versions": record["versions"] | {"triton": "2.0.0"}}))
    passed_over = run("-c", LAUNCH, **variables | {"VAPI_FAST_KERNELS": str(other)})
    assert "is for another version of triton: not used" in passed_over.stderr
    assert passed_over.stdout == compiled.stdout


def test_a_folder_that_is_no_library_is_refused(tmp_path: Path) -> None:
    ended = run("-c", "from vapi_fast.kernels import library; library.served()", VAPI_FAST_KERNELS=str(tmp_path))
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: VAPI_FAST_KERNELS={tmp_path}: no library of kernels")
    assert "or unset the variable" in last


# Fills an empty cache in the background, and looks whether there is more to do.
BACKGROUND = """
from vapi_fast.kernels import compile
for _ in range(2):
    with compile.in_background("sm_90"):
        pass
print(compile.marker("sm_90").exists(), len(list(compile.marker("sm_90").parent.glob("*/*.cubin"))))
"""
# Something fails while kernels are being compiled.
BROKEN_OFF = """
import os, pathlib, time
from vapi_fast.kernels import compile
with compile.in_background("sm_90"):
    while not list(pathlib.Path(os.environ["STARTED"]).iterdir()):
        time.sleep(0.01)
    raise SystemExit("a damaged checkpoint")
"""


@pytest.fixture
def two_kernels(tmp_path: Path) -> Path:
    """A folder with a copy of the package that launches two kernels only."""
    package = tmp_path / "site" / "vapi_fast"
    package.mkdir(parents=True)
    for source in Path(vapi_fast.__file__).parent.iterdir():
        (package / source.name).symlink_to(source)
    shutil.copytree(Path(launches.__file__).parent, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    two = dict(list(launches.load().items())[:2])
    (package / "kernels" / "launches.json").write_text(launches.text(two), encoding="utf-8")
    return package.parent


def test_the_cache_is_filled_in_the_background_and_once(two_kernels: Path, tmp_path: Path) -> None:
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(two_kernels)}
    ended = run("-c", BACKGROUND, folder=tmp_path, **variables)
    assert ended.stdout.split() == ["True", "2"], ended.stderr
    shutil.rmtree(next((tmp_path / "cache").glob("*/")))
    again = run("-c", BACKGROUND, folder=tmp_path, **variables)
    assert again.stdout.split() == ["True", "1"]  # the cache is marked as full


def test_a_kernel_that_does_not_compile_is_left_to_the_first_launch(two_kernels: Path, tmp_path: Path) -> None:
    file = two_kernels / "vapi_fast" / "kernels" / "launches.json"
    (each, scenes), *others = launches.load(file).items()
    wrong = each._replace(constants=(*each.constants, ("no_such_option", 1)))
    file.write_text(launches.text({wrong: scenes} | dict(others)), encoding="utf-8")
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(two_kernels)}
    ended = run("-c", BACKGROUND, folder=tmp_path, **variables)
    assert ended.stdout.split() == ["False", "1"]
    assert "not all kernels could be compiled ahead: the first launches will" in ended.stderr


def test_no_compiler_outlives_a_run_that_fails(two_kernels: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    compile_module = two_kernels / "vapi_fast" / "kernels" / "compile.py"
    source = compile_module.read_text(encoding="utf-8")
    slow = """    (__import__("pathlib").Path(os.environ["STARTED"]) / str(os.getpid())).touch()
    __import__("time").sleep(3600)
"""
    head = '    """Compile one specialisation; what went wrong."""\n'
    assert head in source
    compile_module.write_text(source.replace(head, head + slow), encoding="utf-8")
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(two_kernels), "STARTED": str(started)}
    ended = run("-c", BROKEN_OFF, folder=tmp_path, **variables)
    assert "a damaged checkpoint" in ended.stderr
    workers = [int(path.name) for path in started.iterdir()]
    assert workers
    wait_until(lambda: all(map(gone, workers)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "shared memory, 232448 is the limit"),
        ({"shared": 164 * 1024, "architecture": "sm_80"}, "shared memory, 166912 is the limit"),
        ({"matrix_instruction": "-"}, "did not become a matrix instruction"),
        ({"serial": True}, "matrix instructions that wait for each other"),
    ],
)
def test_problems(change: dict[str, object], message: str) -> None:
    assert GOOD.problems == []
    assert message in dataclasses.replace(GOOD, **change).problems[0]
    assert dataclasses.replace(GOOD, dots=0, matrix_instruction="-").problems == []


def test_load_width_reads_the_instructions() -> None:
    assert check.load_width("ld.global.u16 {%rs1}, [ %rd1 + 0 ];\n ld.global.b32 %r2, [%rd2];") == 32
    assert check.load_width("@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];") == 128
    assert check.load_width("cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r7;") == 128
    assert check.load_width("st.global.v4.b32 [ %rd1 ], { %r1, %r2, %r3, %r4 };\n ld.shared.v4.u32 {}, [%r1];") == 0


def test_an_integer_stands_for_all_of_its_class() -> None:
    assert [launches.representative(n, False) for n in (1, 32, 7, 2**31 + 16, 2**31 + 1)] == [
        *(1, 16, 3),
        *(2**31 + 16, 2**31 + 3),
    ]
    assert [launches.representative(n, True) for n in (1, 32, 2**31)] == [3, 3, 2**31 + 3]
    assert [launches.representative(value, False) for value in (True, None, 0.3)] == [True, None, 1.5]
    x = torch.empty(9, dtype=torch.bfloat16)
    assert launches.representative(x, False) == launches.Pointer("bfloat16", True)
    assert launches.representative(x[1:], False) == launches.Pointer("bfloat16", False)


def test_a_wrong_name_and_the_interpreter_are_refused() -> None:
    assert "--only nothing: no such kernel" in run_check("--only", "nothing").stderr
    interpreted = subprocess.run(
        [sys.executable, "-m", "vapi_fast.kernels.check"],
        env=COMPILER | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert interpreted.returncode == 2
    assert "unset it" in interpreted.stderr
