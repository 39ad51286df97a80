"""The command line: `vapi-fast align`, `generate` and `evaluate`, and `benchmarks/e2e_align.py`.

Nothing here imports torch: --help and a mistyped flag answer at once. What runs is in `vapi_fast.commands`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vapi_fast.alignment.config import METHODS, PATHS, PRIORS, ROLLOUTS
from vapi_fast.models.sizes import LLAMAGEN_CONFIGS
from vapi_fast.runtime.flags import CFG_SCHEDULES, SAMPLE_FORMATS, flag

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
    "format": (SAMPLE_FORMATS, "PNG files (default), or one .npz in the ADM evaluator's layout"),
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


def add_align_flags(parser: argparse.ArgumentParser) -> None:
    for name, (kind, text) in FLAGS.items():
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **options)
    for name, (options, text) in SWITCHES.items():
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **options)


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


def e2e_options() -> argparse.Namespace:
    """The flags of `benchmarks/e2e_align.py`: those of `vapi-fast align`."""
    parser = argparse.ArgumentParser(description="Align a LlamaGen generator to pixel space with VA-π.")
    add_align_flags(parser)
    return parser.parse_args()


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "align": (add_align_flags, "align a generator to pixel space"),
    "generate": (add_generate_flags, "draw images from a generator"),
    "evaluate": (add_evaluate_flags, "score images: FID, sFID, Inception Score, precision, recall"),
}


def main() -> int:
    """`vapi-fast`: the console script."""
    parser = argparse.ArgumentParser(prog="vapi-fast", description="Fast VA-π alignment of LlamaGen generators.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_flags_of, text) in COMMANDS.items():
        add_flags_of(commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."))
    options = parser.parse_args()
    from vapi_fast.commands import MAINS

    run = MAINS[options.command]
    del options.command
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
