"""The published recipe beside our step: its layouts, its warm-up, and what counts as whose time and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comparison
import pytest
import torch
from comparison import Comparison, PublishedRecipe, held_bytes
from reference_step import PublishedModels, is_plain, published_step
from torch import Tensor, nn

from vapi_fast import AlignConfig
from vapi_fast.alignment.models import Models, load_models
from vapi_fast.alignment.step import accumulate_gradients
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.runtime.clock import StageClock

Make = Callable[..., AlignConfig]
CPU = torch.device("cpu")


def watched_maps(networks: tuple[nn.Module, ...]) -> list[Tensor]:
    """A list that gets the input, weight and result of every convolution."""
    maps: list[Tensor] = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda conv, given, out: maps.extend([given[0], conv.weight, out]))
    return maps


def compared_with(models: Models, device: torch.device = CPU) -> Comparison:
    found = Comparison()
    found.prepare(models, None, device)
    return found


def test_the_published_side_has_plain_layouts(tiny_config: Make, tiny_batch: ImageBatch) -> None:
    """In every convolution, as in the released code; our own networks stay as they are."""
    config = tiny_config()
    models = load_models(config, CPU)
    ours = [parameter.stride() for parameter in models.tokenizer.parameters()]
    theirs = PublishedModels.of(models)
    assert not all(is_plain(parameter) for parameter in models.tokenizer.parameters())
    maps = watched_maps((theirs.tokenizer, theirs.lpips))
    published_step(theirs, config, tiny_batch, seed=0)
    assert len(maps) > 300
    assert all(is_plain(each) for each in maps)
    assert [parameter.stride() for parameter in models.tokenizer.parameters()] == ours
    for mine, copy in zip(models.tokenizer.parameters(), theirs.tokenizer.parameters(), strict=True):
        assert torch.equal(mine, copy)


def test_a_one_pixel_weight_in_channels_last_is_not_plain() -> None:
    weight = torch.randn(4, 8, 1, 1)
    last = weight.to(memory_format=torch.channels_last)
    assert last.is_contiguous()
    assert (is_plain(weight), is_plain(last)) == (True, False)


def test_the_published_side_computes_in_tf32_and_leaves_the_setting(tiny_config: Make, tiny_models: Models) -> None:
    seen = []

    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    theirs = PublishedModels.of(tiny_models)
    theirs.tokenizer.decoder.register_forward_hook(lambda *_: seen.append(settings()))
    before = settings()
    assert before[0] == "highest"
    batch = ImageBatch(torch.zeros(1, 3, 32, 32), *(torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    published_step(theirs, tiny_config(), batch, seed=0)
    assert set(seen) == {("high", True)}
    assert settings() == before


class Published:
    """The published step, noting the images and the stages' seconds of each call."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.seconds: list[float] = []

    def __call__(self, models: Any, config: Any, batch: ImageBatch, seed: int, clock: Any, **same: Any) -> Any:
        before = sum(clock.seconds(wait=True).values())
        result = published_step(models, config, batch, seed, clock, **same)
        self.images.append(len(batch.images))
        self.seconds.append(sum(clock.seconds(wait=True).values()) - before)
        return result


def test_a_chunk_is_run_before_the_first_compared_step(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no figure but in what the comparison took, and leaves our gradients and the agreement as they are."""
    config = tiny_config()
    published = Published()
    monkeypatch.setattr(comparison, "published_step", published)
    compared = compared_with(tiny_models)
    clock = StageClock()
    for seed in (1, 2):
        tiny_models.generator.zero_grad()
        compared.gradients(tiny_models, config, tiny_batch, seed, clock)
        found = [parameter.grad.clone() for parameter in tiny_models.generator.parameters()]
    assert published.images == [2, 4, 4]  # eight sequences, G = 4
    record = compared.record()
    counted = [sum(step.values()) for step in compared.stages["published_recipe"]]
    assert counted == pytest.approx(published.seconds[1:])
    assert compared.seconds == pytest.approx(sum(published.seconds))
    assert record["seconds_per_step"]["published_recipe"] == pytest.approx(sum(counted) / 2)
    assert record["comparison"]["gradient_relative_error"] < 1e-5
    assert record["comparison"]["tokens_equal"] == 1
    tiny_models.generator.zero_grad()
    accumulate_gradients(tiny_models, config, tiny_batch, 2, StageClock())
    for mine, parameter in zip(found, tiny_models.generator.parameters(), strict=True):
        assert torch.equal(mine, parameter.grad)


def test_the_published_recipe_alone_is_warm_only_by_itself(
    tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, alone = Published(), PublishedRecipe()
    monkeypatch.setattr(comparison, "published_step", published)
    alone.prepare(tiny_models, tiny_config(), CPU)
    alone.of_step(0, 0, tiny_config())(tiny_models, tiny_config(), tiny_batch, 1, StageClock())
    assert published.images == [4]


def test_held_memory_counts_each_tensor_once() -> None:
    layer = nn.Linear(3, 5)
    plain = SimpleNamespace(layer=layer, view=layer.weight[1:], inner=[{"bias": layer.bias}, (torch.zeros(7),)])
    plain.inner.append(plain)
    assert held_bytes([plain, layer]) == 4 * (15 + 5 + 7)


class FakeGPU:
    """An allocator's figures: the peak since the reset, and the segments of a graphs' pool."""

    def __init__(self) -> None:
        self.peak = 0
        self.resets = 0

    def reset(self, device: torch.device) -> None:
        self.resets += 1

    def read(self, device: torch.device) -> int:
        return self.peak

    def snapshot(self) -> list[dict[str, Any]]:
        segment = {"segment_pool_id": (0, 1), "total_size": 1000, "allocated_size": 400}
        return [segment, segment | {"total_size": 500}, segment | {"segment_pool_id": (0, 0)}]


def test_each_side_is_charged_for_its_own_memory_alone(
    tiny_models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = FakeGPU()
    for name, method in (("reset_peak_memory_stats", gpu.reset), ("max_memory_allocated", gpu.read)):
        monkeypatch.setattr(torch.cuda, name, method)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", gpu.snapshot)
    compared = compared_with(tiny_models)
    compared.device = torch.device("cuda")
    clock = StageClock()
    gpu.peak = 10**6
    pool = comparison.Pool((0, 1), None)
    kept = torch.zeros(100)
    compared.measured("vapi_fast", clock, lambda: gpu.resets, others=[kept], pools=lambda: [pool, None])
    compared.measured("published_recipe", clock, lambda: gpu.resets, others=[kept, kept[2:]])
    assert gpu.resets == 2
    assert compared.peaks == {"vapi_fast": [10**6 + 700 - 400], "published_recipe": [10**6 - 400]}


def test_what_the_other_side_holds(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    """Ours is not charged for the published networks, nor they for our reward's and our gradients."""
    compared = compared_with(tiny_models)
    charged = {}

    def measured(name: str, clock: Any, run: Any, others: list[object], pools: Any = None) -> Any:
        charged[name] = held_bytes(others)
        return run()

    compared.measured = measured
    sizes = {name: held_bytes([value]) for name, value in compared.published._asdict().items()}
    gradients = 4 * sum(parameter.numel() for parameter in tiny_models.generator.parameters())
    image = tiny_batch.take(slice(1))
    for prior in ("ce", "kl"):
        tiny_models.generator.zero_grad()
        compared.gradients(tiny_models, tiny_config(prior=prior), image, 1, StageClock())
        base = sizes["base"] if prior == "ce" else 0  # with the KL prior ours has one too
        assert charged["vapi_fast"] == sizes["tokenizer"] + sizes["lpips"] + base
        assert charged["published_recipe"] == held_bytes([tiny_models.tokenizer, tiny_models.reward]) + gradients
        assert held_bytes([tiny_models.tokenizer, tiny_models.reward]) > 1.9 * (sizes["tokenizer"] + sizes["lpips"])


def test_the_table_shows_both_peaks() -> None:
    stages = {name: {"decode": 2.0} for name in comparison.PATH_NAMES}
    agreement = {"gradient_relative_error": 1e-6, "advantages_cosine": 1.0, "tokens_equal": 1.0}
    peaks = {"vapi_fast": 61_000_000_000, "published_recipe": 70_500_000_000}
    record = {
        "comparison": {"steps": 2, "stages": stages, "speedup": {"decode": 1.0}, "peak_memory": peaks, **agreement},
        "seconds_per_step": dict.fromkeys(comparison.PATH_NAMES, 2.0),
        "speedup_over_reference": 1.0,
    }
    assert comparison.comparison_table(record)[-1] == "peak memory: vapi-fast 61.0 GB, published recipe 70.5 GB"
    record["comparison"]["peak_memory"] = dict.fromkeys(peaks)
    assert "peak memory" not in comparison.comparison_table(record)[-1]


@pytest.mark.gpu
def test_our_peak_is_that_of_a_run_without_a_comparison(tiny_config: Make, tiny_batch: ImageBatch) -> None:
    device = torch.device("cuda")
    batch = tiny_batch.to(device)
    clock = StageClock(device)

    def loaded() -> Models:
        models = load_models(tiny_config(), device)
        accumulate_gradients(models, tiny_config(), batch, 0, clock)
        models.generator.zero_grad()
        return models

    models = loaded()
    compared = compared_with(models, device)
    compared.measured(
        "vapi_fast",
        clock,
        lambda: accumulate_gradients(models, tiny_config(), batch, 0, clock),
        others=[],
        pool=models.codec.pool,
    )
    alone = compared.peaks["vapi_fast"][0] - held_bytes([compared.published.tokenizer, compared.published.lpips])
    models = compared = None
    gc.collect()

    models = loaded()
    compared = compared_with(models, device)
    compared.gradients(models, tiny_config(), batch, 0, clock)
    assert compared.peaks["vapi_fast"][0] == pytest.approx(alone, rel=0.02)
    assert compared.peaks["published_recipe"][0] > 2 * held_bytes([models.generator])  # weights and gradients
