"""What a step is expected to take, kernel by kernel, at rates that a GPU's run corrects; and on many GPUs.

    python benchmarks/prediction.py

says what the host of this machine takes for a layer's forward and backward, and for a micro-batch from graphs.

A kernel takes its FLOPs at the rate of its kind or its bytes at that of memory, whichever is longer, and the time
between two launches. A product's rate holds while its tiles fill the multiprocessors: the last wave takes as long as a
full one. Between GPUs, what a collective moves goes beside kernels, but for the first gathering and the last sum.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_check import json_lines
from sampling import bytes_read

from vapi_fast import ops
from vapi_fast.alignment import memory, micro_batches
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.costs import config_costs, parameters, transformer_costs
from vapi_fast.alignment.kernel_costs import ANYWHERE, BF16, FP32, Cost, Kernel, product, total
from vapi_fast.alignment.losses import Judged
from vapi_fast.alignment.models import Models
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.kernels.launch import recorded
from vapi_fast.models import Condition, LlamaGen, LlamaGenConfig, catalog
from vapi_fast.models.families import generator_config
from vapi_fast.models.recompute import cast_once
from vapi_fast.models.sizes import GeneratorConfig
from vapi_fast.runtime import forms
from vapi_fast.runtime.ceilings import Ceilings
from vapi_fast.runtime.clock import Clock, StageClock

# Of an H100 and an H200: FLOPs a second, but where it says otherwise. Estimates, but for the two ceilings.
RATES = {
    "product": (0.91, 0.91),  # of the ceiling `matmul`, of full waves
    "convolution to 3": (23e12, 23e12),  # few channels may leave the matrix units
    "convolution to 64": (330e12, 330e12),  # cuDNN's, channels-last, 16 bits, by channels out
    "convolution to 128": (520e12, 520e12),
    "convolution to 256": (600e12, 600e12),  # and more
    "convolution in fp8": (900e12, 900e12),  # ours, e4m3, of the decoder's full resolution
    "TF32": (0.42, 0.42),  # of the rates in 16 bits
    "attention": (280e12, 280e12),  # FlashAttention-2, causal, heads of 64
    "attention backward": (230e12, 230e12),
    "wide attention": (33e12, 33e12),  # one head of 512
    "norm": (0.80, 0.70),  # of the ceiling `copy`: GroupNorm's statistics and their use, instructions included
    "elementwise": (0.86, 0.86),  # of `copy`
    "cache": (0.90, 0.90),  # of `copy`: keys and values that a token attends to
    "launch": (1.5e-6, 1.5e-6),  # seconds from a kernel's end to the next one's work
}
UNITS = {"product": "of matmul", "TF32": "of 16 bits", "launch": "s"} | dict.fromkeys(
    ("norm", "elementwise", "cache"), "of copy"
)
GPUS = ("h100", "h200")  # whose rates these are, in their order
MULTIPROCESSORS = 132
# Of products, with the share of the rate that each reaches: tiles, and parts of their sums, none of less than SHORTEST.
TILES = {(128, 256): 1.0, (128, 128): 0.85, (64, 128): 0.6}
SPLITS = {1: 1.0, 2: 0.95, 4: 0.9}
SHORTEST = 512

# Seconds to launch a kernel from Python, on a development machine: of sharded weights' 29 a layer; of whole ones' 25,
# which are the longer ones (`python benchmarks/prediction.py`).
HOST, WHOLE_HOST = 45e-6, 49e-6
NODE = 0.2e-6  # seconds that the driver takes for a kernel of a graph; an estimate
REPLAYED = ("encode", "decode", "lpips")  # from CUDA graphs: a launch each
RECORDED = ("forward", "sample", "loss", "backward")  # with the form `micro-batch=graph`

# The public loop's: launches of one layer and one token of `transformers`' Llama, and around the layers; seconds that
# the host takes for each. Measured on a development machine, launches left out: 24 layers, 13.4 ms a token.
LAYER_LAUNCHES, TOKEN_LAUNCHES = 40, 33
EAGER_HOST = 13.6e-6

MACHINE = 8  # GPUs
# Bytes a second that a GPU receives in NCCL's collectives.
NVLINK = 350e9  # from the others of its machine; 450 by specification
INFINIBAND = 45e9  # from other machines, by an adapter of its own; 50 (400 Gb/s)
LATENCY = 30e-6  # seconds of a collective; across machines twice


@dataclass(frozen=True)
class Rates:
    """A device's. `table`: as RATES, and what was measured of single convolutions, by name. measured: keys of it."""

    name: str
    ceilings: Ceilings
    table: Mapping[str, float]
    measured: frozenset[str] = frozenset()

    def share(self, name: str, ceiling: float) -> float:
        """A rate that the table has as a share of a ceiling, or measured."""
        return self.table[name] * (1 if name in self.measured else ceiling)

    def computing(self, kernel: Kernel) -> float:
        """FLOPs a second."""
        if kernel.kind == "convolution":
            inputs, outputs, side, taps = kernel.shape
            name = convolution_name(taps, "TF32" if kernel.single else "bfloat16", inputs, outputs, side)
            if name in self.table:
                return self.table[name]
            rate = self.table[convolution_class(outputs)]
        elif kernel.kind == "product":
            rate = self.share("product", self.ceilings.matmul) * filled(kernel)
        else:
            rate = self.table[kernel.kind]
        return rate * (self.table["TF32"] if kernel.single else 1)

    def seconds(self, kernel: Kernel) -> float:
        memory = kernel.kind if kernel.kind in ("norm", "cache") else "elementwise"
        moving = kernel.bytes / self.share(memory, self.ceilings.copy)
        computing = kernel.flops / self.computing(kernel) if kernel.flops else 0.0
        return max(computing, moving) + kernel.runs * self.table["launch"]

    def by_kind(self, cost: Cost) -> dict[str, float]:
        """Seconds."""
        found: dict[str, float] = defaultdict(float)
        for kernel in cost.kernels:
            found["TF32 " * kernel.single * (kernel.kind == "convolution") + kernel.kind] += self.seconds(kernel)
        return dict(found)

    def __str__(self) -> str:
        shown = (
            f"{name} {figure(rate)}{'' if name in self.measured else ' ' + UNITS[name] if name in UNITS else ''}"
            f"{' (measured)' * (name in self.measured)}"
            for name, rate in self.table.items()
            if name in RATES
        )
        return "; ".join(shown)


def figure(rate: float) -> str:
    return f"{rate / 1e12:.3g} T" if rate > 1e9 else f"{rate:.2g}"


def filled(kernel: Kernel) -> float:
    """The share of a product's rate that its tiles reach, by their best size; 1 for an unknown shape."""
    if not kernel.shape:
        return 1.0
    rows, columns = kernel.shape
    inner = kernel.flops / (2 * rows * columns * kernel.runs)

    def share(height: int, width: int, parts: int) -> float:
        tiles = parts * math.ceil(rows / height) * math.ceil(columns / width)
        used = parts * rows * columns / (height * width)  # the rest of a tile sticks out of the matrix
        return used / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS)

    ways = ((tile, parts) for tile in TILES for parts in SPLITS if parts == 1 or inner / parts >= SHORTEST)
    return max(TILES[tile] * SPLITS[parts] * share(*tile, parts) for tile, parts in ways)


def convolution_class(outputs: int) -> str:
    return (
        "convolution to 3"
        if outputs < 8
        else f"convolution to {64 if outputs < 128 else 128 if outputs < 256 else 256}"
    )


def convolution_name(taps: int, kind: str, inputs: int, outputs: int, side: int) -> str:
    """As `rates.py` reports it."""
    return f"convolution {taps}×{taps} {kind} {inputs}→{outputs} {side}²"


# ---- measured


class RatesError(ValueError):
    """A file without rates."""


def builtin(key: str, ceilings: Ceilings, name: str) -> Rates:
    """Of one of GPUS."""
    column = GPUS.index(key)
    return Rates(name, ceilings, {each: values[column] for each, values in RATES.items()})


def read_rates(path: Path) -> list[dict[str, Any]]:
    """The rows of a `gpu_check.json`, or of what `rates.py` printed. Raises RatesError."""
    try:
        text = path.read_text(encoding="utf-8")
        try:
            rows = json.loads(text)["parts"]["rates"]["figures"]
        except (ValueError, KeyError, TypeError):
            rows = json_lines(text)
        rows = [row for row in rows or [] if isinstance(row, dict) and "name" in row and row.get("rate", 0) > 0]
    except (OSError, UnicodeDecodeError) as error:
        raise RatesError(f"--rates {path}: {error}") from error
    if not rows:
        raise RatesError(f"--rates {path}: no rates in it: pass a gpu_check.json, or what benchmarks/rates.py printed")
    return rows


def corrected(rates: Rates, rows: Iterable[Mapping[str, Any]]) -> Rates:
    """With what was measured in place of estimates; of an estimate's kind the median of what belongs to it."""
    found = {row["name"]: row["rate"] for row in rows}
    ceilings = replace(
        rates.ceilings,
        copy=found.get("copy", rates.ceilings.copy),
        matmul=found.get("matmul", rates.ceilings.matmul),
    )
    table: dict[str, float] = {}
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, rate in found.items():
        if match := re.fullmatch(r"convolution \d×\d (bfloat16|TF32|fp8) \d+→(\d+) \d+²", name):
            table[name] = rate
            if match[1] == "bfloat16":
                kinds[convolution_class(int(match[2]))].append(rate)
            elif match[1] == "fp8":
                kinds["convolution in fp8"].append(rate)
        elif re.fullmatch(r"(bias_|add_)?group_norm_silu .*, bfloat16", name):
            kinds["norm"].append(rate)
    table |= {name: statistics.median(values) for name, values in kinds.items()}
    for name, row in (
        ("wide attention", "one head of 512, default"),
        ("attention", "T 576, heads of 64, default, forward"),
    ):
        if f"attention, {row}" in found:
            table[name] = found[f"attention, {row}"]
    both = found.get("attention, T 576, heads of 64, default, forward and backward")
    if both and "attention" in table:  # 3.5 times the forward's work, of which the forward is one part
        backward = 3.5 / both - 1 / table["attention"]
        if backward > 0:
            table["attention backward"] = 2.5 / backward
    return Rates(rates.name, ceilings, {**rates.table, **table}, frozenset(table))


# ---- sampling


def token_seconds(config: GeneratorConfig, sequences: int, rates: Rates, cache: torch.dtype) -> dict[str, float]:
    """One token of so many sequences without guidance, keys and values in `cache`, in the mean: seconds by kind."""
    width, hidden, layers = config.width, config.hidden_width, config.layers
    linears = [(width, 3 * width), (width, width), (width, hidden), (width, hidden), (hidden, width)]
    products = total(product(sequences, *linear, layers) for linear in linears)
    products += product(sequences, width, config.vocab_size, written=FP32)
    read = bytes_read(config, sequences, 0, cache) / (config.grid_size**2 - 1)
    # Norms, sums, rotary, the cache's new entry and SwiGLU, as far as they are kernels of their own.
    small = Kernel("elementwise", 0, BF16 * sequences * layers * (16 * width + 3 * hidden), 3 * layers)
    return rates.by_kind(products + Cost((Kernel("cache", 0, read, layers), small)))


class PublicLoop(NamedTuple):
    """One token of Janus's `generation_inference.py`, on `transformers`' Llama: rows of one prompt, half without it."""

    launches: int
    host: float  # seconds
    reading: float  # seconds: weights, and the cache, which every layer's concatenation reads and writes as well

    @property
    def seconds(self) -> float:
        return max(self.host, self.reading)


def public_token(config: GeneratorConfig, images: int, rates: Rates) -> PublicLoop:
    """What a token of the public loop takes at least, `images` of a prompt at once: the host launches every kernel."""
    launches = LAYER_LAUNCHES * config.layers + TOKEN_LAUNCHES
    weights = config.layers * (4 * config.width**2 + 3 * config.width * config.hidden_width)
    slots = config.prefix_len + config.grid_size**2 / 2
    cache = 2 * images * config.layers * slots * 2 * config.width
    reading = BF16 * (weights + 3 * cache) / rates.ceilings.copy
    return PublicLoop(launches, launches * EAGER_HOST, reading)


# ---- many GPUs


class Shared(NamedTuple):
    """A step on one of many GPUs, in seconds.

    kernels: by kind. exposed: collectives that no kernel hides. launched: of the kernels, those that are in no graph.
    host: what it takes to launch them. memory: bytes by plan, None if it does not fit.
    """

    kernels: dict[str, float]
    exposed: float
    launched: float
    host: float
    memory: int | None

    @property
    def step(self) -> float:
        return sum(self.kernels.values()) + self.exposed

    @property
    def with_host(self) -> float:
        """The step where the host launches as slowly as HOST says."""
        return self.step + max(self.host - self.launched, 0)

    def lost(self, alone: Shared, gpus: int) -> dict[str, float]:
        """Seconds by what does not shrink with the number of GPUs, beyond its share of the step alone on one."""
        kinds = {kind: taken - alone.kernels[kind] / gpus for kind, taken in self.kernels.items()} | {
            "exposed": self.exposed
        }
        return dict(sorted(kinds.items(), key=lambda each: -each[1]))


def collective(moved: float, gpus: int) -> float:
    """Seconds of an all-gather or a reduce-scatter of so many bytes in all."""
    machines = max(gpus // MACHINE, 1)
    inside = moved * (1 - 1 / gpus) / NVLINK
    between = moved * (1 - 1 / machines) / (MACHINE * INFINIBAND)  # each adapter brings an eighth
    return max(inside, between)


def share_of_step(config: Mapping[str, Any], gpus: int, rates: Rates, free: int, *, sharded: bool = True) -> Shared:
    """FSDP2 as `runtime.distributed.shard` sets it up, or whole weights everywhere and one all-reduce of gradients.

    Sharded weights are gathered in bf16 for every micro-batch, and again for its backward where the plan of memory says
    so; gradients are summed in fp32 by the last micro-batch's backward.
    """
    costs = config_costs(config, processes=gpus, sharded=sharded)
    generator = generator_config(config["model"])
    batch = config["batch_size"] // gpus
    passes = -(-batch // config["micro_batch"])
    whole = gpus == 1 or not sharded
    form = forms.form("micro-batch", ANYWHERE, f"of {config['micro_batch']}")
    recorded = RECORDED if form == "graph" and whole else ()
    launches = total(cost for stage, cost in costs.items() if stage not in (*REPLAYED, *recorded))
    each = WHOLE_HOST if whole else HOST
    graphs = passes * HOST * len(recorded) + NODE * total(costs[stage] for stage in recorded).runs
    sizes = {"batch_size": config["batch_size"] if sharded else batch}
    sizes |= {"micro_batch": min(config["micro_batch"], batch)}
    sizes |= {name: config[name] for name in ("model", "image_size", "group_size", "recipe")}
    plan = memory.plan(
        AlignConfig(**sizes, random_init=True, synthetic_data=True), generator, free, gpus if sharded else 1
    )
    exposed = 0.0
    if gpus > 1:
        weights, blocks = parameters(generator), generator.layers
        hidden = {stage: sum(rates.by_kind(costs[stage]).values()) for stage in ("forward", "backward")}
        calls = (blocks + 1) * LATENCY * (1 + (gpus > MACHINE))
        reducing = collective(FP32 * weights, gpus) * (1 if sharded else 2) + calls
        gathering = (collective(BF16 * weights, gpus) + calls) * sharded
        again = gathering * plan.reshard_after_forward
        # Nothing hides the first gathering and the last sum: a block and what the blocks share, of the root's module.
        block = (4 * generator.width**2 + 3 * generator.width * generator.hidden_width) / weights
        ends = (1 - (blocks - 1) * block) * (gathering * passes + reducing)
        exposed = ends + max(gathering * passes - hidden["forward"], 0)
        exposed += max(reducing + again - hidden["backward"] / passes, 0)
    kinds, launched = rates.by_kind(total(costs.values())), sum(rates.by_kind(launches).values())
    return Shared(kinds, exposed, launched, each * launches.runs + graphs, plan.total if plan.fits else None)


# ---- the host


def host_seconds(rounds: int = 30) -> tuple[float, float]:
    """What this machine's host takes for a layer's forward and backward, the least of `rounds`, on one thread.

    No kernel of ours is launched, and PyTorch's have next to nothing to do: what a second layer takes more than one, in
    float32 on the CPU, where as in a step on a GPU no weight is cast.
    """
    taken = []
    for layers in (2, 10):
        sizes = {"heads": 2, "width": 32, "vocab_size": 64, "grid_size": 4, "num_classes": 9}
        model = LlamaGen(LlamaGenConfig(layers=layers, **sizes))
        tokens, labels = torch.zeros(2, 15, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        times = []
        for _ in range(rounds):
            with ops.use_backend("triton"), recorded(), cast_once(model.layers, torch.float32, model.norm.weight):
                start = time.thread_time()
                hidden = model.hidden(tokens, Condition(labels))
                middle = time.thread_time()
                hidden.backward(torch.zeros_like(hidden))
                times.append((middle - start, time.thread_time() - middle))
        taken.append([min(each) for each in zip(*times, strict=True)])
    few, many = taken
    return (many[0] - few[0]) / 8, (many[1] - few[1]) / 8


class Recorded:
    """In the place of `RecordedStages`: what it gave once, under as many stages."""

    def __init__(self, half: Callable[[Clock], Any], pool: None) -> None:
        self.stages: list[str] = []
        self.outputs = half(self.noted)

    @contextmanager
    def noted(self, stage: str) -> Iterator[None]:
        self.stages.append(stage)
        yield

    def __call__(self, clock: Clock) -> Any:
        for stage in self.stages:
            with clock(stage):
                pass
        return self.outputs


def replay_seconds(layers: int, rounds: int = 30) -> float:
    """What this machine's host takes for a micro-batch from graphs, the least of `rounds`, but for launching them.

    What is left: to copy what has changed, to see that gradients are where they were, to keep time.
    """
    sizes = {"heads": 1, "width": 4, "vocab_size": 64, "grid_size": 4, "num_classes": 9}
    models = Models(LlamaGen(LlamaGenConfig(layers=layers, **sizes)), tokenizer=None, reward=None)
    config = AlignConfig(model="xxl", recipe="lean", random_init=True, synthetic_data=True)
    tokens, ids = torch.zeros(2, 16, dtype=torch.int64), torch.arange(2)
    batch = ImageBatch(torch.empty(2, 0), labels=ids, sample_ids=ids, image_ids=ids)
    judged, clock, times = Judged({}, torch.zeros(2, config.group_size)), StageClock(), []
    stand_ins = mock.patch.multiple(micro_batches, DEVICES={"cpu"}, RecordedStages=Recorded)
    with stand_ins, forms.taking(micro_batch="graph"):
        for step in range(3):
            with micro_batches.weights_for(models, config):
                for _ in range(rounds if step == 2 else 1):
                    start = time.thread_time()
                    micro_batches.learn(models, config, batch, tokens, step, clock, judged)
                    times.append(time.thread_time() - start)
    return min(times[2:])


def recorded_costs(model: str, micro_batch: int) -> tuple[Cost, int]:
    """What a step of the default size has in the stages that can be recorded, and in how many micro-batches."""
    config = catalog.entry(model).preset("align", "lean") | {"model": model, "micro_batch": micro_batch}
    costs = config_costs(config)
    return total(costs[stage] for stage in RECORDED), -(-config["batch_size"] // micro_batch)


if __name__ == "__main__":
    from roofline import DEVICES

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what a kernel that was not launched leaves may be any numbers
    forward, backward = host_seconds()
    layers = generator_config("xxl").layers
    launches = total(transformer_costs(generator_config("xxl"), images=128, passes=8)).runs / (8 * layers)
    each = (forward + backward) / launches
    replay = replay_seconds(layers)
    print(
        f"the host for a layer: {1e3 * forward:.2f} ms forward, {1e3 * backward:.2f} ms backward; of {launches:.0f} "
        f"launches {1e6 * each:.0f} µs each\n"
        f"the host for a micro-batch from graphs: {1e3 * replay:.2f} ms, and launching {len(RECORDED)} graphs"
    )
    h100 = builtin("h100", DEVICES["h100"].ceilings, "H100")
    for micro_batch in (4, 32):
        cost, passes = recorded_costs("xxl", micro_batch)
        graphs = passes * (replay + len(RECORDED) * HOST) + NODE * cost.runs
        print(
            f"a step of LlamaGen-XXL in micro-batches of {micro_batch}, transformer and losses: "
            f"{each * cost.runs:.2f} s of the host, as graphs {graphs:.3f}; "
            f"{sum(h100.by_kind(cost).values()):.2f} s of an H100"
        )
