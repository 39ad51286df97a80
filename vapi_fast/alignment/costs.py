"""What one optimizer step launches, computes and moves, stage by stage, and how near to it a measured run comes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vapi_fast.alignment.kernel_costs import (
    BF16,
    FP32,
    Cost,
    Kernel,
    casts,
    decoder_cost,
    elementwise,
    encoder_cost,
    feature_cost,
    gradient_products,
    product,
    reward_itemsize,
    sums,
    total,
)
from vapi_fast.models import VQ_CONFIGS, GeneratorConfig
from vapi_fast.models.families import generator_config, random_generator
from vapi_fast.models.frozen import MAX_CHUNK
from vapi_fast.models.lora import train_only
from vapi_fast.models.lpips import LPIPS_CONFIGS, LPIPSConfig
from vapi_fast.models.sizes import Captions, Prompts
from vapi_fast.models.tokenizer import VQTokenizerConfig
from vapi_fast.runtime.ceilings import Ceilings

TRANSFORMER_STAGES = ("forward", "sample", "loss", "backward")
LOGITS = 160 * 2**20  # bytes that the head holds at once (`vapi_fast.kernels.head.CHUNK_BYTES`)
CAST = 320 * 65536  # numbers that PyTorch's `_foreach_copy_` takes in one launch
SHARES = 264  # that a norm's gradient is summed up in, two a multiprocessor (`kernels.rms_norm.norm_shares`)
PROMPT = 40  # tokens of a usual prompt; what a model takes at most is many times as much


def step_costs(
    generator: GeneratorConfig,
    tokenizer: VQTokenizerConfig,
    lpips: LPIPSConfig,
    *,
    image_size: int,
    batch_size: int,
    group_size: int,
    micro_batch: int,
    prior: str = "ce",
    method: str = "vapi",
    second_forward: bool = False,
    dropout: bool = False,
    shards: int = 1,
    reward_dtype: str | None = None,
    by_token: bool = False,
) -> dict[str, Cost]:
    """What one step launches, by stage, as 16-bit CUDA tensors have it.

    One forward an image (its G rollouts share it) and one backward; an encoding, G decodings and 1 + G passes of the
    perceptual network an image, MAX_CHUNK sequences at a time; nearest-neighbour upsampling and a 3×3 convolution as
    the four 2×2 convolutions it equals; attention up to the diagonal. The head's logits are computed in `sample` and
    again in `loss`. Gradients to the weights of what is trained only. `prior="kl"` adds the base model's forward to
    `loss`. `second_forward`: the loss's is another one than the rollouts', as under `--recipe va-pi`. dropout: of the
    forward that the backward is of.

    Batch sizes are those of one process. shards: processes that share weights, gradients and optimizer states.
    reward_dtype: of decoder and perceptual network. by_token: distances are taken by tokens' cells.
    """
    length = (image_size // tokenizer.downsample) ** 2
    generator = usual_size(generator, tokenizer, image_size)
    passes = -(-batch_size // micro_batch)
    forward, backward = transformer_costs(generator, batch_size, passes, shards)
    cast = weight_casts(generator, passes, shards)
    logits, gradients = head_costs(generator, batch_size * length, passes, shards)
    masked = Cost()
    if dropout:  # each residual branch read and written
        states = BF16 * batch_size * (length + generator.prefix_len - 1) * generator.width
        masked = elementwise(2 * 2 * states * generator.layers, 2 * generator.layers * passes)
    # Weight, gradient and two moments read; the gradient read for its norm; weight and moments written.
    optimizer = Cost((Kernel("optimizer", 0, 8 * FP32 * parameters(generator) / shards, 2),))
    if method == "ntp":
        return {
            "forward": forward + masked + cast,
            "loss": logits + gradients,
            "backward": backward + masked,
            "optimizer": optimizer,
        }

    decodings = batch_size * (group_size if method == "vapi" else 1)
    rewards = passes * -(-decodings // (passes * MAX_CHUNK))
    itemsize = reward_itemsize(reward_dtype)
    maps = feature_cost(lpips, image_size, itemsize, plain=method == "ste" or by_token)
    drawn = elementwise(decodings * length * 12, passes)  # an int64 token and its fp32 log-probability
    read = elementwise(FP32 * batch_size * length * generator.vocab_size, passes)  # of the logits
    costs = {
        "encode": encoder_cost(tokenizer, image_size).times(batch_size, -(-2 * batch_size // MAX_CHUNK)),
        "forward": forward + masked + cast,
        "sample": logits + read + drawn,
        "decode": decoder_cost(tokenizer, image_size, reward_dtype).times(decodings, rewards),
        "lpips": maps.times(batch_size + decodings, 2 * rewards),
        "loss": logits + gradients + drawn,
        "backward": backward + masked,
        "optimizer": optimizer,
    }
    if prior == "kl":
        costs["loss"] += forward + logits
    if second_forward and method == "vapi":
        costs["forward"] += forward
    if method == "ste":  # the gradient comes through perceptual network and decoder, whose maps are read again
        through = costs["decode"] + maps.times(decodings, rewards)
        costs["backward"] += through + elementwise(through.bytes, through.runs) + costs.pop("loss")
    return costs


def usual_size(generator: GeneratorConfig, tokenizer: VQTokenizerConfig, image_size: int) -> GeneratorConfig:
    """The generator of images of this size, with a prefix that a usual prompt fills."""
    generator = replace(generator, grid_size=image_size // tokenizer.downsample)
    if isinstance(generator.condition, Prompts):
        return generator.fitted(min(PROMPT, generator.prefix_len))
    return generator


TEXT_ENCODER = {"layers": 24, "hidden_width": 5120}  # of flan-t5-xl, with gated feed-forward, as wide as its states


def caption_cost(captions: Captions) -> Cost:
    """One caption of full length through flan-t5-xl's encoder, which a run does once, before it loads the generator."""
    tokens, width = captions
    weights = 4 * width**2 + 3 * width * TEXT_ENCODER["hidden_width"]
    return Cost((Kernel("product", TEXT_ENCODER["layers"] * (2 * tokens * weights + 4 * tokens**2 * width)),))


def has_second_forward(config: Mapping[str, Any]) -> bool:
    """`RolloutOptions.second_forward` of a run's config, as `run.json` holds it; older ones know of none."""
    return config.get("rollout_mode") == "eval" and bool(config["dropout"] or config["label_dropout"])


def config_costs(config: Mapping[str, Any], *, processes: int = 1, sharded: bool = True) -> dict[str, Cost]:
    """`step_costs` of a run's config, as `run.json` holds it, for one of its processes; none of free rollouts, or where
    a part is trained. sharded: the processes share the weights."""
    # How much free rollouts have to move depends on how many are drawn at once.
    if config.get("rollouts") == "free" or config.get("train", "all") != "all":
        return {}
    return step_costs(
        generator_config(config["model"]),
        VQ_CONFIGS[config["tokenizer"].lower()],
        LPIPS_CONFIGS[config["lpips"]],
        image_size=config["image_size"],
        batch_size=config["batch_size"] // processes,
        group_size=config["group_size"],
        micro_batch=config["micro_batch"],
        prior=config["prior"],
        method=config["method"],
        second_forward=has_second_forward(config),
        dropout=bool(config.get("dropout")),
        shards=processes if sharded else 1,
        reward_dtype=config.get("reward_dtype"),
        by_token=config.get("credit_window") is not None,
    )


def stage_table(
    config: Mapping[str, Any], seconds: Mapping[str, float], ceilings: Ceilings, *, processes: int = 1
) -> dict[str, dict[str, Any]]:
    """How near each stage comes to what the device can do.

    Args:
        config: as in `run.json`. seconds: of one step, by stage. processes: that share the step's images.

    Returns:
        By stage `seconds`, and where work is known `floor` (seconds), `tflops` (needed TFLOP/s), `bound` (the ceiling
        that governs: `matmul` or `copy`) and `share` of it.
    """
    costs = config_costs(config, processes=processes)
    table: dict[str, dict[str, Any]] = {}
    for stage, taken in seconds.items():
        table[stage] = {"seconds": taken}
        if stage in costs and taken > 0:
            floor = costs[stage].floor(ceilings)
            table[stage] |= {
                "floor": floor,
                "tflops": costs[stage].flops / taken / 1e12,
                "bound": costs[stage].bound(ceilings),
                "share": floor / taken,
            }
    return table


def model_flop_utilisation(costs: Mapping[str, Cost], seconds: float, ceilings: Ceilings) -> float:
    """FLOPs that the transformer computes in a step, over what the device could do in the step's `seconds`."""
    flops = sum(costs[stage].flops for stage in TRANSFORMER_STAGES if stage in costs)
    return flops / (seconds * ceilings.matmul)


@functools.cache
def parameters(config: GeneratorConfig, train: str = "all", rank: int = 1) -> int:
    """Number of weights of a generator that are trained (`vapi_fast.models.lora.train_only`): all, by default."""
    with torch.device("meta"):
        generator = random_generator(config)
        train_only(generator, train, rank)
        return sum(parameter.numel() for parameter in generator.parameters() if parameter.requires_grad)


def transformer_costs(config: GeneratorConfig, images: int, passes: int, shards: int = 1) -> tuple[Cost, Cost]:
    """Forward and backward of the blocks and the networks around them, without the head, over `images` in `passes`
    micro-batches.

    A layer's products have 4·D² + 3·D·H weights: 2 FLOPs each and position forward, 4 backward. Attention takes
    2·S²·D FLOPs a layer and image forward, as half of its scores are masked, and 2.5 times that backward, where the
    scores are computed again. Norms and SwiGLU are computed again for the backward.

    The sum of a residual stream is taken by the kernel of its norm, and so is its gradient. The weights' gradients are
    added up in fp32 by their products, those of norms' in SHARES by their kernel, and these summed up once a step;
    sharded ones' are cast and added up as autograd does.
    """
    width, hidden = config.width, config.hidden_width
    length = config.grid_size**2 + config.prefix_len - 1
    runs = config.layers * passes
    rows = images * length / passes  # of a launch
    linears = [(width, 3 * width), (width, width), (width, hidden), (width, hidden), (hidden, width)]
    weights = config.layers * (4 * width**2 + 3 * width * hidden)
    attention = 2 * images * config.layers * length**2 * width

    def maps(widths: float, launches: int = 1, kind: str = "elementwise") -> Cost:
        """`widths` numbers of each position read or written, in so many launches a layer."""
        return elementwise(BF16 * rows * widths * runs, launches * runs, kind)

    def attended(kind: str, flops: float, widths: int) -> Cost:
        return Cost((Kernel(kind, flops, BF16 * rows * widths * runs, runs),))

    forward = total(product(rows, *linear, runs) for linear in linears) + attended("attention", attention, 4 * width)
    forward += maps(8 * width, 2) + maps(4 * width) + maps(3 * hidden)  # sums and norms; q and k rotated; SwiGLU
    written = FP32 if shards == 1 else BF16
    shares = FP32 * SHARES * width * (2 * config.layers + 1)  # of norms' gradients
    backward = total(gradient_products(rows, *linear, runs, written=written) for linear in linears)
    if shards == 1:
        backward += elementwise(FP32 * weights * (passes - 1), 0)  # what the first pass has not to read
        backward += elementwise(shares * 2 * passes, 0) + elementwise(shares, 1, "cast") + elementwise(shares, 1)
    else:
        backward += sums(weights, passes, config.layers)
        backward += elementwise(shares * 2 * passes, (2 * config.layers + 1) * (2 * passes - 1), "cast")
    backward += attended("attention backward", 2.5 * attention, 8 * width)
    backward += maps(10 * width, 2) + maps(6 * width) + maps(6 * hidden)  # norms with sums; rotated back; SwiGLU
    for network, tokens in zip(around(config), (config.grid_size**2 - 1, config.grid_size**2), strict=True):
        if weights := network.weights:
            kept = BF16 * images * tokens * network.kept
            flops = 2 * images * tokens * weights
            read = BF16 * passes * weights
            forward += Cost((Kernel("product", flops, 2 * kept + read, passes),)) + casts(weights / shards, passes)
            backward += Cost((Kernel("product", 2 * flops, 3 * kept + read, 2 * passes),)) + sums(weights, passes)
    return forward, backward


def weight_casts(config: GeneratorConfig, passes: int, shards: int = 1) -> Cost:
    """The blocks' matrices to bf16: whole ones once a step, CAST numbers in a launch, the head's with them; of sharded
    ones each process casts its own in every pass, a block's in a launch, before they are gathered."""
    weights = config.layers * (4 * config.width**2 + 3 * config.width * config.hidden_width)
    if shards == 1:
        weights += config.vocab_size * config.width
        launches = -(-weights // CAST)
        return casts(weights / launches, launches)
    return casts(weights / config.layers / shards, config.layers * passes)


class Network(NamedTuple):
    """`weights` of a network's products, and the elements of a token that are `kept` for its backward."""

    weights: int
    kept: int


@functools.cache
def around(config: GeneratorConfig) -> tuple[Network, Network]:
    """What a generator has between a token's embedding and the blocks, and between these and the head."""
    with torch.device("meta"):
        generator = random_generator(config)

    def network(compute: Callable[[int], Tensor]) -> Network:
        sizes = []
        with FlopCounterMode(display=False) as counter:
            compute(1)
        for tokens in (1, 2):  # the weights that are kept do not count
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
                compute(tokens)
            sizes.append(sum(x.numel() for x in kept if x.is_floating_point()))
        return Network(counter.get_total_flops() // 2, sizes[1] - sizes[0])

    return (
        network(lambda tokens: generator.embed_tokens(torch.zeros(1, tokens, dtype=torch.int64, device="meta"))),
        network(lambda tokens: generator.readout(torch.zeros(1, tokens, config.width, device="meta"))),
    )


def head_costs(config: GeneratorConfig, tokens: int, passes: int, shards: int = 1) -> tuple[Cost, Cost]:
    """The head's logits in fp32, and what follows: their loss, and the gradients to hidden states and weight.

    A chunk of logits is written, read, and has its gradient written over it, in `kernels/head`.
    """
    vocab, width = config.vocab_size, config.width
    weights = vocab * width
    chunks = passes * -(-FP32 * vocab * tokens // (passes * LOGITS))
    rows = tokens / chunks
    logits = product(rows, width, vocab, chunks, written=FP32)
    if shards > 1:
        logits += casts(weights / shards, passes)
    gradients = elementwise((FP32 + BF16) * tokens * vocab, chunks)
    gradients += product(rows, vocab, width, chunks) + product(vocab, round(rows), width, chunks, written=FP32)
    gradients += elementwise(FP32 * weights * (chunks - passes), 0)  # what the first of a pass has not to read
    gradients += elementwise((FP32 + BF16) * weights * passes, passes)  # scaled by the loss's own gradient
    if shards > 1:
        return logits, gradients + sums(weights, passes)
    # The first pass's in bf16 becomes the sum in fp32, the others' are added to it.
    added = (BF16 + FP32) + (BF16 + 2 * FP32) * (passes - 1)
    return logits, gradients + elementwise(added * weights, passes, "cast")
