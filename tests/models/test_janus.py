"""Janus-Pro against `transformers`' model of it: logits, gradients, tokens, pixels."""

from __future__ import annotations

from pathlib import Path

import golden
import janus_models
import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_l2
from janus_models import NAME, SMALL, SMALL_VQ
from torch import Tensor
from transformers import JanusForConditionalGeneration

from vapi_fast import ops
from vapi_fast.alignment.rollout import token_logprobs
from vapi_fast.data.text import padded
from vapi_fast.generation import generate, sample_groups
from vapi_fast.models import Condition, Janus, VQTokenizer
from vapi_fast.models.janus_files import ORIGINAL, halved, paired, to_file
from vapi_fast.models.lora import train_only
from vapi_fast.models.sizes import JANUS_CONFIGS, VQ_CONFIGS

LENGTHS = (12, 5, 9)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JANUS_CONFIGS, NAME, SMALL)
    monkeypatch.setitem(VQ_CONFIGS, "small-vq", SMALL_VQ)


@pytest.fixture(scope="module")
def public() -> JanusForConditionalGeneration:
    return janus_models.public_model()


@pytest.fixture
def model(public: JanusForConditionalGeneration, tmp_path: Path) -> Janus:
    return Janus.from_checkpoint(janus_models.write(tmp_path, "bin", public), NAME)


def public_logits(public: JanusForConditionalGeneration, context: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Logits `[B,S+1,V]` as the public sampling loop computes them: positions are indices of the padded row."""
    embedded = public.get_input_embeddings()(rows)
    images = public.prepare_embeddings_for_image_generation(context)
    seen = None if mask is None else torch.cat([mask, mask.new_ones(context.shape)], dim=1).long()
    states = public.model.language_model(inputs_embeds=torch.cat([embedded, images], dim=1), attention_mask=seen)
    return public.model.generation_head(states.last_hidden_state[:, rows.shape[1] - 1 :])


@pytest.mark.parametrize("masked", [True, False])
def test_values_and_gradients_are_those_of_the_public_model(
    public: JanusForConditionalGeneration, model: Janus, masked: bool
) -> None:
    public, model = public.double(), model.double()
    rows, mask = janus_models.prompts(*(LENGTHS if masked else (12, 12, 12)))
    mask = mask if masked else None
    context, rollouts = torch.randint(50, (3, 8)), torch.randint(50, (3, 4, 9))
    expected = public_logits(public, context, rows, mask)
    hidden = model.hidden(context, Condition(rows, mask))
    assert relative_l2(model.head.logits(hidden).detach(), expected.detach()) < 1e-5  # the rotary tables are float32

    targets, advantages = torch.randint(50, (3, 9)), torch.randn(3, 4, dtype=torch.float64)
    operands = model.head.operands(hidden)
    loss = ops.policy_loss(**operands, tokens=rollouts, advantages=advantages, targets=targets, prior_weight=0.3).loss
    loss.backward()
    logprobs = expected.log_softmax(-1).gather(-1, rollouts.transpose(1, 2)).transpose(1, 2)
    assert relative_l2(token_logprobs(hidden, model.head, rollouts, 1.0).detach(), logprobs.detach()) < 1e-5
    plain = -(advantages[:, :, None] * (logprobs - logprobs.detach()).exp()).mean()
    public.zero_grad()
    (plain + 0.3 * F.cross_entropy(expected.flatten(0, 1), targets.flatten())).backward()
    exact = janus_models.original({name: p.grad for name, p in public.named_parameters() if p.grad is not None})
    found = to_file({name: p.grad for name, p in model.named_parameters()}, ORIGINAL, SMALL)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert exact[name].abs().max() > 0, name
        assert relative_l2(gradient, exact[name]) < 1e-4, name


def test_the_image_side_alone_has_the_gradients_that_it_has_in_the_whole(model: Janus) -> None:
    """`--train image`: of the image head and, through all blocks, of the image aligner."""
    rows, mask = janus_models.prompts(*LENGTHS)
    context, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 9))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        operands = model.head.operands(model.hidden(context, Condition(rows, mask)))
        ops.linear_cross_entropy(**operands, targets=targets).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients()
    train_only(model, "image", rank=1)
    found = gradients()
    model.requires_grad_(True)
    assert {name.partition(".")[0] for name in found} == {"gen_head", "gen_aligner"}
    assert len(found) == 8
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, whole[name])


def test_a_prompt_gives_in_a_batch_what_it_gives_alone(model: Janus) -> None:
    rows, mask = janus_models.prompts(*LENGTHS)
    context = torch.randint(50, (3, 8))
    together = model(context, rows, condition_mask=mask)
    for row, length in enumerate(LENGTHS):
        alone = model(context[row : row + 1], rows[row : row + 1, -length:], condition_mask=None)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        model.fit_prefix(length)
        fitted = model(context[row : row + 1], rows[row : row + 1, -length:])
        torch.testing.assert_close(fitted, alone, rtol=1e-5, atol=1e-5)
        model.fit_prefix(SMALL.prompt_tokens)


def public_tokens(public: JanusForConditionalGeneration, row: Tensor, scale: float) -> Tensor:
    """The public loop for one prompt without padding, a token at a time from the whole sequence, greedily."""
    none = row.clone()
    none[1:-1] = SMALL.pad
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(9):
        logits, without = (public_logits(public, tokens, each[None], None)[:, -1] for each in (row, none))
        tokens = torch.cat([tokens, (without + scale * (logits - without)).argmax(-1, keepdim=True)], dim=1)
    return tokens[0]


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_greedy_tokens_and_pixels_are_those_of_the_public_loop(
    public: JanusForConditionalGeneration, model: Janus, tmp_path: Path, scale: float
) -> None:
    public.float()
    rows, mask = janus_models.prompts(*LENGTHS)
    drawn = generate(model, rows, condition_mask=mask, cfg_scale=scale, top_k=1)
    expected = [public_tokens(public, row[-length:], scale) for row, length in zip(rows, LENGTHS, strict=True)]
    assert torch.equal(drawn, torch.stack(expected))
    pixels = public.decode_image_tokens(drawn).permute(0, 3, 1, 2)
    for layout in ("bin", "transformers"):
        folder = janus_models.write(tmp_path / layout, layout, public)
        tokenizer = VQTokenizer.from_checkpoint(folder, "small-vq")
        torch.testing.assert_close(tokenizer.decode(drawn), pixels, rtol=1e-4, atol=1e-4)
        images = torch.rand(2, 3, 6, 6) * 2 - 1
        latents = public.model.vqmodel.encode(images).last_hidden_state  # its codes are compared unnormalised
        torch.testing.assert_close(tokenizer.encoder(images), latents, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guided_draws_follow_the_public_models_distribution(
    public: JanusForConditionalGeneration, model: Janus
) -> None:
    """Log-probs of drawn tokens, whatever the draw: of uncond + 5 · (cond − uncond)."""
    public.float()
    rows, mask = janus_models.prompts(*LENGTHS)
    drawn = sample_groups(model, rows, group_size=4, condition_mask=mask, cfg_scale=5.0, seed=2)
    none = model.unconditional(rows)
    assert none[1].tolist() == [2, 2, 2, 2, 2, 2, 2, 0, 2, 2, 2, 3]
    for row, tokens in enumerate(drawn.tokens):
        logits, without = (
            public_logits(public, tokens[:, :-1], each[row].repeat(4, 1), mask[row].repeat(4, 1))
            for each in (rows, none)
        )
        logprobs = (without + 5.0 * (logits - without)).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(drawn.logprobs[row], logprobs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_logits_and_tokens_are_those_of_janus_own_code(tmp_path: Path) -> None:
    """DeepSeek's modules and its sampling loop, greedy at CFG 5; here three prompts of several lengths in one batch."""
    public = golden.read("janus")
    torch.save(golden.read_weights("janus"), tmp_path / "pytorch_model.bin")
    model = Janus.from_checkpoint(tmp_path, NAME)
    rows, mask = padded([public[f"prompts.{n}"] for n in range(3)], SMALL.prompt_tokens)
    tokens = torch.stack([public[f"tokens.{n}"] for n in range(3)])
    assert torch.equal(generate(model, rows, condition_mask=mask, cfg_scale=5.0, top_k=1), tokens)
    for half, condition in enumerate((rows, model.unconditional(rows))):
        expected = torch.stack([public[f"logits.{n}"][half] for n in range(3)])
        found = model(tokens[:, :-1], condition, condition_mask=mask)
        assert golden.relative_error(found, expected) < 1e-5


def test_pairs_and_halves_are_each_others_inverse() -> None:
    """Rotating pairs of the permuted rows is rotating halves of the files' rows."""
    weight, x = torch.randn(32, 7), torch.randn(5, 7)
    assert torch.equal(halved(paired(weight, 2), 2), weight)
    assert paired(torch.arange(16)[:, None], 2).flatten().tolist() == [
        0,
        4,
        1,
        5,
        2,
        6,
        3,
        7,
        8,
        12,
        9,
        13,
        10,
        14,
        11,
        15,
    ]
    angles = torch.rand(5, 8)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    turned = ops.rotary_2d((x @ paired(weight, 2).T).view(1, 5, 2, 16), table)[0]
    first, second = (x @ weight.T).view(5, 2, 2, 8).unbind(2)
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    halves = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=2)
    torch.testing.assert_close(turned, halves.transpose(2, 3).flatten(2))


def test_conditions_that_no_prompt_can_be_are_refused(model: Janus) -> None:
    rows, mask = janus_models.prompts(*LENGTHS)
    short = model.checked_condition(rows[:, 3:], mask[:, 3:])
    assert torch.equal(short.rows, rows.where(torch.arange(12) >= 3, 0))
    assert not short.mask[:, :3].any()
    assert torch.equal(short.mask[:, 3:], mask[:, 3:])
    for wrong, its_mask, said in (
        (rows[:, 1:], None, r"prompts must be int64 \[B, 12\]"),
        (rows.int(), mask, "int64"),
        (rows + SMALL.text_vocab, mask, "must lie in 0…39"),
        (rows, mask.long(), "condition_mask must be bool"),
    ):
        with pytest.raises(ValueError, match=said):
            model.checked_condition(wrong, its_mask)
    with pytest.raises(TypeError, match="must be tensors"):
        model.checked_condition([1], None)
