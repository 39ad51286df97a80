"""Joules that a GPU uses, read from its own counter through NVML (package nvidia-ml-py)."""

from __future__ import annotations

from typing import Any

import torch


class EnergyMeter:
    """Counts from its creation on; the whole GPU's energy, whoever used it.

    Args:
        device: its GPU is found by UUID, as CUDA_VISIBLE_DEVICES may count differently from NVML.
        nvml: the module `pynvml`, initialised (`vapi_fast.runtime.accelerators.nvml`); None where there is none.
    """

    def __init__(self, device: torch.device, nvml: Any) -> None:
        self.nvml = nvml
        self.gpu: Any = None
        if nvml is not None and device.type == "cuda":
            uuid = torch.cuda.get_device_properties(device).uuid
            try:
                self.gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                self.start = self.millijoules()
            except nvml.NVMLError:  # a slice of a GPU, or one older than Volta, has no counter
                self.gpu = None

    def millijoules(self) -> int:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu)

    def joules(self) -> float | None:
        """Energy so far, in J; None where the device has no counter."""
        if self.gpu is None:
            return None
        return (self.millijoules() - self.start) / 1e3
