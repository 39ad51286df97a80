"""Every operation has a Triton implementation under its own signature, and compiles without a graph break."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from fused import DEVICE
from torch import Tensor, nn

from vapi_fast import kernels as fused
from vapi_fast import ops, reference

NOT_KERNELS = {"PolicyLoss", "fold_seed", "group_advantages", "rotary_2d_table", "use_backend"}
OPERATIONS = sorted(set(ops.__all__) - NOT_KERNELS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_a_triton_implementation_of_the_same_signature(name: str) -> None:
    public = inspect.signature(getattr(ops, name))
    assert inspect.signature(getattr(fused, name)) == public
    assert inspect.signature(getattr(reference, name)) == public
    assert getattr(fused, name) is not getattr(reference, name)
    assert name in fused.__all__


class TinyModel(nn.Module):
    """What `noisy_prefix_cross_entropy` asks of a model."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.output = nn.Linear(width, vocab_size, bias=False)

    def forward(self, prefix: Tensor, condition: Tensor, return_hidden: bool) -> Tensor:
        assert return_hidden
        return self.embedding(torch.cat([condition[:, None], prefix], dim=1))


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, group, length, vocab_size, width, heads = 2, 3, 4, 24, 16, 2
    leaves = {
        "hidden": torch.randn(batch, length, width),
        "head": torch.randn(vocab_size, width),
        "gain": torch.rand(width),
        "codebook": torch.randn(vocab_size, 8),
        "maps": torch.randn(batch * group, width, 3, 5).to(memory_format=torch.channels_last),
        "reference_maps": torch.randn(batch, width, 3, 5).to(memory_format=torch.channels_last),
    }
    others = {
        "tokens": torch.randint(vocab_size, (batch, group, length)),
        "advantages": torch.randn(batch, group),
        "logprobs": torch.randn(batch, group, length),
        "keys": torch.randn(batch, heads, 6, width),
        "prefix": torch.randn(1, heads, 2, width),
        "table": ops.rotary_2d_table(2, width, 0),
        "slots": ops.rotary_2d_table(3, width, 0)[:6],
        "seed": torch.tensor(7),
        "position": torch.tensor(3),
        "labels": torch.arange(batch),
    }
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in leaves.items()}
    return leaves | {name: x.to(DEVICE) for name, x in others.items()}


def every_operation(x: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """At least one call of each operation; the results by the operation's name."""
    hidden, head, tokens, seed = x["hidden"], x["head"], x["tokens"], x["seed"]
    queries = torch.stack([hidden, hidden], dim=2)  # [B, T, heads, head_dim]
    maps = x["maps"].unflatten(0, (2, 3))
    still, gain = x["maps"].detach(), x["gain"].detach()  # the decoder's operations are for inference
    loss = ops.policy_loss(
        hidden,
        head,
        tokens,
        x["advantages"],
        tokens[:, 0],
        old_logprobs=x["logprobs"],
        base_logprobs=x["logprobs"],
        kl_weight=0.1,
    )
    logits = hidden @ head.T
    sampled, logprobs = ops.group_sample(logits, 3, seed=seed, temperature=0.9)
    filtered, _ = ops.group_sample(logits, 3, seed=seed, top_k=5, top_p=0.9, first_position=x["position"])
    later = {"first_position": x["position"], "first_rollouts": x["labels"]}
    drawn, _ = ops.linear_group_sample(hidden, head, 2, seed=3, **later)
    entry, index = ops.vq_lookup(hidden.reshape(-1, 8), x["codebook"])
    soft, chosen = ops.straight_through_lookup(logits, x["codebook"], tau=1.0, seed=seed)
    prefix, mask = x["prefix"], torch.ones(1, 2, dtype=torch.bool, device=hidden.device)
    qkv, caches = torch.stack([queries[:, 0].detach()] * 3, dim=1), (x["keys"].clone(), x["keys"].clone())
    rotated = ops.append_to_cache(qkv, x["slots"], *caches, x["position"])
    attended = ops.decode_attention(
        queries[:, 0].detach(), x["keys"], x["keys"], x["position"], prefix_k=prefix, prefix_v=prefix, prefix_mask=mask
    )
    return {
        "policy_loss": torch.stack(list(loss)),
        "linear_cross_entropy": ops.linear_cross_entropy(hidden, head, tokens[:, 0]),
        "noisy_prefix_cross_entropy": ops.noisy_prefix_cross_entropy(
            model, tokens[:, 1], x["labels"], noise_prob=0.5, seed=seed
        ),
        "noisy_prefix": ops.noisy_prefix(tokens[:, 2], 0.5, 24, seed=seed),
        "group_sample": torch.stack([sampled, filtered]),
        "group_sample log-probs": logprobs,
        "linear_group_sample": drawn,
        "vq_lookup": entry,
        "vq_lookup indices": index,
        "codebook_lookup": ops.codebook_lookup(tokens, x["codebook"]),
        "straight_through_lookup": soft,
        "straight_through_lookup indices": chosen,
        "group_norm_silu": ops.group_norm_silu(x["maps"], x["gain"], x["gain"], 4, 1e-6),
        "bias_group_norm_silu": ops.bias_group_norm_silu(still, gain, gain, gain, 4, 1e-6),
        "add_group_norm_silu": torch.stack(ops.add_group_norm_silu(still, gain, gain, 4, 1e-6, residual=still)),
        "add_group_norm_silu phases": ops.add_group_norm_silu(still, *[gain[:4]] * 2, 2, 1e-6, phases=True)[1],
        "rms_norm": ops.rms_norm(hidden, x["gain"]),
        "rotary_2d": ops.rotary_2d(queries, x["table"]),
        "swiglu": ops.swiglu(hidden, hidden.flip(0)),
        "append_to_cache": rotated,
        "append_to_cache in place": torch.stack(caches),
        "decode_attention": attended,
        "lpips_distance": ops.lpips_distance([maps, maps], [x["reference_maps"]] * 2, [x["gain"]] * 2),
        "mse": ops.mse(maps, x["reference_maps"]),
    }


def results_and_gradients(function: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    x = inputs()
    model = TinyModel(24, 16).to(DEVICE)
    out = function(x, model)
    differentiable = [value for value in out.values() if value.requires_grad]
    leaves = {name: leaf for name, leaf in (*x.items(), *model.named_parameters()) if leaf.requires_grad}
    gradients = torch.autograd.grad(differentiable, list(leaves.values()), [torch.ones_like(v) for v in differentiable])
    gradients = {f"gradient to {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in out.items()} | gradients


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_every_operation_compiles_without_a_graph_break(backend: str) -> None:
    compiled = torch.compile(every_operation, fullgraph=True, backend=backend)
    with ops.use_backend("triton"):
        expected = results_and_gradients(every_operation)
        actual = results_and_gradients(compiled)
    assert {name.split()[0] for name in expected if not name.startswith("gradient")} == set(OPERATIONS)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")
