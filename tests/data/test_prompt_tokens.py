"""Prompts of captions, by a checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import janus_models
import pytest
import torch

from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.data.text import padded
from vapi_fast.runtime.errors import CheckpointError, DataError

IDS = {"bos": 0, "begin_image": 3}


def test_a_prompt_is_the_template_around_the_caption(tmp_path: Path) -> None:
    """BOS, `<|User|>`, `:`, the words, `<|Assistant|>`, `:`, `<begin_of_image>`; blanks around a caption are none."""
    janus_models.write_tokenizer(tmp_path)
    prompts = PromptTokens(tmp_path, 12, **IDS)
    assert prompts.ids(" a red cup\n").tolist() == [0, 4, 7, 8, 9, 11, 5, 7, 3]
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert torch.equal(PromptTokens(tmp_path / "pytorch_model.bin", 12, **IDS).ids("two"), prompts.ids("two"))
    with pytest.raises(DataError, match="a prompt has 14 tokens, and the model takes 12: shorten it"):
        prompts.ids("a red cup on a blue table two")
    with pytest.raises(DataError, match=r"'a red zebra': has a word that .*tokenizer\.json does not know"):
        prompts.ids("a red zebra")
    with pytest.raises(DataError, match="a prompt has no words"):
        prompts.ids(" \n")


def test_prompts_lie_behind_padding() -> None:
    rows, mask = padded([torch.tensor([0, 8, 3]), torch.tensor([0, 8, 9, 10, 3])], 5)
    assert rows.tolist() == [[0, 0, 0, 8, 3], [0, 8, 9, 10, 3]]
    assert mask.tolist() == [[False, False, True, True, True], [True] * 5]


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file, and a prompt needs it"):
        PromptTokens(tmp_path, 12, **IDS)
    janus_models.write_tokenizer(tmp_path, without="<begin_of_image>")
    with pytest.raises(CheckpointError, match="has no <begin_of_image>: pass Janus-Pro's own tokenizer"):
        PromptTokens(tmp_path, 12, **IDS)
    janus_models.write_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="<begin_of_image> is 3, and 7 in this model"):
        PromptTokens(tmp_path, 12, bos=0, begin_image=7)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        PromptTokens(tmp_path, 12, **IDS)
