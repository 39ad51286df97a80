"""Cached generation against a cache-free forward with the same draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vapi_fast import generate, ops
from vapi_fast.models import LlamaGen

SAMPLING = {"seed": 5, "temperature": 0.9, "top_k": 40, "top_p": 0.95}


def make_model(caption_tokens: int = 0) -> LlamaGen:
    torch.manual_seed(0)
    model = LlamaGen.from_name(
        "tiny", layers=2, heads=2, width=64, vocab_size=97, grid_size=4, caption_tokens=caption_tokens, caption_width=24
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # far from uniform predictions
    return model.eval()


def generate_without_cache(
    model: LlamaGen, condition: Tensor, cfg_scale: float, condition_mask: Tensor | None = None
) -> Tensor:
    """The whole sequence through the model for every token, conditional and unconditional separately."""
    tokens = torch.empty(len(condition), 0, dtype=torch.int64)
    with torch.no_grad():
        for position in range(model.config.grid_size**2):
            logits = model(tokens, condition, condition_mask=condition_mask)[:, -1]
            if cfg_scale > 1:
                empty = model(tokens, model.unconditional(condition), condition_mask=condition_mask)[:, -1]
                logits = empty + cfg_scale * (logits - empty)
            drawn, _ = ops.group_sample(logits[:, None], 1, first_position=position, **SAMPLING)
            tokens = torch.cat([tokens, drawn[:, 0]], dim=1)
    return tokens


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_class_condition_equals_cache_free(batch: int, cfg_scale: float) -> None:
    model = make_model()
    labels = torch.arange(batch) * 2
    expected = generate_without_cache(model, labels, cfg_scale)
    assert torch.equal(generate(model, labels, cfg_scale=cfg_scale, **SAMPLING), expected)
    assert expected.unique().numel() > 5


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_caption_condition_with_padding_equals_cache_free(cfg_scale: float) -> None:
    model = make_model(caption_tokens=6)
    captions = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    expected = generate_without_cache(model, captions, cfg_scale, mask)
    drawn = generate(model, captions, cfg_scale=cfg_scale, condition_mask=mask, **SAMPLING)
    assert torch.equal(drawn, expected)
    assert not torch.equal(generate(model, captions, cfg_scale=cfg_scale, **SAMPLING)[0], drawn[0])  # the mask counts


def test_sample_depends_on_its_id_not_on_the_batch() -> None:
    model = make_model()
    labels = torch.tensor([1, 4, 4, 2])
    ids = torch.tensor([10, 11, 12, 13])
    together = generate(model, labels, sample_ids=ids, seed=3)
    alone = generate(model, labels[2:3], sample_ids=ids[2:3], seed=3)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together[1], together[2])  # same class, other id
    assert not torch.equal(generate(model, labels, sample_ids=ids, seed=4), together)


def test_guidance_of_one_is_the_plain_model() -> None:
    model = make_model()
    labels = torch.tensor([0, 8])
    assert torch.equal(generate(model, labels, cfg_scale=1.0, seed=1), generate(model, labels, seed=1))


def test_training_mode_is_restored_and_dropout_does_not_act() -> None:
    model = make_model()
    expected = generate(model, torch.tensor([3]), seed=1)
    model.dropout = 0.5
    model.train()
    assert torch.equal(generate(model, torch.tensor([3]), seed=1), expected)
    assert model.training


@pytest.mark.parametrize(
    ("labels", "cfg_scale", "message"),
    [([10], 1.0, r"class ids must lie in 0…8"), ([-1], 1.0, "class ids"), ([0], 0.5, "cfg_scale must be at least 1")],
)
def test_bad_input(labels: list[int], cfg_scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(), torch.tensor(labels), cfg_scale=cfg_scale)
