"""What of a generator is trained: all, its head, its image side, or adapters (LoRA, Hu et al., 2021) of its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .transformer import Generator

ORIGINAL = ".parametrizations.weight.original"


class LowRank(nn.Module):
    """weight + b · a, of which b is 0 at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, into = weight.shape
        self.a = nn.Parameter(torch.randn(rank, into, device=weight.device) / into**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast("cuda" if weight.is_cuda else "cpu", enabled=False):  # of the meta device there is none
            return weight + (self.b @ self.a).to(weight.dtype)


def train_only(generator: Generator, part: str, rank: int, seed: int = 0) -> None:
    """Freeze what is not trained: nothing (`all`); all but the head and what stands before it (`head`), and but what
    codes' embeddings go through first (`image`; LlamaGen's go through nothing); all but adapters of that rank, made
    here, of all matrices of the blocks (`lora`)."""
    if part == "all":
        return
    generator.requires_grad_(False)
    if part in ("head", "image"):
        head = [operand for operand in generator.head if operand is not None]
        entry = generator.entry.parameters() if part == "image" else ()
        for parameter in (*head, *generator.readout.parameters(), *entry):
            parameter.requires_grad_(True)
        return
    torch.manual_seed(seed)
    for block in generator.layers:
        matrices = [module for module in block.modules() if isinstance(module, nn.Linear)]
        for matrix in matrices:
            parametrize.register_parametrization(matrix, "weight", LowRank(matrix.weight, rank), unsafe=True)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A generator's state with its adapters added to the matrices that they belong to, by the names of these."""
    found = {}
    for name, value in state.items():
        matrix, is_original, _ = name.partition(ORIGINAL)
        if is_original:
            part = f"{matrix}.parametrizations.weight.0"
            found[f"{matrix}.weight"] = value + (state[f"{part}.b"] @ state[f"{part}.a"]).to(value.dtype)
        elif ".parametrizations." not in name:
            found[name] = value
    return found
