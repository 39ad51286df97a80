"""`vapi-fast generate` and `vapi-fast evaluate`: flags, and every expected failure as one line on standard error."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vapi_fast.checkpoint import CheckpointError
from vapi_fast.config import ConfigError, flag
from vapi_fast.data import DataError
from vapi_fast.evaluation import EvaluationError
from vapi_fast.generation import CFG_SCHEDULES
from vapi_fast.graphs import CaptureError
from vapi_fast.models import LLAMAGEN_CONFIGS
from vapi_fast.sample_files import FORMATS
from vapi_fast.samples import GenerateConfig, draw_samples
from vapi_fast.scoring import EvaluateConfig, evaluate

USAGE_ERROR = 2
FAILURE = 1

# Flag → (type or choices, help). Defaults are the config's: the paper's, or the tiny preset's own.
GENERATE_FLAGS: dict[str, tuple[Any, str]] = {
    "model": (tuple(LLAMAGEN_CONFIGS), "size of the generator; tiny brings its own checkpoints"),
    "gpt_ckpt": (Path, "LlamaGen's generator, or an aligned one"),
    "vq_ckpt": (Path, "LlamaGen's VQ tokenizer"),
    "num": (
        int,
        "images to draw (default: 50000, tiny 1000); torchrun takes --num for its own, use --num-images there",
    ),
    "class_ids": (str, "classes such as 0,7,20-29, one image of each in turn (default: all)"),
    "caption_features": (Path, "text-encoder features [N, 120, 2048] (.npy, .safetensors) for a text model, in turn"),
    "cfg_scale": (float, "classifier-free guidance; 1: none (default)"),
    "cfg_interval": (int, "guide tokens up to this one only; -1: all (default)"),
    "cfg_schedule": (CFG_SCHEDULES, "constant (default), or power-cosine: guidance rises from 1 to --cfg-scale"),
    "cfg_power": (float, "of the power-cosine; above 1 it rises later (default: 1)"),
    "temperature": (float, "of the draws (default: 1)"),
    "top_k": (int, "keep the k likeliest tokens; 0: all (default)"),
    "top_p": (float, "nucleus of the draws; 1: all (default)"),
    "seed": (int, "decides every random draw (default: 0)"),
    "kv_dtype": (("fp8",), "keys and values in 8 bits: faster, less memory, rounded (default: no)"),
    "batch_size": (int, "images drawn at once on one GPU (default: up to 256); lower it when memory runs out"),
    "image_size": (int, "pixels a side as drawn (default: 384, tiny 32)"),
    "save_size": (int, "pixels a side as written (default: --image-size); papers draw 384 and score 256"),
    "format": (tuple(FORMATS), "PNG files (default), or one .npz in the ADM evaluator's layout"),
    "out": (Path, "folder of the results; an interrupted one is finished by the same command"),
    "compare_ckpt": (Path, "another generator: comparison.png shows both at equal seeds"),
}
ALIASES = {"num": ("--num-images",)}
EVALUATE_FLAGS: dict[str, tuple[Any, str]] = {
    "model": (tuple(LLAMAGEN_CONFIGS), "tiny brings its own reference and feature network; all others take Inception"),
    "samples": (
        Path,
        "generate's folder, .npz of images or statistics, folder of pictures, or what align --data takes",
    ),
    "reference": (Path, "images or statistics to score against, in the same forms"),
    "inception_weights": (Path, "FID-Inception weights, weights-inception-2015-12-05-6726825d.pth (default: download)"),
    "batch_size": (int, "images in the network at once (default: 64, tiny 250)"),
    "image_size": (int, "crop of images in class folders, parquet or tars (default: 256, tiny 32)"),
    "output": (Path, "also write the scores there, as JSON"),
}


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, GENERATE_FLAGS, required="out")
    parser.add_argument(
        "--entropy-maps",
        action="store_true",
        default=argparse.SUPPRESS,
        help="also draw where the generator is unsure: entropy.png",
    )


def add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, EVALUATE_FLAGS, required="samples")


def add_flags(parser: argparse.ArgumentParser, flags: dict[str, tuple[Any, str]], required: str) -> None:
    for name, (kind, text) in flags.items():
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        names = (flag(name), *ALIASES.get(name, ()))
        parser.add_argument(
            *names, dest=name, default=argparse.SUPPRESS, help=text, required=name == required, **options
        )


def generate_main(options: argparse.Namespace) -> int:
    """Draw the samples; returns the exit status."""
    return run_command(
        lambda: draw_samples(GenerateConfig(**vars(options))), "interrupted; the same command goes on where it stopped"
    )


def evaluate_main(options: argparse.Namespace) -> int:
    """Print the scores; returns the exit status."""

    def score() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            report = evaluate(EvaluateConfig(**vars(options)))
        if report is not None:
            for warning in caught:
                print(f"vapi-fast: warning: {warning.message}", file=sys.stderr)
            print(report)

    return run_command(score, "interrupted")


def run_command(command: Callable[[], None], interrupted: str) -> int:
    """The exit status of `command`; what can be expected to go wrong becomes one line on standard error."""
    try:
        command()
    except ConfigError as error:
        return fail(USAGE_ERROR, error)
    except torch.OutOfMemoryError:
        return fail(FAILURE, "out of GPU memory: lower --batch-size")
    except CaptureError as error:
        return fail(FAILURE, str(error).splitlines()[0])  # CUDA adds its advice on debugging
    except (CheckpointError, DataError, EvaluationError, OSError) as error:
        return fail(FAILURE, error)
    except KeyboardInterrupt:
        return fail(FAILURE, interrupted)
    return 0


def fail(code: int, error: object) -> int:
    """Print the error; of one that all processes of a machine have alike, that of the first."""
    if code != USAGE_ERROR or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"vapi-fast: error: {error}\n")  # as one piece: other processes write there too
    return code
