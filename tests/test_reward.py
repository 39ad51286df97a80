"""Reward values against the formula, one rollout at a time."""

from __future__ import annotations

import pytest
import torch

from vapi_fast.alignment import Models
from vapi_fast.data import ImageBatch
from vapi_fast.reward import PixelReward


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_reward_is_the_formula_for_any_chunk(tiny_models: Models, tiny_batch: ImageBatch, chunk: int) -> None:
    reward = PixelReward(tiny_models.tokenizer, tiny_models.reward.lpips, 0.7, 1.3, chunk)
    tokens = torch.randint(0, 512, (4, 3, 64), generator=torch.Generator().manual_seed(0))
    scored = reward.score(tokens, tiny_batch.images)
    for b in range(4):
        for g in range(3):
            with torch.no_grad():
                decoded = tiny_models.tokenizer.decode(tokens[b, g][None])
                image = tiny_batch.images[b][None]
                mse = ((decoded - image) ** 2).mean()
                lpips = tiny_models.reward.lpips(decoded, image)[0]
            assert scored.mse[b, g] == pytest.approx(mse.item(), rel=1e-4)
            assert scored.lpips[b, g] == pytest.approx(lpips.item(), rel=1e-4)
            assert scored.total[b, g] == pytest.approx(-(0.7 * mse + 1.3 * lpips).item(), rel=1e-4)


def test_the_images_own_tokens_score_best(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    own = tiny_models.tokenizer.encode(tiny_batch.images)
    others = own.roll(1, 0)
    scored = tiny_models.reward.score(torch.stack([own, others], dim=1), tiny_batch.images)
    assert (scored.total[:, 0] > scored.total[:, 1] + 0.1).all()


def test_straight_through_reward_reaches_the_embeddings(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    tokens = tiny_models.tokenizer.encode(tiny_batch.images).roll(1, 0)
    embeddings = tiny_models.tokenizer.codebook()[tokens].clone().requires_grad_()
    reward = tiny_models.reward.compare(tiny_models.tokenizer.decode_embeddings(embeddings), tiny_batch.images)
    reward.total.sum().backward()
    direction = embeddings.grad / embeddings.grad.flatten(1).norm(dim=1).view(-1, 1, 1)
    moved = tiny_models.tokenizer.decode_embeddings(embeddings.detach() + 0.05 * direction)
    assert (tiny_models.reward.compare(moved, tiny_batch.images).total > reward.total).all()
