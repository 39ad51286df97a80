"""What is rehearsed: LlamaGen-XXL at 384² through the functions that a run calls, each scene under its own name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from vapi_fast import AlignConfig
from vapi_fast.alignment import rollout, run
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.generation import sequences as generation
from vapi_fast.generation.engine import Engine
from vapi_fast.models import Condition, Generator, Janus, LlamaGen, frozen, janus, llamagen
from vapi_fast.runtime import forms

from .watch import Watch

IMAGES = 16
DEVICE = torch.device("cuda", 0)
Scene = Callable[[Watch], None]


def align(watch: Watch, steps: int = 1, path: str = "fast", **options: Any) -> None:
    """A run's start, and its steps from the data to the figures that are read back."""
    import comparison

    with tempfile.TemporaryDirectory() as folder:
        defaults = {"batch_size": IMAGES, "random_init": True, "synthetic_data": True, "steps": steps}
        config = AlignConfig(output_dir=Path(folder) / "run", **(defaults | options))
        started = run.Run(config, DEVICE, comparison.PATHS[path](), time.perf_counter())
        config.output_dir.mkdir()
        with watch.steps(), mock.patch.object(started, "save_state"):  # waits for the device, and needs its numbers
            started.steps(0)


def align_by_other_forms(watch: Watch) -> None:
    """Of tokenizer and perceptual network."""
    others = {"encoder": "float16", "wide_attention": "matmul", "last_convolution": "eight", "cudnn_benchmark": "on"}
    with forms.taking(**others):
        align(watch)


def align_as_graphs(watch: Watch, **options: Any) -> None:
    """Micro-batches of two shapes and two sizes of step: by kernels, recorded, replayed."""
    before = watch.host.captures, watch.host.replays
    untrimmed = mock.patch.object(ImageBatch, "trimmed", lambda batch: batch)  # else each step may be of its own shape
    with forms.taking(micro_batch="graph"), untrimmed:
        align(watch, steps=3, **({"batch_size": 12, "micro_batch": 8} | options))
    captures, replays = watch.host.captures - before[0], watch.host.replays - before[1]
    print(f"micro-batches as graphs: {captures} captures, {replays} replays")


def generate(
    watch: Watch,
    images: int = 256,
    *,
    name: str = "xxl",
    autocast: bool = True,
    dtype: torch.dtype = torch.float32,
    captions: bool = False,
    **options: Any,
) -> None:
    """dtype: of the weights, and without autocast what is computed in."""
    changes = {"caption_tokens": 120} if captions else {}
    with DEVICE:
        model = LlamaGen(dataclasses.replace(llamagen.LLAMAGEN_CONFIGS[name], **changes)).eval().to(dtype)
    condition, mask = torch.arange(images) % 1000, None
    if captions:
        condition = torch.randn(images, 120, model.config.caption_width)
        mask = torch.ones(images, 120, dtype=torch.bool)
    draw(watch, model, condition, mask, autocast=autocast, **options)


def draw(
    watch: Watch,
    model: Generator,
    condition: torch.Tensor,
    mask: torch.Tensor | None,
    autocast: bool = True,
    **options: Any,
) -> None:
    defaults = {"group_size": 1, "batch_size": 256}
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), watch.steps():
        generation.sample_groups(model, condition, condition_mask=mask, **(defaults | options))


def generate_from_prompts(watch: Watch, images: int = 64, tokens: int = 40, **options: Any) -> None:
    with DEVICE:
        model = Janus(janus.JANUS_CONFIGS["janus-pro-1b"].fitted(tokens)).eval()
    draw(watch, model, torch.ones(images, tokens, dtype=torch.int64), torch.ones(images, tokens).bool(), **options)


def operations(watch: Watch, dtype: torch.dtype, only: str = "") -> None:
    """Each of `vapi_fast.ops` by itself, with all of its gradients, as its benchmark calls it."""
    import cases
    import run_once

    for case in (each for each in cases.CASES if only in each.name):
        run_once.run(case, cases.Source(DEVICE, dtype), cases.XXL)


def convolutions_by_pointers(watch: Watch) -> None:
    """As on a GPU without tensor descriptors."""
    with mock.patch("vapi_fast.kernels.convolution.described", return_value=False):
        operations(watch, torch.bfloat16, only="convolution")


def rates(watch: Watch) -> None:
    """All that the script measures in its own process; the operations beside float64 have processes of their own."""
    import rates as script

    beside_float64 = watch.any_layout(script.poisoned)  # cuDNN has no channels-last convolution in float64
    bench, printed = script.Bench(DEVICE), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(mock.patch.object(script, "poisoned", beside_float64))
        stack.enter_context(mock.patch.multiple(script, ROUNDS=1, MOST_SETS=2))  # each further one launches the same
        stack.enter_context(mock.patch.object(torch, "equal", return_value=False))  # of numbers that are not there
        stack.enter_context(mock.patch.object(torch.cuda, "_sleep", create=True))
        script.measure(bench)
    if bench.failed:
        failures = [line for line in printed.getvalue().splitlines() if "failure" in line or '"ok": false' in line]
        raise RuntimeError(" ".join(failures))


def sampling(watch: Watch) -> None:
    import sampling as script

    model = script.random_model(DEVICE)
    synchronize = mock.patch.object(script, "synchronize", watch.waiting(script.synchronize))
    with watch.steps(), synchronize, contextlib.redirect_stdout(io.StringIO()):
        for cache in (None, "int8", "fp8"):
            script.sample(model, 256, f"sampling, {cache}", cache)


@contextlib.contextmanager
def two_ranks() -> Iterator[None]:
    """This process is rank 0 of two, whose collectives do nothing; the other one has the same objects."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gather(values: list[Any], value: Any) -> None:
        values[:] = [value] * len(values)

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with _disable_current_modes():  # a mesh needs the numbers of its ranks
            mesh = dist.init_device_mesh("cuda", (2,))
        default_mesh = "torch.distributed.fsdp._fully_shard._fully_shard._init_default_mesh"
        stand_ins = {"all_gather_object": gather, "new_group": lambda **_: None}  # the group is for snapshots
        with mock.patch(default_mesh, return_value=mesh), mock.patch.multiple(dist, **stand_ins):
            yield
    finally:
        dist.destroy_process_group()


def sharded(watch: Watch) -> None:
    with two_ranks():
        align(watch)


MOST_LAUNCHES = 40  # of a layer and micro-batch, forward and backward: below, the host keeps ahead of a GPU


def launches_of_a_layer(watch: Watch) -> None:
    """Of the default recipe's, with dropout: what a second layer launches more than one alone, weights cast before."""
    config = AlignConfig(model="xxl", random_init=True, synthetic_data=True)
    tokens, ids = torch.zeros(IMAGES, 576, dtype=torch.int64, device=DEVICE), torch.arange(IMAGES, device=DEVICE)
    counts = []
    for depth in (1, 2):
        with layers(depth), DEVICE:
            model = LlamaGen(llamagen.LLAMAGEN_CONFIGS["xxl"])
        with rollout.weights_of_step(model):
            for _ in range(2):  # the second one adds to gradients that are there
                start = watch.launched_so_far
                draw = {"seed": 0, "sample_ids": ids}
                hidden = rollout.teacher_forced_hidden(model, tokens, Condition(ids), config, training=True, **draw)
                middle = watch.launched_so_far
                hidden.backward(torch.zeros_like(hidden))
                found = middle - start, watch.launched_so_far - middle
        counts.append(found)
    forward, backward = (two - one for one, two in zip(*counts, strict=True))
    print(f"a layer: {forward} launches forward, {backward} backward")
    if forward + backward >= MOST_LAUNCHES:
        watch.note("launches", f"a layer's forward and backward are {forward + backward}", "transformer.Block")


PLAIN_LAYOUTS = ("published recipe", "straight-through", "both paths", "released recipe")
SCENES: dict[str, Scene] = {
    "align": partial(align, steps=2),
    "other forms": align_by_other_forms,
    "KL prior": partial(align, prior="kl"),
    "straight-through": partial(align, method="ste"),
    "next token": partial(align, method="ntp"),
    "filters": partial(align, top_k=2000, top_p=0.95, temperature=0.9),
    "noise": partial(align, noise_prob=0.5),
    "lean": partial(align, recipe="lean", steps=2),
    "dropout": partial(align, rollout_mode="train"),
    "released recipe": partial(align, path="both", batch_size=4, steps=2),
    "rewards in float16": partial(align, reward_dtype="float16"),
    "rewards in float32": partial(align, reward_dtype="float32"),
    "rewards in fp8": partial(align, reward_dtype="fp8"),
    "credit by token": partial(align, credit_window=3),
    "a layer": launches_of_a_layer,
    "small micro-batches": partial(align, micro_batch=4),
    "micro-batches as graphs": partial(align_as_graphs, prior="kl", noise_prob=0.5),
    "next token as graphs": partial(align_as_graphs, method="ntp"),
    "adapters as graphs": partial(align_as_graphs, model="janus-pro-1b", train="lora"),
    "free rollouts": partial(align, rollouts="free", batch_size=4),
    "published recipe": partial(align, path="reference", batch_size=4),
    "both paths": partial(align, path="both", recipe="lean", batch_size=4, steps=2),
    "sharded": sharded,
    "align 3B": partial(align, model="3b"),
    "align XL at 256²": partial(align, model="xl", image_size=256),
    "align on captions": partial(align, model="t2i-xl"),
    "align on prompts": partial(align, model="janus-pro-1b"),
    "adapters": partial(align, model="janus-pro-1b", train="lora", batch_size=4),
    "operations in bf16": partial(operations, dtype=torch.bfloat16),
    "operations in fp32": partial(operations, dtype=torch.float32),
    "convolutions by pointers": convolutions_by_pointers,
    "rates": rates,
    "sampling": sampling,
    "generate": generate,
    "generate with guidance": partial(generate, cfg_scale=1.75),
    "generate in fp8": partial(generate, cfg_scale=2.0, kv_dtype="fp8", top_k=2000, top_p=0.9, return_entropies=True),
    "generate in int8": partial(generate, cfg_scale=2.0, kv_dtype="int8"),
    "generate, guided at first": partial(generate, cfg_scale=2.0, cfg_interval=100),
    "generate from bf16 weights": partial(
        generate, images=600, dtype=torch.bfloat16, autocast=False, cfg_scale=2.0, batch_size=None
    ),
    "generate in fp32": partial(generate, images=64, autocast=False),
    "generate by 3B": partial(generate, images=64, name="3b", cfg_scale=2.0),
    "generate groups": partial(generate, images=16, group_size=8, batch_size=128),
    "generate from prompts": partial(generate_from_prompts, cfg_scale=5.0),
    "generate from captions": partial(generate, images=64, name="xl", captions=True, cfg_scale=2.0),
}


@contextlib.contextmanager
def layers(count: int | None) -> Iterator[None]:
    """Inside the `with` block every size has so many blocks; None: its own."""
    if count is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for sizes in (llamagen.LLAMAGEN_CONFIGS, janus.JANUS_CONFIGS):
            cut = {name: dataclasses.replace(config, layers=count) for name, config in sizes.items()}
            stack.enter_context(mock.patch.dict(sizes, cut))
        yield


@contextlib.contextmanager
def set_ups(watch: Watch) -> Iterator[None]:
    """Inside the `with` block an engine's start and the comparison of two steps may wait for the device, and what an
    encoder's maps go up to is seen in the plain encoder, whose norms leave channels-last."""
    from comparison import Comparison

    with contextlib.ExitStack() as stack:
        checks = ((LlamaGen, "checked_condition"), (Janus, "checked_condition"))
        for owner, name in (*checks, (Engine, "__init__"), (Comparison, "gradients")):
            stack.enter_context(mock.patch.object(owner, name, watch.waiting(getattr(owner, name))))
        stack.enter_context(mock.patch.object(frozen, "ranges", watch.any_layout(frozen.ranges)))
        stack.enter_context(mock.patch.object(run, "kernels_compiled", return_value=contextlib.nullcontext()))
        yield


def rehearse(watch: Watch, name: str, depth: int | None) -> None:
    """Play one scene."""
    with layers(depth), set_ups(watch), watch.during(name, channels_last=name not in PLAIN_LAYOUTS):
        SCENES[name](watch)
