"""Alignment of a generator that draws from captions: as the published recipe would, and as for classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from reference_step import PublishedModels, published_step
from steps import SEED, gradient, relative, step

from vapi_fast import AlignConfig
from vapi_fast.alignment.models import Models, frozen_copy, load_models
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.data.synthetic import SyntheticData
from vapi_fast.models import LLAMAGEN_CONFIGS, Condition, LlamaGen
from vapi_fast.models.catalog import CATALOG

Make = Callable[..., AlignConfig]
TOKENS, WIDTH = 7, 24  # of a caption
SIZE = dataclasses.replace(LLAMAGEN_CONFIGS["tiny"], layers=2, caption_tokens=TOKENS, caption_width=WIDTH)


@pytest.fixture
def models(tiny_config: Make) -> Models:
    """The tiny preset's networks around an untrained generator for captions, away from its base."""
    torch.manual_seed(3)
    base = LlamaGen(SIZE)
    for parameter in base.parameters():
        parameter.data *= 3  # far from uniform draws
    generator = LlamaGen(SIZE)
    generator.load_state_dict(
        {name: value + 0.02 * torch.randn_like(value) for name, value in base.state_dict().items()}
    )
    found = load_models(tiny_config(), torch.device("cpu"))
    return dataclasses.replace(found, generator=generator, base=frozen_copy(base))


@pytest.fixture
def batch(tiny_batch: ImageBatch) -> ImageBatch:
    """Real images, with captions of 7, 6, 5 and 4 positions."""
    drawn = SyntheticData(32, caption=(TOKENS, WIDTH)).batch(torch.arange(4), torch.arange(4))
    assert drawn.mask.sum(1).tolist() == [7, 6, 5, 4]
    return tiny_batch._replace(features=drawn.features, mask=drawn.mask)


@pytest.mark.parametrize("recipe", ["lean", "va-pi"])
@pytest.mark.parametrize("changes", [{"noise_prob": 0.5}, {"prior": "kl", "temperature": 0.8}])
def test_a_step_is_the_published_one(
    tiny_config: Make, models: Models, batch: ImageBatch, recipe: str, changes: dict
) -> None:
    """Of captions that are all shorter than there is room for, too: that room is in the reference's forward only."""
    config = tiny_config(recipe=recipe, prior_weight=0.3, micro_batch=3, **changes)
    for part in (batch, batch.take(slice(1, 4)).trimmed()):
        config = dataclasses.replace(config, batch_size=len(part.images))
        figures, ours, found = step(models, config, part)
        models.generator.zero_grad()
        same = {"tokens": found.tokens, "drawn": found.rollouts, "shared_masks": True}
        theirs = published_step(PublishedModels.of(models), config, part, SEED, **same)
        assert figures["loss"] == pytest.approx(theirs["loss"].item(), rel=1e-5, abs=3e-6)
        assert relative(ours, gradient(models)) < 1e-5
        assert figures["clipped"] == pytest.approx(theirs["clipped"].item(), abs=2e-3)
        assert (figures["clipped"] > 0.1) is (recipe == "va-pi")


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "va-pi", "noise_prob": 0.5},
        {"recipe": "ste"},
        {"method": "ntp", "dropout": 0.1, "label_dropout": 0.5},
        {"rollouts": "free", "dropout": 0.2, "rollout_cfg_scale": 2.0, "prior": "kl"},
        {"control": "shuffled"},
    ],
)
def test_neither_micro_batches_nor_padding_change_a_step(
    tiny_config: Make, models: Models, batch: ImageBatch, changes: dict
) -> None:
    short = batch.take(torch.tensor([3, 2, 2, 3]))._replace(sample_ids=batch.sample_ids)
    assert short.trimmed().features.shape[1] == 5
    figures, whole, found = step(models, tiny_config(**changes), short)
    for other in (
        step(models, tiny_config(micro_batch=1, **changes), short),
        step(models, tiny_config(**changes), short.trimmed()),
    ):
        assert torch.equal(other[2].rollouts, found.rollouts)
        assert other[0] == pytest.approx(figures, rel=1e-5, abs=1e-6)
        assert relative(other[1], whole) < 1e-5


def test_captions_decide_what_is_drawn_and_learned(tiny_config: Make, models: Models, batch: ImageBatch) -> None:
    """Features of a caption do, those behind its mask do not, and the projection of captions is learned."""
    config = tiny_config()
    _, _, found = step(models, config, batch)
    projection = models.generator.cls_embedding.cap_proj.fc1.weight
    assert projection.grad.norm() > 0
    hidden = batch._replace(features=batch.features + 9.0 * ~batch.mask[..., None])
    assert torch.equal(step(models, config, hidden)[2].rollouts, found.rollouts)
    swapped = batch._replace(features=batch.features.flip(-1))
    assert not torch.equal(step(models, config, swapped)[2].rollouts, found.rollouts)


def test_what_stands_for_no_caption_is_never_trained(tiny_config: Make, models: Models, batch: ImageBatch) -> None:
    """As in LlamaGen it is a buffer, and a dropped caption keeps its mask."""
    before = models.generator.cls_embedding.uncond_embedding.clone()
    config = tiny_config(method="ntp", label_dropout=1.0)
    _, dropped, _ = step(models, config, batch)
    empty = models.generator.unconditional(batch.features)
    _, replaced, _ = step(models, tiny_config(method="ntp"), batch._replace(features=empty))
    assert relative(dropped, replaced) < 1e-6
    assert torch.equal(models.generator.cls_embedding.uncond_embedding, before)
    assert "cls_embedding.uncond_embedding" in models.generator.state_dict()


def test_shorter_captions_can_be_generated_from(models: Models, batch: ImageBatch) -> None:
    trimmed = batch.take(slice(2, 4)).trimmed()
    rows, mask = models.generator.checked_condition(trimmed.features, trimmed.mask)
    assert torch.equal(rows, batch.features[2:])
    assert torch.equal(mask, batch.mask[2:])
    states = [
        models.generator.hidden(torch.zeros(2, 63, dtype=torch.int64), condition)
        for condition in (Condition(rows, mask), Condition(trimmed.features, trimmed.mask))
    ]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"caption features must be floating \[B, 7, 24\]"):
        models.generator.checked_condition(trimmed.features, None)


def test_the_paper_s_recipe_for_text() -> None:
    """PAPER: 256², 16 images × 8 GPUs × G 8, 200 steps, ξ 0.5, CE 0.1, AdamW 1e-6; AR-GRPO: 8 prompts, CFG 4, KL 1."""
    settings = CATALOG["t2i-xl"].preset("align", "va-pi")
    expected = {"image_size": 256, "batch_size": 128, "group_size": 8, "steps": 200, "lr": 1e-6, "weight_decay": 1e-4}
    expected |= {"noise_prob": 0.5, "prior": "ce", "prior_weight": 0.1, "dropout": 0.1, "label_dropout": 0.1}
    assert {name: settings[name] for name in expected} == expected
    free = CATALOG["t2i-xl"].preset("align", "ar-grpo")
    expected = {"batch_size": 8, "group_size": 8, "steps": 600, "rollout_cfg_scale": 4.0, "prior_weight": 1.0}
    expected |= {"lr": 1e-5, "noise_prob": 0.0, "prior": "kl"}
    assert {name: free[name] for name in expected} == expected
    assert LLAMAGEN_CONFIGS["t2i-xl"].prefix_len == 120
