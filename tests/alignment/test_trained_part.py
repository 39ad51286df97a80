"""`--train`: the head alone, or adapters: their gradients, what a step moves, what is written, and what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import vapi_fast
from vapi_fast import AlignConfig
from vapi_fast.alignment import costs, memory
from vapi_fast.alignment.loop import accumulate_gradients
from vapi_fast.alignment.models import Models, load_models
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import LLAMAGEN_CONFIGS, LlamaGen
from vapi_fast.models.lora import merged, train_only
from vapi_fast.models.sizes import JANUS_CONFIGS
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.tiny import FILES

Make = Callable[..., AlignConfig]
MATRICES = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")


def gradients(models: Models, config: AlignConfig, batch: ImageBatch) -> dict[str, torch.Tensor]:
    accumulate_gradients(models, config, batch, 7, nullcontext)
    return {name: p.grad for name, p in models.generator.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_whole(tiny_config: Make, tiny_batch: ImageBatch) -> None:
    """The head's is the same; an adapter's is its matrix's through b · a: aᵀ on the right, bᵀ on the left."""
    whole = gradients(load_models(tiny_config(), torch.device("cpu")), tiny_config(), tiny_batch)
    config = tiny_config(train="head")
    head = gradients(load_models(config, torch.device("cpu")), config, tiny_batch)
    assert head.keys() == {"output.weight"}
    torch.testing.assert_close(head["output.weight"], whole["output.weight"], rtol=1e-5, atol=1e-8)

    config = tiny_config(train="lora", lora_rank=3)
    models = load_models(config, torch.device("cpu"))
    found = gradients(models, config, tiny_batch)
    assert len(found) == 2 * len(MATRICES) * 6
    state = models.generator.state_dict()
    for matrix in (f"layers.4.{name}" for name in MATRICES):
        part = f"{matrix}.parametrizations.weight.0"
        assert not state[f"{part}.b"].any()
        assert found[f"{part}.a"].abs().max() == 0
        expected = whole[f"{matrix}.weight"] @ state[f"{part}.a"].T
        torch.testing.assert_close(found[f"{part}.b"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("train", ["head", "lora"])
def test_a_run_writes_a_whole_checkpoint(tiny_config: Make, tmp_path: Path, train: str) -> None:
    vapi_fast.align(tiny_config(train=train, synthetic_data=True, lr=1e-2, steps=2))
    before, after = load_state_dict(FILES.generator), load_state_dict(tmp_path / "run" / "aligned.pt")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert (
        moved
        == {
            "head": {"output.weight"},
            "lora": {f"layers.{n}.{name}.weight" for n in range(6) for name in MATRICES},
        }[train]
    )
    if train == "lora":  # of the rank that was asked for, 16 by default
        name = "layers.0.attention.wo.weight"
        assert torch.linalg.matrix_rank((after[name] - before[name].float()).double(), rtol=1e-4) <= 16


def test_adapters_are_added_to_what_is_drawn_from() -> None:
    torch.manual_seed(0)
    model = LlamaGen(dataclasses.replace(LLAMAGEN_CONFIGS["tiny"], layers=2, grid_size=2)).eval()
    tokens, labels = torch.randint(512, (2, 3)), torch.tensor([1, 2])
    before = model(tokens, labels)
    train_only(model, "lora", 4)
    torch.testing.assert_close(model(tokens, labels), before)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    plain = LlamaGen(model.config).eval()
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(tokens, labels), model(tokens, labels))
    assert not torch.allclose(plain(tokens, labels), before, atol=1e-3)
    drawn = [vapi_fast.generate(each, labels, seed=1) for each in (plain, model)]
    assert torch.equal(*drawn)


def test_janus_pro_fits_24_gb(tmp_path: Path) -> None:
    """1.5 billion weights: all of them trained take more than twice that."""
    size, free = JANUS_CONFIGS["janus-pro-1b"].fitted(64), 24 * 10**9
    config = AlignConfig(
        model="janus-pro-1b", random_init=True, synthetic_data=True, output_dir=tmp_path / "run", micro_batch=2
    )
    whole = memory.plan(config, size, free)
    assert not whole.fits
    for train, share in (("head", 0.03), ("image", 0.03), ("lora", 0.02)):
        part = dataclasses.replace(config, train=train)
        plan = memory.plan(part, size, free)
        assert plan.fits, plan
        trained = costs.parameters(size, train, 16)
        assert trained < share * costs.parameters(size)
        assert plan.held["optimizer"] == 8 * trained
        assert plan.held["gradients"] == 4 * trained
