"""The command line: `vapi-fast align` and `benchmarks/e2e_align.py` share these flags."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vapi_fast.alignment import NonFiniteError
from vapi_fast.checkpoint import CheckpointError
from vapi_fast.commands import (
    FAILURE,
    USAGE_ERROR,
    add_evaluate_flags,
    add_generate_flags,
    evaluate_main,
    fail,
    generate_main,
)
from vapi_fast.comparison import PublishedStep
from vapi_fast.config import METHODS, PATHS, PRIORS, ROLLOUTS, AlignConfig, ConfigError, flag
from vapi_fast.data import DataError
from vapi_fast.evaluation import EvaluationError
from vapi_fast.graphs import CaptureError
from vapi_fast.models import LLAMAGEN_CONFIGS
from vapi_fast.run import StoppedError, align

OUT_OF_MEMORY = "out of GPU memory: lower --micro-batch, or --eval-batch if it happened during an evaluation"

# Flag → (type or choices, help). Defaults are AlignConfig's: the paper's recipe, or the tiny preset's own.
FLAGS: dict[str, tuple[Any, str]] = {
    "model": (tuple(LLAMAGEN_CONFIGS), "size of the generator; tiny brings its own checkpoints and images"),
    "vq_ckpt": (Path, "LlamaGen's VQ tokenizer"),
    "gpt_ckpt": (Path, "LlamaGen's generator, the model to align"),
    "vgg_weights": (Path, "torchvision's VGG16 file for LPIPS (default: download)"),
    "data": (Path, "images: folder of class folders, save_to_disk folder, parquet or WebDataset tars"),
    "eval_data": (Path, "images to measure against (default: --data)"),
    "inception_weights": (Path, "FID-Inception weights for the measurements (default: download)"),
    "image_size": (int, "pixels a side"),
    "batch_size": (int, "images a step, over all ranks"),
    "group_size": (int, "rollouts per image (G)"),
    "steps": (int, "optimizer steps"),
    "micro_batch": (int, "images in one forward on one GPU; lower it when memory runs out"),
    "lr": (float, "AdamW's learning rate"),
    "method": (METHODS, "vapi; ste: straight-through baseline; ntp: next-token prediction alone"),
    "rollouts": (ROLLOUTS, "teacher-forced: around the image's tokens; free: sampled from its class alone"),
    "reward": (str, "module:function of images [N,3,H,W] and class ids [N] to rewards [N] (default: the pixels')"),
    "prior": (PRIORS, "ce: cross-entropy to the image's tokens; kl: divergence from the base model"),
    "prior_weight": (float, "weight of the prior (β)"),
    "mse_weight": (float, "weight of MSE in the reward"),
    "lpips_weight": (float, "weight of LPIPS in the reward"),
    "noise_prob": (float, "share of context tokens replaced by random ones (ξ)"),
    "dropout": (float, "dropout in the generator, one mask for all rollouts of an image"),
    "temperature": (float, "of the rollouts"),
    "top_k": (int, "keep the k likeliest tokens in rollouts; 0: all"),
    "top_p": (float, "nucleus of the rollouts; 1: all"),
    "seed": (int, "decides every random draw"),
    "output_dir": (Path, "where the results go (default: runs/<model>-<method>-<time>)"),
    "checkpoint_every": (int, "steps between saved states for --resume"),
    "eval_samples": (int, "images drawn for each evaluation"),
    "eval_batch": (int, "images drawn at once; lower it when memory runs out during an evaluation"),
    "cfg_scale": (float, "guidance scale of the second evaluation"),
    "path": (
        PATHS,
        "fast; reference: the published recipe instead; both: fast, and the published recipe on the batches of a few "
        "steps, to compare time and gradients (benchmarks/e2e_align.py only, except fast)",
    ),
}
SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "--no-eval": ({"dest": "evaluate", "action": "store_false"}, "skip the measurements"),
    "--compare": ({"dest": "path", "action": "store_const", "const": "both"}, "the same as --path both"),
    "--random-init": (
        {"action": "store_true"},
        "random weights instead of checkpoints, to time a model; no measurements",
    ),
    "--synthetic-data": (
        {"action": "store_true"},
        "made-up images instead of --data, to time a model; no measurements",
    ),
    "--resume": ({"action": "store_true"}, "go on with the unfinished run in --output-dir"),
}


def add_align_flags(parser: argparse.ArgumentParser) -> None:
    for name, (kind, text) in FLAGS.items():
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **options)
    for name, (options, text) in SWITCHES.items():
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **options)


def align_main(options: argparse.Namespace, published_step: PublishedStep | None = None) -> int:
    """Run the alignment; every expected failure is one line on standard error.

    One of several ranks that fails ends at once, without a word to the others, so that torchrun ends them.
    """
    try:
        code = align_status(options, published_step)
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


def align_status(options: argparse.Namespace, published_step: PublishedStep | None) -> int:
    config = None
    try:
        config = AlignConfig(**vars(options))
        align(config, published_step=published_step, started=process_start())
    except ConfigError as error:
        return fail(USAGE_ERROR, error)
    except torch.OutOfMemoryError:
        return fail(FAILURE, OUT_OF_MEMORY)
    except (CaptureError, CheckpointError, DataError, EvaluationError, NonFiniteError, StoppedError, OSError) as error:
        return fail(FAILURE, error)
    except KeyboardInterrupt:
        return fail(FAILURE, interrupted(config))
    return 0


def interrupted(config: AlignConfig | None) -> str:
    if config is None or not any(config.snapshots.glob("step-*")):
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


def e2e_main(published_step: PublishedStep) -> int:
    """`benchmarks/e2e_align.py`: `vapi-fast align` plus `--path reference|both`."""
    parser = argparse.ArgumentParser(description="Align a LlamaGen generator to pixel space with VA-π.")
    add_align_flags(parser)
    return align_main(parser.parse_args(), published_step)


COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., int], str]] = {
    "align": (add_align_flags, align_main, "align a generator to pixel space"),
    "generate": (add_generate_flags, generate_main, "draw images from a generator"),
    "evaluate": (add_evaluate_flags, evaluate_main, "score images: FID, sFID, Inception Score, precision, recall"),
}


def main() -> int:
    """`vapi-fast`: the console script."""
    parser = argparse.ArgumentParser(prog="vapi-fast", description="Fast VA-π alignment of LlamaGen generators.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_flags, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_flags(command)
        command.set_defaults(run=run)
    options = parser.parse_args()
    run = options.run
    del options.command, options.run
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
