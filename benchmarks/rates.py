"""What this GPU does at LlamaGen-XXL's shapes: rates that decide how the stages are built, and a first smoke test.

    python benchmarks/rates.py [--cpu]

One line of JSON each, as soon as it is known. First the rates, in FLOPs or bytes a second, medians over inputs that
take turns, so that none is found in the cache: a large copy and product, cuDNN's convolutions at the shapes of decoder,
LPIPS and encoder, attention, GroupNorm, our convolution. Then LPIPS's fused convolution over poisoned memory, encoder
and decoder as CUDA graphs in each of their forms, and every operation, in parallel, against its truth in float64. Exit
code 1 if anything fails or is less exact than it must be. Needs torch, triton and numpy. With --cpu everything is
small, and times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

import torch
import torch.nn.functional as F
from bench_group_norm import OPERATIONS as NORMS
from cases import SMALL, XXL, Sizes, Source
from operations import DISAGREEMENT, ERROR, Operation, accuracy, every_operation, relative, rotation
from parts import die_with_the_check
from timing import host_seconds, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vapi_fast import AlignConfig, ops
from vapi_fast.alignment import micro_batches
from vapi_fast.alignment.losses import Judged
from vapi_fast.alignment.models import Models
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import LlamaGen, VQTokenizer
from vapi_fast.models.frozen import E4M3, PixelCodec, check_eight_bits, conv_relu, matmul_attention
from vapi_fast.runtime import accelerators, ceilings, forms
from vapi_fast.runtime.accelerators import Attention, optional_attention
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.forms import FORMS, architecture

WARM_UPS, ROUNDS, MOST_SETS = 2, 9, 8
IMAGES = 2  # of a batch, held to float64: the second shows what strides between images spoil
# Between a graph's replay and its kernels one by one, of images or the share of other tokens: cuDNN may take another
# algorithm.
GRAPH_ERROR = {"decoder": 1e-2, "encoder": 5e-2}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vapi_fast.ops", "vapi_fast.models.frozen"])
EIGHT_BIT_ERROR = 2e-3  # by emulation 7e-4; what was rounded to 8 bits before has 4e-2
NO_KERNEL = re.compile("No (available kernel|viable backend)")  # that attention's backend has for such heads
# Of encoder and decoder, beside the usual ones, by what they belong to.
GRAPHS = {
    "encoder": ("encoder=float16", "cudnn-benchmark=on"),
    "decoder": ("wide-attention=matmul", "last-convolution=eight", "cudnn-benchmark=on"),
}
BACKENDS = {"default": None, "cuDNN": SDPBackend.CUDNN_ATTENTION}

# Channels in and out, side, of 3×3 convolutions at 384²; of the decoder and LPIPS, and of the encoder.
CONVOLUTIONS = [
    (128, 128, 384), (64, 64, 384), (8, 64, 384), (128, 128, 192), (256, 128, 192), (64, 128, 192),
    (256, 256, 96), (512, 256, 48), (256, 256, 48), (512, 512, 48), (512, 512, 24), (256, 512, 24), (128, 3, 384),
]  # fmt: skip
PHASES = [(128, 512, 192), (256, 1024, 48), (512, 2048, 24)]  # of 2×2, in place of upsampling and a 3×3 one
ENCODER = [(128, 128, 384), (128, 128, 192), (256, 256, 96), (256, 256, 48), (512, 512, 24)]
BLOCKS = [(128, 128, 384), (128, 128, 192), (256, 256, 96), (256, 256, 48)]  # of residual blocks: those of whole tiles
MICRO_BATCHES = (4, 16, 32)  # images
COMPILED = ("convolution", "rms_norm", "rotary", "swiglu", "group_sample", "losses")  # whose kernels are many
LAYERS, PASSES = 4, 4  # blocks of LlamaGen-XXL, and micro-batches of a step


def report(name: str, **figures: Any) -> None:
    sys.stdout.write(json.dumps({"name": name, **figures}, ensure_ascii=False) + "\n")  # whole: others write there too
    sys.stdout.flush()


@dataclass
class Bench:
    """Where and at what size; `failed` is set by what goes wrong."""

    device: torch.device
    shrink: int = 1  # sides, batch and channels are this many times smaller
    failed: bool = False

    @property
    def sizes(self) -> Sizes:
        return XXL if self.device.type == "cuda" else SMALL

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0

    def less(self, size: int) -> int:
        return max(size // self.shrink, 1)

    def attempt(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Report what `run` finds; what goes wrong is reported too, and does not keep the rest from being run."""
        try:
            figures = run()
        except Exception as error:
            self.failed = True
            figures = {"failure": f"{type(error).__name__}: {error}"[:300]}
        self.failed |= figures.get("ok") is False
        report(name, **figures)

    def rate(self, name: str, inputs: Callable[[], Any], call: Callable[..., Any], work: float, unit: str) -> None:
        """Report `work` (FLOPs or bytes) a second of `call` on what `inputs` makes."""

        def run() -> dict[str, Any]:
            try:
                return rate(rotation(inputs, list, self.cache_bytes, MOST_SETS), call, work) | {"unit": unit}
            except RuntimeError as error:
                if NO_KERNEL.search(str(error)):
                    return {"unavailable": str(error)[:100]}
                raise

        self.attempt(name, run)


def rate(sets: Iterator[Any], call: Callable[..., Any], work: float, held: float | None = None) -> dict[str, Any]:
    """held: as of `timed`, by default so long that launching takes no time."""

    def run() -> object:
        return call(*next(sets))

    launched = 1.5 * [host_seconds(run) for _ in range(WARM_UPS)][-1]
    held = launched if held is None else held
    seconds = statistics.median(timed(run, held) for _ in range(ROUNDS))
    return {"seconds": seconds, "rate": work / seconds}


# ---- rates


def measure_ceilings(bench: Bench) -> None:
    found = ceilings.measure(bench.device)
    report("copy", rate=found.copy, unit="B/s")
    report("matmul", rate=found.matmul, unit="FLOP/s")


def convolutions(bench: Bench) -> None:
    """What a step's prediction takes in place of estimates: forms are decided by encoder and decoder as a whole."""
    for shape in CONVOLUTIONS:
        convolution(bench, shape, torch.bfloat16)
    for shape in PHASES:
        convolution(bench, shape, torch.bfloat16, kernel=2)
    for shape in ENCODER:
        convolution(bench, shape, torch.float32)


def convolution(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, kernel: int = 3, note: str = "") -> None:
    inputs, outputs, side = (bench.less(size) for size in shape)
    batch = bench.less(16 if dtype == torch.float32 else 32)
    source = Source(bench.device, torch.float16 if dtype == E4M3 else dtype)
    weight = filters(source, outputs, inputs, kernel).to(dtype)
    kind = {torch.float32: "TF32", E4M3: "fp8"}.get(dtype, str(dtype).removeprefix("torch."))
    name = f"convolution {kernel}×{kernel} {kind} {shape[0]}→{shape[1]} {shape[2]}²{note}"
    work = 2 * batch * (side + 3 - kernel) ** 2 * inputs * outputs * kernel**2
    ours = functools.partial(ops.convolution, kernel=weight, dtype=source.dtype)
    eight = {"channel_scale": source.normal(outputs, dtype=torch.float32)} if dtype == E4M3 else {}
    cudnns = functools.partial(F.conv2d, weight=weight, padding=1)
    convolve = functools.partial(ours, **eight) if eight or note == ", triton" else cudnns
    bench.rate(name, lambda: (source.maps(batch, inputs, side, side).to(dtype),), convolve, work, "FLOP/s")


def filters(source: Source, outputs: int, inputs: int, kernel: int = 3) -> Tensor:
    return source.normal(outputs, inputs, kernel, kernel, scale=0.05).to(memory_format=torch.channels_last)


def own_convolutions(bench: Bench) -> None:
    """Ours beside cuDNN's row of the same name, and both forms of a residual block's end, with bias, residual and norm.

    The ends decide about a shape's form; the rest says why.
    """
    for shape in BLOCKS:
        convolution(bench, shape, torch.bfloat16, note=", triton")
        for form in FORMS["convolution"]:
            block_end(bench, shape, form)


def in_eight_bits(bench: Bench) -> None:
    """What `--reward-dtype fp8` is made of, beside the rows in bfloat16 of the same names; and how exact its sums are,
    which the matrix units round."""
    try:
        check_eight_bits(bench.device)
    except ConfigError as error:
        report("fp8", unavailable=str(error))
        return
    convolution(bench, BLOCKS[0], E4M3)
    block_end(bench, BLOCKS[0], "triton", E4M3)
    bench.attempt("convolution in fp8 against float32", functools.partial(eight_bit_error, bench))
    bench.attempt("decoder as a CUDA graph in fp8", functools.partial(graph, bench, "decoder", dtype=E4M3))


def eight_bit_error(bench: Bench) -> dict[str, Any]:
    source, (inputs, outputs, _), side = Source(bench.device, torch.float32), BLOCKS[0], bench.less(96)
    x, weight = source.maps(IMAGES, inputs, side, side).to(E4M3), filters(source, outputs, inputs).to(E4M3)
    found = ops.convolution(x, weight, dtype=torch.float16)
    error = relative(found, F.conv2d(x.float(), weight.float(), padding=1).double())  # whose products are exact
    return {"error": error, "ok": error < EIGHT_BIT_ERROR}


def block_end(bench: Bench, shape: tuple[int, int, int], form: str, operands: torch.dtype = torch.bfloat16) -> None:
    """Of e4m3 operands the norm is too, for another such convolution."""
    inputs, outputs, side = (bench.less(size) for size in shape)
    dtype, kind = (torch.float16, "fp8") if operands == E4M3 else (operands, "bfloat16")
    batch, source = bench.less(32), Source(bench.device, dtype)
    weight, groups = filters(source, outputs, inputs).to(operands), min(bench.sizes.norm_groups, outputs)
    gain, bias, channel_bias = source.normal(3, outputs, dtype=torch.float32)
    norm = (gain, bias, groups, 1e-6)

    def end(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        added = {"residual": residual, "channel_bias": channel_bias}
        if form == "cudnn":
            return ops.add_group_norm_silu(F.conv2d(x, weight, padding=1), *norm, **added)
        eight = {"channel_scale": gain, "dtype": dtype, "normed_scale": 0.05} if operands == E4M3 else {}
        return ops.convolution_group_norm_silu(x, weight, *norm, **added, **eight)

    bench.rate(
        f"block end {kind} {shape[0]}→{shape[1]} {shape[2]}², {form}",
        lambda: (source.maps(batch, inputs, side, side).to(operands), source.maps(batch, outputs, side, side)),
        end,
        18 * batch * side**2 * inputs * outputs,
        "FLOP/s",
    )


def attention(bench: Bench) -> None:
    """At the decoder's and encoder's single head of width 512, and at the transformer's T 576, width 64."""
    tokens, source = bench.less(576), Source(bench.device, torch.bfloat16)

    def one(name: str, shape: tuple[int, ...], call: Callable[..., Any], work: float, both: bool = False) -> None:
        def inputs() -> tuple[Tensor, ...]:
            return tuple(source.normal(*shape).requires_grad_(both) for _ in range(3))

        bench.rate(f"attention, {name}", inputs, call, work, "FLOP/s")

    batch, width = bench.less(64), bench.less(512)
    work = 4 * batch * tokens**2 * width
    one("one head of 512, default", (batch, 1, tokens, width), functools.partial(attend, backend="default"), work)
    one("one head of 512, bmm", (batch, tokens, width), torch.no_grad()(matmul_attention), work)
    batch, heads = bench.less(16), bench.less(24)
    work = 2 * batch * heads * tokens**2 * 64  # causal: half of the products
    calls = {backend: functools.partial(attend, backend=backend, causal=True) for backend in BACKENDS}
    for kind in ("flash-attn-3", "installed"):
        if (installed := optional_attention(kind)).name not in (accelerators.SDPA.name, *calls):
            calls[installed.name] = functools.partial(attend_by_position, attention=installed)
    for (name, call), both in itertools.product(calls.items(), (False, True)):
        name = f"T 576, heads of 64, {name}, forward{' and backward' * both}"
        one(name, (batch, heads, tokens, 64), call, work * (3.5 if both else 1), both)  # 2 products forward, 5 backward


@torch.enable_grad()
def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str, causal: bool = False) -> object:
    """With gradients if the inputs want some."""
    with sdpa_kernel(BACKENDS[backend]) if BACKENDS[backend] else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return torch.autograd.grad(out, (q, k, v), v.detach()) if out.requires_grad else out


@torch.enable_grad()
def attend_by_position(q: Tensor, k: Tensor, v: Tensor, *, attention: Attention) -> object:
    """An optional package's, whose tensors have the heads behind the positions."""
    out = attention.function(*(x.transpose(1, 2) for x in (q, k, v)))
    return torch.autograd.grad(out, (q, k, v), v.detach().transpose(1, 2)) if out.requires_grad else out


def norms(bench: Bench) -> None:
    """GroupNorm with what is fused to it, in bf16; the plain one in the encoder's float32 too."""
    for operation in NORMS:
        case = operation.case
        for dtype in (torch.bfloat16, torch.float32)[: 2 if case.operation == "group_norm_silu" else 1]:
            source = Source(bench.device, dtype)
            bench.rate(
                f"{operation.name}, {str(dtype).removeprefix('torch.')}",
                lambda case=case, source=source: (case.inputs(bench.sizes, source),),
                torch.no_grad()(functools.partial(case.call, ops)),
                operation.bytes_moved(bench.sizes, dtype.itemsize)[0],
                "B/s",
            )


# ---- smoke


@torch.no_grad()
def poisoned(bench: Bench, dtype: torch.dtype, poison: float) -> dict[str, Any]:
    """cuDNN's fused ReLU also adds a tensor, times zero, and PyTorch passes the result's own memory for it."""
    source, side = Source(bench.device, dtype), bench.less(96)
    x, bias = source.maps(16, 64, side, side), source.normal(64)
    weight = source.normal(64, 64, 3, 3, scale=0.05).to(memory_format=torch.channels_last)
    expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    old = [torch.full(expected.shape, poison, dtype=dtype, device=bench.device) for _ in range(4)]
    places = {each.data_ptr() for each in old}
    del old
    found = conv_relu(x, weight, bias)
    error = relative(found, expected)
    return {"error": error, "memory_reused": found.data_ptr() in places, "ok": error < ERROR[torch.bfloat16]}


@torch.no_grad()
def graph(bench: Bench, coder: str, form: str = "", dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The frozen encoder or decoder of random weights, of eight images at once, by replay and kernel by kernel."""
    gpu = bench.device.type == "cuda"
    torch.manual_seed(0)
    kind, _, name = form.partition("=")
    with bench.device, forms.taking(**({kind: name} if form else {})):
        tokenizer = VQTokenizer.from_name("vq-16" if gpu else "tiny").to(memory_format=torch.channels_last)
        codec = PixelCodec(tokenizer, 16, dtype)
        given = Source(bench.device, torch.float32).maps(16, 3, bench.sizes.pixels, bench.sizes.pixels).clamp(-1, 1)
        if coder == "decoder":
            given = torch.randint(len(codec.frozen.entries), (16, bench.sizes.tokens))
        replayed, plain = getattr(codec, f"_{coder[:-1]}"), getattr(codec.frozen, coder[:-1])
        first, second = given.split(8)
        replayed(second, chunk=8)  # the recording
        found, expected = replayed(first, chunk=8), plain(first)
    differing = (found != expected).double().mean() if coder == "encoder" else relative(found, expected.double())
    error = float(differing)
    figures = rate(itertools.cycle([(first,), (second,)]), functools.partial(replayed, chunk=8), 8)
    return figures | {"unit": "images/s", "error": error, "ok": error < GRAPH_ERROR[coder]}


def operation_error(index: int, passes: str, device: str) -> dict[str, Any]:
    """One operation against float64."""
    gpu = device == "cuda"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if gpu else torch.float32
    source = Source(torch.device(device), dtype)
    error, differing = accuracy(every_operation()[index], passes, XXL if gpu else SMALL, source, IMAGES)
    ok = error <= ERROR[dtype] and differing <= DISAGREEMENT[dtype]
    return {"error": error, "differing": differing, "ok": ok}


def apart(*arguments: Any) -> dict[str, Any]:
    """The same in a process of its own, forked from one that has imported PyTorch: a fault is that of one case."""
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=die_with_the_check) as pool:
        return pool.submit(operation_error, *arguments).result()


def exactness(bench: Bench, operations: list[Operation], processes: int) -> None:
    """In parallel, as compiling them takes most of the time."""
    if bench.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault of this process's, which was reported
            torch.cuda.empty_cache()
    with ThreadPoolExecutor(processes) as threads:
        cases = {
            threads.submit(apart, index, passes, bench.device.type): f"{operation.name} {passes}"
            for index, operation in enumerate(operations)
            for passes in operation.passes
        }
        for case in as_completed(cases):
            bench.attempt(cases[case], case.result)


def micro_batch(bench: Bench, images: int, form: str, found: dict[str, list[Tensor]]) -> dict[str, Any]:
    """The transformer's part of a step's micro-batches, LAYERS deep, with made-up advantages; launching counts.

    found: of each form its loss and gradients, which must be those of kernel by kernel.
    """
    torch.manual_seed(0)
    config = AlignConfig(model="xxl", micro_batch=images, recipe="lean", random_init=True, synthetic_data=True)
    small = {"layers": 1, "heads": 2, "width": 128, "vocab_size": 64, "grid_size": 4}
    with bench.device:
        generator = LlamaGen.from_name("xxl", **({"layers": LAYERS} if bench.device.type == "cuda" else small))
        tokens = torch.randint(generator.config.vocab_size, (images, generator.config.grid_size**2))
        ids = torch.arange(images)
        judged = Judged({}, torch.randn(images, config.group_size))
        batch = ImageBatch(torch.empty(images, 0), labels=ids, sample_ids=ids, image_ids=ids)
    models = Models(generator, tokenizer=None, reward=None)

    def step(seed: int) -> Tensor:
        generator.zero_grad(set_to_none=True)
        with micro_batches.weights_for(models, config):
            for _ in range(PASSES):
                losses = micro_batches.learn(models, config, batch, tokens, seed, contextlib.nullcontext, judged)
        return losses.terms["loss"].detach()

    with forms.taking(micro_batch=form):
        loss = [step(seed) for seed in range(3)][-1]  # kernel by kernel, recorded, replayed
        gradients = [each.grad for each in generator.parameters() if each.grad is not None]
        found[form] = [loss.clone(), *(each.clone() for each in gradients)]
        figures = rate(((seed,) for seed in itertools.count()), step, PASSES * images, held=0.0)
    error = max(relative(mine, right.double()) for mine, right in zip(found[form], found["eager"], strict=True))
    return figures | {"unit": "images/s", "error": error, "ok": error < ERROR[torch.bfloat16]}


def micro_batch_forms(bench: Bench) -> None:
    """Each number of images in both forms, whose losses and gradients must agree."""
    for images in MICRO_BATCHES:
        found: dict[str, list[Tensor]] = {}
        for form in FORMS["micro-batch"]:
            bench.attempt(
                f"micro-batch of {images}, {form}", functools.partial(micro_batch, bench, images, form, found)
            )


def measure(bench: Bench) -> None:
    """All that this process measures itself."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    for rates in (measure_ceilings, convolutions, attention, norms, own_convolutions):
        rates(bench)
    bench.attempt("poisoned memory, bfloat16", lambda: poisoned(bench, torch.bfloat16, math.nan))
    bench.attempt("poisoned memory, float32", lambda: poisoned(bench, torch.float32, math.inf))
    micro_batch_forms(bench)
    for coder, others in GRAPHS.items():
        for form in ("", *others):
            name = f"{coder} as a CUDA graph{', ' * bool(form)}{form}"
            bench.attempt(name, functools.partial(graph, bench, coder, form))
    for dtype in (torch.float16, torch.float32):  # as `--reward-dtype` has it
        name = f"decoder as a CUDA graph in {str(dtype).removeprefix('torch.')}"
        bench.attempt(name, functools.partial(graph, bench, "decoder", dtype=dtype))
    in_eight_bits(bench)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rates of this GPU at LlamaGen-XXL's shapes, and a smoke test.")
    parser.add_argument("--cpu", action="store_true", help="small, on a machine without a GPU")
    if parser.parse_args().cpu:
        torch.set_num_threads(1)  # the clock is that of one thread
        bench = Bench(torch.device("cpu"), shrink=16)
    elif torch.cuda.is_available():
        bench = Bench(torch.device("cuda"))
    else:
        parser.error("no CUDA device; --cpu runs everything small")
    forkserver.ensure_running()  # it imports PyTorch meanwhile
    if bench.device.type == "cuda":  # of these no other run has filled Triton's cache
        arch = ["--arch", architecture(torch.device("cuda", 0))]
        for name in COMPILED:
            subprocess.Popen([sys.executable, "-m", "vapi_fast.kernels.compile", *arch, "--only", name])
    measure(bench)
    exactness(bench, every_operation(), 1 if bench.device.type == "cpu" else min(8, os.cpu_count() or 1))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
