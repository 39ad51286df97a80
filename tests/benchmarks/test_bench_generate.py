"""The benchmark of generation: the bytes that bound it, and its figures on a small model."""

from __future__ import annotations

import pytest
import torch
from bench_generate import Setting, agreement, bytes_read, loop_without_cache, table, targets
from race import OURS

from vapi_fast.generation.sequences import sample_groups
from vapi_fast.models import LLAMAGEN_CONFIGS, LlamaGen


def test_bytes_that_xxl_must_read() -> None:
    """As in `vapi_fast.generation.engine`: 2.77 GB of weights a step, and 295 kB a sequence and slot."""
    config = LLAMAGEN_CONFIGS["xxl"]
    weights = bytes_read(config, 0, 2, torch.bfloat16) / 575
    cache = bytes_read(config, 1, 0, torch.bfloat16) / sum(range(2, 577))
    assert weights == pytest.approx(2.77e9, rel=2e-3)
    assert cache == pytest.approx(295e3, rel=1e-3)
    for dtype, rate in ((torch.bfloat16, 54), (torch.float8_e4m3fn, 98), (torch.int8, 93)):
        assert bytes_read(config, 256, 2, dtype) / 3.0e12 == pytest.approx(256 / rate, rel=0.01)


def test_figures_of_a_small_model() -> None:
    torch.manual_seed(0)
    model = LlamaGen.from_name("tiny", layers=1, heads=2, width=64, vocab_size=50, grid_size=3).eval()
    setting = Setting("small", model, torch.arange(10) % 9, rounds=1, loop_tokens=2)
    lengths = []
    hook = model.register_forward_hook(lambda module, inputs, result: lengths.append(inputs[0].shape[1]))
    loop_without_cache(setting)
    hook.remove()
    assert lengths == [2, 6]  # the middles of two halves of 9 tokens
    drawn = sample_groups(model, setting.labels, group_size=1, seed=20251219)
    assert agreement(setting, drawn) == {"equal_draws": 1.0, "logprob_error": pytest.approx(0, abs=1e-5)}
    wrong = drawn._replace(tokens=(drawn.tokens + 1) % 50)
    assert agreement(setting, wrong)["equal_draws"] < 0.2
    rates = {"engine": 30.0, "reference": 3.0}
    row = {
        "setting": "small",
        "sequences": 10,
        "device": "CPU",
        "images_per_second": rates,
        **agreement(setting, drawn),
    }
    row |= {"times_faster": {"engine": 1.0, "reference": 10.0}, "bytes_per_second": 2e9, "share_of_copy": 0.25}
    row["images_per_second"][OURS] = 50.0
    row["targets"] = targets(row, torch.device("cuda"))
    assert [each["met"] for each in row["targets"]] == [True, True]
    row["images_per_second"][OURS] = 49.9
    row["targets"] = targets(row, torch.device("cuda"))
    assert [each["met"] for each in row["targets"]] == [False, True]
    assert targets(row, torch.device("cpu")) == []
    del row["images_per_second"][OURS]
    text = table(row)
    assert "10× LlamaGen's own way: met" in text
    assert "50 images/s: missed" in text
    assert "reference" in text
    assert "10.00× as fast" in text
    assert "2.0 GB/s read, 25% of a copy's" in text
    assert "100.00% equal draws" in text
