"""Where a GPU's memory goes in an alignment, estimated before anything is loaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch

from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.costs import LOGITS, SHARES, around, parameters
from vapi_fast.alignment.image_text import SOURCES
from vapi_fast.alignment.kernel_costs import BF16, FP32, largest_decoder_map, reward_elements, reward_itemsize
from vapi_fast.models import LPIPS, VQ_CONFIGS, GeneratorConfig, VQTokenizer
from vapi_fast.models.lpips import LPIPS_CONFIGS
from vapi_fast.models.sizes import Captions, Prompts
from vapi_fast.runtime.errors import ConfigError

USABLE = 0.95  # of the free memory; the allocator's rounding and gaps take the rest
WORKSPACES = 10**9  # of cuBLAS, cuDNN and NCCL
LARGEST_CHUNK = 64  # rollouts decoded at once; more fill a GPU no better
LIVE_MAPS = 5  # of the decoder: a convolution's result, the residual stream, their sum, its norm, and a workspace


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU's memory.

    held: by part, all the time. step: by part, in forward and backward. others: each in place of all of `step`.
    reward_chunk: rollouts to decode at once. reshard_after_forward: give gathered weights up between a block's forward
    and backward (`vapi_fast.runtime.distributed.shard`). free: what there is.
    """

    held: dict[str, int]
    step: dict[str, int]
    others: dict[str, int]
    reward_chunk: int
    reshard_after_forward: bool
    free: int

    @property
    def parts(self) -> dict[str, int]:
        """What there is at the peak."""
        name, size = max(self.others.items(), key=lambda item: item[1], default=("", 0))
        return self.held | ({name: size} if size > sum(self.step.values()) else self.step)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.free

    def __str__(self) -> str:
        parts = (f"{name} {size / 1e9:.1f}" for name, size in self.parts.items() if size >= 5e7)
        return f"{self.total / 1e9:.1f} GB ({', '.join(parts)})"


class Beside(NamedTuple):
    """Bytes of GPU memory of what runs beside our steps, by part: held all the time, and each in place of a step's."""

    held: Mapping[str, int] = MappingProxyType({})
    others: Mapping[str, int] = MappingProxyType({})
    advice: str = "choose a smaller --model or --image-size"  # where nothing else fits


ALONE = Beside()


def plan(
    config: AlignConfig, generator: GeneratorConfig, free: int, world_size: int = 1, beside: Beside = ALONE
) -> MemoryPlan:
    """How a run would use `free` bytes of each of `world_size` GPUs, computing in bf16.

    Rollouts are decoded in the largest chunk that fits: whole groups and a power of two of them, or a power of two of
    rollouts. Gathered weights are kept between forward and backward if that leaves room for a whole group. The plan's
    `fits` says whether there is any way; without one it is the plan that needs least.
    """
    return best_plan(config, generator, free, world_size, config.micro_batch, config.eval_batch, beside)


def check(
    config: AlignConfig, generator: GeneratorConfig, free: int, world_size: int = 1, beside: Beside = ALONE
) -> MemoryPlan:
    """`plan` if it fits. Raises ConfigError if not: the estimate by part, and which flag to lower and how far."""
    found = plan(config, generator, free, world_size, beside)
    if found.fits:
        return found

    need = f"about {found} are needed, and {free / 1e9:.1f} GB of the GPU are free"

    def planned(micro_batch: int, eval_batch: int) -> MemoryPlan:
        return best_plan(config, generator, free, world_size, micro_batch, eval_batch, beside)

    micro_batch = largest_fitting(config.micro_batch, lambda count: planned(count, 0))
    if not micro_batch:
        part = "train a part (--train lora or --train head), " if config.train == "all" and world_size == 1 else ""
        raise ConfigError(
            f"{need}: --micro-batch 1 does not fit either; {part}share the weights over more GPUs (torchrun "
            f"--nproc_per_node), or {beside.advice}"
        )
    lower = [f"--micro-batch {micro_batch}"] if micro_batch < config.micro_batch else []
    if config.evaluate:
        eval_batch = largest_fitting(config.eval_batch, lambda count: planned(micro_batch, count))
        lower += [f"--eval-batch {eval_batch}" if eval_batch else "--no-eval"] * (eval_batch < config.eval_batch)
    raise ConfigError(f"{need}: pass {' '.join(lower)}")


def largest_fitting(most: int, planned: Callable[[int], MemoryPlan]) -> int:
    """The greatest count up to `most` whose plan fits, 0 if none does."""
    return max((count for count in range(1, most + 1) if planned(count).fits), default=0)


def best_plan(
    config: AlignConfig,
    generator: GeneratorConfig,
    free: int,
    world_size: int,
    micro_batch: int,
    eval_batch: int,
    beside: Beside = ALONE,
) -> MemoryPlan:
    """`plan` for these batch sizes; no evaluation if `eval_batch` is 0."""
    generator = replace(generator, grid_size=config.grid_size)
    step = step_parts(config, generator, micro_batch)
    others = {}
    if config.evaluate and eval_batch:
        others["evaluation"] = evaluation_bytes(generator, eval_batch, world_size)
    others |= beside.others
    sizes = chunks(config.group_size)
    ways = [(False, chunk) for chunk in sizes if world_size == 1 or chunk >= config.group_size]
    if world_size > 1:  # gathering again costs less than decoding few rollouts at a time
        ways += [(True, chunk) for chunk in sizes]
    for reshard, chunk in ways:
        held = held_parts(config, generator, micro_batch, world_size, reshard)
        held |= {part: held.get(part, 0) + size for part, size in beside.held.items()}
        found = MemoryPlan(held | {"reward": reward_bytes(config, chunk)}, step, others, chunk, reshard, free)
        if found.fits:
            break
    return found


def chunks(group_size: int) -> list[int]:
    """Numbers of rollouts to decode at once, from the greatest."""
    powers = [2**n for n in range(7)]
    groups = [group_size * n for n in powers if group_size * n <= LARGEST_CHUNK]
    return sorted({*groups, *(n for n in powers if n < group_size)}, reverse=True)


def held_parts(
    config: AlignConfig, generator: GeneratorConfig, micro_batch: int, world_size: int, reshard: bool
) -> dict[str, int]:
    count, trained = parameters(generator), parameters(generator, config.train, config.lora_rank)
    passes = -(-config.batch_size // (world_size * micro_batch))
    share, trained_share = FP32 * count // world_size, FP32 * trained // world_size
    shares = FP32 * SHARES * generator.width * (2 * generator.layers + 1)
    gathered = count
    if reshard:  # embeddings and head, the block at work and the next
        width = generator.width
        blocks = generator.layers * (4 * width**2 + 3 * width * generator.hidden_width + 2 * width)
        gathered = count - blocks + 2 * blocks // generator.layers
    frozen = frozen_parameters(config.tokenizer, config.lpips)
    images = config.batch_size // world_size * (3 * config.image_size**2 + caption_numbers(generator))
    return {
        "weights": share + (FP32 * trained if config.train == "lora" else 0),
        # Until the last micro-batch of a step, each process sums up whole gradients.
        "gradients": trained_share + (FP32 * count if world_size > 1 and passes > 1 else 0),
        "norms' gradients": shares if world_size == 1 and config.train == "all" else 0,
        "optimizer": 2 * trained_share,
        "bf16 weights": BF16 * gathered,
        "base model": BF16 * count if config.prior == "kl" else 0,
        "reward networks": sum(SOURCES[name].bytes for name in config.networks),
        "tokenizer and LPIPS": 2 * FP32 * frozen,  # as loaded, and the form that rewards are computed with
        "images": 2 * FP32 * images,  # of this step and the next
        "workspaces": WORKSPACES,
    }


def caption_numbers(generator: GeneratorConfig) -> int:
    """Features of an image's caption. Their encoder has left the GPU before the generator comes to it."""
    if isinstance(generator.condition, Prompts):
        return 2 * generator.condition.tokens  # int64
    return math.prod(generator.condition) if isinstance(generator.condition, Captions) else 0


@functools.cache
def frozen_parameters(tokenizer: str, lpips: str) -> int:
    with torch.device("meta"):
        modules = VQTokenizer(VQ_CONFIGS[tokenizer]), LPIPS(LPIPS_CONFIGS[lpips])
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def step_parts(config: AlignConfig, generator: GeneratorConfig, micro_batch: int) -> dict[str, int]:
    """Activations that the backward needs, the head's buffers, and what the backward has at work at once."""
    width, hidden, vocab = generator.width, generator.hidden_width, generator.vocab_size
    tokens = micro_batch * generator.grid_size**2
    positions = tokens + micro_batch * (generator.prefix_len - 1)
    loss = LOGITS + (BF16 + 2 * FP32) * vocab * width + BF16 * tokens * width  # head, its gradient twice, the hidden's
    if config.prior == "kl":
        loss += 3 * FP32 * tokens * vocab  # the base model's logits, scaled, and their log-softmax
    activations = micro_batch * activation_bytes(generator)
    if config.train == "head":
        activations = BF16 * tokens * (around(generator)[1].kept + width)
    if config.method == "ste":  # what convolutions and norms of decoder and LPIPS read, in fp32
        tokenizer, lpips = VQ_CONFIGS[config.tokenizer], LPIPS_CONFIGS[config.lpips]
        elements = reward_elements(tokenizer, lpips, config.image_size)
        activations += micro_batch * FP32 * elements // 2 + 2 * FP32 * tokens * vocab
    return {
        "activations": activations,
        "loss": loss,
        "backward": BF16 * positions * (8 * width + 4 * hidden) + FP32 * vocab * width,
    }


def activation_bytes(generator: GeneratorConfig) -> int:
    """What the forward of one image keeps for the backward.

    A layer keeps its two norms' inputs, queries, keys, values and attention's output, 6·D numbers a position, gate and
    up, 2·hidden, and the scores' logsumexp in fp32, one a head; it computes norms and SwiGLU again. After the last one
    there are the final norm's input and output and the gradient to it; before the first and after the last, what the
    networks keep that a family has there.
    """
    width = generator.width
    layer = BF16 * (6 * width + 2 * generator.hidden_width) + FP32 * generator.heads
    positions = generator.grid_size**2 + generator.prefix_len - 1
    embedding, readout = around(generator)
    beside = generator.grid_size**2 * (embedding.kept + readout.kept)
    return positions * (generator.layers * layer + BF16 * 3 * width) + BF16 * beside


def reward_bytes(config: AlignConfig, chunk: int) -> int:
    """What decoding `chunk` rollouts takes, or comparing them, whole groups at a time; one after the other.

    Comparing their tokens copies a level's maps at a time, where convolutions had two.
    """
    decoding = LIVE_MAPS * largest_decoder_map(VQ_CONFIGS[config.tokenizer], config.image_size)
    lpips = LPIPS_CONFIGS[config.lpips]
    levels = [width * side**2 for (width, _), side in zip(lpips.levels, lpips.sides(config.image_size), strict=True)]
    comparing = sum(levels) + 2 * max(levels)
    return reward_itemsize(config.reward_dtype) * max(chunk * decoding, max(chunk, config.group_size) * comparing)


def evaluation_bytes(generator: GeneratorConfig, images: int, world_size: int) -> int:
    """Keys and values in bf16 of as many images, each with and without condition; a whole copy of sharded weights."""
    positions = generator.grid_size**2 + generator.prefix_len
    caches = 2 * images * positions * generator.layers * 2 * BF16 * generator.width
    return caches + (FP32 * parameters(generator) if world_size > 1 else 0)
