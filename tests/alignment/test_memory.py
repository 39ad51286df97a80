"""The memory plan: XXL fits the cards it should, and activations are what autograd really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Comparison, published_bytes
from torch import Tensor

from vapi_fast import AlignConfig, ops
from vapi_fast.alignment import costs
from vapi_fast.alignment.memory import activation_bytes, check, chunks, frozen_parameters, plan
from vapi_fast.models import (
    LLAMAGEN_CONFIGS,
    Condition,
    Dropout,
    Generator,
    Janus,
    JanusConfig,
    LlamaGen,
    LlamaGenConfig,
)
from vapi_fast.runtime.errors import ConfigError

XXL = LLAMAGEN_CONFIGS["xxl"]
GB = 10**9
PARAMETERS = 1_410_972_672


def config(**changes: Any) -> AlignConfig:
    return AlignConfig(**({"model": "xxl", "random_init": True, "synthetic_data": True} | changes))


def test_xxl_fits_an_80_gb_card() -> None:
    found = plan(config(), XXL, 80 * GB)
    assert found.fits
    assert found.total <= 70 * GB
    assert found.reward_chunk == 64
    assert found.parts["weights"] == found.parts["gradients"] == 4 * PARAMETERS
    assert found.parts["optimizer"] == 8 * PARAMETERS
    assert found.parts["norms' gradients"] == 4 * 264 * 97 * 1536
    assert found.parts["bf16 weights"] == 2 * PARAMETERS
    # PAPER: 16 images of 576 tokens, 48 layers of 34 KB a token
    assert found.parts["activations"] == pytest.approx(16 * 576 * 48 * 34.9e3, rel=0.02)
    assert found.total == sum(found.parts.values())


def test_rewards_in_float32_take_twice_the_memory() -> None:
    usual, half, single, eight = (
        plan(config(reward_dtype=each), XXL, 80 * GB).parts["reward"] for each in (None, "float16", "float32", "fp8")
    )
    assert single == 2 * usual == 2 * half == 2 * eight  # the largest maps are then sums in 16 bits


def test_xxl_fits_a_40_gb_card_with_a_smaller_micro_batch() -> None:
    found = plan(config(micro_batch=4), XXL, 40 * GB)
    assert found.fits
    assert found.total <= 38 * GB
    assert found.reward_chunk >= 8
    assert check(config(micro_batch=4), XXL, 40 * GB) == found


def test_a_plan_that_does_not_fit_names_the_parts_and_the_largest_micro_batch_that_does() -> None:
    with pytest.raises(
        ConfigError, match=r"activations 15\.5.*40\.0 GB of the GPU are free: pass --micro-batch (\d+)$"
    ) as error:
        check(config(), XXL, 40 * GB)
    advised = int(str(error.value).split()[-1])
    assert plan(config(micro_batch=advised), XXL, 40 * GB).fits
    assert not plan(config(micro_batch=advised + 1), XXL, 40 * GB).fits


def test_without_any_way_other_means_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--micro-batch 1 does not fit either; train a part .*, share the weights"):
        check(config(), XXL, 24 * GB)
    with pytest.raises(ConfigError, match=r"--micro-batch 1 does not fit either; share the weights over more GPUs"):
        check(config(), XXL, 8 * GB, world_size=2)
    assert check(config(micro_batch=4), XXL, 24 * GB, world_size=8).fits


def test_an_evaluation_that_does_not_fit_names_its_batch(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("vq_ckpt", "gpt_ckpt", "data")}
    for path in files.values():
        path.touch()
    options = {"random_init": False, "synthetic_data": False, **files, "micro_batch": 4}
    with pytest.raises(ConfigError, match=r"evaluation 43\.\d.*: pass --eval-batch (\d+)$") as error:
        check(config(**options, eval_batch=128), XXL, 60 * GB)
    advised = int(str(error.value).split()[-1])
    assert check(config(**options, eval_batch=advised), XXL, 60 * GB).fits
    assert not plan(config(**options, eval_batch=advised + 1), XXL, 60 * GB).fits


def test_processes_share_weights_and_keep_whole_gradients_over_micro_batches() -> None:
    alone, shared = plan(config(), XXL, 80 * GB), plan(config(), XXL, 80 * GB, world_size=8)
    assert shared.parts["weights"] == alone.parts["weights"] // 8
    assert shared.parts["optimizer"] == alone.parts["optimizer"] // 8
    assert shared.parts["gradients"] == alone.parts["gradients"] // 8  # one micro-batch of 16 images a process
    assert shared.parts["activations"] == alone.parts["activations"]
    several = plan(config(micro_batch=4), XXL, 80 * GB, world_size=8)
    assert several.parts["gradients"] == 4 * PARAMETERS // 8 + 4 * PARAMETERS


def test_gathered_weights_are_given_up_where_memory_is_short() -> None:
    assert not plan(config(micro_batch=8), XXL, 40 * GB, world_size=16).reshard_after_forward
    tight = plan(config(micro_batch=8), XXL, 16 * GB, world_size=16)
    assert tight.reshard_after_forward
    assert tight.fits
    assert tight.parts["bf16 weights"] < PARAMETERS / 4
    assert not plan(config(micro_batch=4), XXL, 40 * GB).reshard_after_forward  # alone there is nothing to gather


def test_options_that_need_more_are_counted() -> None:
    plain = plan(config(), XXL, 200 * GB)
    divergence = plan(config(prior="kl"), XXL, 200 * GB)
    assert divergence.parts["base model"] == 2 * PARAMETERS
    assert divergence.parts["loss"] - plain.parts["loss"] == 12 * 16 * 576 * 16384
    both = plan(config(), XXL, 200 * GB, beside=Comparison().memory(config(), world_size=1))
    held = (2 + 4) * PARAMETERS + 4 * frozen_parameters("vq-16", "vgg16")
    assert both.total - plain.total == held + published_bytes(XXL, 128, masks=True) - sum(plain.step.values())
    assert plan(config(method="ste"), XXL, 200 * GB).parts["activations"] > 2 * plain.parts["activations"]
    quarter = plan(config(image_size=192), XXL, 200 * GB)
    assert quarter.parts["activations"] == plain.parts["activations"] / 4
    assert quarter.parts["reward"] == plain.parts["reward"] / 4


def test_chunks_are_whole_groups_or_powers_of_two() -> None:
    assert chunks(8) == [64, 32, 16, 8, 4, 2, 1]
    assert chunks(6) == [48, 24, 12, 6, 4, 2, 1]
    assert chunks(100) == [64, 32, 16, 8, 4, 2, 1]


class KernelDropout(Dropout):
    """By the kernel, which draws its masks again for the gradient, as on a GPU."""

    def states(self, x: Tensor, site: int) -> Tensor:
        with ops.use_backend("triton"):
            return super().states(x, site)


def kept_bytes(model: Generator, images: int, dropout: float) -> int:
    """Memory that autograd keeps for the backward of a forward in bf16, each allocation once, with the states that the
    forward gives and the gradient to them."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(images, model.config.grid_size**2 - 1, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        masks = KernelDropout(dropout, dropout, 0, torch.arange(images)) if dropout else None
        prompt = (model.config.prefix_len,) if isinstance(model, Janus) else ()
        hidden = model.hidden(tokens, Condition(torch.zeros(images, *prompt, dtype=torch.long)), masks)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + 2 * hidden.nbytes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layers", [1, 4])
def test_activations_are_what_autograd_keeps(layers: int, dropout: float) -> None:
    generator = LlamaGenConfig(layers=layers, heads=4, width=128, vocab_size=100, grid_size=8, num_classes=9)
    model = LlamaGen(generator)
    kept = kept_bytes(model, 3, dropout) - kept_bytes(model, 2, dropout)  # weights' copies are in both
    assert activation_bytes(generator) == pytest.approx(kept, rel=0.02)


def test_activations_around_the_blocks_are_counted() -> None:
    """Of Janus-Pro's image aligner, and of the layer before its head."""
    sizes = {"hidden_width": 200, "text_vocab": 40, "prompt_tokens": 5}
    generator = JanusConfig(layers=1, heads=4, width=128, vocab_size=100, grid_size=8, **sizes)
    model = Janus(generator)
    kept = kept_bytes(model, 3, 0.0) - kept_bytes(model, 2, 0.0)
    assert activation_bytes(generator) == pytest.approx(kept, rel=0.05)
    assert costs.around(generator) == ((8 * 128 + 128 * 128, 8 + 2 * 128), (128 * 128, 2 * 128))


def test_the_heads_buffers_are_those_of_the_kernels() -> None:
    head = pytest.importorskip("vapi_fast.kernels.head")
    from vapi_fast.alignment import memory

    assert memory.LOGITS == head.CHUNK_BYTES


@pytest.mark.gpu
def test_activations_on_a_gpu() -> None:
    generator = LlamaGenConfig(layers=12, heads=12, width=768, grid_size=24)
    model = LlamaGen(generator).cuda()
    tokens = torch.zeros(8, 575, dtype=torch.long, device="cuda")
    labels = torch.zeros(8, dtype=torch.long, device="cuda")

    def allocated(images: int) -> int:
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model(tokens[:images], labels[:images], return_hidden=True)
        used = torch.cuda.memory_allocated() - before
        del hidden
        return used

    allocated(1)
    assert activation_bytes(generator) * 4 == pytest.approx(allocated(8) - allocated(4), rel=0.1)
