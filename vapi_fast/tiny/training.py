"""How the presets' networks are trained: what `build` and `build_text` share."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from vapi_fast import ops
from vapi_fast.models import LPIPS, Generator, VQTokenizer
from vapi_fast.runtime.checkpoint import write_atomically

SEED = 0


def build_parts(
    module: str, about: str, parts: Mapping[str, Callable[[Any], None]], files: Callable[[Path], Any], package: Path
) -> None:
    """A builder's command: its `parts` in turn, or some, into the `files` of a folder, by default `package`."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=package, help="default: into the package")
    parser.add_argument(
        "--only", nargs="+", choices=parts, help="build these from the others that are there, as after an interruption"
    )
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, build in parts.items():
        if not options.only or name in options.only:
            started = time.perf_counter()
            build(files(options.output_dir))
            print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)


def half_precision() -> torch.autocast:
    """bf16 where the processor computes in it; elsewhere it is several times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def fit(
    name: str,
    module: nn.Module,
    steps: int,
    loss_of: Callable[[int], Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    cosine: bool = False,
    every: int = 100,
    figures: Callable[[], dict[str, str | int]],
) -> None:
    """AdamW at a rate that rises and falls to zero again; `figures` after each `every` steps are shown.

    cosine: the rate rises in a thirtieth of the steps and falls along a cosine; otherwise it is `OneCycleLR`'s.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
    schedule: torch.optim.lr_scheduler.LRScheduler
    if cosine:
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, 30 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        )
    else:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    progress = trange(steps, desc=name)
    for step in progress:
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == every - 1:
            with torch.no_grad():
                progress.set_postfix(loss=f"{loss.item():.4f}", **figures())


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches from endless shuffled epochs."""
    pool = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pool) < batch_size:
            pool = torch.cat([pool, torch.randperm(count, generator=generator)])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def save_half(weights: nn.Module | Mapping[str, Tensor], path: Path) -> None:
    """Weights as float16 safetensors: half the size, and loads into float32 modules."""
    weights = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {key: value.detach().half().contiguous() for key, value in weights.items()}
    write_atomically(path, lambda temporary: save_file(state, temporary))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


def nearest_centres(points: Tensor, count: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Spherical k-means: `count` unit vectors for unit vectors `points` `[N,C]`."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = sums.norm(dim=1) == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=1)
    return centres


def fit_tokenizer(
    model: VQTokenizer,
    perceptual: LPIPS,
    draw: Callable[[], Tensor],
    examples: Tensor,
    heldout: Tensor,
    steps: int,
    continuous_steps: int,
    generator: torch.Generator,
) -> None:
    """MSE + LPIPS + codebook and commitment losses; the first steps leave the latents continuous, then k-means.

    Args:
        draw: a batch of images `[B,3,H,W]` in [−1, 1].
        examples: images whose latents' clusters the codes begin as.
    """
    codes = model.quantize.embedding.weight
    used = torch.zeros(len(codes), dtype=torch.bool)
    latents = torch.empty(0)

    def loss_of(step: int) -> Tensor:
        nonlocal latents
        target = draw().to(memory_format=torch.channels_last)
        with half_precision():
            z = model.latents(target)
        z = F.normalize(z.float(), dim=-1)
        latents = z.detach().flatten(0, 2)
        if step == continuous_steps:
            with torch.no_grad():
                sample = torch.cat(
                    [F.normalize(model.latents(chunk), dim=-1).flatten(0, 2) for chunk in examples.split(256)]
                )
                codes.copy_(nearest_centres(sample, len(codes), generator))
        if step < continuous_steps:
            z_q, codebook_loss = z, torch.zeros(())
        else:
            z_q, indices = ops.vq_lookup(z, codes)
            chosen = model.codebook()[indices]
            codebook_loss = F.mse_loss(chosen, z.detach()) + 0.25 * F.mse_loss(z, chosen.detach())
            used[indices.flatten()] = True
        with half_precision():
            decoded = model.decode_embeddings(z_q.flatten(1, 2)).float()
            distance = perceptual(decoded, target).float().mean()
        if step % 250 == 249 and step < 0.8 * steps:
            # Codes that no image chose start again at a latent that some image has.
            lost = (~used).nonzero().flatten()
            codes.data[lost] = latents[torch.randint(len(latents), (len(lost),), generator=generator)]
        return F.mse_loss(decoded, target) + 0.1 * distance + codebook_loss

    def figures() -> dict[str, str | int]:
        error = F.mse_loss(model.decode(model.encode(heldout)).clamp(-1, 1), heldout)
        found = {"heldout_mse": f"{error:.4f}", "codes": int(used.sum())}
        used.zero_()
        return found

    fit("tokenizer", model, steps, loss_of, weight_decay=1e-4, every=250, figures=figures)


def fit_generator(
    model: Generator,
    draw: Callable[[int], tuple[Tensor, dict[str, Any]]],
    heldout: tuple[Tensor, dict[str, Any]],
    steps: int,
    text_loss: Callable[[dict[str, Any]], Tensor] | None = None,
) -> None:
    """Next-token cross-entropy, at a rate that falls to zero along a cosine.

    Args:
        draw: by step, tokens int64 `[B,T]` and the forward's further arguments; as `heldout`.
        text_loss: of these arguments; a tenth of it is added.
    """

    def loss_of(step: int) -> Tensor:
        with half_precision(), torch.no_grad():
            tokens, given = draw(step)
        with half_precision(), sdpa_kernel(SDPBackend.MATH):  # the other one takes as long or twice for 64 tokens
            loss = F.cross_entropy(model(tokens[:, :-1], **given).flatten(0, 1), tokens.flatten())
            return loss if text_loss is None else loss + 0.1 * text_loss(given)

    def figures() -> dict[str, str | int]:
        tokens, given = heldout
        hidden = model(tokens[:, :-1], **given, return_hidden=True)
        return {"heldout": f"{ops.linear_cross_entropy(**model.head.operands(hidden), targets=tokens):.4f}"}

    fit("generator", model, steps, loss_of, cosine=True, every=50, figures=figures)
