"""The snippets of docs/recipes.md, run as they stand there on models of the public repository's structure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import public_models
import pytest
import torch
import torch.nn.functional as F
from public_models import LPIPS, Transformer, VQModel, randomised
from torch import Tensor

from vapi_fast import ops
from vapi_fast.reference.quantization import gumbel_noise

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
STEP, NOISE_PROB = 7, 0.4
RECIPES = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
}
Names = dict[str, Any]


def names(**more: Any) -> Names:
    """What every snippet may use, made anew; equal numbers each time."""
    torch.manual_seed(0)
    gpt, vq_model, lpips = (randomised(cls()).eval() for cls in (lambda: Transformer(block_size=16), VQModel, LPIPS))
    lpips.requires_grad_(False)
    return {
        "torch": torch,
        "F": F,
        "gpt": gpt,
        "vq_model": vq_model,
        "lpips": lpips,
        "tokens": torch.randint(40, (2, 16)),
        "classes": torch.tensor([1, 4]),
        "images": torch.rand(2, 3, 8, 8) * 2 - 1,
        "step": STEP,
        "group_size": 3,
        "logits": torch.randn(2, 16, 40, requires_grad=True),
        "rollouts": torch.randint(40, (2, 3, 16)),
        **more,
    }


def both(title: str, **more: Any) -> tuple[Names, Names]:
    """The names after the snippet before, and after the one after."""
    results = []
    for snippet in RECIPES[title]:
        namespace = names(**{k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in more.items()})
        exec(compile(snippet, f"{PAGE.name}: {title}", "exec"), namespace)
        results.append(namespace)
    before, after = results
    return before, after


def assert_close(before: Names, after: Names, *keys: str) -> None:
    for key in keys:
        torch.testing.assert_close(after[key], before[key], rtol=1e-4, atol=1e-5)


def test_every_recipe_has_two_snippets_and_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(RECIPES) == 8
    for title, snippets in RECIPES.items():
        assert len(snippets) == 2, title
        assert f'"{title}"' in source, title


def test_one_line_for_a_model() -> None:
    before, after = both("One line for a model")
    assert_close(before, after, "logits" if False else "loss", "logits", "quant", "indices", "distance")
    assert "10 modules replaced, 0 left alone" in after["report"]


def test_our_models_on_the_same_parameters() -> None:
    before, after = both("Our models on the same parameters")
    assert_close(before, after, "logits")
    assert after["policy"].output.weight is after["gpt"].output.weight


def test_sampling() -> None:
    """Each snippet's draws have the log-probs that both give them, and their frequencies are the probabilities."""
    more = {"temperature": torch.tensor(0.7), "logits": torch.randn(2, 3, 5), "group_size": torch.tensor(2000)}
    plain = {"temperature": 0.7, "group_size": 2000}
    probabilities = (more["logits"] / 0.7).softmax(-1)
    for snippet in RECIPES["Sampling G sequences from teacher-forced logits"]:
        namespace = names(logits=more["logits"], **plain)
        exec(snippet, namespace)
        rollouts, logprobs = namespace["rollouts"], namespace["logprobs"]
        expected = probabilities.log()[:, None].expand(-1, 2000, -1, -1).gather(-1, rollouts[..., None])[..., 0]
        torch.testing.assert_close(logprobs, expected)
        frequencies = F.one_hot(rollouts, 5).float().mean(1)
        assert ((frequencies - probabilities).abs() < 5 * (probabilities / 2000).sqrt() + 1e-3).all()


def test_policy_loss() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    before, after = both(
        "GRPO loss and cross-entropy",
        hidden=hidden,
        weight=weight,
        rewards=torch.randn(6),
        old_logprobs=torch.randn(2, 3, 16) * 0.2 - 4,
    )
    assert_close(before, after, "advantages", "loss")
    for name in ("hidden", "weight"):
        gradients = [torch.autograd.grad(n["loss"], n[name], retain_graph=True)[0] for n in (before, after)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_noisy_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same corruption: the first snippet's random numbers are turned into the second one's."""
    tokens = names()["tokens"]
    prefix = ops.noisy_prefix(tokens, NOISE_PROB, 40, seed=STEP)
    assert 0 < (prefix != tokens[:, :-1]).float().mean() < 2 * NOISE_PROB
    monkeypatch.setattr(torch, "rand", lambda shape: (prefix == tokens[:, :-1]).float())
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: prefix if tuple(a[-1]) == (2, 15) else real(*a, **k))
    noise = {"noise_prob": NOISE_PROB}
    results = []
    for snippet in RECIPES["Cross-entropy with a noisy prefix"]:
        with monkeypatch.context() as untouched:
            untouched.setattr(torch, "rand", lambda shape, *more: (prefix == tokens[:, :-1]).float())
            namespace = {**SHARED, **noise} if False else fixed_names(noise)
            exec(snippet, namespace)
        weight = namespace["gpt"].layers[0].attention.wqkv.weight
        results.append([namespace["loss"], torch.autograd.grad(namespace["loss"], weight)[0]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
