"""Our own models on the parameters of live LlamaGen models: views, no copies.

A view computes with the very `nn.Parameter`s of the model that it is made from: training one trains the other, and
weights that are loaded into one are seen by both. Parameters that are replaced by others later, as by `.to(device)`,
are not followed: make the view afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vapi_fast.models import LPIPS, LlamaGen, LlamaGenConfig, VQTokenizer, VQTokenizerConfig
from vapi_fast.models.llamagen import NORM_EPS
from vapi_fast.models.lpips import LPIPSConfig

from . import llamagen, lpips, tokenizer
from .modules import flattened
from .patching import checked_root
from .recognition import TOLERANCE, distance, integers, on_cpu, signature, twin_of, uniform

GROUP_NORM_EPS = 1e-6
BATCH, POSITIONS, SIDE = 2, 2, 16  # of the calls compared
CHECKED: set[Any] = set()  # signatures of models whose views compute the same


def as_llamagen(model: nn.Module) -> LlamaGen:
    """Our `LlamaGen` on the parameters of a LlamaGen `Transformer`, without dropout (set its `dropout` to train so).

    Raises:
        TypeError: not a `torch.nn.Module`.
        ValueError: not of LlamaGen's structure, a fork that computes something else, or sharded parameters.
    """
    root = whole_root("as_llamagen", model, llamagen.NEEDED)
    check_view("as_llamagen", root, llamagen_results)
    return llamagen_view(root).train(root.training)


def as_tokenizer(vq_model: nn.Module) -> VQTokenizer:
    """Our `VQTokenizer` on the parameters of LlamaGen's `VQModel`; errors as of `as_llamagen`."""
    root = whole_root("as_tokenizer", vq_model, tokenizer.NEEDED)
    check_view("as_tokenizer", root, tokenizer_results)
    return tokenizer_view(root).train(root.training)


def as_lpips(model: nn.Module) -> LPIPS:
    """Our `LPIPS` on the parameters of LlamaGen's `LPIPS`, whose dropout it leaves out; errors as of `as_llamagen`."""
    root = whole_root("as_lpips", model, lpips.NEEDED)
    check_view("as_lpips", root, lpips_results)
    return lpips_view(root).train(root.training)


def llamagen_view(root: nn.Module) -> LlamaGen:
    attention, captions = root.layers[0].attention, root.model_type == "t2i"
    must_be("n_kv_head", attention.n_kv_head, attention.n_head)
    must_be("norm_eps", root.norm.eps, NORM_EPS)
    if not captions:
        must_be("cls_token_num", root.cls_token_num, 1)
    config = LlamaGenConfig(
        layers=len(root.layers),
        heads=attention.n_head,
        width=root.tok_embeddings.weight.shape[1],
        vocab_size=root.vocab_size,
        grid_size=math.isqrt(root.block_size),
        num_classes=root.num_classes,
        caption_tokens=root.cls_token_num if captions else 0,
        caption_width=root.cls_embedding.uncond_embedding.shape[1] if captions else 0,
    )
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        view = LlamaGen(config)
    share(view, {key: x for key, x in root.state_dict(keep_vars=True).items() if ".kv_cache." not in key})
    view.rotary = root.freqs_cis.to(root.output.weight.device)
    return view


def tokenizer_view(root: nn.Module) -> VQTokenizer:
    must_be("l2_norm", root.quantize.l2_norm, True)
    for module in root.modules():
        if isinstance(module, nn.GroupNorm):
            must_be("the eps of GroupNorm", module.eps, GROUP_NORM_EPS)
    channels = root.encoder.conv_in.out_channels
    config = VQTokenizerConfig(
        channels=channels,
        multipliers=tuple(level.res[0].conv1.out_channels // channels for level in root.encoder.conv_blocks),
        latent_channels=root.encoder.conv_out.out_channels,
        codebook_size=root.quantize.embedding.num_embeddings,
        code_width=root.quantize.embedding.embedding_dim,
        norm_groups=root.encoder.norm_out.num_groups,
    )
    with torch.device("meta"):
        view = VQTokenizer(config)
    state = root.state_dict(keep_vars=True)
    state.pop("quantize.codebook_used", None)  # usage statistics of LlamaGen's training
    share(view, state)
    return view


def lpips_view(root: nn.Module) -> LPIPS:
    levels, state = [], {}
    for index, (name, part) in enumerate((n, m) for n, m in root.net.named_children() if n.startswith("slice")):
        convolutions = [layer for layer in part if isinstance(layer, nn.Conv2d)]
        levels.append((convolutions[-1].out_channels, len(convolutions)))
        state |= {f"features.{key}": x for key, x in getattr(root.net, name).state_dict(keep_vars=True).items()}
        head = getattr(root, f"lin{index}").model[-1].weight
        state[f"heads.{index}"] = nn.Parameter(head.detach().flatten(), requires_grad=head.requires_grad)
    with torch.device("meta"):
        view = LPIPS(LPIPSConfig(tuple(levels)))
    share(view, state)
    view.shift, view.scale = root.scaling_layer.shift, root.scaling_layer.scale
    return view


def share(view: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors themselves where the view has its parameters and buffers."""
    expected = view.state_dict().keys()
    for kind, keys in (("lacks", expected - tensors.keys()), ("has besides", tensors.keys() - expected)):
        if keys:
            raise ValueError(f"it {kind} {', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''}")
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        module = view.get_submodule(path)
        place = module._parameters if name in module._parameters else module._buffers
        place[name] = tensor if place is module._parameters else tensor.detach()


def must_be(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} is {found}, ours is {expected}")


def whole_root(name: str, model: nn.Module, needed: tuple[str, ...]) -> nn.Module:
    """The model inside of its wrappers, with parameters that are there as a whole."""
    root = checked_root(name, model, needed)
    if flattened(model) or any(isinstance(parameter, DTensor) for parameter in root.parameters()):
        raise ValueError(f"{name}: the parameters are sharded by FSDP: load its full state dict into a model without")
    return root


def check_view(name: str, root: nn.Module, results: Callable[[nn.Module], tuple[list[Tensor], list[Tensor]]]) -> None:
    """ValueError if a view of a model computes something else: tried on a twin with random weights, once a kind."""
    key = (name, signature(root))
    if key in CHECKED:
        return
    refusal = f"{name}: this {type(root).__name__} is not LlamaGen's as we know it"
    try:
        with on_cpu(), torch.no_grad():
            error = distance(*results(twin_of(root, {}).eval()))
    except Exception as problem:  # whatever a fork's code raises when it is called as LlamaGen's would be
        reason = str(problem).partition("\n")[0][:160]
        raise ValueError(f"{refusal}: {reason or type(problem).__name__}") from problem
    if not error <= TOLERANCE:
        raise ValueError(f"{refusal}: on the same random weights it gives something else (relative error {error:.1e})")
    CHECKED.add(key)


def llamagen_results(twin: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the fork and of the view; a caption is cut down to a few positions."""
    tokens = integers("tokens", (1, POSITIONS), twin.vocab_size)
    condition, prefix = integers("condition", (1,), twin.num_classes), 1
    if twin.model_type == "t2i":
        prefix, embedding = POSITIONS, twin.cls_embedding
        twin.freqs_cis, twin.cls_token_num = twin.freqs_cis[twin.cls_token_num - prefix :], prefix
        embedding.uncond_embedding = embedding.uncond_embedding[:prefix]
        condition = uniform("condition", (1, *embedding.uncond_embedding.shape), -1, 1)
    positions = torch.arange(prefix + POSITIONS)
    logits, _ = type(twin).forward(twin, tokens, condition, positions)
    return [logits[:, prefix - 1 :]], [llamagen_view(twin).eval()(tokens, condition)]


def tokenizer_results(twin: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and decoded images of the fork and of the view."""
    view = tokenizer_view(twin).eval()
    side = 2 * view.config.downsample
    _, _, (_, _, indices) = twin.encode(uniform("images", (BATCH, 3, side, side), -1, 1))
    tokens = indices.view(BATCH, -1)
    ours = view.encode(uniform("images", (BATCH, 3, side, side), -1, 1))
    decoded = twin.decode_code(tokens, (BATCH, view.config.code_width, 2, 2))
    return [tokens, decoded], [ours, view.decode(tokens)]


def lpips_results(twin: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    a, b = (uniform(name, (BATCH, 3, SIDE, SIDE), -1, 1) for name in "ab")
    return [type(twin).forward(twin, a, b).flatten()], [lpips_view(twin).eval()(a, b)]
