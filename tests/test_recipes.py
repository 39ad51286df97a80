"""The snippets of docs/recipes.md, run as they stand there on models of the public repository's structure."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import public_models
import pytest
import torch
import torch.nn.functional as F
from public_models import LPIPS, Transformer, VQModel, randomised
from torch import Tensor

from vapi_fast import ops
from vapi_fast.reference.straight_through import gumbel_noise

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
STEP = 7
RECIPES = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
}
Names = dict[str, Any]


def names(**more: Any) -> Names:
    """What a snippet may use: the same numbers each time."""
    torch.manual_seed(0)
    return {
        "torch": torch,
        "F": F,
        "gpt": randomised(Transformer(block_size=16, vocab_size=40)).eval(),
        "vq_model": randomised(VQModel()).eval(),
        "lpips": randomised(LPIPS()).eval(),
        "tokens": torch.randint(40, (2, 16)),
        "classes": torch.tensor([1, 4]),
        "images": torch.rand(2, 3, 8, 8) * 2 - 1,
        "step": STEP,
        "group_size": 3,
        "rollouts": torch.randint(40, (2, 3, 16)),
        **more,
    }


def run(title: str, snippet: int, namespace: Names) -> Names:
    exec(compile(RECIPES[title][snippet], f"{PAGE.name}: {title}", "exec"), namespace)
    return namespace


def both(title: str, **more: Any) -> tuple[Names, Names]:
    """The names after the snippet before, and after the one after."""
    return run(title, 0, names(**more)), run(title, 1, names(**more))


def assert_close(before: Names, after: Names, *keys: str) -> None:
    for key in keys:
        torch.testing.assert_close(after[key], before[key], rtol=1e-4, atol=1e-5)


def assert_gradients_close(before: Names, after: Names, result: str, *sources: str) -> None:
    for name in sources:
        old, new = (torch.autograd.grad(n[result].sum(), n[name], retain_graph=True)[0] for n in (before, after))
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)


def test_every_recipe_has_two_snippets_and_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(RECIPES) == 8
    for title, snippets in RECIPES.items():
        assert len(snippets) == 2, title
        assert f'"{title}"' in source, title


def test_one_line_for_a_model() -> None:
    before, after = both("One line for a model", tokens=torch.arange(16).repeat(2, 1))
    assert "10 modules replaced, 0 left alone" in after["report"]
    assert_close(before, after, "logits", "loss", "quant", "indices", "distance")


def test_our_models_on_the_same_parameters() -> None:
    before, after = both("Our models on the same parameters")
    assert_close(before, after, "logits")
    assert after["policy"].output.weight is after["gpt"].output.weight


@pytest.mark.parametrize("snippet", [0, 1])
def test_sampling(snippet: int) -> None:
    """Both draw with the frequencies, and give the log-probs, that the logits say."""
    torch.manual_seed(1)
    logits, count = torch.randn(2, 3, 5), 2000
    given = names(logits=logits, group_size=count, temperature=0.7)
    drawn = run("Sampling G sequences from teacher-forced logits", snippet, given)
    probabilities = (logits / 0.7).softmax(-1)
    of_all = probabilities.log()[:, None].expand(-1, count, -1, -1)
    torch.testing.assert_close(drawn["logprobs"], of_all.gather(-1, drawn["rollouts"][..., None])[..., 0])
    frequencies = F.one_hot(drawn["rollouts"], 5).float().mean(1)
    assert ((frequencies - probabilities).abs() < 5 * (probabilities / count).sqrt()).all()


def test_policy_loss() -> None:
    torch.manual_seed(1)
    given = {
        "hidden": torch.randn(2, 16, 8, requires_grad=True),
        "weight": torch.randn(40, 8, requires_grad=True),
        "rewards": torch.randn(6),
        "old_logprobs": torch.randn(2, 3, 16) * 0.2 - 4,
    }
    before, after = both("GRPO loss and cross-entropy", **given)
    assert_close(before, after, "advantages", "loss")
    assert_gradients_close(before, after, "loss", "hidden", "weight")


def test_noisy_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain snippet is given the corruption that ours draws."""
    title, noise_prob = "Cross-entropy with a noisy prefix", 0.4
    before, after = names(noise_prob=noise_prob), names(noise_prob=noise_prob)
    clean = before["tokens"][:, :-1]
    prefix = ops.noisy_prefix(before["tokens"], noise_prob, 40, seed=STEP)
    assert 0 < (prefix != clean).float().mean() < 2 * noise_prob
    with monkeypatch.context() as draws:
        draws.setattr(torch, "rand", lambda shape, device: (prefix == clean).float())
        draws.setattr(torch, "randint_like", lambda like, high: prefix)
        run(title, 0, before)
    run(title, 1, after)
    assert_close(before, after, "loss")
    for namespace in (before, after):
        namespace["weight"] = namespace["gpt"].layers[0].attention.wqkv.weight
    assert_gradients_close(before, after, "loss", "weight")


def test_decoding_and_reward() -> None:
    before, after = both("Decoding and reward", code_width=8, rollouts=torch.arange(96).view(2, 3, 16) % 40)
    assert_close(before, after, "rewards")
    assert before["rewards"].std() > 0.01


def test_straight_through_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.gumbel_softmax` is given the noise that ours draws: g = −log e for an exponential e."""
    torch.manual_seed(1)
    title = "Straight-through codebook lookup"
    given = {"logits": torch.randn(2, 16, 40, requires_grad=True), "tau": 0.8}
    noise = gumbel_noise(given["logits"].shape, STEP, None, torch.float32, torch.device("cpu"))

    def exponential(x: Tensor) -> Tensor:
        return x.copy_((-noise).exp())

    before, after = names(**given), run(title, 1, names(**given))
    monkeypatch.setattr(Tensor, "exponential_", exponential)
    run(title, 0, before)
    assert_close(before, after, "z_q")
    for namespace in (before, after):
        namespace["projected"] = namespace["z_q"] @ torch.arange(8.0)
    assert_gradients_close(before, after, "projected", "logits")


def test_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("autoregressive", "autoregressive.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "autoregressive.models.generate", public_models)
    before, after = both("Generation")
    assert torch.equal(before["samples"], after["samples"])
    assert before["samples"].dtype == after["samples"].dtype
