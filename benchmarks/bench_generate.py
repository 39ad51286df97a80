"""Generation by the engine against LlamaGen's own way and a loop without cache: images/s, bandwidth, agreement.

    pytest benchmarks/bench_generate.py --benchmark-only [--benchmark-json FILE]

On a GPU LlamaGen-XXL with random weights at 384² in bf16, 256 images at once; on a CPU the tiny preset in fp32. No
guidance. The contestants take turns, and their medians count. The loop without cache, which would take minutes, draws a
few tokens, in the middle of equal parts of the sequence: its time is theirs times the size of a part.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from race import OURS, YARDSTICK, Contestant, Race, yardstick
from sampling import bytes_read, random_model
from torch import Tensor

from vapi_fast import ops
from vapi_fast.generation.sequences import Generation, sample_groups
from vapi_fast.models import LlamaGen
from vapi_fast.reference import generation as reference
from vapi_fast.tiny import FILES

if TYPE_CHECKING:
    from conftest import Guard

SEED = 20251219
SCORED_ROWS = 8  # sequences whose logits are held at once


@dataclass(frozen=True)
class Setting:
    name: str
    model: LlamaGen
    labels: Tensor
    rounds: int  # at least
    loop_tokens: int  # that the loop without cache draws

    @property
    def length(self) -> int:
        return self.model.config.grid_size**2


@pytest.fixture(scope="module")
def setting() -> Setting:
    if torch.cuda.is_available():
        model = random_model(torch.device("cuda"))
        return Setting("xxl 384²", model, torch.arange(256, device="cuda") % 1000, rounds=2, loop_tokens=4)
    model = LlamaGen.from_checkpoint(FILES.generator, "tiny").eval()
    return Setting("tiny", model, torch.arange(64) % 9, rounds=10, loop_tokens=8)


@torch.no_grad()
def loop_without_cache(setting: Setting) -> None:
    """Each token from a forward of the whole sequence so far; the LM head at its end alone."""
    tokens = torch.zeros(len(setting.labels), setting.length, dtype=torch.int64, device=setting.labels.device)
    for part in range(setting.loop_tokens):
        t = int((part + 0.5) * setting.length / setting.loop_tokens)
        hidden = setting.model(tokens[:, :t], setting.labels, return_hidden=True)[:, -1:]
        drawn, _ = ops.linear_group_sample(hidden, setting.model.output.weight, 1, seed=SEED, first_position=t)
        tokens[:, t] = drawn[:, 0, 0]


@torch.no_grad()
def agreement(setting: Setting, drawn: Generation) -> dict[str, float]:
    """Against a forward along the sequences drawn: share of equal draws, mean difference of the log-probs."""
    head, equal, difference = setting.model.output.weight, [], []
    ids = torch.arange(len(setting.labels), device=setting.labels.device)
    for rows in ids.split(SCORED_ROWS):
        tokens = drawn.tokens[rows, 0]
        hidden = setting.model(tokens[:, :-1], setting.labels[rows], return_hidden=True)
        again, _ = ops.linear_group_sample(hidden, head, 1, seed=SEED, sample_ids=rows)
        logprobs = (hidden.float() @ head.float().T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        equal.append((again[:, 0] == tokens).double().mean())
        difference.append((logprobs - drawn.logprobs[rows, 0]).abs().double().mean())
    return {"equal_draws": torch.stack(equal).mean().item(), "logprob_error": torch.stack(difference).mean().item()}


def test_generate(setting: Setting, guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    device, sequences = setting.labels.device, len(setting.labels)

    def engine(kv_dtype: str | None = None) -> Generation:
        return sample_groups(
            setting.model, setting.labels, group_size=1, seed=SEED, batch_size=sequences, kv_dtype=kv_dtype
        )

    rivals = {
        "reference": Contestant(lambda _: reference.generate(setting.model, setting.labels)),
        "without cache": Contestant(lambda _: loop_without_cache(setting)),
        YARDSTICK: yardstick(device),
    }
    if device.type == "cuda":
        rivals["engine, int8 cache"] = Contestant(lambda _: engine("int8"))
        if torch.cuda.get_device_capability(device) >= (8, 9):
            rivals["engine, fp8 cache"] = Contestant(lambda _: engine("fp8"))
    agreed = agreement(setting, engine())
    race = Race(lambda _: engine(), rivals, itertools.repeat(None))
    race.warm_up()
    row = guard.measure(
        f"generate {setting.name}",
        race,
        references=["reference"],
        error=agreed["logprob_error"],
        bound=0.05 if device.type == "cuda" else 1e-4,
        disagreement=1 - agreed["equal_draws"],
        # Rounding to bf16 moves most draws from 16384 about equally likely tokens to a neighbour; chance finds none.
        disagreement_bound=0.99 if device.type == "cuda" else 0.0,
        fewest=setting.rounds,
    )
    row["seconds"]["without cache"] *= setting.length / setting.loop_tokens
    medians = {name: each for name, each in row["seconds"].items() if name != YARDSTICK}
    weight = setting.model.output.weight
    bandwidth = bytes_read(setting.model.config, sequences, weight.element_size(), weight.dtype) / medians[OURS]
    row |= {
        "setting": setting.name,
        "device": guard.bench.name,
        "threads": torch.get_num_threads(),
        "sequences": sequences,
        "images_per_second": {name: sequences / each for name, each in medians.items()},
        "times_faster": {name: each / medians[OURS] for name, each in medians.items()},
        "bytes_per_second": bandwidth,
        "share_of_copy": bandwidth / guard.bench.ceilings.copy,
        **agreed,
    }
    row["targets"] = targets(row, device)
    with capsys.disabled():
        print(f"\n{table(row)}")
    guard.judge(row)


def targets(row: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """On an H100 50 images/s and ten times LlamaGen's own way."""
    if device.type != "cuda":
        return []
    rate, faster = row["images_per_second"][OURS], row["times_faster"]
    return [
        {"target": "50 images/s", "met": rate >= 50},
        {"target": "10× LlamaGen's own way", "met": faster["reference"] >= 10},
    ]


def table(row: dict[str, Any]) -> str:
    lines = [f"{row['setting']}, {row['sequences']} images at once, on {row['device']}"]
    for name, rate in row["images_per_second"].items():
        lines.append(f"  {name:<18}{rate:10.2f} images/s, engine {row['times_faster'][name]:.2f}× as fast")
    lines.append(
        f"  engine: {row['bytes_per_second'] / 1e9:.1f} GB/s read, {row['share_of_copy']:.0%} of a copy's; along its "
        f"sequences {row['equal_draws']:.2%} equal draws, log-probs {row['logprob_error']:.1e} apart"
    )
    lines += [f"  {each['target']}: {'met' if each['met'] else 'missed'}" for each in row["targets"]]
    return "\n".join(lines)
