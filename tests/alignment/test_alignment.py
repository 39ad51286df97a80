"""The alignment step against the published recipe, and its independence of micro-batches and ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from reference_step import PublishedModels, published_step
from steps import gradient, relative
from torch import Tensor

from vapi_fast import AlignConfig, ops
from vapi_fast.alignment.figures import METRICS
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.rollout import roll_out, teacher_forced_hidden, token_logprobs
from vapi_fast.alignment.step import accumulate_gradients, align_step, make_trainer
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.models import Condition
from vapi_fast.runtime.errors import NonFiniteError

Make = Callable[..., AlignConfig]


def accumulated(models: Models, config: AlignConfig, batch: ImageBatch, seed: int) -> dict[str, float]:
    """Our gradients, added to the generator's, and the means of METRICS."""
    means = accumulate_gradients(models, config, batch, seed, nullcontext).means
    return dict(zip(METRICS, means.tolist(), strict=True))


def our_gradient(models: Models, config: AlignConfig, batch: ImageBatch, step: int = 3) -> tuple[float, Tensor]:
    models.generator.zero_grad()
    metrics = accumulated(models, config, batch, ops.fold_seed(config.seed, step))
    return metrics["loss"], gradient(models)


@pytest.mark.parametrize("noise_prob", [0.0, 0.5])
@pytest.mark.parametrize("prior", ["ce", "kl"])
def test_shared_forward_equals_published_recipe(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, prior: str, noise_prob: float
) -> None:
    """One forward an image for all G rollouts gives the loss and the gradient of the G-fold repeated batch."""
    config = tiny_config(prior=prior, noise_prob=noise_prob, prior_weight=0.3)
    torch.manual_seed(1)
    for parameter in tiny_models.generator.parameters():  # away from the base, so that the KL term is not zero
        parameter.data += 0.02 * parameter.std() * torch.randn_like(parameter)
    loss, ours = our_gradient(tiny_models, config, tiny_batch)

    seed = ops.fold_seed(config.seed, 3)
    tokens = tiny_models.tokenizer.encode(tiny_batch.images)
    draw = {"seed": seed, "sample_ids": tiny_batch.sample_ids}
    drawn = roll_out(tiny_models.generator, tokens, Condition(tiny_batch.labels), config, **draw).tokens
    tiny_models.generator.zero_grad()
    theirs = PublishedModels.of(tiny_models)
    published_loss = published_step(theirs, config, tiny_batch, seed, tokens=tokens, drawn=drawn)["loss"].item()
    # The policy term cancels: its parts are of order 1, in float32.
    assert loss == pytest.approx(published_loss, rel=1e-5, abs=3e-6)
    assert relative(ours, gradient(tiny_models)) < 1e-5


def test_published_recipe_draws_from_the_same_distribution(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    """Its own multinomial draws have the mean log-probability that ours have: the negative entropy."""
    from reference_step import draw

    config = tiny_config(group_size=64)
    tokens = tiny_models.tokenizer.encode(tiny_batch.images)
    hidden = teacher_forced_hidden(
        tiny_models.generator, tokens, Condition(tiny_batch.labels), config, seed=0, sample_ids=tiny_batch.sample_ids
    )
    head = tiny_models.generator.head
    theirs = draw(hidden @ head.weight.T, 64, 1.0)
    ours = roll_out(
        tiny_models.generator, tokens, Condition(tiny_batch.labels), config, seed=0, sample_ids=tiny_batch.sample_ids
    ).tokens
    logprobs = [token_logprobs(hidden, head, drawn, 1.0).detach().double() for drawn in (ours, theirs)]
    error = sum(x.var().item() / x.numel() for x in logprobs) ** 0.5
    assert abs(float(logprobs[0].mean() - logprobs[1].mean())) < 5 * error


@pytest.mark.parametrize("method", ["vapi", "ste", "ntp"])
def test_gradient_does_not_depend_on_micro_batch(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, method: str
) -> None:
    whole_loss, whole = our_gradient(tiny_models, tiny_config(method=method), tiny_batch)
    for micro_batch in (1, 3):
        config = tiny_config(method=method, micro_batch=micro_batch)
        loss, split = our_gradient(tiny_models, config, tiny_batch)
        assert loss == pytest.approx(whole_loss, rel=1e-5, abs=1e-6)
        assert relative(split, whole) < 1e-5


def test_kl_is_zero_at_the_base_and_its_gradient_too(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    config = tiny_config(prior="kl", prior_weight=1.0)
    metrics = accumulated(tiny_models, config, tiny_batch, 1)
    assert abs(metrics["kl"]) < 1e-6
    with_kl = gradient(tiny_models)
    tiny_models.generator.zero_grad()
    accumulated(tiny_models, tiny_config(prior_weight=0.0), tiny_batch, 1)
    assert relative(with_kl, gradient(tiny_models)) < 1e-5


@pytest.mark.parametrize(
    ("method", "metric", "lr"), [("vapi", "reward", 5e-5), ("ste", "reward", 1e-4), ("ntp", "cross_entropy", 1e-4)]
)
def test_steps_improve_what_they_optimise(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, method: str, metric: str, lr: float
) -> None:
    """Ten steps on one batch raise the reward of new draws (lower the cross-entropy)."""
    config = tiny_config(method=method, lr=lr, prior_weight=0.0, group_size=16)
    trainer = make_trainer(tiny_models, config)
    measured = [align_step(trainer, tiny_batch, s).read()[0][metric] for s in range(10)]
    gain = sum(measured[-3:]) / 3 - sum(measured[:3]) / 3
    assert gain > 0.02 if metric == "reward" else gain < -0.1, measured


def test_dropout_changes_the_forward_only_when_asked(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch
) -> None:
    config = tiny_config(method="ntp")
    plain = our_gradient(tiny_models, config, tiny_batch)[0]
    assert our_gradient(tiny_models, config, tiny_batch)[0] == plain
    for changes in ({"dropout": 0.1}, {"label_dropout": 0.9}):
        assert our_gradient(tiny_models, tiny_config(method="ntp", **changes), tiny_batch)[0] != plain


@pytest.mark.parametrize("broken", ["reward", "loss", "gradient"])
def test_non_finite_stops_before_the_optimizer_step(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_models, tiny_config())
    before = copy.deepcopy(tiny_models.generator.state_dict())
    batch = tiny_batch
    if broken == "reward":
        images = batch.images.clone()
        images[2, 0, 5, 5] = float("nan")
        batch = batch._replace(images=images)
        expected = rf"mse is not finite \(stage decode\) for the images with ids \[{int(batch.image_ids[2])}\]"
    elif broken == "loss":
        tiny_models.generator.norm.weight.data[0] = float("inf")
        before = copy.deepcopy(tiny_models.generator.state_dict())
        expected = r"is not finite \(stage \w+\) for the images with ids"
    else:
        tiny_models.generator.norm.weight.register_hook(lambda grad: grad * float("inf"))
        expected = "gradient is not finite"
    with pytest.raises(NonFiniteError, match=expected):
        align_step(trainer, batch, 0).read()
    align_step(trainer, tiny_batch, 1)  # launched before the host knows
    for name, value in tiny_models.generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_config_is_frozen(tiny_config: Make) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().lr = 1.0
