"""AdamW, gradient clipping and steps that are left out: plain parameters, and those that FSDP2 has sharded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vapi_fast.alignment import optimizer as optimization
from vapi_fast.alignment.optimizer import clip_gradients, make_optimizer, step_unless

CONFIG = SimpleNamespace(lr=1e-2, weight_decay=0.1, beta2=0.99)
OK, FAILED = torch.tensor(0.0), torch.tensor(1.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10, bias=False)
        self.norm = nn.RMSNorm(10)
        self.last = nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.fixture(params=["plain", "sharded"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    if request.param == "plain":
        yield Model()
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = Model()
        fully_shard(sharded.first, mesh=mesh)
        yield fully_shard(sharded, mesh=mesh)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A copy of a parameter, gradient or moment, put together from its shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    model.zero_grad(set_to_none=True)
    (scale * model(inputs).square().sum()).backward()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, then each parameter's moments and step count."""
    kept = (optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq", "step"))
    return [whole(tensor) for tensor in (*model.parameters(), *kept)]


def test_steps_are_those_of_plain_adamw(model: Model) -> None:
    """Weight decay for the matrices alone, betas 0.9 and the configured one."""
    plain = Model()
    matrices, norms = [plain.first.weight, plain.last.weight], [plain.norm.weight]
    expected = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.99),
        foreach=False,
        fused=False,
    )
    optimizer = make_optimizer(model, CONFIG)
    for step in range(5):
        backward(model, step)
        backward(plain, step)
        step_unless(optimizer, OK)
        expected.step()
    for found, exactly in zip(state_of(model, optimizer), state_of(plain, expected), strict=True):
        assert (found - exactly).norm() <= 1e-6 * exactly.norm()
    assert not torch.allclose(whole(model.norm.weight), Model().norm.weight, atol=1e-2)


@pytest.mark.parametrize("failed", [FAILED, torch.tensor(3.0), torch.tensor(math.nan)])
def test_a_failed_step_changes_nothing(model: Model, failed: Tensor) -> None:
    """Also the very first one, before there are moments; the next good step is the one that it would have been."""
    undisturbed = Model()
    optimizer, expected = make_optimizer(model, CONFIG), make_optimizer(undisturbed, CONFIG)
    before = [whole(p) for p in model.parameters()]
    backward(model, 100, scale=math.inf)
    step_unless(optimizer, failed)
    assert all(torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))
    for step in range(2):
        for some, its_optimizer in ((model, optimizer), (undisturbed, expected)):
            backward(some, step)
            step_unless(its_optimizer, OK)
        kept = state_of(model, optimizer)
        backward(model, 101 + step, scale=math.nan)
        step_unless(optimizer, failed)
        for found, unchanged in zip(state_of(model, optimizer), kept, strict=True):
            assert torch.equal(found, unchanged)
    assert [p["step"].item() for p in optimizer.state.values()] == [2.0] * 3
    for found, exactly in zip(state_of(model, optimizer), state_of(undisturbed, expected), strict=True):
        assert (found - exactly).norm() <= 1e-6 * exactly.norm()
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_scales_the_whole_gradient(model: Model, max_norm: float) -> None:
    backward(model, 0)
    before = torch.cat([whole(p.grad).flatten() for p in model.parameters()])
    norm = clip_gradients(model.parameters(), max_norm)
    after = torch.cat([whole(p.grad).flatten() for p in model.parameters()])
    assert not isinstance(norm, DTensor)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-6)
    torch.testing.assert_close(after, before * min(1.0, max_norm / before.norm().item()), rtol=1e-5, atol=0.0)


def test_parameters_without_gradient_are_left_out(model: Model) -> None:
    backward(model, 0)
    model.last.weight.grad = None
    expected = torch.cat([whole(p.grad).flatten() for p in (model.first.weight, model.norm.weight)]).norm().item()
    assert clip_gradients(model.parameters(), 1.0).item() == pytest.approx(expected, rel=1e-6)
    before = whole(model.last.weight)
    step_unless(make_optimizer(model, CONFIG), OK)
    assert torch.equal(whole(model.last.weight), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_tells_of_a_gradient_that_is_not_finite(model: Model, bad: float) -> None:
    backward(model, 0)
    with torch.no_grad():
        gradient = model.norm.weight.grad
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[3] = bad
    assert not clip_gradients(model.parameters(), 1.0).isfinite()


class FakeFusedAdam:
    """apex's signature; counts its steps."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], adam_w_mode: bool) -> None:
        self.groups, self.settings, self.steps = groups, (lr, betas, adam_w_mode), 0

    def step(self) -> None:
        self.steps += 1


def test_apex_is_used_for_plain_cuda_parameters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "apex_fused_adam", lambda: FakeFusedAdam)
    assert isinstance(make_optimizer(Model(), CONFIG), torch.optim.AdamW)
    weights = {name: SimpleNamespace(is_cuda=True, requires_grad=True) for name in ("first.weight", "norm.weight")}
    generator = SimpleNamespace(named_parameters=weights.items, parameters=weights.values)
    optimizer = make_optimizer(generator, CONFIG)
    assert isinstance(optimizer, FakeFusedAdam)
    assert optimizer.settings == (1e-2, (0.9, 0.99), True)
    assert [(group["params"], group["weight_decay"]) for group in optimizer.groups] == [
        ([weights["first.weight"]], 0.1),
        ([weights["norm.weight"]], 0.0),
    ]
    for failed in (FAILED, OK, FAILED):
        step_unless(optimizer, failed)
    assert optimizer.steps == 1


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    model = Model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs, failed = torch.randn(4, 6, device="cuda"), torch.zeros((), device="cuda")
    for _ in range(3):
        model(inputs).square().sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = clip_gradients(model.parameters(), 1.0)
            step_unless(optimizer, torch.maximum(failed, (~norm.isfinite()).float()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    before = [p.detach().clone() for p in model.parameters()]
    step_unless(optimizer, failed + 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert [p["step"].item() for p in optimizer.state.values()] == [3.0] * 3
