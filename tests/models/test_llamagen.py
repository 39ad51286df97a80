from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
import torch.distributed as dist
from plain_transformer import plain_states
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vapi_fast import generate, ops
from vapi_fast.generation.sequences import KVCache
from vapi_fast.models import LLAMAGEN_CONFIGS, Dropout, LlamaGen, LlamaGenConfig
from vapi_fast.reference.dropout import dropout_mask
from vapi_fast.runtime.accelerators import causal_attention

TOLERANCE = 1e-5  # relative L2, float32
SMALL = LlamaGenConfig(layers=2, heads=4, width=64, grid_size=4)  # of the golden files; the rest is read from them
CFG_SCALE = 2.5
CONTAINERS = ("bare", "model", "module", "state_dict", "safetensors")


def class_weights() -> dict[str, Tensor]:
    return golden.read_weights("class_generator")


def caption_weights() -> dict[str, Tensor]:
    shared = {key: value for key, value in class_weights().items() if not key.startswith("cls_embedding.")}
    return shared | golden.read_weights("caption_generator")


def load(weights: dict[str, Tensor], folder: Path, container: str = "model") -> LlamaGen:
    """The golden model through a file on disk."""
    path = folder / ("generator.safetensors" if container == "safetensors" else "generator.pt")
    if container == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if container == "bare" else {container: weights, "steps": 100}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LLAMAGEN_CONFIGS, "small", SMALL)
        return LlamaGen.from_checkpoint(path, "small")


@pytest.fixture(scope="module")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> LlamaGen:
    return load(class_weights(), tmp_path_factory.mktemp("class")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def caption_model(tmp_path_factory: pytest.TempPathFactory) -> LlamaGen:
    return load(caption_weights(), tmp_path_factory.mktemp("caption")).eval().requires_grad_(False)


@pytest.fixture
def fresh_model() -> LlamaGen:
    """Random weights; safe to change."""
    torch.manual_seed(0)
    return LlamaGen(LlamaGenConfig(layers=2, heads=4, width=64, vocab_size=97, grid_size=4, num_classes=7))


# ---- equal to LlamaGen's public code


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_class_logits_equal_the_public_code(container: str, mode: str, tmp_path: Path) -> None:
    public = golden.read("class_generator")
    model = load(class_weights(), tmp_path, container).train(mode == "train")
    logits = model(public["tokens"][:, :-1], public["labels"])
    assert logits.dtype == torch.float32
    assert golden.relative_error(logits, public[f"{mode}_logits"]) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_caption_logits_equal_the_public_code(mode: str, masked: bool, caption_model: LlamaGen) -> None:
    public = golden.read("caption_generator")
    mask = public["caption_mask"] if masked else None
    logits = caption_model.train(mode == "train")(public["tokens"][:, :-1], public["captions"], condition_mask=mask)
    expected = public[f"{'masked_' if masked else ''}{mode}_logits"]
    if mode == "eval":  # the public code then returns the condition positions too
        expected = expected[:, caption_model.config.prefix_len - 1 :]
    assert golden.relative_error(logits, expected) <= TOLERANCE


def test_class_and_captions_are_read_from_the_file(class_model: LlamaGen, caption_model: LlamaGen) -> None:
    assert (class_model.config.vocab_size, class_model.config.num_classes, class_model.config.prefix_len) == (97, 7, 1)
    assert (caption_model.config.caption_tokens, caption_model.config.caption_width) == (6, 24)
    assert caption_model.config.prefix_len == 6


def test_loss_equals_the_public_code(class_model: LlamaGen, caption_model: LlamaGen) -> None:
    public = golden.read("class_generator")
    hidden = class_model(public["tokens"][:, :-1], public["labels"], return_hidden=True)
    loss = ops.linear_cross_entropy(hidden, class_model.output.weight, public["tokens"])
    assert golden.relative_error(loss, public["loss"]) <= TOLERANCE
    public = golden.read("caption_generator")
    hidden = caption_model(
        public["tokens"][:, :-1], public["captions"], condition_mask=public["caption_mask"], return_hidden=True
    )
    loss = ops.linear_cross_entropy(hidden, caption_model.output.weight, public["tokens"])
    assert golden.relative_error(loss, public["masked_loss"]) <= TOLERANCE


def greedy_along(model: LlamaGen, tokens: Tensor, condition: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The most likely token after each prefix of `tokens`, with classifier-free guidance."""
    logits = model(tokens[:, :-1], condition, condition_mask=mask)
    unconditional = model(tokens[:, :-1], model.unconditional(condition), condition_mask=mask)
    return (unconditional + scale * (logits - unconditional)).argmax(-1)


@pytest.mark.parametrize(("name", "scale"), [("greedy_tokens", 1.0), ("greedy_cfg_tokens", CFG_SCALE)])
def test_public_greedy_class_samples_are_ours(name: str, scale: float, class_model: LlamaGen) -> None:
    public = golden.read("class_generator")
    ours = greedy_along(class_model, public[name], public["generation_labels"], scale, None)
    assert torch.equal(ours, public[name])
    drawn = generate(class_model, public["generation_labels"], cfg_scale=scale, top_k=1)
    assert torch.equal(drawn, public[name])


@pytest.mark.parametrize(
    ("name", "scale", "masked"),
    [
        ("greedy_tokens", 1.0, False),
        ("masked_greedy_tokens", 1.0, True),
        ("masked_greedy_cfg_tokens", CFG_SCALE, True),
    ],
)
def test_public_greedy_caption_samples_are_ours(name: str, scale: float, masked: bool, caption_model: LlamaGen) -> None:
    public = golden.read("caption_generator")
    mask = public["caption_mask"] if masked else None
    assert torch.equal(greedy_along(caption_model, public[name], public["captions"], scale, mask), public[name])
    drawn = generate(caption_model, public["captions"], cfg_scale=scale, top_k=1, condition_mask=mask)
    assert torch.equal(drawn, public[name])


@pytest.mark.parametrize(
    ("name", "millions"), [("b", 111), ("l", 343), ("xl", 775), ("xxl", 1411), ("xxxl", 3900), ("3b", 3100)]
)
def test_named_sizes_have_the_published_weights(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = LlamaGen.from_name(name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.public_state_dict(f"GPT-{name.upper()}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_caption_model_has_the_published_weights() -> None:
    with torch.device("meta"):
        model = LlamaGen.from_name("xl", caption_tokens=120, grid_size=16)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.public_state_dict("GPT-XL t2i")
    assert shapes["cls_embedding.uncond_embedding"] == [120, 2048]


def test_rotary_table_of_serving_checkpoints_is_ignored(tmp_path: Path, class_model: LlamaGen) -> None:
    model = load(class_weights() | {"freqs_cis": torch.ones(17, 8, 2)}, tmp_path)
    assert torch.equal(model.rotary, class_model.rotary)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model 'xs': choose one of b, l, xl, xxl, xxxl, 3b, t2i-xl, tiny"):
        LlamaGen.from_name("xs")


# ---- behaviour


@pytest.mark.parametrize("position", [0, 7, 14])
def test_a_token_changes_later_predictions_only(position: int, class_model: LlamaGen) -> None:
    """Output i predicts token i: it may depend on the tokens before i alone."""
    public = golden.read("class_generator")
    tokens = public["tokens"][:, :-1]
    changed = tokens.clone()
    changed[:, position] = (tokens[:, position] + 1) % 97
    difference = (class_model(tokens, public["labels"]) - class_model(changed, public["labels"])).abs().amax((0, 2))
    assert difference[: position + 1].max() == 0
    assert difference[position + 1 :].min() > 1e-3


def test_every_prediction_depends_on_the_condition(class_model: LlamaGen) -> None:
    tokens = golden.read("class_generator")["tokens"][:1, :-1]
    difference = class_model(tokens, torch.tensor([1])) - class_model(tokens, torch.tensor([2]))
    assert difference.abs().amax((0, 2)).min() > 1e-3


def test_masked_caption_positions_are_invisible(caption_model: LlamaGen) -> None:
    public = golden.read("caption_generator")
    mask = public["caption_mask"]
    assert not mask.all()
    noise = torch.randn(public["captions"].shape, generator=torch.Generator().manual_seed(0))
    scrambled = torch.where(mask[:, :, None], public["captions"], noise)
    logits, again = (
        caption_model(public["tokens"][:, :-1], c, condition_mask=mask) for c in (public["captions"], scrambled)
    )
    assert torch.equal(logits, again)
    unmasked = caption_model(public["tokens"][:, :-1], scrambled)
    assert golden.relative_error(unmasked, logits) > 0.1


def test_hidden_states_give_the_logits(class_model: LlamaGen) -> None:
    public = golden.read("class_generator")
    hidden = class_model(public["tokens"][:, :-1], public["labels"], return_hidden=True)
    assert hidden.shape == (3, 16, 64)
    assert golden.relative_error(hidden @ class_model.output.weight.T, public["train_logits"]) <= TOLERANCE


def plain_hidden(model: LlamaGen, tokens: Tensor, labels: Tensor, **dropped: Any) -> Tensor:
    """The model's hidden states in plain PyTorch."""
    h = torch.cat([model.cls_embedding(labels), model.tok_embeddings(tokens)], dim=1)
    turns = torch.view_as_complex(model.rotary[: h.shape[1]].contiguous())
    return plain_states(model.layers, model.norm, h, turns, eps=1e-5, **dropped)


def gradients(hidden: Tensor, model: LlamaGen) -> list[Tensor]:
    """Of a loss whose gradient differs from one number of the hidden states to the next."""
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    return torch.autograd.grad(hidden, [p for p in model.parameters() if p is not model.output.weight], direction)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_gradients_equal_the_plain_form_in_float64(share: float, fresh_model: LlamaGen) -> None:
    model = fresh_model.double()
    tokens, labels, ids = torch.randint(97, (3, 15)), torch.tensor([2, 5, 0]), torch.tensor([4, 0, 9])

    def dropped(x: Tensor, site: int) -> Tensor:
        mask = dropout_mask(x.shape, share, seed=7, site=site, sample_ids=ids, device=x.device)
        return x.masked_fill(mask, 0) / (1 - share)

    expected = gradients(plain_hidden(model, tokens, labels, dropped=dropped), model)
    found = gradients(model(tokens, labels, dropout=Dropout(share, 0.0, 7, ids), return_hidden=True), model)
    for gradient, plain in zip(found, expected, strict=True):
        assert golden.relative_error(gradient, plain) < 1e-12


def test_gradients_under_bfloat16_autocast(fresh_model: LlamaGen) -> None:
    """Master weights stay float32 and get float32 gradients; hidden states and everything between are bfloat16."""
    tokens, labels = torch.randint(97, (3, 15)), torch.tensor([2, 5, 0])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = fresh_model(tokens, labels, return_hidden=True)
    assert hidden.dtype == torch.bfloat16
    found = gradients(hidden, fresh_model)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    exact = fresh_model.double()
    expected = gradients(plain_hidden(exact, tokens, labels), exact)
    assert golden.relative_error(hidden, plain_hidden(exact, tokens, labels)) < 1e-2
    flat = (torch.cat([gradient.flatten() for gradient in some]) for some in (found, expected))
    assert golden.relative_error(*flat) < 1e-2


def test_the_residual_stream_is_in_the_autocast_dtype(fresh_model: LlamaGen) -> None:
    seen = []
    for block in fresh_model.layers:
        block.register_forward_hook(
            lambda _, inputs, output: seen.extend([inputs[0].dtype, *(each.dtype for each in output)])
        )
    with torch.autocast("cpu", torch.bfloat16):
        fresh_model(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]))
    assert seen == [torch.bfloat16] * 6


def test_what_a_block_keeps_for_its_backward(fresh_model: LlamaGen) -> None:
    """Both residual sums, q, k, v, the attention's output and logsumexp, gate and up; neither norms nor SwiGLU."""
    config, block = fresh_model.config, fresh_model.layers[0].bfloat16()
    x = torch.randn(3, 16, config.width, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out, branch = block(x, None, fresh_model.rotary[:16], None, None, 0, None)
    for shared in (*block.parameters(), fresh_model.rotary):
        kept.pop(shared.untyped_storage().data_ptr(), None)
    per_token = 2 * (2 + 3 + 1) * config.width + 2 * 2 * config.hidden_width + 4 * config.heads
    assert sum(kept.values()) == 3 * 16 * per_token
    (out + branch).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.gpu
def test_an_xxl_block_keeps_34_kilobytes_a_token_on_a_gpu() -> None:
    config = LLAMAGEN_CONFIGS["xxl"]
    torch.manual_seed(0)
    block = LlamaGen(LlamaGenConfig(layers=1, heads=24, width=1536)).cuda().layers[0]
    rotary = ops.rotary_2d_table(24, 64, 1).cuda()
    x = torch.randn(4, 577, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cast_weights = 2 * sum(p.numel() for p in block.parameters())
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        stream = block(x, None, rotary, None, None, 0, None)
    kept = torch.cuda.memory_allocated() - before - cast_weights  # x itself is counted before, the last branch here
    out = sum(stream)
    expected = 4 * 577 * (2 * 6 * config.width + 4 * config.hidden_width + 4 * config.heads)
    assert kept == pytest.approx(expected, rel=0.02)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *block.parameters()], direction)
    with ops.use_backend("reference"):
        exact = block.double()
        wide = x.detach().double().requires_grad_()
        expected_gradients = torch.autograd.grad(
            sum(exact(wide, None, rotary, None, None, 0, None)), [wide, *exact.parameters()], direction.double()
        )
    for gradient, exactly in zip(found, expected_gradients, strict=True):
        assert golden.relative_error(gradient.cpu(), exactly.cpu()) < 2e-2


def test_fsdp_may_free_the_weights_between_forward_and_backward(fresh_model: LlamaGen) -> None:
    tokens, labels = torch.randint(97, (2, 15)), torch.tensor([1, 2])
    loss = fresh_model(tokens, labels, return_hidden=True)[..., 0].sum()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in fresh_model.named_parameters() if p.grad is not None}
    fresh_model.zero_grad()
    unsharded = []

    def remember(attention: nn.Module, inputs: Any) -> None:
        unsharded.append(attention.wqkv.weight)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in fresh_model.layers:
            block.attention.register_forward_pre_hook(remember)
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(fresh_model, mesh=mesh)
        loss = fresh_model(tokens, labels, return_hidden=True)[..., 0].sum()
        assert [weight.untyped_storage().nbytes() for weight in unsharded] == [0, 0]
        loss.backward()
        for name, parameter in fresh_model.named_parameters():
            if name in expected:
                assert golden.relative_error(parameter.grad.full_tensor(), expected[name]) < 1e-6, name
    finally:
        dist.destroy_process_group()


def test_attention_without_mask_or_cache_is_the_fast_one(
    class_model: LlamaGen, caption_model: LlamaGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*heads: Tensor) -> Tensor:
        calls.append([list(x.shape) for x in heads])
        return causal_attention(*heads)

    monkeypatch.setattr("vapi_fast.models.transformer.causal_attention", counted)
    public = golden.read("class_generator")
    class_model(public["tokens"], public["labels"])
    assert calls == [[[3, 17, 4, 16]] * 3] * 2
    class_model(None, public["labels"], cache=KVCache(class_model, 3, 17))
    public = golden.read("caption_generator")
    caption_model(public["tokens"][:, :-1], public["captions"], condition_mask=public["caption_mask"])
    assert len(calls) == 2


def test_a_loaded_model_is_ready_for_training(tmp_path: Path) -> None:
    """Float32 parameters with a gradient and a real rotary table, whatever the file's dtype and container."""
    weights = class_weights()
    for stored in (weights, {key: value.bfloat16() for key, value in weights.items()}):
        for container in ("model", "safetensors"):
            torch.manual_seed(0)
            before = torch.get_rng_state()
            model = load(stored, tmp_path, container)
            assert torch.equal(torch.get_rng_state(), before)  # no weight was drawn at random
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, nn.Parameter)
                assert parameter.requires_grad
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, stored[name].float())
            assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
            assert torch.equal(model.rotary, ops.rotary_2d_table(4, 16, 1))


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path: Path) -> None:
    model = load(class_weights(), tmp_path)
    written = (tmp_path / "generator.pt").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "generator.pt").read_bytes() == written


def test_logits_are_float32_for_a_bfloat16_model(fresh_model: LlamaGen) -> None:
    logits = fresh_model.bfloat16()(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]))
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_more_tokens_than_the_grid_are_refused(class_model: LlamaGen) -> None:
    labels = torch.tensor([0])
    assert class_model(torch.zeros(1, 16, dtype=torch.int64), labels).shape == (1, 17, 97)
    with pytest.raises(ValueError, match="17 image tokens do not fit a 4×4 grid"):
        class_model(torch.zeros(1, 17, dtype=torch.int64), labels)


@pytest.mark.parametrize("chunks", [[1] * 15, [15], [1, 5, 2, 7]])
def test_cached_class_forward_equals_the_whole(chunks: list[int], class_model: LlamaGen) -> None:
    public = golden.read("class_generator")
    cache = KVCache(class_model, 3, 17)
    outputs = [class_model(None, public["labels"], cache=cache)]
    for chunk in public["tokens"][:, :-1].split(chunks, dim=1):
        outputs.append(class_model(chunk, None, cache=cache))
    assert golden.relative_error(torch.cat(outputs, dim=1), public["eval_logits"]) <= TOLERANCE


@pytest.mark.parametrize("chunks", [[1] * 15, [1, 5, 2, 7]])
def test_cached_caption_forward_equals_the_whole(chunks: list[int], caption_model: LlamaGen) -> None:
    public = golden.read("caption_generator")
    mask = {"condition_mask": public["caption_mask"]}
    cache = KVCache(caption_model, 3, 22)
    outputs = [caption_model(None, public["captions"], cache=cache, **mask)]
    for chunk in public["tokens"][:, :-1].split(chunks, dim=1):
        outputs.append(caption_model(chunk, None, cache=cache, **mask))
    assert golden.relative_error(torch.cat(outputs, dim=1), public["masked_eval_logits"][:, 5:]) <= TOLERANCE


def test_dropout_is_off_by_default(fresh_model: LlamaGen) -> None:
    inputs = torch.arange(15)[None], torch.tensor([2])
    assert torch.equal(fresh_model.train()(*inputs), fresh_model.eval()(*inputs))


def test_dropout_is_decided_by_seed_and_sample_id(fresh_model: LlamaGen) -> None:
    tokens, labels, ids = torch.randint(97, (3, 15)), torch.tensor([2, 5, 0]), torch.tensor([3, 1, 2])

    def logits(seed: int, rows: Tensor) -> Tensor:
        return fresh_model(tokens[rows], labels[rows], dropout=Dropout(0.5, 0.3, seed, ids[rows]))

    clean, first, second = fresh_model(tokens, labels), logits(0, torch.arange(3)), logits(1, torch.arange(3))
    assert golden.relative_error(first, clean) > 0.01
    assert golden.relative_error(first, second) > 0.01
    for row in range(3):
        assert golden.relative_error(logits(0, torch.tensor([row])), first[row : row + 1]) < 1e-5


def test_dropout_falls_on_embeddings_and_both_branches(fresh_model: LlamaGen) -> None:
    """A share p of what enters a residual sum is zero, the rest is scaled by 1 / (1 − p)."""
    tokens, labels = torch.randint(97, (8, 15)), torch.randint(7, (8,))
    block, seen = fresh_model.layers[0], {}

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        assert inputs[-1] is not None
        seen[module] = inputs[0], output[1], module.forward(*inputs[:-1], None)[1]

    branches = block.attention, block.feed_forward
    for module in branches:
        module.register_forward_hook(keep)
    fresh_model(tokens, labels, dropout=Dropout(0.25, 0.0, 3))
    embedded = fresh_model.tok_embeddings(tokens)
    for total, clean in [(seen[block.attention][0][:, 1:], embedded), *(seen[module][1:] for module in branches)]:
        kept = total.abs() > clean.abs()
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
        assert torch.allclose(total[kept], clean[kept] / 0.75, atol=1e-5)
        assert total[~kept].abs().max() < 1e-5


def test_unconditional_class_is_the_last_row(class_model: LlamaGen) -> None:
    assert class_model.unconditional(torch.tensor([0, 3])).tolist() == [7, 7]


@pytest.mark.parametrize(("name", "rows", "classes"), [("tiny", 9, 9), ("tiny", 10, 9), ("b", 1000, 1000)])
def test_a_table_of_as_many_rows_as_classes_has_no_unconditional_one(
    name: str, rows: int, classes: int, tmp_path: Path
) -> None:
    """1000 rows are ImageNet's classes (`class_dropout_prob` 0), not 999 classes and "none"."""
    config = replace(LLAMAGEN_CONFIGS[name], layers=1)
    small = LlamaGen(replace(config, vocab_size=5, num_classes=rows - 1))
    torch.save(small.state_dict(), tmp_path / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LLAMAGEN_CONFIGS, name, config)
        model = LlamaGen.from_checkpoint(tmp_path / "model.pt", name, grid_size=2)
    assert (model.config.num_classes, model.config.has_unconditional) == (classes, rows > classes)
    last = torch.tensor([classes - 1])
    drawn = generate(model.eval(), last, seed=1)
    small.config = replace(small.config, grid_size=2)
    small.rotary = small.rotary_table()
    assert torch.equal(drawn, generate(small.eval(), last, seed=1))
    if rows > classes:
        assert not torch.equal(model.unconditional(last), last)
        return
    for refused, says in (
        (lambda: generate(model, last, cfg_scale=1.5), "guidance needs an unconditional class"),
        (lambda: generate(model, last + 1), rf"class ids must lie in 0…{classes - 1}"),
        (lambda: model.unconditional(last), "needs an unconditional class"),
    ):
        with pytest.raises(ValueError, match=says):
            refused()


def test_unconditional_caption_is_the_stored_one(caption_model: LlamaGen) -> None:
    captions = golden.read("caption_generator")["captions"]
    unconditional = caption_model.unconditional(captions)
    assert unconditional.shape == captions.shape
    assert torch.equal(unconditional[1], caption_weights()["cls_embedding.uncond_embedding"])


def test_conditions_are_dropped_whole(class_model: LlamaGen, caption_model: LlamaGen) -> None:
    labels = torch.arange(4000) % 7
    captions = torch.randn(200, 6, 24)
    for model, condition, spread in ((class_model, labels, 0.03), (caption_model, captions, 0.12)):
        dropped = Dropout(0.0, 0.3, 5).condition(condition, model.unconditional(condition))
        rows = (dropped == model.unconditional(condition)).view(len(condition), -1).all(1)
        assert rows.float().mean().item() == pytest.approx(0.3, abs=spread)
        assert torch.equal(dropped[~rows], condition[~rows])
    tokens, unconditional = torch.randint(97, (3, 15)), class_model.unconditional(labels[:3])
    assert torch.equal(
        class_model(tokens, labels[:3], dropout=Dropout(0.0, 1.0, 5)), class_model(tokens, unconditional)
    )
