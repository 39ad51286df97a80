"""Cached generation against a cache-free forward and LlamaGen's own way, with the same draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fused import DEVICE
from torch import Tensor

from vapi_fast import generate, ops
from vapi_fast.generation.engine import Engine, slot_bytes
from vapi_fast.generation.sequences import Generation, bytes_of_sequence, guidance_scales, sample_groups
from vapi_fast.models import LLAMAGEN_CONFIGS, Condition, LlamaGen
from vapi_fast.reference.filters import filter_logits
from vapi_fast.reference.generation import generate as reference_generate
from vapi_fast.tiny import FILES

SAMPLING = {"seed": 5, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
CAPTION_MASKS = {  # left padding, as LlamaGen's scripts make it, none, and right padding
    "left": [[False, False, True, True, True, True], [True] * 6],
    "right": [[True, True, True, False, False, False], [True, False, False, False, False, False]],
}


def make_model(caption_tokens: int = 0, **changes: int) -> LlamaGen:
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "width": 64, "vocab_size": 97, "grid_size": 4} | changes
    model = LlamaGen.from_name("tiny", caption_tokens=caption_tokens, caption_width=24, **sizes)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # far from uniform predictions
    return model.eval().to(DEVICE)


def captions(count: int = 2) -> Tensor:
    return torch.randn(count, 6, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def classes(*labels: int) -> Tensor:
    return torch.tensor(labels, device=DEVICE)


@torch.no_grad()
def without_cache(
    model: LlamaGen,
    condition: Tensor,
    *,
    group_size: int = 1,
    scales: list[float] | None = None,
    condition_mask: Tensor | None = None,
    sample_ids: Tensor | None = None,
    **sampling: Any,
) -> Generation:
    """The whole sequence through the model for every token, conditional and unconditional separately."""
    batch, length = len(condition), model.config.grid_size**2
    condition = condition.repeat_interleave(group_size, 0)
    mask = None if condition_mask is None else condition_mask.repeat_interleave(group_size, 0)
    ids = torch.arange(batch, device=DEVICE) if sample_ids is None else sample_ids
    places = {
        "sample_ids": ids.repeat_interleave(group_size),
        "first_rollouts": torch.arange(group_size, device=DEVICE).repeat(batch),
    }
    tokens = torch.empty(len(condition), 0, dtype=torch.int64, device=DEVICE)
    results = []
    for position, scale in enumerate(scales or [1.0] * length):
        logits = model(tokens, condition, condition_mask=mask)[:, -1]
        if scale != 1:
            empty = model(tokens, model.unconditional(condition), condition_mask=mask)[:, -1]
            logits = empty + scale * (logits - empty)
        drawn, logprobs = ops.group_sample(logits[:, None], 1, first_position=position, **places, **sampling)
        kept = filter_logits(logits / sampling["temperature"], sampling["top_k"], sampling["top_p"])
        entropies = torch.distributions.Categorical(logits=kept).entropy()
        tokens = torch.cat([tokens, drawn[:, 0]], dim=1)
        results.append(torch.stack([logprobs[:, 0, 0], entropies]))
    logprobs, entropies = torch.stack(results, -1)
    return Generation(*(x.unflatten(0, (batch, group_size)) for x in (tokens, logprobs, entropies)))


def assert_same(drawn: Generation, expected: Generation) -> None:
    assert torch.equal(drawn.tokens, expected.tokens)
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn.entropies, expected.entropies, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cfg", [{}, {"cfg_scale": 2.5}, {"cfg_scale": 3.0, "cfg_interval": 4}])
@pytest.mark.parametrize(("batch", "group_size"), [(1, 1), (3, 1), (1, 16), (5, 3)])
def test_class_condition_equals_cache_free(batch: int, group_size: int, cfg: dict[str, Any]) -> None:
    model, labels = make_model(), torch.arange(batch, device=DEVICE) * 2 % 9
    scales = guidance_scales(16, cfg.get("cfg_scale", 1.0), cfg.get("cfg_interval", -1))
    expected = without_cache(model, labels, group_size=group_size, scales=scales, **SAMPLING)
    drawn = sample_groups(model, labels, group_size=group_size, return_entropies=True, **cfg, **SAMPLING)
    assert_same(drawn, expected)
    assert drawn.tokens.shape == (batch, group_size, 16)
    assert drawn.tokens.unique().numel() > 5
    tokens = generate(model, labels, group_size=group_size, **cfg, **SAMPLING)
    assert torch.equal(tokens, drawn.tokens[:, 0] if group_size == 1 else drawn.tokens)


@pytest.mark.parametrize("name", ["b", "l", "xl", "xxl", "xxxl", "3b"])
def test_every_family_equals_cache_free(name: str) -> None:
    with torch.device("meta"):
        model = LlamaGen.from_name(name, layers=2, vocab_size=60, num_classes=3, grid_size=2)
    model.to_empty(device=DEVICE)
    noise = torch.randn(100_003, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for parameter in model.parameters():
        whole = noise.repeat(parameter.numel() // len(noise) + 1)[: parameter.numel()].view_as(parameter)
        parameter.data.copy_(1 + whole / 10 if parameter.ndim == 1 else whole / parameter.shape[1] ** 0.5)
    model.rotary = ops.rotary_2d_table(2, model.config.width // model.config.heads, 1).to(DEVICE)
    scales = guidance_scales(4, 2.0)
    expected = without_cache(model.eval(), classes(0, 2), group_size=2, scales=scales, **SAMPLING)
    drawn = sample_groups(model, classes(0, 2), group_size=2, cfg_scale=2.0, return_entropies=True, **SAMPLING)
    assert_same(drawn, expected)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("cfg", [{}, {"cfg_scale": 2.5}, {"cfg_scale": 2.5, "cfg_interval": 3}])
def test_caption_condition_equals_cache_free(cfg: dict[str, Any], padding: str | None) -> None:
    model = make_model(caption_tokens=6)
    mask = None if padding is None else torch.tensor(CAPTION_MASKS[padding], device=DEVICE)
    scales = guidance_scales(16, cfg.get("cfg_scale", 1.0), cfg.get("cfg_interval", -1))
    options = {"group_size": 3, "condition_mask": mask} | SAMPLING
    drawn = sample_groups(model, captions(), return_entropies=True, **cfg, **options)
    assert_same(drawn, without_cache(model, captions(), scales=scales, **options))
    if mask is not None:
        unmasked = generate(model, captions(), group_size=3, **cfg, **SAMPLING)
        assert not torch.equal(unmasked[0], drawn.tokens[0])


RISES = {"rar": [t / 16 for t in range(16)], "power-cosine": [1.0] + [t / 15 for t in range(15)]}


@pytest.mark.parametrize("schedule", RISES)
@pytest.mark.parametrize("caption_tokens", [0, 6])
def test_rising_schedules_equal_cache_free(caption_tokens: int, schedule: str) -> None:
    model = make_model(caption_tokens)
    condition = captions() if caption_tokens else classes(3, 8)
    scales = [1 + 4.0 * (1 - math.cos(math.pi * share**1.5)) / 2 for share in RISES[schedule]]
    cfg = {"cfg_scale": 5.0, "cfg_schedule": schedule, "cfg_power": 1.5}
    drawn = sample_groups(model, condition, group_size=2, return_entropies=True, **cfg, **SAMPLING)
    assert_same(drawn, without_cache(model, condition, group_size=2, scales=scales, **SAMPLING))


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"cfg_scale": 2.0},
        {"cfg_scale": 2.0, "cfg_interval": 5},
        {"cfg_scale": 4.0, "cfg_schedule": "power-cosine", "cfg_power": 0.8},
        {"cfg_scale": 4.0, "cfg_schedule": "rar", "cfg_power": 0.8, "cfg_interval": 9},
    ],
)
@pytest.mark.parametrize("caption_tokens", [0, 6])
def test_equals_reference_generation(caption_tokens: int, cfg: dict[str, Any]) -> None:
    model = make_model(caption_tokens)
    condition = captions() if caption_tokens else classes(4, 1)
    mask = torch.tensor(CAPTION_MASKS["left"], device=DEVICE) if caption_tokens else None

    def draw(logits: Tensor, t: int) -> Tensor:
        return ops.group_sample(logits[:, None], 1, first_position=t, **SAMPLING)[0][:, 0, 0]

    expected = reference_generate(model, condition, condition_mask=mask, draw=draw, **cfg)
    assert torch.equal(generate(model, condition, condition_mask=mask, **cfg, **SAMPLING), expected)


def test_reference_generation_draws_from_the_filtered_softmax() -> None:
    model = make_model()
    greedy = reference_generate(model, classes(4, 1), top_k=1)
    assert torch.equal(greedy, generate(model, classes(4, 1), top_k=1))
    torch.manual_seed(3)
    first = reference_generate(model, classes(4).repeat(4000), top_k=3)[:, 0]
    logits = filter_logits(model(None, classes(4))[0, 0], 3, 1.0)
    frequencies = torch.bincount(first, minlength=97).double() / 4000
    torch.testing.assert_close(frequencies, logits.double().softmax(-1), rtol=0, atol=0.04)


def test_a_rollout_depends_on_seed_sample_id_and_its_index_alone() -> None:
    model, labels, ids = make_model(), classes(1, 4, 4, 2), classes(10, 11, 12, 13)
    together = generate(model, labels, sample_ids=ids, seed=3, group_size=4)
    assert torch.equal(generate(model, labels[2:3], sample_ids=ids[2:3], seed=3, group_size=4), together[2:3])
    assert torch.equal(generate(model, labels, sample_ids=ids, seed=3, group_size=16)[:, :4], together)
    assert torch.equal(generate(model, labels, sample_ids=ids, seed=torch.tensor(3)), together[:, 0])
    assert len({tuple(row) for row in together.flatten(0, 1).tolist()}) == 16  # same class twice, but other ids
    assert not torch.equal(generate(model, labels, sample_ids=ids, seed=4, group_size=4), together)


@pytest.mark.parametrize("caption_tokens", [0, 6])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 7, 12, 100])
def test_splits_into_batches_change_nothing(batch_size: int, caption_tokens: int) -> None:
    model = make_model(caption_tokens)
    condition = captions(5) if caption_tokens else classes(0, 2, 4, 6, 8)
    options = {"group_size": 3, "cfg_scale": 1.5, "return_entropies": True} | SAMPLING
    assert_same(
        sample_groups(model, condition, batch_size=batch_size, **options),
        sample_groups(model, condition, batch_size=15, **options),
    )


class Replay:
    """What a CUDA graph does, one operation at a time."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run

    def replay(self, inputs: tuple[Tensor]) -> Tensor:
        return self.run(*inputs).clone()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has real graphs")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("caption_tokens", [0, 6])
def test_steps_that_a_graph_replays_draw_the_same(caption_tokens: int, backend: str) -> None:
    """With position and seed as data; two draws with one engine, whose first step is one for warming up."""
    model, labels = make_model(caption_tokens, layers=1, grid_size=2), torch.tensor([4, 1])
    condition = captions() if caption_tokens else labels
    filters = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    scales = guidance_scales(4, 2.0, 1, "power-cosine", 0.5)  # 2, 1, 1.62, 1
    options = {"scales": scales, "masked": False, "entropies": True} | filters
    engine = Engine(model, groups=2, rollouts=2, **options)
    engine.graphs = {guided: Replay(partial(engine.step, guided=guided)) for guided in (True, False)}
    draw = {"sample_ids": labels, "first_rollout": 3}
    with ops.use_backend(backend):
        engine.step(engine.positions[-1], True)
        drawn = [engine.draw(Condition(condition), seed=seed, **draw) for seed in (torch.tensor(5), 6)]
    for seed, found in zip((5, 6), drawn, strict=True):
        expected = without_cache(
            model, condition, group_size=5, scales=options["scales"], sample_ids=labels, seed=seed, **filters
        )
        assert_same(found, Generation(*(x[:, 3:] for x in expected)))


def test_one_token_and_one_rollout() -> None:
    model = make_model(grid_size=1)
    drawn = sample_groups(model, classes(3), group_size=1, return_entropies=True, cfg_scale=2.0, **SAMPLING)
    assert_same(drawn, without_cache(model, classes(3), scales=[2.0], **SAMPLING))


def test_unconditional_half_is_left_out_where_the_scale_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    block = Engine.block
    monkeypatch.setattr(Engine, "block", lambda self, h, *rest: rows.append(len(h)) or block(self, h, *rest))
    generate(make_model(), classes(1, 2, 3), cfg_scale=2.0, cfg_interval=4)
    if DEVICE.type == "cpu":  # token 0 comes from the prefill; a graph's blocks run when it is captured
        assert rows == [6] * 2 * 5 + [3] * 2 * 10
    assert set(rows) == {3, 6}
    rows.clear()
    generate(make_model(), classes(1, 2, 3))
    assert set(rows) == {3}


def test_guidance_scales() -> None:
    assert guidance_scales(3, 1.0) == [1.0] * 3
    assert guidance_scales(5, 2.0, interval=1) == [2.0, 2.0, 2.0, 1.0, 1.0]  # LlamaGen counts from the second token
    scales = guidance_scales(4, 3.0, schedule="rar", power=2.0)
    assert scales == pytest.approx([1 + (1 - math.cos(math.pi * share**2)) for share in (0, 0.25, 0.5, 0.75)])
    assert guidance_scales(4, 3.0, schedule="rar", interval=1)[2:] == pytest.approx([2.0, 1.0])
    scales = guidance_scales(5, 3.0, schedule="power-cosine")  # VA-π's evaluation: s, then over (t − 1) / (T − 1)
    assert scales == pytest.approx([3.0, 1.0, 2 - 0.5**0.5, 2.0, 2 + 0.5**0.5])
    assert guidance_scales(5, 3.0, schedule="power-cosine", interval=2)[3:] == pytest.approx([2.0, 1.0])
    assert guidance_scales(1, 3.0, schedule="power-cosine") == [3.0]
    assert guidance_scales(3, [1, 2.5, 1]) == [1.0, 2.5, 1.0]
    with pytest.raises(ValueError, match="cfg_scale must be a number, or 3 of them, one for each token"):
        guidance_scales(3, [1.0, 2.0])
    with pytest.raises(ValueError, match="cfg_interval and cfg_schedule make one number into a schedule"):
        guidance_scales(3, [1.0, 2.0, 1.0], interval=1)


def test_guidance_given_token_by_token() -> None:
    by_name = generate(make_model(), classes(1, 2), cfg_scale=3.0, cfg_schedule="power-cosine", seed=3)
    scales = guidance_scales(16, 3.0, schedule="power-cosine")
    assert torch.equal(generate(make_model(), classes(1, 2), cfg_scale=scales, seed=3), by_name)


def test_logprobs_are_those_of_a_teacher_forced_forward() -> None:
    model = LlamaGen.from_checkpoint(FILES.generator, "tiny").eval().to(DEVICE)
    drawn = sample_groups(model, classes(3, 7), group_size=2, seed=1)
    with torch.no_grad():
        logits = model(drawn.tokens.flatten(0, 1)[:, :-1], classes(3, 3, 7, 7))
    expected = logits.log_softmax(-1).gather(-1, drawn.tokens.flatten(0, 1)[..., None])[..., 0]
    torch.testing.assert_close(drawn.logprobs.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    assert drawn.entropies is None


@pytest.mark.parametrize("caption_tokens", [0, 6])
def test_fused_kernels_draw_the_same(caption_tokens: int) -> None:
    """Interpreted on a CPU; with captions, groups, guidance, and caches of 8 bits as well."""
    model = make_model(caption_tokens, layers=1, grid_size=2)
    condition = captions() if caption_tokens else classes(4, 1)
    mask = torch.tensor(CAPTION_MASKS["left"], device=DEVICE) if caption_tokens else None
    options = {"group_size": 2, "condition_mask": mask, "cfg_scale": 2.0, "cfg_interval": 0} | SAMPLING
    drawn = {}
    for name in ("reference", "triton"):
        with ops.use_backend(name):
            drawn[name] = [sample_groups(model, condition, **options, kv_dtype=kind) for kind in (None, "int8", "fp8")]
    for exact, *rounded in (drawn["reference"], drawn["triton"]):
        for each in rounded:
            assert not torch.equal(exact.logprobs, each.logprobs)
    for plain, fused in list(zip(*drawn.values(), strict=True))[:2]:  # the interpreter rounds fp8 in a way of its own
        assert torch.equal(plain.tokens, fused.tokens)
        torch.testing.assert_close(plain.logprobs, fused.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "equal", "apart"), [("int8", (0.88, 0.99), (0.003, 0.012)), ("fp8", (0.65, 0.9), (0.01, 0.05))]
)
def test_cache_of_8_bits_agrees_with_the_exact_one(
    kind: str, equal: tuple[float, float], apart: tuple[float, float]
) -> None:
    """On the trained tiny model, along the sequences drawn; `sample_groups` says what was measured."""
    model = LlamaGen.from_checkpoint(FILES.generator, "tiny").eval().to(DEVICE)
    labels = torch.arange(36, device=DEVICE) % 9
    drawn = sample_groups(model, labels, group_size=1, seed=2, kv_dtype=kind)
    with torch.no_grad():
        hidden = model(drawn.tokens[:, 0, :-1], labels, return_hidden=True)
    tokens, logprobs = ops.linear_group_sample(hidden, model.output.weight, 1, seed=2)
    same = tokens == drawn.tokens
    assert equal[0] < same.double().mean() < equal[1]
    assert apart[0] < (logprobs - drawn.logprobs)[same].abs().mean() < apart[1]


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn, torch.int8])
def test_cache_is_of_the_dtype_asked_for(dtype: torch.dtype | None) -> None:
    options = {"groups": 2, "rollouts": 3, "scales": [1.0] * 16, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model = make_model()
    engine = Engine(model, **options, masked=False, cache_dtype=dtype)
    found = [[each if each is None else (each.dtype, *each.shape) for each in cache] for cache in engine.caches]
    cache, scale = (dtype or torch.float32, 6, 2, 16, 32), (torch.float32, 6, 2, 16) if dtype is torch.int8 else None
    assert found == [[cache, cache, scale, scale]] * 2
    held = sum(x.nbytes for layer in engine.caches for x in layer if x is not None)
    assert held == 6 * 16 * slot_bytes(model.config, dtype or torch.float32)


def test_values_beyond_fp8_are_clamped() -> None:
    model = make_model()
    for layer in model.layers:
        layer.attention.wqkv.weight.data *= 1e3
    drawn = sample_groups(model, classes(1, 2), group_size=2, kv_dtype="fp8")
    assert drawn.logprobs.isfinite().all()


def test_bytes_of_a_sequence() -> None:
    config, bf16, fp8, int8 = LLAMAGEN_CONFIGS["xxl"], torch.bfloat16, torch.float8_e4m3fn, torch.int8
    cache = 576 * 2 * 48 * 1536 * 2
    assert cache < bytes_of_sequence(config, bf16, bf16, guided=False) < 1.01 * cache
    assert 2 * cache < bytes_of_sequence(config, bf16, bf16, guided=True) < 2.02 * cache
    assert cache / 2 < bytes_of_sequence(config, bf16, fp8, guided=False) < 0.51 * cache
    assert cache * 17 / 32 < bytes_of_sequence(config, bf16, int8, guided=False) < 0.54 * cache


def test_computes_in_the_dtype_of_autocast() -> None:
    model = LlamaGen.from_checkpoint(FILES.generator, "tiny").eval().to(DEVICE)
    labels = torch.arange(18, device=DEVICE) % 9
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        drawn = sample_groups(model, labels, group_size=1, seed=2)
        hidden = model(drawn.tokens[:, 0, :-1], labels, return_hidden=True)
    tokens, logprobs = ops.linear_group_sample(hidden, model.output.weight, 1, seed=2)
    same = tokens == drawn.tokens
    assert same.double().mean() > 0.8  # measured 90 %: a boundary of the CDF moves a little
    torch.testing.assert_close(logprobs[same], drawn.logprobs[same], rtol=0, atol=0.2)
    exact = sample_groups(model, labels, group_size=1, seed=2)
    assert not torch.equal(exact.logprobs, drawn.logprobs)


def test_training_mode_is_restored() -> None:
    model = make_model()
    expected = generate(model, classes(3), seed=1)
    model.train()
    assert torch.equal(generate(model, classes(3), seed=1), expected)
    assert model.training
    assert not expected.requires_grad


def test_no_conditions() -> None:
    drawn = sample_groups(make_model(), classes().long(), group_size=3, return_entropies=True)
    assert [x.shape for x in drawn] == [(0, 3, 16)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": torch.tensor([10])}, "class ids must lie in 0…8, got"),
        ({"condition": torch.tensor([-1])}, "class ids must lie in 0…8"),
        ({"condition": torch.tensor([1.0])}, r"class ids must be an int64 tensor \[B\], got torch.float32 \[1\]"),
        ({"condition": torch.tensor([[1]])}, r"class ids must be an int64 tensor \[B\]"),
        ({"condition_mask": torch.ones(1, 1, dtype=torch.bool)}, "condition_mask is for text-conditioned models"),
        ({"sample_ids": torch.tensor([1, 2])}, r"sample_ids must be int64 \[1\], got torch.int64 \[2\]"),
        ({"cfg_scale": 0.5}, "cfg_scale must be at least 1"),
        ({"cfg_scale": math.nan}, "cfg_scale must be at least 1"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule must be one of constant, power-cosine, rar, got 'cosine'"),
        ({"cfg_power": 0.0}, "cfg_power must be positive"),
        ({"condition": [1, 2]}, "a condition and its mask must be tensors, got <class 'list'>"),
        ({"seed": 2**63}, r"generate: seed must be an int in \[-2.63, 2.63\) or a 0-d int64 tensor, got 922337"),
        ({"seed": 1.5}, "seed must be an int in .*, got float"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"group_size": 1.5}, "group_size must be at least 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"kv_dtype": "int4"}, "kv_dtype must be None, 'int8' or 'fp8', got 'int4'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must be in"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        generate(make_model(), **{"condition": torch.tensor([0])} | changes)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (
            torch.zeros(2, 6, 23),
            None,
            r"caption features must be floating \[B, 6, 24\] for this model, got .*\[2, 6, 23\]",
        ),
        (torch.zeros(2, 5, 24), None, r"caption features must be floating \[B, 6, 24\]"),
        (torch.tensor([1, 2]), None, r"caption features must be floating \[B, 6, 24\] .* got torch.int64 \[2\]"),
        (torch.zeros(2, 6, 24), torch.ones(2, 6), r"condition_mask must be bool \[2, 6\], got torch.float32"),
        (torch.zeros(2, 6, 24), torch.ones(2, 5, dtype=torch.bool), r"condition_mask must be bool \[2, 6\]"),
    ],
)
def test_bad_captions(features: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(caption_tokens=6), features, condition_mask=mask)
