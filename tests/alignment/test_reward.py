"""Reward values against the formula, one rollout at a time; the fast pipeline's advantages against the plain one's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from accuracy import relative_l2
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor

from vapi_fast import AlignConfig, ops, tiny
from vapi_fast.alignment.models import Models, load_models
from vapi_fast.alignment.reward import PixelReward, Reward
from vapi_fast.alignment.rollout import roll_out
from vapi_fast.data.dataset import ImageBatch, ImageData
from vapi_fast.models import Condition
from vapi_fast.runtime.errors import ConfigError

GROUP_SIZE = 8


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
            assert scored.mse[b, g] == pytest.approx(mse.item(), rel=1e-5)
            assert scored.lpips[b, g] == pytest.approx(lpips.item(), rel=1e-5)
            assert scored.total[b, g] == pytest.approx(-(0.7 * mse + 1.3 * lpips).item(), rel=1e-5)


@pytest.mark.parametrize(("chunk", "decoded", "images"), [(4, 4, 1), (16, 16, 2), (64, 32, 4)])
def test_no_more_is_computed_at_once_than_the_chunk(
    tiny_models: Models, tiny_batch: ImageBatch, chunk: int, decoded: int, images: int
) -> None:
    """Sequences decoded, whole groups compared, and half as many images encoded, in float32."""
    reward = PixelReward(tiny_models.tokenizer, tiny_models.reward.lpips, chunk=chunk)
    rows: dict[str, set[int]] = {}
    for owner, name in ((reward.codec, "_encode"), (reward.codec, "_decode"), (reward, "_distances")):
        replayed = getattr(owner, name)

        def noted(*inputs: Tensor, name: str = name, function: Callable[..., Tensor] = replayed.function) -> Tensor:
            rows.setdefault(name, set()).add(len(inputs[0]))
            return function(*inputs)

        replayed.function = noted
    tokens = reward.codec.encode(tiny_batch.images)
    reward.score(tokens[:, None].repeat(1, GROUP_SIZE, 1), tiny_batch.images)
    assert rows == {"_encode": {min(4, chunk // 2)}, "_decode": {decoded}, "_distances": {images}}


def test_chunk_by_image_size(tiny_models: Models) -> None:
    assert tiny_models.codec.chunk_size(32 * 32) == 64
    assert tiny_models.codec.chunk_size(384 * 384) == 14
    assert tiny_models.codec.chunk_size(2048 * 2048) == 1


def test_the_images_own_tokens_score_best(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    own = tiny_models.codec.encode(tiny_batch.images)
    others = own.roll(1, 0)
    scored = tiny_models.reward.score(torch.stack([own, others], dim=1), tiny_batch.images)
    assert (scored.total[:, 0] > scored.total[:, 1] + 0.1).all()


def test_stages_are_timed_once_a_call(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    stages = []

    @contextlib.contextmanager
    def clock(stage: str) -> Iterator[None]:
        stages.append(stage)
        yield
        stages.append(f"end of {stage}")

    tiny_models.reward.score(torch.zeros(4, 2, 64, dtype=torch.int64), tiny_batch.images, clock)
    assert stages == ["decode", "end of decode", "lpips", "end of lpips"]


def test_straight_through_reward_reaches_the_embeddings(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    tokens = tiny_models.tokenizer.encode(tiny_batch.images).roll(1, 0)
    embeddings = tiny_models.tokenizer.codebook()[tokens].clone().requires_grad_()
    reward = tiny_models.reward.compare(tiny_models.tokenizer.decode_embeddings(embeddings), tiny_batch.images)
    reward.total.sum().backward()
    direction = embeddings.grad / embeddings.grad.flatten(1).norm(dim=1).view(-1, 1, 1)
    moved = tiny_models.tokenizer.decode_embeddings(embeddings.detach() + 0.05 * direction)
    assert (tiny_models.reward.compare(moved, tiny_batch.images).total > reward.total).all()


# ---- 16 bits on real images


def photographs(side: int, zoom: int) -> Tensor:
    """Four parts of a photograph `[4,3,side,side]` in [−1, 1], each of a square zoom·side pixels wide."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        photo = picture.convert("RGB")
    draws = np.random.default_rng(0)
    parts = []
    for _ in range(4):
        left, top = (int(draws.integers(0, size - zoom * side + 1)) for size in photo.size)
        part = photo.crop((left, top, left + zoom * side, top + zoom * side)).resize((side, side))
        parts.append(torch.from_numpy(np.array(part)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(parts)


def some_replaced(tokens: Tensor, share: float) -> Tensor:
    """G sequences `[B,G,T]` for each of tokens `[B,T]`: a share of the tokens drawn anew."""
    generator = torch.Generator().manual_seed(0)
    copies = tokens[:, None].repeat(1, GROUP_SIZE, 1)
    replaced = torch.rand(copies.shape, generator=generator) < share
    return torch.where(replaced, torch.randint(0, 512, copies.shape, generator=generator), copies)


def plain_reward(models: Models, tokens: Tensor, images: Tensor) -> Reward:
    decoded = models.tokenizer.decode(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return models.reward.compare(decoded, images)


def assert_same_advantages(
    models: Models, fast: PixelReward, tokens: Tensor, images: Tensor, mean: float = 0.9999, least: float = 0.999
) -> None:
    """In 16 bits, an image's advantages point where those of the plain modules in float32 do: bounds of the cosine."""
    scored = fast.score(tokens, images)
    with torch.no_grad():
        plain = plain_reward(models, tokens, images)
    advantages = [ops.group_advantages(reward.total).double() for reward in (scored, plain)]
    cosines = torch.cosine_similarity(*advantages, dim=1)
    assert cosines.mean() > mean
    assert cosines.min() > least
    for ours, theirs in zip(scored, plain, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < relative_l2(ours, theirs.double()) < 5e-3


@pytest.mark.usefixtures("image_sets")
@pytest.mark.parametrize(
    ("dtype", "mean", "least"),
    [
        ("bfloat16", 0.99997, 0.9998),  # measured: 0.999985 and 0.99992
        ("float16", 0.9999995, 0.999999),  # 0.99999987 and 0.9999997
        ("fp8", 0.9999, 0.9995),  # 0.999957 and 0.99986; less than 0.9995 in the mean would not be offered
    ],
)
def test_advantages_of_rollouts(tiny_config: Callable[..., AlignConfig], dtype: str, mean: float, least: float) -> None:
    config = tiny_config(group_size=GROUP_SIZE, reward_dtype=dtype)
    models = load_models(config, torch.device("cpu"))
    assert str(models.reward.dtype) == f"torch.{'float16' if dtype == 'fp8' else dtype}"
    assert models.codec.encoder_dtype == torch.float32
    batch = next(iter(ImageData(tiny.FILES.heldout_images, tiny.IMAGE_SIZE).batches(16, 1, seed=0)))
    tokens = models.codec.encode(batch.images)
    with torch.no_grad():
        rollout = roll_out(
            models.generator.eval(), tokens, Condition(batch.labels), config, seed=0, sample_ids=batch.sample_ids
        )
    assert_same_advantages(models, models.reward, rollout.tokens, batch.images, mean, least)


def test_rewards_are_in_float32_without_a_gpu(tiny_models: Models) -> None:
    layers = tiny_models.reward.frozen_lpips.layers
    assert {tiny_models.reward.dtype, *(each.weight.dtype for each in layers)} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_dtype": "int8"}, "--reward-dtype int8: choose one of bfloat16, float16, float32, fp8"),
        (
            {"reward_dtype": "float16", "method": "ste"},
            "--reward-dtype float16 needs --method vapi: --method ste has no",
        ),
    ],
)
def test_reward_dtypes_that_are_refused(
    tiny_config: Callable[..., AlignConfig], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny_config(**changes)


@pytest.mark.parametrize(("side", "zoom", "share"), [(64, 1, 0.5), (96, 4, 0.05)])
def test_bf16_advantages_on_photographs(tiny_models: Models, side: int, zoom: int, share: float) -> None:
    images = photographs(side, zoom)
    fast = PixelReward(tiny_models.tokenizer, tiny_models.reward.lpips, dtype=torch.bfloat16)
    assert_same_advantages(tiny_models, fast, some_replaced(tiny_models.codec.encode(images), share), images)


def test_bf16_rewards_leave_the_tokens_alone(tiny_models: Models) -> None:
    reward = PixelReward(tiny_models.tokenizer, tiny_models.reward.lpips, dtype=torch.bfloat16)
    for images in (photographs(64, 1), photographs(96, 4)):
        assert torch.equal(reward.codec.encode(images), tiny_models.tokenizer.encode(images))


# ---- on a GPU


@pytest.mark.gpu
def test_recorded_rewards_are_those_of_the_cpu(tiny_models: Models, tiny_batch: ImageBatch) -> None:
    tokens = some_replaced(tiny_models.tokenizer.encode(tiny_batch.images), 0.3)
    with torch.no_grad():
        plain = plain_reward(tiny_models, tokens, tiny_batch.images)
    for module in (tiny_models.tokenizer, tiny_models.reward.lpips):
        module.cuda()
    reward = PixelReward(tiny_models.tokenizer, tiny_models.reward.lpips, chunk=GROUP_SIZE)
    images = tiny_batch.images.cuda()
    own = reward.codec.encode(images)
    for _ in range(2):  # recorded, then replayed
        scored = reward.score(tokens.cuda(), images)
        for ours, theirs in zip(scored, plain, strict=True):
            assert relative_l2(ours.cpu(), theirs.double()) < 5e-3
        assert reward.score(own[:, None].contiguous(), images).total.mean() > scored.total.mean()
