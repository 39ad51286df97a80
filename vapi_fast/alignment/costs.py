"""What one optimizer step has to compute and move, stage by stage, and how near to it a measured run comes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vapi_fast import ops
from vapi_fast.models import LPIPS, VQ_CONFIGS, GeneratorConfig, VQTokenizer
from vapi_fast.models.families import generator_config, random_generator
from vapi_fast.models.lora import train_only
from vapi_fast.models.lpips import LPIPS_CONFIGS, LPIPSConfig
from vapi_fast.models.sizes import Captions, Prompts
from vapi_fast.models.tokenizer import VQTokenizerConfig
from vapi_fast.runtime.ceilings import Ceilings

TRANSFORMER_STAGES = ("forward", "sample", "loss", "backward")
BF16, FP32 = 2, 4  # bytes
PROMPT = 40  # tokens of a usual prompt; what a model takes at most is many times as much

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """`flops`: of matrix products and convolutions, a multiplication with its addition is two; `bytes`: to and from
    memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that it takes at least, moving and computing at the same time."""
        return max(self.flops / ceilings.matmul, self.bytes / ceilings.copy)

    def bound(self, ceilings: Ceilings) -> str:
        """The ceiling that decides the floor: `matmul` or `copy`."""
        return "matmul" if self.flops / ceilings.matmul >= self.bytes / ceilings.copy else "copy"


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
) -> dict[str, Cost]:
    """The work that the mathematics of one step needs, by stage, however it is computed.

    One forward an image (its G rollouts share it) and one backward; the head's logits once, in `sample`; an encoding,
    G decodings and 1 + G passes of the perceptual network an image; nearest-neighbour upsampling and a 3×3 convolution
    as the four 2×2 convolutions it equals; attention up to the diagonal. Gradients to the weights of what is trained
    only. `prior="kl"` adds the base model's forward to `loss`. `second_forward`: the loss's is another one than the
    rollouts', as under `--recipe va-pi`; its logits are counted in `loss`.

    Bytes are those of 16-bit activations and of weights read once a pass (`network_cost`, `transformer_costs`), 32-bit
    gradients and optimizer states. Batch sizes are those of one process.
    """
    length = (image_size // tokenizer.downsample) ** 2
    generator = replace(generator, grid_size=image_size // tokenizer.downsample)
    if isinstance(generator.condition, Prompts):
        generator = generator.fitted(min(PROMPT, generator.prefix_len))
    passes = -(-batch_size // micro_batch)
    forward, backward = transformer_costs(generator, batch_size, passes)
    logits, gradients = head_costs(generator, batch_size * length, passes)
    optimizer = Cost(0, 8 * FP32 * parameters(generator))  # weight, gradient, two moments read; gradient's norm; 3 out
    if method == "ntp":
        return {"forward": forward, "loss": logits + gradients, "backward": backward, "optimizer": optimizer}

    decodings = batch_size * (group_size if method == "vapi" else 1)
    maps = feature_cost(lpips, image_size)
    drawn = Cost(0, decodings * length * 12)  # an int64 token and its fp32 log-probability
    costs = {
        "encode": encoder_cost(tokenizer, image_size) * batch_size,
        "forward": forward,
        "sample": logits + drawn,
        "decode": decoder_cost(tokenizer, image_size) * decodings,
        "lpips": maps * (batch_size + decodings),
        "loss": gradients + drawn,
        "backward": backward,
        "optimizer": optimizer,
    }
    if prior == "kl":
        costs["loss"] += forward + logits
    if second_forward and method == "vapi":
        costs["forward"] += forward
        costs["loss"] += logits
    if method == "ste":  # the gradient comes through perceptual network and decoder, whose maps are read again
        through = costs["decode"] + maps * decodings
        costs["backward"] += Cost(through.flops, 2 * through.bytes) + costs.pop("loss")
    return costs


ENCODER = {"layers": 24, "hidden_width": 5120}  # of flan-t5-xl, with gated feed-forward, as wide as its states


def caption_cost(captions: Captions) -> Cost:
    """One caption of full length through flan-t5-xl's encoder, which a run does once, before it loads the generator."""
    tokens, width = captions
    weights = 4 * width**2 + 3 * width * ENCODER["hidden_width"]
    return Cost(ENCODER["layers"] * (2 * tokens * weights + 4 * tokens**2 * width))


def has_second_forward(config: Mapping[str, Any]) -> bool:
    """`RolloutOptions.second_forward` of a run's config, as `run.json` holds it; older ones know of none."""
    return config.get("rollout_mode") == "eval" and bool(config["dropout"] or config["label_dropout"])


def config_costs(config: Mapping[str, Any], *, processes: int = 1) -> dict[str, Cost]:
    """`step_costs` of a run's config, as `run.json` holds it, for one of its processes; none of free rollouts, or where
    a part is trained."""
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
    """FLOPs that the transformer needs in a step, over what the device could do in the step's `seconds`."""
    flops = sum(costs[stage].flops for stage in TRANSFORMER_STAGES if stage in costs)
    return flops / (seconds * ceilings.matmul)


@functools.cache
def parameters(config: GeneratorConfig, train: str = "all", rank: int = 1) -> int:
    """Number of weights of a generator that are trained (`vapi_fast.models.lora.train_only`): all, by default."""
    with torch.device("meta"):
        generator = random_generator(config)
        train_only(generator, train, rank)
        return sum(parameter.numel() for parameter in generator.parameters() if parameter.requires_grad)


def transformer_costs(config: GeneratorConfig, images: int, passes: int) -> tuple[Cost, Cost]:
    """Forward and backward of the blocks and the networks around them, without the head, over `images` in `passes`
    micro-batches.

    A layer's products have 4·D² + 3·D·H weights: 2 FLOPs each and position forward, 4 backward. Attention takes
    2·S²·D FLOPs a layer and image forward, as half of its scores are masked, and twice that backward.

    Elements moved by a layer a position: every product reads its input and writes its output (backward: both its
    gradients do), and attention its four maps (backward eight); norms, rotary and SwiGLU are passes of their own, the
    residual additions ride on the norms. Norms and SwiGLU are computed again for the backward. Weights are read as
    bf16 once a pass; their fp32 gradients are written in the first pass, and read and written in every other.
    """
    width, hidden = config.width, config.hidden_width
    length = config.grid_size**2 + config.prefix_len - 1
    positions = images * length * config.layers
    weights = config.layers * (4 * width**2 + 3 * width * hidden)
    products = 2 * images * length * weights
    attention = 2 * images * config.layers * length**2 * width
    forward_elements = positions * (22 * width + 6 * hidden)
    backward_elements = positions * (38 * width + 12 * hidden)
    cast = (FP32 + BF16) * weights  # of the master weights
    forward = Cost(products + attention, BF16 * (forward_elements + passes * weights) + cast)
    gradients = FP32 * (2 * passes - 1) * weights
    backward = Cost(2 * (products + attention), BF16 * (backward_elements + passes * weights) + gradients)
    for network, tokens in zip(around(config), (config.grid_size**2 - 1, config.grid_size**2), strict=True):
        weights, kept = network.weights, images * tokens * network.kept
        product = 2 * images * tokens * weights
        forward += Cost(product, BF16 * (2 * kept + passes * weights) + (FP32 + BF16) * weights)
        gradients = FP32 * (2 * passes - 1) * weights
        backward += Cost(2 * product, BF16 * (3 * kept + passes * weights) + gradients)
    return forward, backward


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


def head_costs(config: GeneratorConfig, tokens: int, passes: int) -> tuple[Cost, Cost]:
    """The head's logits, and its gradients to hidden states and weight, of which the logits never reach memory."""
    weights = config.vocab_size * config.width
    states = BF16 * tokens * config.width
    product = 2 * tokens * weights
    logits = Cost(product, states + BF16 * passes * weights)
    gradients = Cost(2 * product, 2 * states + (BF16 * passes + FP32 * (2 * passes - 1)) * weights)
    return logits, gradients


class MapTraffic(TorchDispatchMode):
    """Counts the elements that a convolutional network's maps move at least, and the FLOPs that upsampling spares.

    A convolution reads its input and writes its output; bias, activation and a norm's statistics ride on that, the
    addition of a residual too, but for reading it. A norm is a pass of its own, as is a pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.spared_flops = 0
        self.largest_map = 0
        self.upsampled: tuple[Tensor, Tensor] | None = None  # result and its source: the result is never written

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation is aten.convolution.default:
            self.convolution(args[0], args[1], result)
        elif operation is aten.native_group_norm.default:
            self.elements += 2 * args[0].numel()
        elif operation is aten.max_pool2d_with_indices.default:
            self.elements += args[0].numel() + result[0].numel()
        elif operation is aten.add.Tensor:
            self.elements += result.numel()
        elif operation is aten.upsample_nearest2d.default:
            self.upsampled = result, args[0]
        return result

    def convolution(self, source: Tensor, weight: Tensor, result: Tensor) -> None:
        if self.upsampled is not None and source is self.upsampled[0]:
            source = self.upsampled[1]
            self.spared_flops += 2 * result.numel() * weight[0].numel() * 5 // 9  # four of nine taps are left
        self.elements += source.numel() + result.numel()
        self.largest_map = max(self.largest_map, source.numel(), result.numel())


def network_cost(network: nn.Module, channels: int, side: int) -> tuple[Cost, MapTraffic]:
    """Cost of one image's map `[1, channels, side, side]` through a network on the meta device, at 16 bits."""
    counter, traffic = FlopCounterMode(display=False), MapTraffic()
    with torch.no_grad(), ops.use_backend("reference"), counter, traffic:
        network(torch.empty(1, channels, side, side, device="meta"))
    return Cost(counter.get_total_flops() - traffic.spared_flops, BF16 * traffic.elements), traffic


@functools.cache
def encoder_cost(config: VQTokenizerConfig, image_size: int) -> Cost:
    """Encoding of one image, with the comparison of its latents with every code."""
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    cost, _ = network_cost(nn.Sequential(tokenizer.encoder, tokenizer.quant_conv), 3, image_size)
    codes = (image_size // config.downsample) ** 2 * config.codebook_size
    return cost + Cost(2 * codes * config.code_width)


@functools.cache
def decoder_cost(config: VQTokenizerConfig, image_size: int) -> Cost:
    """Decoding of one image."""
    return _decoder(config, image_size)[0]


@functools.cache
def largest_decoder_map(config: VQTokenizerConfig, image_size: int) -> int:
    """Elements of the largest map on the way to one image."""
    return _decoder(config, image_size)[1].largest_map


def _decoder(config: VQTokenizerConfig, image_size: int) -> tuple[Cost, MapTraffic]:
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    decoder = nn.Sequential(tokenizer.post_quant_conv, tokenizer.decoder)
    return network_cost(decoder, config.code_width, image_size // config.downsample)


@functools.cache
def feature_cost(config: LPIPSConfig, image_size: int) -> Cost:
    """One image through the perceptual network, and its maps read again where distances are taken."""
    with torch.device("meta"):
        lpips = LPIPS(config)
    cost, _ = network_cost(lpips.features, 3, image_size)
    maps = sum(width * side**2 for (width, _), side in zip(config.levels, config.sides(image_size), strict=True))
    return cost + Cost(0, BF16 * maps)
