"""`vapi_fast.patch` on models of the public repository's structure: the same numbers, and for forks no wrong ones."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import public_models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accuracy import relative_l2
from forks import (
    CappedLogits,
    ClampedActivations,
    ClampedGate,
    ClampedInput,
    ClampedLoss,
    Counting,
    DoubledAtLateSlots,
    DoubledIntoCache,
    DoubledUnderMask,
    GatedGELU,
    HalfPrecisionRMSNorm,
    IgnoredToken,
    NormalisedQueries,
    OneMoreRMSNorm,
    OtherEpsilon,
    ScaledEmbeddings,
    ScaledLogits,
    SlidingWindow,
    SmoothedLabels,
    StoppedGradient,
    SwappedGate,
    TwiceDropped,
    WindowedModel,
)
from fused import DEVICE
from public_models import LPIPS, Transformer, VQModel, randomised
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_full_backward_hook,
    register_module_module_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel

import vapi_fast
from vapi_fast import ops, patch, patch_llamagen, patch_lpips, patch_tokenizer, unpatch
from vapi_fast.models import LlamaGen
from vapi_fast.patch import llamagen as llamagen_patch
from vapi_fast.patch import recognition

BATCH = 3
CAPTIONS = {"model_type": "t2i", "cls_token_num": 4}
KINDS = {"classes": {}, "captions": CAPTIONS, "grouped queries": {"n_kv_head": 1}, "dropout": {"attn_dropout": 0.2}}


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """What is not recognised warns: no other test may see that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="patch_")
        yield


@pytest.fixture
def model() -> Transformer:
    return randomised(Transformer()).eval()


@pytest.fixture
def vq_model() -> VQModel:
    return randomised(VQModel()).eval()


def example(model: Transformer) -> tuple[Tensor, Tensor]:
    """Tokens and condition."""
    torch.manual_seed(0)
    tokens = torch.randint(model.vocab_size, (BATCH, model.block_size))
    if model.model_type == "c2i":
        return tokens, torch.randint(model.num_classes, (BATCH,))
    return tokens, torch.randn(BATCH, model.cls_token_num, model.config.caption_dim)


def gradients(module: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def training_results(model: Transformer, **arguments: Any) -> list[Tensor]:
    """Logits, loss and gradients of a training step, dropout included."""
    tokens, condition = example(model)
    model.train()
    torch.manual_seed(1)
    logits, loss = model(tokens[:, :-1], condition, targets=tokens, **arguments)
    return [logits, loss, gradients(model, loss)]


def evaluation_logits(model: Transformer) -> Tensor:
    tokens, condition = example(model)
    positions = torch.arange(model.cls_token_num + tokens.shape[1] - 1)
    return model.eval()(tokens[:, :-1], condition, positions)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_patched_llamagen_gives_the_same_in_evaluation_and_in_training(kind: str) -> None:
    model = randomised(Transformer(**KINDS[kind]))
    valid = torch.tensor([1, 0, 1])
    expected = [evaluation_logits(model), *training_results(model), *training_results(model, valid=valid)]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = patch_llamagen(model).report()
    actual = [evaluation_logits(model), *training_results(model), *training_results(model, valid=valid)]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert report.startswith("patch_llamagen: 10 modules replaced, 0 left alone")
    assert "layers.*.feed_forward (2): SwiGLU → ops.swiglu" in report
    assert "model: the decoding step's mask; the loss stays LlamaGen's own (keep_logits=True)" in report
    assert ("ops.decode_attention" in report) == (kind != "grouped queries")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_without_logits_is_the_same(kind: str) -> None:
    model = randomised(Transformer(**KINDS[kind]))
    tokens, condition = example(model)
    _, loss, gradient = training_results(model)
    with_valid = training_results(model, valid=torch.ones(BATCH))
    with patch_llamagen(model, keep_logits=False):
        logits, new_loss, new_gradient = training_results(model)
        assert logits is None
        torch.testing.assert_close([new_loss, new_gradient], [loss, gradient], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(training_results(model, valid=torch.ones(BATCH)), with_valid, rtol=1e-5, atol=1e-5)
        assert model(tokens[:, :-1], condition)[0].shape == (BATCH, model.block_size, model.vocab_size)
        handle = model.output.register_forward_hook(lambda module, inputs, output: output * 2)
        assert training_results(model)[0] is not None  # a hook on the head has to see logits
        handle.remove()
    assert training_results(model)[0] is not None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["classes", "captions"])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 3.0, "cfg_interval": 4}], ids=["plain", "guided"])
def test_generate_gives_the_same_tokens(
    kind: str, options: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LlamaGen's loop on a patched model, and our `generate`; with a caption's mask attention is not ours."""
    model = randomised(Transformer(**KINDS[kind])).eval()
    _, condition = example(model)
    if masked and kind == "captions":
        options = options | {"emb_masks": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])}
    runs = []
    monkeypatch.setattr(ops, "decode_attention", counted(ops.decode_attention, runs))
    greedy = public_models.generate(model, condition, 9, sample_logits=False, **options)
    torch.manual_seed(2)
    sampled = public_models.generate(model, condition, 9, top_k=20, **options)
    assert not runs
    with patch_llamagen(model):
        runs.clear()
        torch.testing.assert_close(public_models.generate(model, condition, 9, sample_logits=False, **options), greedy)
        assert len(runs) == (0 if "emb_masks" in options else 8 * len(model.layers))
        torch.manual_seed(2)
        torch.testing.assert_close(public_models.generate(model, condition, 9, top_k=20, **options), sampled)
        ours = patch.generate(model, condition, 9, sample_logits=False, **options)
    torch.testing.assert_close(ours, greedy)
    torch.testing.assert_close(patch.generate(model, condition, 4, sample_logits=False, **options), greedy[:, :4])
    assert len(greedy.unique()) > 3


def counted(function: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return function(*arguments, **options)

    return run


def test_generate_draws_what_multinomial_draws_from_the_same_numbers(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, condition = example(model)
    options = {"cfg_scale": 2.0, "top_k": 12, "top_p": 0.9, "temperature": 0.8}
    steps = iter(range(9))

    def multinomial(probabilities: Tensor, count: int) -> Tensor:
        return ops.group_sample(probabilities.log()[:, None], count, seed=11, first_position=next(steps))[0][:, 0]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    expected = public_models.generate(model, condition, 9, **options)
    assert torch.equal(patch.generate(model, condition, 9, seed=11, **options), expected)


@pytest.mark.parametrize("changes", [{}, {"cfg_power": 2.5}, {"cfg_interval": 3}, {"cfg_scale": 1.0}])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_generate_with_the_schedule_of_va_pis_fork(model: Transformer, changes: dict[str, Any], count: int) -> None:
    _, condition = example(model)
    options = {"cfg_scale": 6.0, "cfg_type": "power-cosine", "sample_logits": False} | changes
    expected = public_models.generate(model, condition, count, **options)
    assert torch.equal(patch.generate(model, condition, count, **options), expected)
    if not changes and count == 9:
        constant = patch.generate(model, condition, count, **(options | {"cfg_type": "constant"}))
        assert not torch.equal(constant, expected)


def test_generate_follows_the_distribution_and_the_global_seed(model: Transformer) -> None:
    count = 4000
    condition = torch.zeros(count, dtype=torch.long)
    torch.manual_seed(3)
    tokens = patch.generate(model, condition, 1, temperature=1.5)
    frequencies = tokens.flatten().bincount(minlength=model.vocab_size) / count
    probabilities = (first_logits(model) / 1.5).softmax(-1)
    assert ((frequencies - probabilities).abs() < 5 * (probabilities / count).sqrt() + 1e-3).all()
    torch.manual_seed(3)
    assert torch.equal(patch.generate(model, condition, 1, temperature=1.5), tokens)
    assert not torch.equal(patch.generate(model, condition, 1, temperature=1.5), tokens)


def first_logits(model: Transformer) -> Tensor:
    model.setup_caches(1, 10, torch.float32)
    with torch.no_grad():
        return model(None, torch.zeros(1, dtype=torch.long), torch.arange(1))[0][0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 10}, "max_new_tokens must be in 1…9"),
        ({"cfg_type": "cosine"}, "cfg_type must be 'constant' or 'power-cosine', got 'cosine'"),
        ({"emb_masks": torch.ones(BATCH, 1)}, "condition_mask is for text-conditioned models"),
    ],
)
def test_generate_rejects(model: Transformer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch.generate(model, example(model)[1], **({"max_new_tokens": 9} | arguments))


def test_generate_without_an_unconditional_class(model: Transformer) -> None:
    """As LlamaGen builds it for `class_dropout_prob` 0: guidance is refused, and the last class is a class."""
    table = model.cls_embedding.embedding_table
    table.weight = nn.Parameter(table.weight[: model.num_classes].detach())
    last = torch.full((BATCH,), model.num_classes - 1)
    expected = public_models.generate(model, last, 9, sample_logits=False)
    assert torch.equal(patch.generate(model, last, 9, sample_logits=False), expected)
    with pytest.raises(ValueError, match="generate: guidance needs an unconditional class, and this model was built"):
        patch.generate(model, last, 9, cfg_scale=1.5)


def test_patching_twice_is_patching_once(model: Transformer) -> None:
    before = dict(model.norm.__dict__)
    expected = evaluation_logits(model)
    with patch_llamagen(model) as outer:
        forwards = [module.__dict__.get("forward") for module in model.modules()]
        with patch_llamagen(model) as inner:
            assert inner.replaced == outer.replaced
        assert [module.__dict__.get("forward") for module in model.modules()] == forwards
        with patch_llamagen(model, keep_logits=False):
            assert training_results(model)[0] is None
        assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert dict(model.norm.__dict__) | {"training": False} == before
    patch_llamagen(model)
    unpatch(model)
    unpatch(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(evaluation_logits(model), expected)


@pytest.mark.parametrize("first_out", ["older", "newer"])
def test_each_patch_undoes_its_own_alone(model: Transformer, first_out: str) -> None:
    older, newer = patch_llamagen(model), patch_llamagen(model, keep_logits=False)
    patches = [older, newer] if first_out == "older" else [newer, older]
    patches[0].unpatch()
    assert sum("forward" in module.__dict__ for module in model.modules()) == 10
    assert (training_results(model)[0] is None) == (first_out == "older")
    twin = copy.deepcopy(model)
    with patch_llamagen(twin):
        pass
    assert sum("forward" in module.__dict__ for module in twin.modules()) == 10  # as it was before
    patches[1].unpatch()
    assert not any("forward" in module.__dict__ for module in model.modules())
    patch_llamagen(model)
    for each in patches:
        each.unpatch()  # done already
    assert sum("forward" in module.__dict__ for module in model.modules()) == 10
    unpatch(model)
    with patch_llamagen(model):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("undo", [patch.Patch.unpatch, lambda patched: unpatch(patched.root)], ids=["Patch", "all"])
def test_what_was_put_in_place_of_a_patch_stays(model: Transformer, undo: Callable[[patch.Patch], None]) -> None:
    patched = patch_llamagen(model)
    model.norm.forward = own = lambda x: x
    undo(patched)
    assert [module for module in model.modules() if "forward" in module.__dict__] == [model.norm]
    assert model.norm.forward is own


def test_a_warning_that_is_an_error_leaves_nothing_patched(model: Transformer) -> None:
    model.norm.__class__ = OtherEpsilon
    with pytest.raises(UserWarning, match="left 1 of 10 modules"):
        patch_llamagen(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_patching_leaves_no_other_trace(model: Transformer, vq_model: VQModel) -> None:
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    patch_llamagen(model, keep_logits=False)
    patch_tokenizer(vq_model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_surroundings_do_not_matter(model: Transformer, vq_model: VQModel) -> None:
    condition = example(model)[1]
    expected = patch.generate(model, condition, 9, sample_logits=False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert len(patch_llamagen(model, keep_logits=False).replaced) == 10
        assert len(patch_tokenizer(vq_model).replaced) == 25
    with torch.inference_mode():
        assert torch.equal(public_models.generate(model, condition, 9, sample_logits=False), expected)
        assert torch.equal(patch.generate(model, condition, 9, sample_logits=False), expected)


def test_gradients_are_compared_in_inference_mode_too(model: Transformer) -> None:
    model.layers[1].attention.__class__ = StoppedGradient
    with torch.inference_mode(), pytest.warns(UserWarning, match=r"such as layers\.1\.attention"):
        patch_llamagen(model)


def test_a_patched_model_under_autocast_is_as_exact_as_before(model: Transformer) -> None:
    exact = [x.detach() for x in training_results(model)[1:]]

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            return [relative_l2(a.detach(), b) for a, b in zip(training_results(model)[1:], exact, strict=True)]

    before = errors()
    for keep_logits in (True, False):
        with patch_llamagen(model, keep_logits=keep_logits):
            assert all(new < 2 * old + 1e-3 for new, old in zip(errors(), before, strict=True))


def test_copies_and_pickles_stand_on_their_own(model: Transformer) -> None:
    expected = evaluation_logits(model)
    patch_llamagen(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        model.output.weight.zero_()
        model.norm.weight.zero_()
    assert twin.norm.__dict__["forward"].__self__ is twin.norm
    torch.testing.assert_close(evaluation_logits(twin), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(evaluation_logits(loaded), expected)
    assert not patch_llamagen(loaded).left_alone
    torch.testing.assert_close(evaluation_logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_hooks_still_run(model: Transformer, vq_model: VQModel) -> None:
    seen = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    for name in ("layers.0.attention", "layers.1.ffn_norm", "layers.0.feed_forward.w1", "output"):
        model.get_submodule(name).register_forward_hook(note(name))
    names = ("decoder.mid.0.norm1", "decoder.norm_out", "decoder.conv_blocks.0.upsample.conv", "quantize")
    for name in names:
        vq_model.get_submodule(name).register_forward_hook(note(name))
    patch_llamagen(model)
    patch_tokenizer(vq_model)
    evaluation_logits(model)
    with torch.no_grad():
        vq_model(torch.randn(1, 3, 8, 8))
    assert len(seen) == 8
    assert {*names, "output"} < set(seen)


def doubled_by(weight: Tensor) -> nn.Linear:
    """A head in LoRA's way: a linear layer whose weight is not all of it."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    head = Doubled(*weight.T.shape, bias=False)
    head.weight = weight
    return head


HEADS = {
    "forward hook": lambda model: model.output.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda model: model.output.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda model: model.output.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda model: model.output.register_full_backward_pre_hook(lambda *_: None),
    "global hook": lambda model: register_module_forward_hook(lambda *_: None),
    "global backward hook": lambda model: register_module_full_backward_hook(lambda *_: None),
    "own forward": lambda model: setattr(model.output, "forward", lambda x: x @ model.output.weight.T),
    "other class": lambda model: setattr(model, "output", doubled_by(model.output.weight)),
    "bias": lambda model: setattr(model, "output", randomised(nn.Linear(32, 40))),
}


@pytest.mark.parametrize("change", HEADS)
def test_a_head_that_is_more_than_its_weight_is_called(model: Transformer, change: str) -> None:
    patch_llamagen(model, keep_logits=False)
    handle = HEADS[change](model)
    try:
        logits, loss, _ = training_results(model)
        assert logits is not None
        unpatch(model)
        assert torch.allclose(loss, training_results(model)[1])
    finally:
        if handle is not None:
            handle.remove()


def test_a_check_does_not_run_global_hooks(model: Transformer) -> None:
    calls = []
    kinds = register_module_forward_hook, register_module_full_backward_hook, register_module_module_registration_hook
    handles = [register(lambda *_: calls.append(None)) for register in kinds]
    try:
        assert not patch_llamagen(model).left_alone
        assert not calls
        evaluation_logits(model)
        assert calls
    finally:
        for handle in handles:
            handle.remove()


def test_the_loss_without_logits_is_computed_in_autocasts_dtype(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_llamagen(model, keep_logits=False)
    dtypes, original = [], ops.linear_cross_entropy

    def recorded(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        dtypes.append((hidden.dtype, weight.dtype))
        return original(hidden, weight, targets)

    monkeypatch.setattr(ops, "linear_cross_entropy", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        training_results(model)
    training_results(model)
    assert dtypes == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_patched_model_compiles_without_a_graph_break(model: Transformer, keep_logits: bool) -> None:
    model = randomised(Transformer(dropout=0.0))
    expected = [evaluation_logits(model), *training_results(model)]
    patch_llamagen(model, keep_logits=keep_logits)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = [evaluation_logits(compiled), *training_results(compiled)]
    torch.testing.assert_close(actual[2:] + actual[:1], expected[2:] + expected[:1], rtol=1e-5, atol=1e-5)
    with patch_llamagen(compiled) as second:  # the wrapper is looked through
        assert not second.left_alone


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_wrapped_models_train_the_same(model: Transformer, wrapper: str, patch_first: bool) -> None:
    expected = training_results(model)
    wrapped = model
    for step in ("patch", "wrap") if patch_first else ("wrap", "patch"):
        if step == "patch":
            assert len(patch_llamagen(wrapped).replaced) == 10
        elif wrapper == "DDP":
            wrapped = DistributedDataParallel(model, static_graph=True)
        else:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
    tokens, condition = example(model)
    wrapped.train()
    torch.manual_seed(1)
    logits, loss = wrapped(tokens[:, :-1], condition, targets=tokens)
    loss.backward()
    gradient = [p.grad.full_tensor() if wrapper == "FSDP2" else p.grad for p in model.parameters()]
    actual = [logits, loss, torch.cat([g.flatten() for g in gradient])]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if wrapper == "FSDP2":
        with pytest.raises(ValueError, match="as_llamagen: the parameters are sharded by FSDP"):
            patch.generate(model, condition, 2)
    unpatch(wrapped)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.usefixtures("one_process")
def test_fsdp1_is_patched_before_wrapping_only(model: Transformer) -> None:
    expected = evaluation_logits(model)
    late = FullyShardedDataParallel(copy.deepcopy(model), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"left 10 of 10 modules as they are.*under FullyShardedDataParallel"):
        assert not patch_llamagen(late).replaced
    patch_llamagen(model)
    early = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    positions = torch.arange(model.block_size)
    tokens, condition = example(model)
    for wrapped in (late, early):
        logits, _ = wrapped.eval()(tokens[:, :-1], condition, positions)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


FORKS = {
    "ffn_norm": (OneMoreRMSNorm, OtherEpsilon, HalfPrecisionRMSNorm, ClampedInput),
    "feed_forward": (GatedGELU, SwappedGate, TwiceDropped, ClampedGate, Counting),
    "attention": (
        NormalisedQueries,
        StoppedGradient,
        ClampedActivations,
        SlidingWindow,
        DoubledUnderMask,
        DoubledIntoCache,
        DoubledAtLateSlots,
    ),
}


@pytest.mark.parametrize(("part", "fork"), [(part, fork) for part, forks in FORKS.items() for fork in forks])
def test_a_forks_own_part_is_named_and_left_alone(model: Transformer, part: str, fork: type[nn.Module]) -> None:
    layer = model.layers[1]
    setattr(layer, part, randomised(fork(32 if part == "ffn_norm" else model.config)))
    expected = training_results(model)
    with pytest.warns(UserWarning, match=rf"left 1 of 10 modules as they are, such as layers.1.{part}"):
        left = patch_llamagen(model)
    assert list(left.left_alone) == [f"layers.1.{part}"]
    assert "computes something else" in left.report()
    torch.testing.assert_close(training_results(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_kv_head", [2, 1])
@pytest.mark.parametrize("fork", [ScaledLogits, CappedLogits, ScaledEmbeddings])
def test_a_fork_that_decodes_otherwise_is_named_and_left_alone(fork: type[nn.Module], n_kv_head: int) -> None:
    model = randomised(fork(n_kv_head=n_kv_head))
    with pytest.warns(UserWarning, match=r"left 1 of 10 .* such as model .*\(decoding in evaluation mode: differs"):
        assert list(patch_llamagen(model).left_alone) == ["model"]


@pytest.mark.parametrize("fork", [SmoothedLabels, IgnoredToken, ClampedLoss])
def test_a_forks_own_loss_is_named_and_left_alone(fork: type[nn.Module]) -> None:
    model = randomised(fork())
    assert not patch_llamagen(model).left_alone
    with pytest.warns(UserWarning, match=r"left 1 of 10 modules.* such as model .*\(loss.*: differs"):
        assert list(patch_llamagen(model, keep_logits=False).left_alone) == ["model"]


class AnyGate(public_models.FeedForward):
    """A fork whose layers have their activation functions by an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        gate = getattr(self.gate, "kind", self.gate)
        gate = gate[0] if isinstance(gate, list) else gate
        gate = ("silu", "gelu")[int(gate)] if isinstance(gate, Tensor) else gate
        gate = getattr(F, gate) if isinstance(gate, str) else gate
        return self.ffn_dropout(self.w2(gate(self.w1(x)) * self.w3(x)))


class Opaque:
    def __init__(self, kind: str) -> None:
        self.kind = kind


@pytest.mark.parametrize(
    "attribute",
    [
        str,
        lambda name: getattr(F, name),
        lambda name: functools.partial(getattr(F, name)),
        lambda name: [name],
        lambda name: torch.tensor(name == "gelu"),
        lambda name: nn.Buffer(torch.tensor(name == "gelu")),
        lambda name: SimpleNamespace(kind=name),
        Opaque,
    ],
    ids=["name", "function", "partial", "list", "tensor", "buffer", "namespace", "object"],
)
def test_layers_that_differ_in_an_attribute_alone_are_told_apart(
    model: Transformer, attribute: Callable[[str], Any]
) -> None:
    for layer, name in zip(model.layers, ("silu", "gelu"), strict=True):
        layer.feed_forward.__class__ = AnyGate
        layer.feed_forward.gate = attribute(name)
    with pytest.warns(UserWarning, match="such as layers.1.feed_forward"):
        assert list(patch_llamagen(model).left_alone) == ["layers.1.feed_forward"]


def test_a_signature_is_that_of_equal_modules_alone(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recognition.signature(model)
    assert recognition.signature(copy.deepcopy(model)) == before
    assert recognition.signature(randomised(Transformer(), seed=1)) == before
    assert recognition.signature(public_models.RMSNorm(8)) != recognition.signature(public_models.RMSNorm(9))
    model.freqs_cis = model.freqs_cis * 2
    assert recognition.signature(model) != before
    model.freqs_cis = model.freqs_cis / 2
    model.setup_caches(1, 8, torch.float32)
    before = recognition.signature(model)
    model.layers[0].attention.kv_cache.k_cache += 1
    assert recognition.signature(model) == before  # what they hold does not count
    monkeypatch.setattr(public_models.RMSNorm, "forward", OtherEpsilon.forward)
    assert recognition.signature(model) != before


def test_each_kind_of_part_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(recognition, "first_difference", counted(recognition.first_difference, compared))
    patch_llamagen(Transformer(n_layer=6))
    assert len(compared) == 4  # norms, attention, SwiGLU and the whole
    assert recognition.first_difference(nn.Identity(), (llamagen_patch.rms_norm,), []) is not None


def test_a_check_leaves_no_trace_in_a_forks_lists(model: Transformer) -> None:
    class Logging(public_models.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            self.log["calls"].append(x.shape)
            return super().forward(x)

    model.layers[0].feed_forward.__class__, model.layers[0].feed_forward.log = Logging, {"calls": []}
    assert not patch_llamagen(model).left_alone
    assert model.layers[0].feed_forward.log == {"calls": []}


def test_a_method_with_other_parameters_is_left_alone(model: Transformer) -> None:
    class WithHidden(Transformer):
        def forward(self, idx, cond_idx, input_pos=None, targets=None, mask=None, valid=None, hidden=False):
            return super().forward(idx, cond_idx, input_pos, targets, mask, valid)

    model.__class__ = WithHidden
    with pytest.warns(UserWarning, match=r"its forward takes \(idx, .*hidden=False\), LlamaGen's takes \(idx, "):
        assert list(patch_llamagen(model).left_alone) == ["model"]
    tokens, condition = example(model)
    assert model.eval()(tokens, condition, torch.arange(10), hidden=True)[1] is None


def decoded(model: Transformer, steps: int = 2) -> Tensor:
    """Logits of the prefix and of the first steps of LlamaGen's decoding loop; the last one as gradients are on."""
    tokens, condition = example(model)
    with torch.no_grad():
        model.setup_caches(BATCH, 10, torch.float32)
        logits = [model(None, condition, torch.arange(1))[0]]
        for t in range(steps - 1):
            logits.append(model(tokens[:, t : t + 1], None, torch.tensor([1 + t]))[0])
    return torch.cat([*logits, model(tokens[:, -1:], None, torch.tensor([steps]))[0]], dim=1)


def test_a_step_with_gradients_or_dropout_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Transformer(attn_dropout=0.5, dropout=0.0)).eval()

    def results() -> list[Tensor]:
        logits = decoded(model.eval())
        found = [logits, gradients(model.layers, logits.square().sum())]
        with torch.no_grad():
            for modes in ((), model.layers, (model,)):  # dropout in the blocks, and training, where positions differ
                for module in modes:
                    module.train()
                torch.manual_seed(3)
                found.append(decoded(model))
        return found

    expected = results()
    patch_llamagen(model)
    runs = []
    monkeypatch.setattr(ops, "decode_attention", counted(ops.decode_attention, runs))
    assert max(map(relative_l2, results(), expected)) < 1e-5  # no bound for single gradients, sums of many terms
    assert len(runs) == len(model.layers) * (1 + 2)  # the first step of three, and the second without gradients


class LocalBlock(public_models.TransformerBlock):
    """A fork's block that sees the last two slots alone: it edits the mask that it is given."""

    def forward(self, x: Tensor, freqs_cis: Tensor, start_pos: Tensor | None, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask &= torch.arange(mask.shape[-1]) > start_pos[:, None] - 2
        return super().forward(x, freqs_cis, start_pos, mask)


@torch.no_grad()
def test_a_mask_edited_on_its_way_is_obeyed(model: Transformer) -> None:
    full = decoded(model, 5)
    for layer in model.layers:
        layer.__class__ = LocalBlock
    expected = decoded(model, 5)
    assert not patch_llamagen(model).left_alone
    torch.testing.assert_close(decoded(model, 5), expected, rtol=1e-5, atol=1e-5)
    assert relative_l2(full, expected) > 0.01


def test_another_mask_for_decoding_is_obeyed() -> None:
    model = randomised(WindowedModel()).eval()
    _, condition = example(model)
    expected = public_models.generate(model, condition, 9, sample_logits=False)
    assert not patch_llamagen(model).left_alone
    assert torch.equal(public_models.generate(model, condition, 9, sample_logits=False), expected)
    assert not llamagen_patch.mask_is_causal(model)
    model.causal_mask = torch.ones_like(model.causal_mask).tril()
    assert llamagen_patch.mask_is_causal(model)
    model.causal_mask[:, :, 0] = False  # in place, after it was looked at
    assert not llamagen_patch.mask_is_causal(model)


def test_a_fork_that_computes_something_else_is_not_viewed(model: Transformer) -> None:
    model.layers[0].feed_forward = SwappedGate(model.config)
    with pytest.raises(ValueError, match=r"this Transformer is not LlamaGen's as we know it: .*relative error"):
        patch.generate(model, example(model)[1], 9)
    with pytest.raises(ValueError, match="n_kv_head is 1, ours is 2"):
        patch.as_llamagen(Transformer(n_kv_head=1))


def test_what_lacks_a_part_is_named(model: Transformer) -> None:
    del model.layers[0].ffn_norm
    model.layers[1].attention.forward = model.layers[1].attention.forward.__func__.__get__(model.layers[0].attention)
    model.layers[1].feed_forward.forward = lambda x: x
    with pytest.warns(UserWarning, match="such as layers.0.ffn_norm"):
        left = patch_llamagen(model).left_alone
    assert left["layers.0.ffn_norm"] == "there is no such module"
    assert left["layers.1.feed_forward"] == "its forward has been replaced by something else already"
    assert model.layers[1].feed_forward.forward(3) == 3


def test_what_cannot_be_compared_says_why(model: Transformer) -> None:
    with pytest.raises(ValueError, match="DataParallel copies modules: use DistributedDataParallel"):
        patch_llamagen(nn.DataParallel(model))
    model.layers[0].feed_forward.w1 = nn.Identity()
    with pytest.warns(UserWarning, match="layers.0.feed_forward .is not of LlamaGen's kind: .* 'in_features'"):
        patch_llamagen(model)
    with pytest.warns(UserWarning, match="left 1 of 10 .* model .on the meta device: load its weights first"):
        patch_llamagen(Transformer(**CAPTIONS).to("meta"))


@pytest.mark.parametrize("function", [patch_llamagen, patch_tokenizer, patch_lpips, unpatch, patch.as_llamagen])
def test_what_is_no_model_is_rejected(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        function({"model": 1})


def test_other_models_are_rejected(model: Transformer, vq_model: VQModel) -> None:
    with pytest.raises(ValueError, match="this VQModel has no tok_embeddings and no cls_embedding"):
        patch_llamagen(vq_model)
    with pytest.raises(ValueError, match=r"structure, with encoder, decoder.*this Transformer has no encoder"):
        patch_tokenizer(model)
    with pytest.raises(ValueError, match="this Linear has no scaling_layer and no net and no lin0"):
        patch_lpips(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="this LlamaGen is vapi-fast's own"):
        patch_llamagen(LlamaGen.from_name("tiny"))


def test_patched_models_run_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device(DEVICE):
        model, vq_model, lpips = (randomised(cls()).eval() for cls in (Transformer, VQModel, LPIPS))
        images, (_, condition) = torch.rand(1, 3, 8, 8), example(model)

        @torch.no_grad()
        def results() -> list[Tensor]:
            codes, _, (_, _, indices) = vq_model.encode(images)
            decoded = vq_model.decode_code(indices, (1, 8, 4, 4))
            tokens = public_models.generate(model, condition[:1], 3, sample_logits=False)
            for layer in model.layers:
                layer.attention.kv_cache = None
            return [evaluation_logits(model), tokens, codes, indices, decoded, lpips(decoded, images)]

        expected = results()
        for patched, replaced in (
            (patch_llamagen(model), 10),
            (patch_tokenizer(vq_model), 25),
            (patch_lpips(lpips), 1),
        ):
            assert len(patched.replaced) == replaced
        with ops.use_backend("triton"):
            torch.testing.assert_close(results(), expected, rtol=1e-3, atol=1e-4)


def test_names_of_the_package() -> None:
    for name in ("patch_llamagen", "patch_tokenizer", "patch_lpips", "unpatch"):
        assert getattr(vapi_fast, name) is getattr(patch, name)
    assert llamagen_patch.patch_llamagen is vapi_fast.patch_llamagen
