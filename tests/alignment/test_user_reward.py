"""A user's reward: what it is at import, in a call and as a result; its errors are one line with their place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vapi_fast import AlignConfig, align
from vapi_fast.alignment.user_reward import reward_function, user_rewards
from vapi_fast.runtime.errors import ConfigError, RewardError

IMAGES, LABELS = torch.zeros(4, 3, 8, 8), torch.arange(4)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Writes a module that can be imported from the working directory, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        name = f"reward_{abs(hash((request.node.name, text)))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(0)\n", "SystemExit: 0 ("),
        ("def reward(images, labels)\n    return images\n", "SyntaxError: expected ':' ("),
        ("import no_such_thing_at_all\n", "No module named 'no_such_thing_at_all' ("),
        ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines ("),
        ("raise BaseException\n", "BaseException: no word ("),
        ("reward = 3\n", "not a function"),
        ("", "has no attribute 'reward'"),
    ],
)
def test_at_import(module: Any, text: str, message: str) -> None:
    name = f"{module(text)}:reward"
    with pytest.raises(ConfigError) as refused:
        AlignConfig(model="tiny", reward=name)
    said = str(refused.value)
    assert said.startswith(f"--reward {name}: ")
    assert message in said
    assert "\n" not in said
    assert refused.value.exit_code == 2
    if "(" in message:
        assert ".py, line " in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no\\nidea')", "ValueError: no idea ("),
        ("import sys; sys.exit(0)", "SystemExit: 0 ("),
        ("return images @ labels", "RuntimeError: "),
        (
            "return images.mean((1, 2, 3)).bool()",
            "must return a floating-point tensor [4], a reward an image; got bool [4]",
        ),
        ("return labels", "got int64 [4]"),
        ("return images.mean((1, 2, 3)).to(complex)", "got complex128 [4]"),
        ("return images.mean()", "got float32 []"),
        ("return 1.0", "got float"),
        ("return None", "got NoneType"),
        ("return images.mean((1, 2, 3)).to('meta')", "got float32 [4] on the meta device"),
        ("return images.mean((1, 2, 3)).to_sparse()", "got float32 that is not dense"),
        ("import torch; return torch.nested.nested_tensor(list(images))", "got float32 that is not dense"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()", "Odd: no word ("),
    ],
)
def test_in_a_call_and_as_a_result(module: Any, body: str, message: str) -> None:
    name = f"{module(f'def reward(images, labels):{chr(10)}    {body}{chr(10)}')}:reward"
    with pytest.raises(RewardError) as refused:
        user_rewards(name, IMAGES, LABELS)
    said = str(refused.value)
    assert message in said
    assert "\n" not in said
    assert refused.value.exit_code == 1
    if message.endswith("("):
        assert "line 2)" in said


def test_a_reward_of_another_precision_is_taken(module: Any) -> None:
    name = f"{module('def reward(images, labels):' + chr(10) + '    return labels.double() / 2' + chr(10))}:reward"
    assert callable(reward_function(name))
    rewards = user_rewards(name, IMAGES, LABELS)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.usefixtures("image_sets")
def test_a_module_that_switches_gradients_off(module: Any, tiny_config: Callable[..., AlignConfig]) -> None:
    lines = (
        "import torch",
        "torch.set_grad_enabled(False)",
        "def reward(images, labels):",
        "    return images.mean((1, 2, 3))",
    )
    try:
        config = tiny_config(steps=1, reward=f"{module(chr(10).join(lines))}:reward")
        assert not torch.is_grad_enabled()
        assert align(config)["curves"]["loss"]
    finally:
        torch.set_grad_enabled(True)
