"""What kernels compute and move: the terms of a step's costs, and those of the frozen networks.

FLOPs are counted by PyTorch's `flop_registry`, on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vapi_fast import ops
from vapi_fast.models import LPIPS, VQTokenizer
from vapi_fast.models.frozen import TENSOR_CORE_CHANNELS, eight_bit_parts, lowest_parts
from vapi_fast.models.lpips import LPIPSConfig
from vapi_fast.models.tokenizer import ResidualBlock, VQTokenizerConfig
from vapi_fast.runtime import forms
from vapi_fast.runtime.ceilings import Ceilings

FP8, BF16, FP32 = 1, 2, 4  # bytes
ANYWHERE = torch.device("cpu")  # where a form is the usual one, unless the environment or `forms.taking` names another

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """Launches of one kernel in one place of a step, all together.

    kind: `product`, `convolution`, `convolution in fp8`, `attention`, `wide attention` (one head over a map), `norm`
        (GroupNorm with what is fused to it), `elementwise`, `cast` (of weights, and sums of their gradients) or
        `optimizer`.
    flops: of matrix products and convolutions, a multiplication with its addition is two. bytes: to and from memory.
    single: computed in float32, on a GPU in TF32.
    shape: of a launch's product its rows and columns; of a convolution channels in and out, pixels and taps a side.
    """

    kind: str
    flops: float = 0.0
    bytes: float = 0.0
    runs: float = 1
    single: bool = False
    shape: tuple[int, ...] = ()

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that it takes at least: a kernel moves and computes at the same time."""
        return max(self.flops / self.peak(ceilings), self.bytes / ceilings.copy)

    def peak(self, ceilings: Ceilings) -> float:
        """FLOPs a second at most. By specification matrix units take twice as many numbers of 8 bits as of 16."""
        if self.kind == "convolution in fp8":
            return 2 * ceilings.matmul
        return ceilings.single if self.single else ceilings.matmul


@dataclass(frozen=True)
class Cost:
    """What is launched, one kernel after the other."""

    kernels: tuple[Kernel, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.kernels + other.kernels)

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def runs(self) -> float:
        """Launches."""
        return sum(kernel.runs for kernel in self.kernels)

    def times(self, count: float, runs: float | None = None) -> Cost:
        """`count` times the work, in `runs` times the launches; by default as many."""
        runs = count if runs is None else runs

        def scaled(kernel: Kernel) -> Kernel:
            work = {"flops": kernel.flops * count, "bytes": kernel.bytes * count, "runs": kernel.runs * runs}
            if kernel.kind == "product" and kernel.shape and runs:  # a launch has so many times the rows
                work["shape"] = (round(kernel.shape[0] * count / runs), kernel.shape[1])
            return replace(kernel, **work)

        return Cost(tuple(map(scaled, self.kernels)))

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that it takes at least: kernels do not overlap, each has to wait for what the last one wrote."""
        return sum(kernel.floor(ceilings) for kernel in self.kernels)

    def bound(self, ceilings: Ceilings) -> str:
        """The ceiling that decides most of the floor: `matmul` or `copy`."""
        moving = (each.bytes / ceilings.copy for each in self.kernels)
        floors = [each.floor(ceilings) for each in self.kernels]
        computing = sum(floor for floor, moved in zip(floors, moving, strict=True) if floor > moved)
        return "matmul" if computing >= sum(floors) / 2 else "copy"


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def elementwise(bytes_moved: float, runs: float = 1, kind: str = "elementwise") -> Cost:
    return Cost((Kernel(kind, 0, bytes_moved, runs),))


def product(rows: float, inner: int, columns: int, runs: float = 1, *, written: int = BF16) -> Cost:
    """`[rows, inner]` · `[inner, columns]` in 16 bits, `runs` times. written: bytes of a number of the result."""
    moved = BF16 * (rows + columns) * inner + written * rows * columns
    return Cost(
        (Kernel("product", 2 * rows * inner * columns * runs, moved * runs, runs, False, (round(rows), columns)),)
    )


def gradient_products(rows: float, inner: int, columns: int, runs: float, *, written: int = BF16) -> Cost:
    """The two products of a linear's backward: the gradients of its input and, in so many bytes, of its weight."""
    return product(rows, columns, inner, runs) + product(columns, round(rows), inner, runs, written=written)


def casts(weights: float, runs: float) -> Cost:
    """fp32 master weights → bf16."""
    return elementwise((FP32 + BF16) * weights * runs, runs, "cast")


def sums(weights: float, passes: int, count: int = 1) -> Cost:
    """bf16 gradients of `count` tensors → fp32, and from the second pass on added to those before."""
    moved = (BF16 + FP32) * passes + 3 * FP32 * (passes - 1)
    return elementwise(moved * weights, (2 * passes - 1) * count, "cast")


class NetworkKernels(TorchDispatchMode):
    """Notes the kernels that `models/frozen` launches for a plain convolutional network and one image.

    A convolution's bias and activation ride on it or on the pass that follows. GroupNorm's statistics are a pass of
    their own before it is applied, and a sum is written by the former: 5 passes over the map; of an upsampling's phases
    or a convolution's bias alone 4, and 3 inside of a block, where nothing else reads the sum. A sum that is not normed
    takes 3, and its padding none. Where a block's convolution is ours, it reads what is added to it, and the norm has 2
    passes left. Upsampling and a 3×3 convolution are four 2×2 convolutions of the map itself. Attention over a map
    keeps its scores on the chip; as two products it writes them in fp32, and reads them for the softmax.
    FLOPs are those of PyTorch's `flop_registry`. Forms are those that `forms.form` takes anywhere.

    eight: residual blocks whose 3×3 convolutions are ours, in e4m3: norms write for them a byte a number.
    """

    def __init__(self, itemsize: int, eight: Collection[ResidualBlock] = ()) -> None:
        super().__init__()
        self.itemsize = itemsize
        self.convolved = {id(each.weight) for block in eight for each in (block.conv1, block.conv2)}
        self.norms = {id(each.weight) for block in eight for each in (block.norm1, block.norm2)}
        self.kernels: list[Kernel] = []
        self.elements = 0  # of all maps, that convolutions, norms and poolings read or write at least once
        self.largest_map = 0
        self.made: dict[int, tuple[str, Tensor, Any]] = {}  # by id of a map: the operation, the map, its first input
        self.fused: dict[int, int] = {}  # by id of what a convolution of ours writes: its place in `kernels`
        self.scored = False  # whether the last batched product was attention's scores

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if note := getattr(self, f"note_{name}", None):
            note(result, *args)
        if isinstance(result, Tensor):
            self.made[id(result)] = name, result, args[0] if args else None
        return result

    def origin(self, x: Any) -> tuple[str, Any]:
        """The operation that made x, "" for an input, and that one's first input."""
        name, _, source = self.made.get(id(x), ("", x, None))
        return name, source

    def note(
        self, kind: str, flops: float, elements: float, shape: tuple[int, ...] = (), runs: float = 1, wide: int = 0
    ) -> None:
        """elements: moved, in numbers of `itemsize`; wide: in numbers of fp32."""
        moved = elements * self.itemsize + wide * FP32
        self.kernels.append(Kernel(kind, flops, moved, runs, self.itemsize == FP32, shape))

    def note_convolution(self, result: Tensor, source: Tensor, weight: Tensor, *others: Any) -> None:
        flops = flop_registry[aten.convolution](source, weight, *others, out_val=result)
        outputs, inputs, taps, _ = weight.shape
        side, written = result.shape[-1], result.numel()
        name, original = self.origin(source)
        if name == "upsample_nearest2d":
            source, flops, outputs, side, taps = original, flops * 4 // 9, 4 * outputs, side // 2, 2
        if outputs == 3 and forms.form("last-convolution", ANYWHERE) == "eight":
            flops, written = (each * TENSOR_CORE_CHANNELS // outputs for each in (flops, written))
            outputs = TENSOR_CORE_CHANNELS
        read = source.numel() + weight.numel()
        if eight := id(weight) in self.convolved:
            self.note("convolution in fp8", flops, read * FP8 / self.itemsize + written, (inputs, outputs, side, taps))
        elif taps > 1:
            self.note("convolution", flops, read + written, (inputs, outputs, side, taps))
        else:
            self.note("product", flops, read + written, (side * side, outputs))
        shape = f"{inputs}→{outputs} {side}²"
        in_a_block = name == "silu" and outputs > TENSOR_CORE_CHANNELS  # which the last one has not
        ours = self.itemsize == BF16 and in_a_block and forms.form("convolution", ANYWHERE, shape) == "triton"
        if ours or eight:
            self.fused[id(result)] = len(self.kernels) - 1
        self.elements += source.numel() + result.numel()
        self.largest_map = max(self.largest_map, source.numel(), result.numel())

    def note_native_group_norm(self, result: Any, x: Tensor, weight: Tensor, *others: Any) -> None:
        name, source = self.origin(x)
        inside = name == "convolution" and self.origin(source)[0] == "silu"
        fused = id(x) in self.fused
        passes = 2 if fused else 5 if name == "add" else 3 if inside else 4
        saved = 1 - FP8 / self.itemsize if id(weight) in self.norms else 0
        self.note("norm", 0, (passes - saved) * x.numel(), runs=2 if fused else 3)
        self.elements += 2 * x.numel()

    def note_add(self, result: Tensor, *added: Any) -> None:
        for each in added:
            if id(each) in self.fused and self.origin(each)[0] == "convolution":  # which reads what is added to it
                place = self.fused[id(result)] = self.fused[id(each)]
                convolution = self.kernels[place]
                self.kernels[place] = replace(convolution, bytes=convolution.bytes + self.itemsize * result.numel())
        self.elements += result.numel()

    def note_max_pool2d_with_indices(self, result: Any, x: Tensor, *others: Any) -> None:
        self.note("elementwise", 0, x.numel() + result[0].numel())
        self.elements += x.numel() + result[0].numel()

    def note_upsample_nearest2d(self, result: Tensor, x: Tensor, *others: Any) -> None:
        if self.origin(x)[0] == "add" and id(x) not in self.fused:
            self.note("elementwise", 0, 3 * x.numel())

    def note_constant_pad_nd(self, result: Tensor, x: Tensor, *others: Any) -> None:
        fused = id(x) in self.fused  # whose sum is written, then read to be padded
        self.note("elementwise", 0, (1 if fused else 2) * x.numel() + result.numel())

    def note_bmm(self, result: Tensor, a: Tensor, b: Tensor) -> None:
        """One of attention's two."""
        self.scored = not self.scored
        flops = flop_registry[aten.bmm](a, b, out_val=result)
        outside = b.numel() + (a if self.scored else result).numel()
        if forms.form("wide-attention", ANYWHERE) == "sdpa":
            self.note("wide attention", flops, outside, runs=0.5)
            return
        shape = tuple(result.shape[1:])
        if self.scored:
            self.note("product", flops, outside, shape, wide=result.numel())
            rounded = 0 if self.itemsize == FP32 else result.numel()
            self.note("elementwise", 0, rounded, runs=1 + (rounded > 0), wide=2 * result.numel() + rounded)
        else:
            self.note("product", flops, outside + a.numel(), shape)


def network_cost(
    network: nn.Module,
    channels: int,
    side: int,
    itemsize: int = BF16,
    *,
    single: nn.Module | None = None,
    eight: Collection[ResidualBlock] = (),
) -> tuple[Cost, NetworkKernels]:
    """Cost of one image's map `[1, channels, side, side]` through a network on the meta device.

    single: the module from which on maps are in fp32. eight: blocks with convolutions in e4m3.
    """
    noted = NetworkKernels(itemsize, eight)
    if single is not None:
        single.register_forward_pre_hook(lambda *_: setattr(noted, "itemsize", FP32))
    with torch.no_grad(), ops.use_backend("reference"), noted:
        network(torch.empty(1, channels, side, side, device="meta"))
    return Cost(tuple(noted.kernels)), noted


Forms = tuple[tuple[str, str], ...]


def taken() -> Forms:
    """The forms that are taken anywhere: what is kept of costs is kept for them."""
    return tuple(sorted(forms.taken("").items()))


def encoder_cost(config: VQTokenizerConfig, image_size: int) -> Cost:
    """Encoding of one image, with the comparison of its latents with every code."""
    return _encoder(config, image_size, taken())


@functools.cache
def _encoder(config: VQTokenizerConfig, image_size: int, taken: Forms) -> Cost:
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    network, half = nn.Sequential(tokenizer.encoder, tokenizer.quant_conv), dict(taken).get("encoder") == "float16"
    lowest = tokenizer.encoder.get_submodule(lowest_parts(tokenizer.encoder)[0])
    cost, _ = network_cost(network, 3, image_size, BF16 if half else FP32, single=lowest if half else None)
    codes = (image_size // config.downsample) ** 2 * config.codebook_size
    return cost + Cost((Kernel("product", 2 * codes * config.code_width, single=True),))


def reward_itemsize(dtype: str | None) -> int:
    """Bytes of a number of decoder and perceptual network on a GPU, by `--reward-dtype`; of fp8 those of its sums."""
    return BF16 if dtype == "fp8" else getattr(torch, dtype or "bfloat16").itemsize


def decoder_cost(config: VQTokenizerConfig, image_size: int, dtype: str | None = None) -> Cost:
    """Decoding of one image, by `--reward-dtype`."""
    return _decoder(config, image_size, dtype, taken())[0]


def largest_decoder_map(config: VQTokenizerConfig, image_size: int) -> int:
    """Elements of the largest map on the way to one image."""
    return _decoder(config, image_size, None, taken())[1].largest_map


@functools.cache
def _decoder(
    config: VQTokenizerConfig, image_size: int, dtype: str | None, taken: Forms
) -> tuple[Cost, NetworkKernels]:
    with torch.device("meta"):
        decoder = VQTokenizer(config).decoder
    blocks = [decoder.get_submodule(part) for part in eight_bit_parts(decoder)] if dtype == "fp8" else ()
    # As `models/frozen` has it, post_quant_conv is in the codebook.
    side = image_size // config.downsample
    return network_cost(decoder, config.latent_channels, side, reward_itemsize(dtype), eight=blocks)


def feature_cost(config: LPIPSConfig, image_size: int, itemsize: int = BF16, *, plain: bool = False) -> Cost:
    """One image through the perceptual network, and its maps read again where distances are taken.

    Shifted, scaled, cast and padded to eight channels first, in one pass. Where 2×2 poolings follow, they take the
    distances too: only the last map is read for its own sake. plain: as gradients want it, one after the other.
    """
    pixels = (3 + 8) * itemsize * image_size**2
    compared = _level_elements(config, image_size)
    if not plain and all(config.pool(level) == 2 for level in range(1, len(config.levels))):
        compared = compared[-1:]
    distances = elementwise(itemsize * sum(compared), len(compared))
    return elementwise(pixels) + _features(config, image_size, itemsize)[0] + distances


@functools.cache
def _features(config: LPIPSConfig, image_size: int, itemsize: int = BF16) -> tuple[Cost, NetworkKernels]:
    with torch.device("meta"):
        lpips = LPIPS(config)
    return network_cost(lpips.features, 3, image_size, itemsize)


def _level_elements(config: LPIPSConfig, image_size: int) -> list[int]:
    return [width * side**2 for (width, _), side in zip(config.levels, config.sides(image_size), strict=True)]


def reward_elements(tokenizer: VQTokenizerConfig, lpips: LPIPSConfig, image_size: int) -> int:
    """Elements of one image's maps that decoder and perceptual network read or write, each operation's once."""
    networks = _decoder(tokenizer, image_size, None, taken())[1].elements + _features(lpips, image_size)[1].elements
    return networks + sum(_level_elements(lpips, image_size))
