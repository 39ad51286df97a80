"""Advantages, and controls: what an alignment does where they say nothing of the rollouts, everything else equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.alignment.config import AlignConfig
from vapi_fast.alignment.figures import figure_of
from vapi_fast.reference.philox import CONTROL, default_sample_ids, open_uniform23, philox, seed_key
from vapi_fast.runtime.distributed import sum_over_ranks

SAID = {
    "random": "a control run: the advantages are drawn at random, and the rewards decide nothing",
    "shuffled": "a control run: every image has another one's advantages, and its own rewards decide nothing",
}


def sheet_label(config: AlignConfig) -> str:
    """What stands above the samples of the generator that a run has trained."""
    if config.control:
        return f"{config.control} advantages"
    return {"vapi": "aligned", "ste": "straight-through", "ntp": "next-token prediction alone"}[config.method]


def advantages_of(rewards: Mapping[str, Tensor], config: AlignConfig, seed: int, sample_ids: Tensor) -> Tensor:
    """Advantages `[b,G]` of rollouts with rewards `[b,G]`, of the images in the slots `sample_ids` of the step.

    Those of `reward`, or with `config.advantage` "each" the mean of those of each reward by its weight. With
    `config.credit_window` rewards `[b,G,T]` are the tokens' own, and so are advantages: of their neighbourhoods'.
    With `config.control` in their place, by draws of the step's seed that depend on neither batch nor rank:
    "random", the advantages of rewards drawn from a normal distribution; "shuffled", the whole group's of another
    image of the step. For that, `rewards` must be those of all of this rank's images, and all ranks call it.

    Args:
        rewards: as `rewards_of` gives them.
    """
    total = rewards["reward"]
    clip = config.advantage_clip or config.group_size  # none comes up to √G
    normalised = partial(ops.group_advantages, eps=config.advantage_eps, clip=clip)
    if config.control == "random":
        total = normal_rewards(seed, sample_ids, *total.shape[1:])
    if config.credit_window:
        total = neighbourhood_means(total, config.credit_window)
    if config.control != "random" and config.advantage == "each" and len(config.reward_terms) > 1:
        parts = [term.weight * normalised(rewards[figure_of(term)]) for term in config.reward_terms]
        advantages = torch.stack(parts).sum(0) / sum(abs(term.weight) for term in config.reward_terms)
    else:
        advantages = normalised(total)
    if config.control != "shuffled":
        return advantages
    step = advantages.new_zeros(config.batch_size, *total.shape[1:]).index_copy_(0, sample_ids, advantages)
    return sum_over_ranks(step)[others(seed, config.batch_size, total.device)[sample_ids]]


def neighbourhood_means(rewards: Tensor, window: int) -> Tensor:
    """Means of rewards `[b,G,T]` over the tokens of a square around each, of which there are fewer at the border."""
    grid = math.isqrt(rewards.shape[-1])
    maps = rewards.unflatten(-1, (grid, grid))
    return F.avg_pool2d(maps, window, 1, window // 2, count_include_pad=False).flatten(2)


def normal_rewards(seed: int, sample_ids: Tensor, group_size: int, length: int | None = None) -> Tensor:
    """float32 `[b,G]`, with a length `[b,G,T]`, standard normal: a function of seed, sample id and indices alone."""
    device = sample_ids.device
    positions, rollouts = torch.arange(length or 1, device=device), torch.arange(group_size, device=device)
    ids = default_sample_ids(len(sample_ids), sample_ids, device)
    word = philox((positions, rollouts[:, None], ids[:, None, None], CONTROL), seed_key(seed))[0]
    rewards = torch.special.ndtri(open_uniform23(word, torch.float64)).float()
    return rewards[..., 0] if length is None else rewards


def others(seed: int, batch_size: int, device: torch.device) -> Tensor:
    """For each image of a step another one's slot, int64 `[batch_size]`: a random cycle through all of them."""
    word = philox((0, 0, torch.arange(batch_size, device=device), CONTROL), seed_key(seed))[1]
    order = word.argsort(stable=True)
    return torch.empty_like(order).index_copy_(0, order, order.roll(-1))
