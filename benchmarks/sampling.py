"""How fast the engine draws 256 images of LlamaGen-XXL at 384², its set-up apart, in bf16 with random weights.

    python benchmarks/sampling.py [--cpu]

One line of JSON each, as soon as it is known: the set-up (weights cast, cache allocated, kernels compiled, graphs
captured), a draw with the cache in bf16, one in int8, and one in fp8 where the GPU has it. `bench_generate.py` compares
the engine with LlamaGen's own way. Needs torch, triton and numpy. With --cpu the tiny preset's size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from timing import synchronize

from vapi_fast.generation.engine import Engine, slot_bytes
from vapi_fast.generation.sequences import CACHE_DTYPES, guidance_scales
from vapi_fast.models import Condition, GeneratorConfig, LlamaGen

DRAWS = 1  # after one that warms up
FLOAT8 = (8, 9)  # compute capability


def bytes_read(config: GeneratorConfig, sequences: int, weight_bytes: int, cache_dtype: torch.dtype) -> int:
    """What T − 1 steps must read: the blocks and the head, and each sequence's keys and values so far.

    weight_bytes: of one number.
    """
    block = 4 * config.width**2 + 3 * config.width * config.hidden_width
    weights = config.layers * block + config.vocab_size * config.width
    # The condition's and those of the tokens before, step by step.
    slots = sum(range(1 + config.prefix_len, config.grid_size**2 + config.prefix_len))
    return (config.grid_size**2 - 1) * weights * weight_bytes + sequences * slots * slot_bytes(config, cache_dtype)


def random_model(device: torch.device) -> LlamaGen:
    """LlamaGen-XXL in bf16; on a CPU the tiny preset's in fp32."""
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    with device:
        model = LlamaGen.from_name("xxl" if gpu else "tiny").eval()
    if gpu:
        for parameter in model.parameters():  # the rotary table stays in fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def report(name: str, seconds: float, **figures: Any) -> None:
    sys.stdout.write(json.dumps({"name": name, "seconds": seconds, **figures}) + "\n")
    sys.stdout.flush()


@torch.no_grad()
def sample(model: LlamaGen, images: int, name: str, kv_dtype: str | None) -> None:
    """Report the set-up and the draws of the engine with one kind of cache."""
    config, device = model.config, model.output.weight.device
    length, start = config.grid_size**2, time.perf_counter()
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "masked": False, "cache_dtype": CACHE_DTYPES[kv_dtype]}
    engine = Engine(model, groups=images, rollouts=1, scales=guidance_scales(length, 1.0), **filters)
    synchronize()
    report(f"{name} set-up", time.perf_counter() - start)
    labels, seconds = torch.arange(images, device=device) % config.num_classes, []
    for seed in range(1 + DRAWS):
        start = time.perf_counter()
        engine.draw(Condition(labels), sample_ids=labels, first_rollout=0, seed=seed)
        synchronize()
        seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[1:] or seconds)
        weight = model.output.weight
        cache_dtype = CACHE_DTYPES[kv_dtype] or weight.dtype
        rate = bytes_read(config, images, weight.element_size(), cache_dtype) / median
        report(
            name, median, images_per_second=images / median, seconds_per_token=median / length, bytes_per_second=rate
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second that the engine draws of LlamaGen-XXL at 384².")
    parser.add_argument("--cpu", action="store_true", help="the tiny preset's size, on a machine without a GPU")
    cpu = parser.parse_args().cpu
    if not cpu and not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu draws at the tiny preset's size")
    start = time.perf_counter()
    model = random_model(torch.device("cpu" if cpu else "cuda"))
    synchronize()
    report("weights", time.perf_counter() - start)
    images = 4 if cpu else 256
    sample(model, images, "sampling", None)
    sample(model, images, "sampling, int8 cache", "int8")
    if cpu or torch.cuda.get_device_capability() >= FLOAT8:
        sample(model, images, "sampling, fp8 cache", "fp8")


if __name__ == "__main__":
    main()
