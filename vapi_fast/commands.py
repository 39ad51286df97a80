"""What the command line runs: every expected failure is one line on standard error and an exit status."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from vapi_fast.alignment.config import AlignConfig, saved_steps
from vapi_fast.alignment.loop import GradientSource
from vapi_fast.alignment.run import align
from vapi_fast.runtime.errors import ConfigError, Error, one_line, warn
from vapi_fast.runtime.packages import require

FAILURE = 1
LOWER_BATCH_SIZE = "out of GPU memory: lower --batch-size"
TOO_LARGE = ("allocate memory", "size calculation overflowed", "cannot be represented as a SymInt")  # torch's words
OUT_OF_MEMORY = "out of GPU memory: lower --micro-batch, or --eval-batch if it happened during an evaluation"


def align_main(options: argparse.Namespace, source: GradientSource | None = None) -> int:
    """Run the alignment; every expected failure is one line on standard error.

    One of several ranks that fails ends at once, without a word to the others, so that torchrun ends them.
    """
    try:
        code = align_status(options, source)
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        code = FAILURE
    if code and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def align_status(options: argparse.Namespace, source: GradientSource | None) -> int:
    config: AlignConfig | None = None

    def run() -> None:
        nonlocal config
        config = AlignConfig(**vars(options))
        align(config, source=source, started=process_start())

    return run_command(run, lambda: interrupted(config), OUT_OF_MEMORY)


def interrupted(config: AlignConfig | None) -> str:
    if config is None or not saved_steps(config.snapshots):
        return "interrupted; nothing was saved yet"
    return f"interrupted; go on from the last saved state with --resume --output-dir {config.output_dir}"


def process_start() -> float:
    """When this process, or the torchrun that started it, began, on the clock of `time.perf_counter`."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    stat = Path(f"/proc/{process}/stat")
    if not stat.exists():  # not Linux
        return time.perf_counter()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.perf_counter() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def generate_main(options: argparse.Namespace) -> int:
    """Draw the samples; returns the exit status."""

    def draw() -> None:
        require(ConfigError, "vapi-fast generate", "PIL", "safetensors")
        from vapi_fast.generation.config import GenerateConfig
        from vapi_fast.generation.folder import draw_samples

        draw_samples(GenerateConfig(**vars(options)))

    return run_command(draw, lambda: "interrupted; the same command goes on where it stopped", LOWER_BATCH_SIZE)


def evaluate_main(options: argparse.Namespace) -> int:
    """Print the scores; returns the exit status."""

    def score() -> None:
        require(ConfigError, "vapi-fast evaluate", "PIL")
        from vapi_fast.evaluation.config import EvaluateConfig
        from vapi_fast.evaluation.scoring import evaluate

        report = evaluate(EvaluateConfig(**vars(options)))
        if report is not None:
            print(report)

    return run_command(score, lambda: "interrupted", LOWER_BATCH_SIZE)


def geneval_main(options: argparse.Namespace) -> int:
    """Print GenEval's scores; returns the exit status."""

    def score() -> None:
        require(ConfigError, "vapi-fast geneval", "PIL")
        from vapi_fast.evaluation.config import GenevalConfig
        from vapi_fast.evaluation.geneval import evaluate_geneval

        report = evaluate_geneval(GenevalConfig(**vars(options)))
        if report is not None:
            print(report)

    return run_command(score, lambda: "interrupted", LOWER_BATCH_SIZE)


def encode_captions_main(options: argparse.Namespace) -> int:
    """Write captions' features; returns the exit status."""

    def encode() -> None:
        require(ConfigError, "vapi-fast encode-captions", "datasets", "PIL", "transformers", "ftfy")
        from vapi_fast.data.caption_folder import encode_captions
        from vapi_fast.data.config import EncodeCaptionsConfig

        report = encode_captions(EncodeCaptionsConfig(**vars(options)))
        if report is not None:
            print(report)

    return run_command(encode, lambda: "interrupted; the same command goes on where it stopped", LOWER_BATCH_SIZE)


def run_command(command: Callable[[], None], interrupted: Callable[[], str], out_of_memory: str) -> int:
    """The exit status of `command`; what can be expected to go wrong becomes one line on standard error."""
    for stream in (sys.stdout, sys.stderr):  # a name may hold what a terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):  # and not None: closed before the start
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warning_line
            command()
    except Error as error:
        return fail(error.exit_code, error, alike=isinstance(error, ConfigError))
    except torch.OutOfMemoryError:
        return fail(FAILURE, out_of_memory)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in TOO_LARGE):
            raise
        return fail(FAILURE, f"out of memory: {str(error) or 'this machine has too little'}; choose smaller sizes")
    except OSError as error:
        return fail(FAILURE, error)
    except KeyboardInterrupt:
        return fail(FAILURE, interrupted())
    return 0


def warning_line(message: Warning | str, *_: object) -> None:
    """Of a warning the line that `warn` would print, whoever warns."""
    warn(message)


def fail(code: int, error: object, alike: bool = False) -> int:
    """Print the error; of one that all processes of a machine have `alike`, that of the first."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if not alike or not local_rank.isdecimal() or int(local_rank) == 0:
        sys.stderr.write(f"vapi-fast: error: {one_line(error)}\n")  # as one piece: other processes write there too
    return code


MAINS: dict[str, Callable[[argparse.Namespace], int]] = {
    "align": align_main,
    "generate": generate_main,
    "evaluate": evaluate_main,
    "geneval": geneval_main,
    "encode-captions": encode_captions_main,
}
