"""Energy from a GPU's counter, played here by an object with NVML's functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vapi_fast.runtime import accelerators
from vapi_fast.runtime.energy import EnergyMeter

UUIDS = ["6b1f7d2a-0000-1111-2222-333344445555", "0c9e4f00-aaaa-bbbb-cccc-ddddeeeeffff"]


class NVML:
    """Two GPUs, whose counters are in millijoules."""

    class NVMLError(Exception): ...

    def __init__(self) -> None:
        self.counters = {f"GPU-{uuid}": 5_000_000 + i for i, uuid in enumerate(UUIDS)}

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.counters:
            raise self.NVMLError(f"not found: {uuid}")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.counters[handle]


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """UUIDs in the order in which CUDA counts the GPUs: the second of NVML's alone."""
    uuids = [UUIDS[1]]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index or 0])
    )
    return uuids


def test_joules_are_those_of_the_cuda_device_since_the_start(visible: list[str]) -> None:
    nvml = NVML()
    meter = EnergyMeter(torch.device("cuda", 0), nvml)
    nvml.counters[f"GPU-{UUIDS[0]}"] += 77_000  # NVML's first GPU is not CUDA's
    nvml.counters[f"GPU-{UUIDS[1]}"] += 1_234
    assert meter.joules() == pytest.approx(1.234)
    nvml.counters[f"GPU-{UUIDS[1]}"] += 1_000
    assert meter.joules() == pytest.approx(2.234)


def test_no_counter_gives_none(visible: list[str]) -> None:
    assert EnergyMeter(torch.device("cpu"), NVML()).joules() is None
    assert EnergyMeter(torch.device("cuda", 0), None).joules() is None
    visible[0] = "a slice of a GPU"
    assert EnergyMeter(torch.device("cuda", 0), NVML()).joules() is None


def test_an_old_gpu_without_a_counter_gives_none(visible: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(self: NVML, handle: str) -> int:
        raise self.NVMLError("not supported")

    monkeypatch.setattr(NVML, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    assert EnergyMeter(torch.device("cuda", 0), NVML()).joules() is None


def test_nvml_is_optional() -> None:
    assert EnergyMeter(torch.device("cpu"), accelerators.nvml()).joules() is None


@pytest.mark.gpu
def test_a_busy_gpu_uses_energy() -> None:
    meter = EnergyMeter(torch.device("cuda"), accelerators.nvml())
    if meter.joules() is None:
        pytest.skip("no energy counter: nvidia-ml-py is not installed or the GPU has none")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(300):  # about half a second, the counter moves every tenth
        a @ a
    torch.cuda.synchronize()
    assert 5 < meter.joules() < 2000
