"""Our own models on the parameters of live LlamaGen models: views, no copies.

A view computes with the very `nn.Parameter`s of the model that it is made from: training one trains the other, and
weights that are loaded into one are seen by both. Parameters that are replaced by others later, as by `.to(device)`,
are not followed: make the view afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vapi_fast.models import LPIPS, LlamaGen, LlamaGenConfig, VQTokenizer, VQTokenizerConfig
from vapi_fast.models.lpips import LPIPSConfig

from . import llamagen, lpips, tokenizer
from .cases import LOUD, QUIET
from .modules import flattened, on_meta
from .patching import checked_root
from .recognition import TOLERANCE, distance, first_line, integers, on_cpu, signature, twin_of, uniform

BATCH, PREFIX, POSITIONS, SIDE = 2, 2, 17, 16  # of the calls compared
CHECKED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # models whose views compute the same → signatures
Results = list[tuple[Tensor, Tensor]]  # of the fork, of its view


def as_llamagen(model: nn.Module) -> LlamaGen:
    """Our `LlamaGen` on the parameters of a LlamaGen `Transformer`, without dropout (an argument of its forward).

    Raises:
        TypeError: not a `torch.nn.Module`.
        ValueError: not of LlamaGen's structure, a fork that computes something else, sharded parameters, or the meta
            device.
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
    """Our `LPIPS` on the parameters of LlamaGen's `LPIPS`, whose dropout it leaves out; errors as of `as_llamagen`.

    In its state dict `heads.*` keep LlamaGen's shape `[1,C,1,1]`.
    """
    root = whole_root("as_lpips", model, lpips.NEEDED)
    check_view("as_lpips", root, lpips_results)
    return lpips_view(root).train(root.training)


def llamagen_view(root: nn.Module) -> LlamaGen:
    attention, captions = root.layers[0].attention, root.model_type == "t2i"
    must_be("n_kv_head", attention.n_kv_head, attention.n_head)
    must_be("norm_eps", root.norm.eps, LlamaGenConfig.norm_eps)  # the last one's hardly shows in the logits
    if not captions:
        must_be("cls_token_num", root.cls_token_num, 1)
    config = LlamaGenConfig(
        layers=len(root.layers),
        heads=attention.n_head,
        width=root.tok_embeddings.weight.shape[1],
        vocab_size=root.vocab_size,
        grid_size=math.isqrt(root.block_size),
        num_classes=root.num_classes,
        has_unconditional=captions or len(root.cls_embedding.embedding_table.weight) > root.num_classes,
        caption_tokens=root.cls_token_num if captions else 0,
        caption_width=root.cls_embedding.uncond_embedding.shape[1] if captions else 0,
    )
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        view = LlamaGen(config)
    share(view, {key: x for key, x in root.state_dict(keep_vars=True).items() if ".kv_cache." not in key})
    view.rotary = root.freqs_cis.to(root.output.weight.device)
    return view


def tokenizer_view(root: nn.Module) -> VQTokenizer:
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
        state[f"heads.{index}"] = getattr(root, f"lin{index}").model[-1].weight
    with torch.device("meta"):
        view = LPIPS(LPIPSConfig(tuple(levels)))
    view.heads = Heads(view.heads)
    share(view, state)
    view.shift, view.scale = root.scaling_layer.shift, root.scaling_layer.scale
    return view


class Heads(nn.ParameterList):
    """Linear layers of LPIPS in LlamaGen's shape `[1,C,1,1]`, read in ours, `[C]`."""

    def __getitem__(self, level: int) -> Tensor:
        return super().__getitem__(level).flatten()


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
    if on_meta(root) or any(parameter.is_meta for parameter in root.parameters()):
        raise ValueError(f"{name}: the model is on the meta device: load its weights first")
    return root


def check_view(name: str, root: nn.Module, results: Callable[[nn.Module], Results]) -> None:
    """ValueError if a view of a model computes something else: tried on a twin with random weights, once a model."""
    state = signature(root)
    if CHECKED.get(root) == state:
        return
    refusal = f"{name}: this {type(root).__name__} is not LlamaGen's as we know it"
    try:
        with on_cpu(), torch.no_grad():
            theirs, ours = zip(*results(twin_of(root, {}).eval()), strict=True)
            error = distance(list(theirs), list(ours))
    except Exception as problem:  # whatever a fork's code raises when it is called as LlamaGen's would be
        raise ValueError(f"{refusal}: {first_line(problem)}") from problem
    if not error <= TOLERANCE:
        raise ValueError(f"{refusal}: on the same random weights it gives something else (relative error {error:.1e})")
    CHECKED[root] = state


def llamagen_results(twin: nn.Module) -> Results:
    """Logits of the fork and of the view, of ordinary and of large activations; a caption is cut to a few positions."""
    tokens = integers("tokens", (1, min(POSITIONS, twin.block_size)), twin.vocab_size)
    condition, prefix = integers("condition", (1,), twin.num_classes), 1
    if twin.model_type == "t2i":
        prefix, embedding = min(PREFIX, twin.cls_token_num), twin.cls_embedding
        twin.freqs_cis, twin.cls_token_num = twin.freqs_cis[twin.cls_token_num - prefix :], prefix
        embedding.uncond_embedding = embedding.uncond_embedding[:prefix]
        condition = uniform("condition", (1, *embedding.uncond_embedding.shape), -1, 1)
    positions = torch.arange(prefix + tokens.shape[1])
    view = llamagen_view(twin).eval()

    def outputs() -> Results:
        logits, _ = type(twin).forward(twin, tokens, condition, positions)
        return [(logits[:, prefix - 1 :], view(tokens, condition))]

    ordinary = outputs()
    for parameter in twin.parameters():
        if parameter.ndim == 1:  # a norm's: what follows it grows with them
            parameter.mul_(LOUD)
    return [*ordinary, *outputs()]


def tokenizer_results(twin: nn.Module) -> Results:
    """Tokens, decoded images and wide maps of the fork and of the view; of large and of small activations too."""
    view = tokenizer_view(twin).eval()
    config, side = view.config, view.config.downsample
    square = uniform("square", (BATCH, 3, 2 * side, 2 * side), -1, 1)
    wide = uniform("wide", (1, 3, side, tokenizer.WIDE * side), -1, 1)
    latents = uniform("latents", (1, config.latent_channels, 1, tokenizer.WIDE), -1, 1)

    def outputs(scale: float) -> Results:
        _, _, (_, _, indices) = twin.encode(scale * square)
        tokens = indices.view(BATCH, -1)
        return [
            (tokens, view.encode(scale * square)),
            (twin.decode_code(tokens, (BATCH, config.code_width, 2, 2)), view.decode(tokens)),
            (twin.encoder(scale * wide), view.encoder(scale * wide)),
            (twin.decoder(scale * latents), view.decoder(scale * latents)),
        ]

    ordinary = outputs(1)
    for coder in (twin.encoder, twin.decoder):
        coder.norm_out.weight.mul_(LOUD)
    large = outputs(LOUD)
    for name, parameter in twin.named_parameters():
        if parameter.ndim == 4 or name.endswith("bias"):  # of convolutions; shows the norms' epsilon
            parameter.mul_(QUIET)
    return [*ordinary, *large, *outputs(1)]


def lpips_results(twin: nn.Module) -> Results:
    """Distances of the fork and of the view, of ordinary and of large numbers."""
    a, b = (uniform(name, (BATCH, 3, SIDE, SIDE), -1, 1) for name in "ab")
    view = lpips_view(twin).eval()

    def outputs(scale: float) -> Results:
        return [(type(twin).forward(twin, scale * a, scale * b).flatten(), view(scale * a, scale * b))]

    ordinary = outputs(1)
    for parameter in view.heads.parameters():
        parameter.mul_(LOUD)
    return [*ordinary, *outputs(LOUD)]
