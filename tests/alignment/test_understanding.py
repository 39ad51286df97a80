"""How far a generator's text is from what it was, against `transformers`' model of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import janus_models

from vapi_fast.alignment.understanding import TEXTS, text_check
from vapi_fast.models import Janus, LlamaGen
from vapi_fast.models.sizes import JANUS_CONFIGS
from vapi_fast.tiny import FILES


def tokenized(text: str) -> torch.Tensor:
    return torch.tensor([0, *(4 + ord(letter) % 36 for letter in text[:15])])


@pytest.mark.parametrize("layout", ["bin", "transformers"])
def test_the_divergence_is_that_of_the_public_models_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setitem(JANUS_CONFIGS, janus_models.NAME, janus_models.SMALL)
    public = janus_models.public_model()
    folder = janus_models.write(tmp_path, layout, public)
    model = Janus.from_checkpoint(folder, janus_models.NAME)
    check = text_check(model, folder, tokenized)
    assert check.tokens == 16 * len(TEXTS)
    assert check.divergence(model) == pytest.approx(0, abs=1e-6)
    divergences, before = [], [public(input_ids=tokenized(text)[None]).logits[0].log_softmax(-1) for text in TEXTS]
    with torch.no_grad():
        for parameter in (model.norm.weight, public.model.language_model.norm.weight):
            parameter[:8] *= 1.3
    for text, logprobs in zip(TEXTS, before, strict=True):
        now = public(input_ids=tokenized(text)[None]).logits[0].log_softmax(-1)
        divergences.append(F.kl_div(now, logprobs, reduction="none", log_target=True).sum(-1))
    assert check.divergence(model) == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)


def test_what_does_not_write_has_no_check() -> None:
    assert text_check(LlamaGen.from_checkpoint(FILES.generator, "tiny"), FILES.generator, tokenized) is None
