"""Free-running generation: groups of sequences from classes or captions, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vapi_fast.generation.config import CFG_SCHEDULES
from vapi_fast.generation.engine import Engine, Generation, KVCache, compute_dtype, slot_bytes
from vapi_fast.models import Generator, GeneratorConfig
from vapi_fast.ops.checks import ArgumentChecks

__all__ = ["Generation", "KVCache", "generate", "guidance_scales", "sample_groups"]

CACHE_DTYPES = {None: None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
CPU_ROWS = 256  # sequences at once on a CPU: more gain nothing
MEMORY_SHARE = 0.9  # of a GPU's free memory


def generate(model: Generator, condition: Tensor, *, group_size: int = 1, **options: Any) -> Tensor:
    """Draw token sequences; `VQTokenizer.decode` turns them into images.

    All arguments but `group_size`, which is 1 here by default, and all errors are those of `sample_groups`.

    Returns:
        int64 tokens `[B,T]`, T = grid_size²; `[B,G,T]` for a group size G above 1.
    """
    tokens = sample_groups(model, condition, group_size=group_size, **options).tokens
    return tokens[:, 0] if group_size == 1 else tokens


@torch.no_grad()
def sample_groups(
    model: Generator,
    condition: Tensor,
    *,
    group_size: int,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    cfg_scale: float | Sequence[float] = 1.0,
    cfg_interval: int = -1,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    condition_mask: Tensor | None = None,
    batch_size: int | None = None,
    kv_dtype: str | None = None,
    return_entropies: bool = False,
) -> Generation:
    """Draw G token sequences for each condition, which is computed once a group.

    A sequence depends on the seed, its condition, its sample id and its index in the group alone: not on batch size,
    G, or rank, up to the rounding of matrix products of another size. The model computes in the dtype of a surrounding
    autocast, else in that of its weights.

    Args:
        condition: class ids int64 `[B]` in 0…num_classes (that one: unconditional), or caption features
            `[B,prefix_len,caption_width]`.
        group_size: G ≥ 1.
        seed: int, or 0-d int64 tensor.
        sample_ids: int64 `[B]`, global ids of the conditions; default 0…B−1.
        cfg_scale, cfg_interval, cfg_schedule, cfg_power: classifier-free guidance, see `guidance_scales`.
        temperature, top_k, top_p: applied to the guided logits; 0 and 1 switch the filters off.
        condition_mask: bool `[B,prefix_len]`, False at caption padding.
        batch_size: sequences drawn at once; default: on a GPU what its free memory holds, on a CPU 256.
        kv_dtype: "int8" and "fp8" keep keys and values in 8 bits, about half of bf16's memory and traffic: int8 with a
            float32 scale for each token and head, a sixteenth more in heads of 64; fp8 is float8_e4m3fn, on a GPU from
            compute capability 8.9 on. int8 rounds normal numbers by 0.6 % (rms), fp8 by 2.6 %. On the tiny preset
            93 % of the draws stay the same, and the log-prob of a token moves by 0.007 nats in the mean; with fp8
            77 % and 0.041, with a cache in bf16 96 % and 0.003, with the whole computation in bf16 91 % and 0.008.
        return_entropies: also give the entropy of each distribution that a token was drawn from.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, or guidance where no condition stands for
            "none".
    """
    checked = model.checked_condition(condition, condition_mask)
    sample_ids = checked_sample_ids(sample_ids, checked.rows)
    scales = guidance_scales(model.config.grid_size**2, cfg_scale, cfg_interval, cfg_schedule, cfg_power)
    batch, device = len(checked.rows), checked.rows.device
    check_engine(device, group_size, batch_size, kv_dtype)
    ArgumentChecks("generate").seed(seed)
    shape = (batch, group_size, len(scales))
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    logprobs = torch.empty(shape, device=device)
    entropies = torch.empty(shape, device=device) if return_entropies else None
    if batch == 0:
        return Generation(tokens, logprobs, entropies)

    if batch_size is None:
        batch_size = rows_that_fit(model, CACHE_DTYPES[kv_dtype], guided=any(scale != 1 for scale in scales))
    rollouts = even_part(group_size, batch_size)
    groups = even_part(batch, batch_size // rollouts)
    engine = Engine(
        model,
        groups=groups,
        rollouts=rollouts,
        scales=scales,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        masked=checked.mask is not None,
        cache_dtype=CACHE_DTYPES[kv_dtype],
        entropies=return_entropies,
    )
    for first in range(0, batch, groups):
        rows = torch.arange(first, first + groups, device=device).clamp(max=batch - 1)  # a short part is filled up
        for rollout in range(0, group_size, rollouts):
            drawn = engine.draw(checked.take(rows), sample_ids=sample_ids[rows], first_rollout=rollout, seed=seed)
            for whole, part in zip((tokens, logprobs, entropies), drawn, strict=True):
                if whole is not None:
                    wanted = whole[first : first + groups, rollout : rollout + rollouts]
                    wanted.copy_(part[: wanted.shape[0], : wanted.shape[1]])
    return Generation(tokens, logprobs, entropies)


def guidance_scales(
    length: int, scale: float | Sequence[float], interval: int = -1, schedule: str = "constant", power: float = 1.0
) -> list[float]:
    """Classifier-free guidance s(t) of each of `length` tokens: uncond + s(t) · (cond − uncond), of the logits.

    Args:
        scale: s ≥ 1; 1 is no guidance. Or all s(t), one for each token; the others then stay default.
        interval: as LlamaGen's cfg_interval: if not negative, s(t) = 1 for t > interval + 1 (it counts from the second
            token). The unconditional half of the batch is then left out.
        schedule: "constant", s(t) = s; or "rar", s(t) = 1 + (s − 1) · (1 − cos(π · (t / length)^power)) / 2, from 1 up
            to s, as in MDT (Gao et al., ICCV 2023) and for token sequences in RAR (Yu et al., 2024); or "power-cosine",
            as VA-π's evaluation: s(0) = s, and then the same rise over (t − 1) / (length − 1).
        power: of "rar" and "power-cosine"; above 1 they rise later.

    Raises:
        ValueError: an argument out of range.
    """
    if isinstance(scale, Sequence):
        return checked_scales(length, scale, interval, schedule)
    if not 1 <= scale < math.inf:
        raise ValueError(f"cfg_scale must be at least 1 (no guidance) and finite, got {scale}")
    if schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule must be one of {', '.join(CFG_SCHEDULES)}, got {schedule!r}")
    if not 0 < power < math.inf:
        raise ValueError(f"cfg_power must be positive and finite, got {power}")
    scales = [float(scale)] * length
    if schedule != "constant":
        full = 1 if schedule == "power-cosine" else 0  # tokens before the rise
        risen = ((t / (length - full)) ** power for t in range(length - full))
        scales[full:] = [1 + (scale - 1) * (1 - math.cos(math.pi * share)) / 2 for share in risen]
    last = length if interval < 0 else interval + 1
    return [value if t <= last else 1.0 for t, value in enumerate(scales)]


def checked_scales(length: int, scales: Sequence[float], interval: int, schedule: str) -> list[float]:
    if len(scales) != length or not all(1 <= scale < math.inf for scale in scales):
        raise ValueError(
            f"cfg_scale must be a number, or {length} of them, one for each token, all at least 1 and finite; got "
            f"{len(scales)}: {list(scales[:4])} …"
        )
    if interval != -1 or schedule != "constant":
        raise ValueError("cfg_interval and cfg_schedule make one number into a schedule: cfg_scale is one already")
    return [float(scale) for scale in scales]


def checked_sample_ids(sample_ids: Tensor | None, condition: Tensor) -> Tensor:
    if sample_ids is None:
        return torch.arange(len(condition), device=condition.device)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != condition.shape[:1]:
        raise ValueError(
            f"sample_ids must be int64 [{len(condition)}], got {sample_ids.dtype} {list(sample_ids.shape)}"
        )
    return sample_ids.to(condition.device)


def check_engine(device: torch.device, group_size: int, batch_size: int | None, kv_dtype: str | None) -> None:
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if kv_dtype not in CACHE_DTYPES:
        raise ValueError(f"kv_dtype must be None, 'int8' or 'fp8', got {kv_dtype!r}")
    if kv_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("kv_dtype 'fp8' needs a GPU of compute capability 8.9 or more (Ada, Hopper): pass 'int8'")


def even_part(total: int, limit: int) -> int:
    """Size of the fewest parts of at most `limit` that make up `total`, if all are of one size."""
    return math.ceil(total / math.ceil(total / limit))


def rows_that_fit(model: Generator, cache_dtype: torch.dtype | None, *, guided: bool) -> int:
    """Sequences that can be drawn at once."""
    device = model.head.weight.device
    if device.type != "cuda":
        return CPU_ROWS
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    dtype = compute_dtype(model)
    copies = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    one = bytes_of_sequence(model.config, dtype, cache_dtype or dtype, guided=guided)
    return max(int(MEMORY_SHARE * (free - copies)) // one, 1)


def bytes_of_sequence(config: GeneratorConfig, dtype: torch.dtype, cache_dtype: torch.dtype, *, guided: bool) -> int:
    """Memory for one more sequence: its cache, a prefix's positions if they are not shared, and a step's work."""
    apart = config.prefix_len if config.prefix_len > 1 else 0
    cache = config.grid_size**2 * slot_bytes(config, cache_dtype) + apart * slot_bytes(config, dtype)
    work = (6 * config.width + 3 * config.hidden_width) * dtype.itemsize * config.prefix_len
    return (2 if guided else 1) * (cache + work) + 8 * config.vocab_size
