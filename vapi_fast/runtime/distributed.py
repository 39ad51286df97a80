"""Data parallelism over images: one process a device, started by torchrun; the generator sharded by FSDP2."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vapi_fast.runtime.errors import ConfigError

RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # that processes find each other by
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TIMEOUT = timedelta(minutes=30)  # ranks wait for one another while rank 0 draws pictures and writes files


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join torchrun's process group (none for a single process) and yield this rank's device."""
    local_rank, processes = number_in_environment("LOCAL_RANK", 0), number_in_environment("WORLD_SIZE", 1)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    end_with_torchrun()
    joins = processes > 1 and not dist.is_initialized()
    if joins:
        if missing := [name for name in RENDEZVOUS if name not in os.environ]:
            raise ConfigError(
                f"WORLD_SIZE is {processes} and {missing[0]} is missing: start with torchrun, or unset WORLD_SIZE"
            )
        # gloo beside nccl: snapshots and evaluation features are gathered on the host.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield device
    # After an error nothing is waited for: the other ranks may be in a collective that never ends.
    if joins:
        dist.destroy_process_group()


def number_in_environment(name: str, default: int) -> int:
    """A number that torchrun has set; raises ConfigError for what is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r} in the environment, expected torchrun's number: unset it")
    return int(text)


def end_with_torchrun() -> None:
    """On Linux, have SIGTERM sent to this process when the torchrun that started it dies, by SIGKILL too.

    Workers would else go on, with nobody to end them; after SIGTERM an alignment saves its state.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died just now
            os.kill(os.getpid(), signal.SIGTERM)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(generator: nn.Module, *, reshard_after_forward: bool) -> None:
    """Split weights, gradients and optimizer state over all ranks (ZeRO-3), block by block; one rank: nothing to do.

    fp32 master weights and fp32 sums of gradients; on GPUs the blocks compute in bf16. A gradient is the sum over
    ranks: each rank's loss carries its images' share of the whole batch.

    Args:
        reshard_after_forward: give a block's gathered weights up between forward and backward: less memory, one more
            gathering a micro-batch.
    """
    if world_size() == 1:
        return
    compute = torch.bfloat16 if next(generator.parameters()).is_cuda else None
    # Inputs are not cast: the rotary table is to stay float32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in generator.layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The LM head belongs to the root: the loss uses it after the forward, so it stays gathered.
    fully_shard(generator, mp_policy=policy, reshard_after_forward=False)
    for module in (*generator.layers, generator):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that scales


def reduce_at(generator: nn.Module, last: bool) -> None:
    """Gradients are summed over ranks by the backward of the `last` micro-batch of a step, and kept local before."""
    if isinstance(generator, FSDPModule):
        generator.set_requires_gradient_sync(last)
        generator.set_is_last_backward(last)


def whole_state(generator: nn.Module) -> dict[str, Tensor]:
    """The generator's weights, gathered one by one onto rank 0's CPU; all ranks must call it, others get nothing."""
    state = {}
    for name, value in generator.state_dict().items():
        gathered = whole(value)
        if rank() == 0:
            state[name] = gathered.detach().cpu()
    return state


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_copy(generator: nn.Module) -> nn.Module:
    """A generator that draws by itself: a copy with all weights if `generator` is sharded, otherwise `generator`.

    Drawing token by token from a sharded one would gather every block for every token.
    """
    if not isinstance(generator, FSDPModule):
        return generator
    device = next(generator.parameters()).device
    with torch.device("meta"):
        copy = type(generator)(generator.config)
    copy.rotary = generator.rotary
    copy.load_state_dict({name: whole(value).detach() for name, value in generator.state_dict().items()}, assign=True)
    return copy.to(device).requires_grad_(False)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, on the CPU; ranks may hold different numbers of rows."""
    return torch.cat(gather_objects(tensor.cpu()))
