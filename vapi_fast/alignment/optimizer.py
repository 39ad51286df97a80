"""AdamW as the recipe has it, gradient clipping, and a step that can be left out, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vapi_fast.alignment.config import OptimizerOptions
from vapi_fast.runtime.accelerators import apex_fused_adam


def make_optimizer(generator: nn.Module, config: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW over what is trained, in one fused kernel; norm weights do not decay.

    apex's FusedAdam where it is installed and all parameters are plain CUDA tensors, else PyTorch's fused AdamW.
    """
    trained = [(name, p) for name, p in generator.named_parameters() if p.requires_grad]
    norms = [p for name, p in trained if "norm" in name]
    others = [p for name, p in trained if "norm" not in name]
    groups = [{"params": others, "weight_decay": config.weight_decay}]
    groups += [{"params": norms, "weight_decay": 0.0}] if norms else []
    betas = (0.9, config.beta2)
    fused_adam = apex_fused_adam()
    if fused_adam and all(p.is_cuda and not isinstance(p, DTensor) for p in generator.parameters()):
        return fused_adam(groups, lr=config.lr, betas=betas, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their L2 norm over all parameters and ranks is at most `max_norm`.

    Returns:
        The norm before, float32 0-d on the device, of the whole gradient also where FSDP2 has sharded it; not finite
        if a gradient is not, and the gradients are then of no use.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_unless(optimizer: torch.optim.Optimizer, failed: Tensor) -> None:
    """One optimizer step, or none at all if `failed`, a 0-d float32 tensor on the parameters' device, is not 0.

    Weights, moments and step counts then stay as they are. PyTorch's AdamW decides on the device, as for a gradient
    scaler that found an infinity; apex's has to wait for the flag.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        if not failed.item():
            optimizer.step()
        return
    optimizer.found_inf = (failed != 0).float()  # the kernel compares with 1, the step counts subtract it
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
