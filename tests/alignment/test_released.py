"""`--recipe va-pi`: rollouts without dropout, the loss of a second forward with it, as the released script has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import Comparison
from reference_step import PublishedModels, RowDropout, SharedDropout, forward, published_step, sequence_loss
from steps import SEED, gradient, relative, step
from torch import Tensor

import vapi_fast
from vapi_fast import AlignConfig, ops
from vapi_fast.alignment.models import Models, load_models
from vapi_fast.alignment.step import align_step, make_trainer
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import Condition, Dropout, LlamaGen, catalog
from vapi_fast.reference.straight_through import gumbel_noise
from vapi_fast.runtime.clock import StageClock
from vapi_fast.runtime.errors import ConfigError

Make = Callable[..., AlignConfig]


@pytest.mark.parametrize("changes", [{}, {"noise_prob": 0.5, "temperature": 0.8}, {"prior": "kl", "clip_range": 0.05}])
def test_a_step_is_the_published_one(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, changes: dict
) -> None:
    """Loss, gradient and clipped share, where each of the G rows of an image has its masks, in plain PyTorch."""
    config = tiny_config(recipe="va-pi", prior_weight=0.3, micro_batch=3, **changes)
    figures, ours, found = step(tiny_models, config, tiny_batch)
    tiny_models.generator.zero_grad()
    same = {"tokens": found.tokens, "drawn": found.rollouts, "shared_masks": True}
    theirs = published_step(PublishedModels.of(tiny_models), config, tiny_batch, SEED, **same)
    assert figures["loss"] == pytest.approx(theirs["loss"].item(), rel=1e-5, abs=3e-6)
    assert relative(ours, gradient(tiny_models)) < 1e-5
    assert figures["clipped"] == pytest.approx(theirs["clipped"].item(), abs=2e-3)  # a ratio on the boundary may differ
    assert 0.2 < figures["clipped"] < 1  # the clip is active


def test_rollouts_are_those_of_evaluation_mode(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    """Bit for bit those of a step without dropout, in which no ratio is clipped."""
    lean, _, without = step(tiny_models, tiny_config(), tiny_batch)
    released, _, found = step(tiny_models, tiny_config(recipe="va-pi"), tiny_batch)
    _, _, dropped = step(tiny_models, tiny_config(dropout=0.1), tiny_batch)
    assert torch.equal(found.rollouts, without.rollouts)
    assert torch.equal(found.rewards, without.rewards)
    assert (dropped.rollouts != without.rollouts).double().mean() > 0.01
    assert lean["clipped"] == 0
    assert released["cross_entropy"] > lean["cross_entropy"] + 0.02


def test_the_row_without_a_class_is_trained(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    table = tiny_models.generator.cls_embedding.embedding_table.weight
    for label_dropout in (0.0, 0.7):
        step(tiny_models, tiny_config(recipe="va-pi", label_dropout=label_dropout), tiny_batch)
        assert bool(table.grad[-1].any()) is (label_dropout > 0)


@pytest.mark.parametrize("rollouts", ["teacher-forced", "free"])
def test_masks_do_not_depend_on_micro_batches(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, rollouts: str
) -> None:
    changes, batch = (
        {"recipe": "va-pi", "rollouts": rollouts, "group_size": 2, "batch_size": 3},
        tiny_batch.take(slice(3)),
    )
    figures, whole, _ = step(tiny_models, tiny_config(**changes), batch)
    assert figures["clipped"] > 0.1
    for micro_batch in (1, 2):
        split_figures, split, _ = step(tiny_models, tiny_config(micro_batch=micro_batch, **changes), batch)
        assert split_figures == pytest.approx(figures, rel=1e-5, abs=1e-6)
        assert relative(split, whole) < 1e-5


def test_free_rollouts_have_masks_of_their_own(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []
    states = Dropout.states
    monkeypatch.setattr(Dropout, "states", lambda self, x, site: ids.append(self.sample_ids) or states(self, x, site))
    config = tiny_config(recipe="va-pi", rollouts="free", group_size=2, batch_size=2)
    step(tiny_models, config, tiny_batch.take(slice(2)))
    policy, prior = (set(found.tolist()) for found in (ids[0], ids[-1]))
    assert len(policy) == 4  # a sequence each
    assert prior == {0, 1}
    assert not policy & prior


def test_the_comparison_gives_both_the_same_masks(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    config = tiny_config(recipe="va-pi")
    compared = Comparison()
    compared.prepare(tiny_models, config, torch.device("cpu"))
    compared.gradients(tiny_models, config, tiny_batch, SEED, StageClock())
    assert compared.record()["comparison"]["gradient_relative_error"] < 1e-5


def test_the_published_step_draws_masks_for_each_row(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    """By PyTorch's generator: other ones each time, and with a loss near the one of shared masks."""
    config, theirs = tiny_config(recipe="va-pi", group_size=8), PublishedModels.of(tiny_models)
    same = {"tokens": tiny_models.tokenizer.encode(tiny_batch.images)}
    losses = [published_step(theirs, config, tiny_batch, SEED, **same)["loss"].item() for _ in range(2)]
    assert losses[0] != losses[1]
    figures, _, _ = step(tiny_models, config, tiny_batch)
    assert losses == pytest.approx([figures["loss"]] * 2, abs=0.05)


DRAWS, CHUNKS = 96, 40


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.1, 0.0), (0.0, 0.5)])
def test_shared_masks_leave_the_expected_gradient_as_it_is(tiny_config: Make, shares: tuple[float, float]) -> None:
    """Of 3 840 draws of masks, one for a group of four, and one for each row as released: within the standard error."""
    torch.manual_seed(0)
    model = LlamaGen.from_name("b", layers=2, heads=2, width=16, vocab_size=11, grid_size=2, num_classes=3)
    for parameter in model.parameters():
        parameter.data *= 8
    config = tiny_config(recipe="va-pi", prior_weight=0.3)
    labels, targets, drawn = torch.tensor([1]), torch.randint(11, (1, 4)), torch.randint(11, (1, 4, 4))
    advantages = torch.tensor([[1.2, -0.7, 0.4, -0.9]])
    with torch.no_grad():
        logprobs = model(targets[:, :-1], labels).log_softmax(-1)
    old = logprobs.gather(-1, drawn.transpose(1, 2)).transpose(1, 2)

    def shared(chunk: int, shares: tuple[float, float]) -> Tensor:
        dropout = Dropout(*shares, SEED, torch.arange(DRAWS) + chunk * DRAWS)
        hidden = model.hidden(targets[:, :-1].expand(DRAWS, -1), Condition(labels.expand(DRAWS)), dropout)
        rows = {"tokens": drawn, "advantages": advantages, "targets": targets, "old_logprobs": old}
        rows = {name: value.expand(DRAWS, *value.shape[1:]) for name, value in rows.items()}
        return ops.policy_loss(**model.head.operands(hidden), **rows, prior_weight=0.3).loss

    def each_row(_: int) -> Tensor:
        rows = {"drawn": drawn, "advantages": advantages, "old_logprobs": old}
        part = {name: value.flatten(0, 1).repeat(DRAWS, *[1] * (value.ndim - 2)) for name, value in rows.items()}
        part["targets"] = targets.repeat(4 * DRAWS, 1)
        logits = forward(model, part["targets"][:, :-1], Condition(labels.repeat(4 * DRAWS)), RowDropout(*shares))
        return sequence_loss(config, part, logits, logits.detach())[0]

    def estimate(loss: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and squared standard error of the gradient, in random directions: its elements go together."""
        found = []
        for chunk in range(CHUNKS):
            gradients = torch.autograd.grad(loss(chunk), list(model.parameters()))
            found.append(directions @ torch.cat([each.flatten() for each in gradients]).double())
        return torch.stack(found).mean(0), torch.stack(found).var(0) / CHUNKS

    directions = torch.randn(200, sum(p.numel() for p in model.parameters()), dtype=torch.float64)

    def distance(shares: tuple[float, float]) -> float:
        """Mean square of the differences in their standard errors: 1 where there is none, by at most a quarter off."""
        mean, error = estimate(lambda chunk: shared(chunk, shares))
        return float(((mean - released[0]).square() / (error + released[1])).mean())

    released = estimate(each_row)
    assert distance(shares) < 1.6
    assert distance((0.0, 0.0)) > 4


def test_a_recipe_is_values_that_flags_win_over(tiny_config: Make) -> None:
    released, lean = tiny_config(recipe="va-pi"), tiny_config(recipe="lean")
    assert (released.rollout_mode, released.dropout, released.label_dropout) == ("eval", 0.1, 0.1)
    assert released.second_forward
    assert (lean.rollout_mode, lean.dropout, lean.label_dropout, lean.second_forward) == ("train", 0, 0, False)
    assert tiny_config(recipe="va-pi", dropout=0.0).label_dropout == 0.1
    assert not tiny_config(recipe="va-pi", dropout=0.0, label_dropout=0.0).second_forward
    assert tiny_config().recipe == "lean"
    paper = {name: found.preset("align")["recipe"] for name, found in catalog.CATALOG.items()}
    assert {paper.pop(name) for name in ("janus-pro-1b", "janus-pro-7b", "tiny-janus")} == {"janus"}
    assert {paper.pop(name) for name in ("tiny", "tiny-text")} == {"lean"}
    assert {*paper.values()} == {"va-pi"}
    assert all(values.keys() >= catalog.LEAN.keys() for values in catalog.RECIPES.values())
    with pytest.raises(ConfigError, match=r"^--recipe va-phi: unknown, choose one of lean, va-pi, ste"):
        tiny_config(recipe="va-phi")
    with pytest.raises(ConfigError, match=r"^--codes raw needs --method ste: --method vapi decodes tokens"):
        tiny_config(recipe="ste", method="vapi")


def test_the_clipped_share_is_reported(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    for recipe, low, high in (("va-pi", 0.2, 0.95), ("lean", 0, 0)):
        figures, _ = align_step(make_trainer(tiny_models, tiny_config(recipe=recipe)), tiny_batch, 0).read()
        assert low <= figures["clipped"] <= high


def test_straight_through_as_released(tiny_config: Make, tiny_batch: ImageBatch) -> None:
    """MSE alone, of a hard draw's raw code vectors, through a softmax: by autograd on the plain forward."""
    config = tiny_config(recipe="ste", micro_batch=3)
    tiny_models = load_models(config, torch.device("cpu"))
    assert (config.lr, config.weight_decay, config.beta2) == (1e-5, 1e-2, 0.95)
    assert make_trainer(tiny_models, config).optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    figures, ours, found = step(tiny_models, config, tiny_batch)
    generator, tokenizer, ids = tiny_models.generator, tiny_models.tokenizer, tiny_batch.sample_ids
    generator.zero_grad()
    logits = forward(generator, found.tokens[:, :-1], Condition(tiny_batch.labels), SharedDropout(0.1, 0.1, SEED, ids))
    soft = (logits + gumbel_noise(logits.shape, SEED, ids, torch.float32, logits.device)).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).float()
    vectors = (hard - soft.detach() + soft) @ tokenizer.quantize.embedding.weight
    loss = (tokenizer.decode_embeddings(vectors) - tiny_batch.images).square().mean()
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative(ours, gradient(tiny_models)) < 1e-5
    normalised, _, _ = step(tiny_models, tiny_config(recipe="ste", codes="normalised"), tiny_batch)
    assert abs(normalised["loss"] - loss.item()) > 1e-5  # the tiny codebook is nearly normalised as it is stored


@pytest.mark.usefixtures("image_sets")
def test_a_resumed_run_draws_the_same_masks(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from vapi_fast.alignment import loop

    config = tiny_config(recipe="va-pi", batch_size=2, steps=2, checkpoint_every=1)
    whole = vapi_fast.align(config)
    took = loop.align_step

    def broken(trainer: object, batch: object, at: int, **options: object) -> object:
        if at == 1:
            raise KeyboardInterrupt
        return took(trainer, batch, at, **options)

    folder = {"output_dir": config.output_dir.with_name("again")}
    again = {"recipe": "va-pi", "batch_size": 2, "steps": 2, "checkpoint_every": 1, **folder}
    with monkeypatch.context() as patched:
        patched.setattr(loop, "align_step", broken)
        with pytest.raises(KeyboardInterrupt):
            vapi_fast.align(tiny_config(**again))
    torch.manual_seed(99)
    resumed = vapi_fast.align(tiny_config(**again, resume=True))
    assert resumed["curves"] == whole["curves"]
    assert all(share > 0.1 for share in whole["curves"]["clipped"])
