"""Top-k and top-p: LlamaGen's filters, their ties and their ends."""

from __future__ import annotations

import math

import pytest
import torch
from draws import FILTERS, assert_group_sample, draw
from fused import DEVICE, DTYPES

on_both = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@on_both
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("filters", [*FILTERS, {"top_k": 5000}, {"top_k": 0, "top_p": 1e-9}, {"top_k": 1}])
def test_filters(filters: dict[str, float], dtype: torch.dtype) -> None:
    assert_group_sample(2 * torch.randn(1, 2, 1000), 8, dtype, seed=11, **filters)


@on_both
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.77, 0.9])
@pytest.mark.parametrize("top_k", [0, 150])
def test_ties(top_k: int, top_p: float) -> None:
    """Half of the kept ones are ties of the last; one tie more or less shifts all log-probs by more than 1e-3."""
    logits = torch.randint(0, 4, (1, 2, 300)) - 2.0
    logits[logits == 0] *= torch.randint(0, 2, (int((logits == 0).sum()),)) * 2 - 1  # zeros of both signs
    assert_group_sample(logits, 32, torch.bfloat16 if top_k else torch.float32, seed=4, top_k=top_k, top_p=top_p)


@on_both
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 0.3, "top_k": 2}])
def test_equal_rows(filters: dict[str, float]) -> None:
    for fill in (0.0, 1e4, -1e4):
        assert_group_sample(torch.full((1, 1, 257), fill), 32, seed=1, **filters)


@on_both
def test_ties_stay_under_top_k_and_go_by_index_under_top_p() -> None:
    for row in ([0.0, 2.0, -1.0, 2.0, 2.0], [-4.0, -0.0, -9.0, 0.0, -0.0]):
        logits = torch.tensor(row, device=DEVICE).expand(1, 4, 5)  # a token is missed once in 10⁷ times
        tokens, logprobs = draw(logits, 10, seed=0, top_k=2)
        assert set(tokens.flatten().tolist()) == {1, 3, 4}
        torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(3)))
        tokens, logprobs = draw(logits, 10, seed=0, top_p=0.4)
        assert set(tokens.flatten().tolist()) == {1, 3}
        assert (logprobs > -0.71).all()


@on_both
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (0, 1e-9)])
def test_narrowest_filters_give_the_argmax(top_k: int, top_p: float) -> None:
    logits = torch.randn(3, 7, 65, device=DEVICE)
    tokens, logprobs = draw(logits, 4, seed=0, top_k=top_k, top_p=top_p)
    assert torch.equal(tokens, logits.argmax(-1)[:, None].expand(3, 4, 7))
    assert not logprobs.any()


@on_both
def test_a_share_rounded_to_one_keeps_everything() -> None:
    assert_group_sample(torch.randn(1, 2, 200), 16, seed=0, top_p=1 - 1e-12)
    assert_group_sample(torch.randn(1, 2, 200), 16, seed=0, top_p=1 - 1e-12, top_k=9)
    assert_group_sample(torch.zeros(1, 1, 200), 16, seed=0, top_p=1 - 1e-12, top_k=3)
