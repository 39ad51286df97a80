"""Micro-batches as graphs, without a GPU: what a graph would do again on the tensors that it had, a tape does here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vapi_fast import AlignConfig
from vapi_fast.alignment import micro_batches, recordings, rollout
from vapi_fast.alignment.losses import draw_rollouts
from vapi_fast.alignment.models import Models, load_models
from vapi_fast.alignment.recordings import Recordings, Standing
from vapi_fast.alignment.rollout import weights_of_step
from vapi_fast.alignment.step import Gradients, accumulate_gradients, align_step, make_trainer
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.ops.checks import ArgumentChecks
from vapi_fast.runtime import forms, graphs
from vapi_fast.runtime.clock import Clock

Make = Callable[..., AlignConfig]
STEPS = 3
SIDE = 16  # pixels


class Tape(TorchDispatchMode):
    """In the place of a CUDA graph: every operation with the very tensors and numbers that it was called with.

    Nothing is written while it is recorded but into new tensors, which are not a number afterwards; each replay calls
    the operations again, and writes their results to where they were. Raises RuntimeError where the host reads.
    """

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a number")
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs, []))
            return kwargs.get("out", args[0]) if func._schema.returns else None
        result = func(*args, **kwargs)
        given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        results = tensors(result)
        if not any(each.untyped_storage().data_ptr() in given for each in results):  # a view is one for ever
            self.calls.append((func, args, kwargs, results))
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for *_, results in self.calls:
            for each in results:
                if each.is_floating_point():
                    each.data.fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        Tape.replays += 1
        for func, args, kwargs, results in self.calls:
            found = func(*args, **kwargs)
            for place, value in zip(results, tensors(found) if results else [], strict=True):
                place.data.copy_(value)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for each in value for found in tensors(each)] if isinstance(value, list | tuple) else []


@contextmanager
def on_tape(tape: Tape, pool: None, what: str) -> Iterator[None]:
    with tape:
        yield


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches on a CPU can be recorded."""
    monkeypatch.setattr(micro_batches, "DEVICES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(graphs, "recorded", on_tape)
    monkeypatch.setattr(ArgumentChecks, "token_range", lambda *_: None)  # of tokens on a CPU, which it reads
    monkeypatch.setattr(Tape, "replays", 0)


def batch_of(step: int, batch: ImageBatch) -> ImageBatch:
    """Other images, classes and sample ids in each step; of 16 × 16 tokens."""
    images = batch.images[..., :SIDE, :SIDE].roll(step, 0)
    return batch._replace(images=images, labels=(batch.labels + step) % 9, sample_ids=(batch.sample_ids + step) % 4)


def run(
    config: AlignConfig, batch: ImageBatch, form: str, device: str = "cpu"
) -> tuple[Models, list[tuple[Gradients, list[Tensor]]]]:
    """The models after STEPS steps, and what each of them found, with its gradients before they were clipped."""
    models, found = load_models(config, torch.device(device)), []
    trainer = make_trainer(models, config)

    def noted(*args: Any) -> Gradients:
        result = accumulate_gradients(*args)
        gradients = [p.grad.clone() for p in models.generator.parameters() if p.grad is not None]
        found.append((result, gradients))
        return result

    with forms.taking(micro_batch=form):
        for step in range(STEPS):
            align_step(trainer, batch_of(step, batch).to(torch.device(device)), step, gradients=noted)
    return models, found


def assert_same(config: AlignConfig, batch: ImageBatch) -> None:
    (expected, usual), (models, found) = (run(config, batch, form) for form in ("eager", "graph"))
    for (result, gradients), (other, others) in zip(usual, found, strict=True):
        for name, ours, theirs in zip(Gradients._fields, result, other, strict=True):
            assert torch.equal(ours, theirs), name
        assert len(gradients) == len(others)
        for ours, theirs in zip(gradients, others, strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(expected.generator.parameters(), models.generator.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def small(make: Make, **options: Any) -> AlignConfig:
    usual = {"micro_batch": 2, "group_size": 2, "recipe": "lean", "lr": 1e-3, "image_size": SIDE}
    return make(**(usual | options))


CASES: dict[str, dict[str, Any]] = {
    "one forward": {"recipe": "lean"},
    "dropout": {"rollout_mode": "train", "dropout": 0.1, "label_dropout": 0.5, "noise_prob": 0.3},
    "two forwards": {"recipe": "va-pi"},
    "filters and KL": {"prior": "kl", "top_k": 50, "temperature": 0.8},
    "credit by token": {"credit_window": 3},
    "shuffled": {"control": "shuffled"},
    "next token": {"method": "ntp", "noise_prob": 0.3},
    "head": {"train": "head"},
    "adapters": {"train": "lora"},
    "a smaller one at last": {"micro_batch": 3},
    "one a step": {"micro_batch": 4},
}


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_same_from_graphs(
    tiny_config: Make, tiny_batch: ImageBatch, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "AUTOCAST", {"cpu"})
    config = small(tiny_config, **CASES[case])
    assert_same(config, tiny_batch)
    stages = 3 if config.method == "ntp" else 4 + config.second_forward
    later = (STEPS - 1) * -(-config.batch_size // config.micro_batch)
    assert Tape.replays == later * stages


def without(field: str) -> Callable[..., None]:
    """`Standing.take`, which leaves one of the batch's tensors as it was."""
    take = Standing.take

    def wrong(self: Standing, batch: ImageBatch, tokens: Tensor, seed: int) -> None:
        old = self.tokens.clone() if field == "tokens" else tokens
        kept = batch if field in ("tokens", "seed") else batch._replace(**{field: getattr(self.batch, field).clone()})
        take(self, kept, old, 5 if field == "seed" else seed)

    return wrong


def first_alone(self: Standing, advantages: Tensor) -> None:
    self.advantages = advantages.clone() if self.advantages is None else self.advantages


FAULTS: dict[str, tuple[object, str, object]] = {
    **{
        f"{field} not copied": (Standing, "take", without(field))
        for field in ("tokens", "labels", "sample_ids", "seed")
    },
    "advantages not copied": (Standing, "learn_from", first_alone),
    "gradients elsewhere": (Recordings, "hold_gradients", lambda *_: None),
    "casts elsewhere": (micro_batches, "weights_of_step", lambda generator, kept=None: weights_of_step(generator)),
    "a seed of Python's": (
        micro_batches,
        "draw_rollouts",
        lambda *given, **draw: draw_rollouts(*given, **draw | {"seed": int(draw["seed"])}),
    ),
}


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_graph_does_not_see_is_found(
    tiny_config: Make, tiny_batch: ImageBatch, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "AUTOCAST", {"cpu"})
    monkeypatch.setattr(*FAULTS[fault])
    config = small(tiny_config, noise_prob=0.5, micro_batch=4)
    with pytest.raises(AssertionError):
        assert_same(config, tiny_batch)


@pytest.mark.usefixtures("taped")
def test_memory_is_planned_for_one_micro_batch(
    tiny_config: Make, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape that comes later gives up what was recorded, until there are too many; so does a measurement."""
    config = small(tiny_config, micro_batch=4, method="ntp")
    models, counts = load_models(config, torch.device("cpu")), []

    def step(images: int) -> int:
        before = Tape.replays
        accumulate_gradients(models, config, batch_of(0, tiny_batch).take(slice(images)), 1, nullcontext)
        counts.append(sum(each.halves is not None for each in models.recordings.shapes.values()))
        return Tape.replays - before

    with forms.taking(micro_batch="graph"):
        replays = [step(images) for images in (4, 4, 3, 3, 4)]
        assert [each > 0 for each in replays] == [False, True, False, True, True]
        assert counts == [0, 1, 0, 1, 2]
        models.recordings.release()
        assert not models.recordings.casts
        assert step(4) > 0
        assert counts[-1] == 1
        monkeypatch.setattr(recordings, "MOST_SHAPES", 2)
        assert not any(step(images) for images in (2, 2, 4, 4))
        assert counts[-1] == 0


@pytest.mark.usefixtures("taped")
def test_stages_are_replayed_under_their_clock_and_what_waits_is_refused() -> None:
    x, seen = torch.ones(2), []

    def function(clock: Clock) -> Tensor:
        with clock("forward"):
            doubled = 2 * x
        with clock("loss"):
            return doubled.sum()

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        seen.append(stage)
        yield

    stages = graphs.RecordedStages(function, None)
    x.fill_(3)
    assert stages(clock) == 12
    assert seen == ["forward", "loss"]

    def waiting(clock: Clock) -> None:
        with clock("loss"):
            x.sum().item()

    with pytest.raises(RuntimeError, match="the host reads"):
        graphs.RecordedStages(waiting, None)


def test_graphs_are_for_whole_weights_on_a_gpu(
    tiny_models: Models, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forms.taking(micro_batch="graph"):
        assert not micro_batches.is_recorded(tiny_models, tiny_config())
        monkeypatch.setattr(micro_batches, "DEVICES", {"cpu"})
        assert micro_batches.is_recorded(tiny_models, tiny_config())
        assert not micro_batches.is_recorded(tiny_models, tiny_config(method="ste"))
    assert not micro_batches.is_recorded(tiny_models, tiny_config())


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["one forward", "dropout", "two forwards", "filters and KL", "adapters", "next token"])
def test_graphs_on_a_gpu(tiny_config: Make, tiny_batch: ImageBatch, case: str) -> None:
    """But for the order in which gradients of embeddings are added, and draws that this moves across a bound."""
    config = small(tiny_config, **CASES[case] | {"lr": 1e-7})
    usual, found = (run(config, tiny_batch, form, "cuda")[1] for form in ("eager", "graph"))
    for (result, gradients), (other, others) in zip(usual, found, strict=True):
        assert torch.equal(result.tokens, other.tokens)
        if result.rollouts.numel():
            assert (result.rollouts == other.rollouts).double().mean() > 0.99
        ours, theirs = (torch.cat([each.flatten() for each in every]) for every in (gradients, others))
        assert float((ours - theirs).norm() / ours.norm()) < 0.05
