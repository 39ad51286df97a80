"""How exact an operation is: its results and gradients beside those of another form, in float64.

That form is the plain PyTorch one of `peers.py`, or, where the operation draws, one of those below with the same random
words. These come from our generator, which the tests hold to its published answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from operations import BOTH, SEED, Operation, differentiable
from peers import filtered
from shapes import Sizes, Source, changed, few_images, tensors
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.reference.philox import philox

ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative L2 against float64
DISAGREEMENT = {torch.float32: 0.0, torch.bfloat16: 1e-2}  # share of indices that may differ from float64's


def words(images: int, length: int, third: Tensor | int, operation: int, device: torch.device) -> tuple[Tensor, ...]:
    """Four words for each image, position and `third` counter."""
    image, t = torch.arange(images, device=device), torch.arange(length, device=device)
    return philox((t[:, None], third, image[:, None, None], operation), (SEED, 0))


def drawn(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds a uniform number."""
    rollouts = torch.arange(group_size, device=logits.device)
    uniform = (words(*logits.shape[:2], rollouts, 1, logits.device)[0] >> 8).double() / 2**24
    probabilities = logits.softmax(-1)
    tokens = (probabilities.cumsum(-1)[:, :, None] <= uniform[..., None]).sum(-1)
    return tokens.transpose(1, 2), probabilities.gather(-1, tokens).log().transpose(1, 2)


def noisy_prefix(tokens: Tensor, noise_prob: float, vocab_size: int) -> Tensor:
    choice, code, *_ = words(len(tokens), tokens.shape[1] - 1, 0, 2, tokens.device)
    replaced = (choice[..., 0] >> 8).double() / 2**24 < noise_prob
    return torch.where(replaced, code[..., 0] * vocab_size // 2**32, tokens[:, :-1])


def straight_through_lookup(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    images, length, vocabulary = logits.shape
    fours = torch.arange(math.ceil(vocabulary / 4), device=logits.device)
    noise = torch.stack(words(images, length, fours, 3, logits.device), -1).flatten(-2)[..., :vocabulary]
    uniform = ((noise >> 9).double() + 0.5) / 2**23
    soft = ((logits - (-uniform.log()).log()) / 0.9).softmax(-1)
    indices = soft.argmax(-1)
    return (F.one_hot(indices, vocabulary) + soft - soft.detach()) @ codebook, indices


DRAWN: dict[str, Callable] = {
    "group_sample": drawn,
    "group_sample top-k, top-p": lambda logits, group_size: drawn(filtered(logits), group_size),
    "linear_group_sample": lambda hidden, weight, group_size: drawn(F.linear(hidden, weight), group_size),
    "noisy_prefix": noisy_prefix,
    "straight_through_lookup": straight_through_lookup,
}


def relative(mine: Tensor, right: Tensor) -> float:
    """Relative L2 error; NaN where anything is, infinite where it ought to be zero and is not."""
    if mine.shape != right.shape:
        return math.inf
    return 0.0 if torch.equal(mine.double(), right) else ((mine.double() - right).norm() / right.norm()).item()


def accuracy(operation: Operation, passes: str, sizes: Sizes, source: Source, images: int = 1) -> tuple[float, float]:
    """Greatest relative L2 error of results and gradients, and share of indices that differ, for `images` of a batch.

    Where indices differ, so do the values that belong to them: those are left out.
    """
    inputs = operation.inputs(few_images(sizes, images), source)
    exact = changed(inputs, lambda x: x.double() if x.is_floating_point() else x.clone())
    (low, low_leaves), (high, high_leaves) = differentiable(operation, inputs), differentiable(operation, exact)
    form = DRAWN.get(operation.name) or operation.plain[1]
    with torch.set_grad_enabled(passes == BOTH):
        found, expected = list(tensors(operation.call(ops, *low))), list(tensors(form(*high)))
    pairs = list(zip(found, expected, strict=True))
    agree = [mine == right for mine, right in pairs if not right.is_floating_point()]
    errors = []
    for mine, right in pairs:
        if right.is_floating_point():
            for mask in agree:
                mask = mask[..., None] if mask.ndim == right.ndim - 1 > 0 else mask
                mine, right = mine * mask, right * mask
            errors.append(relative(mine, right))
    if passes == BOTH:
        (mine,), (right,) = ([x for x in results if x.requires_grad] for results in (found, expected))
        direction = torch.randn_like(mine, requires_grad=False)
        gradients = torch.autograd.grad(mine, low_leaves, direction)
        wanted = torch.autograd.grad(right, high_leaves, direction.double())
        errors += map(relative, gradients, wanted)
    worst = max(errors, key=lambda each: math.inf if math.isnan(each) else each, default=0.0)
    return worst, max((1 - each.double().mean().item() for each in agree), default=0.0)
