"""Janus-Pro's files: DeepSeek's own layout and that of `transformers`, each in one file or in shards.

What drawing images does not use (vision tower, its aligner, `lm_head`, the VQ model) is not read with the generator,
and goes unchanged into what is written, which has the layout that was read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vapi_fast.models.sizes import JANUS_CONFIGS, JanusConfig, named_size
from vapi_fast.runtime.checkpoint import (
    checkpoint_files,
    contained,
    is_safetensors,
    load_file_checked,
    load_state_dict,
    read_regular,
    save_generator,
    shards_of,
    unwrapped,
    write_atomically,
)
from vapi_fast.runtime.errors import CheckpointError
from vapi_fast.runtime.hub import COMPANIONS, local_path


class Layout(NamedTuple):
    """How a format names what we have under `ours`; names are without the wrapper `model.` in front."""

    language: str  # in front of the language model's
    lm_head: str
    parts: dict[str, str]  # of the image side, by our names


ORIGINAL = Layout(
    "language_model.model.",
    "language_model.lm_head.weight",
    {name: name for name in ("gen_embed", "gen_aligner.layers.0", "gen_aligner.layers.2")}
    | {name: name for name in ("gen_head.output_mlp_projector", "gen_head.vision_head")},
)
TRANSFORMERS = Layout(
    "language_model.",
    "lm_head.weight",
    {
        "gen_embed": "generation_embeddings",
        "gen_aligner.layers.0": "generation_aligner.fc1",
        "gen_aligner.layers.2": "generation_aligner.hidden_layers.0",
        "gen_head.output_mlp_projector": "generation_head.proj_out",
        "gen_head.vision_head": "generation_head.vision_head",
    },
)
# Of a layer, by our names; the same in both formats.
LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FUSED = re.compile(r"layers\.(\d{1,4})\.attention\.wqkv\.weight")
# The VQ model has LlamaGen's names in Janus's own files; `transformers` has others for some of its modules.
TOKENIZERS = ("gen_vision_model.", "vqmodel.")
RENAMED = (
    (re.compile(r"^(encoder|decoder)\.(?:down|up)\."), r"\1.conv_blocks."),
    (re.compile(r"\.block\."), ".res."),
    (re.compile(r"\.mid\.block_1\."), ".mid.0."),
    (re.compile(r"\.mid\.attn_1\."), ".mid.1."),
    (re.compile(r"\.mid\.block_2\."), ".mid.2."),
)
HEADS = (ORIGINAL.lm_head, TRANSFORMERS.lm_head)
NO_GENERATOR = ("vision_model.", "aligner.", *HEADS, *TOKENIZERS)
NO_TOKENIZER = (
    "language_model.",
    "vision_model.",
    "aligner.",
    "lm_head.",
    *(f"{name}." for layout in (ORIGINAL, TRANSFORMERS) for name in layout.parts.values()),
)
# Of config.json: where the language model's fields stand, by `model_type`.
LANGUAGE = {"multi_modality": "language_config", "janus": "text_config"}
EARLIER = re.compile(r"janus-1\.3b", re.IGNORECASE)
LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}  # where a file leaves them out


def layout_of(state: dict[str, Any], path: str | Path) -> Layout:
    """The format of these names; CheckpointError for another model's."""
    if any(name.startswith(("vision_gen_enc", "vision_gen_dec")) for name in state):
        raise CheckpointError(f"{path}: is JanusFlow, which draws by rectified flow, without tokens: pass Janus-Pro")
    for layout in (ORIGINAL, TRANSFORMERS):
        if f"{layout.language}embed_tokens.weight" in state and f"{layout.parts['gen_embed']}.weight" in state:
            return layout
    raise CheckpointError(
        f"{path}: has no language model with image embeddings (gen_embed): not a Janus-Pro checkpoint"
    )


def load_weights(path: str | Path, name: str, *, averaged: bool = False) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of `Janus`, by its names, and what of the configuration the file decides: its vocabularies.

    Raises CheckpointError as `Janus.from_checkpoint` does.
    """
    config, path = named_size(JANUS_CONFIGS, name), local_path(path)
    check_config(path, config, name)
    state = load_state_dict(path, averaged=averaged, skip=NO_GENERATOR)
    layout = layout_of(state, path)
    embeddings, codes = (
        state[key] for key in (f"{layout.language}embed_tokens.weight", f"{layout.parts['gen_embed']}.weight")
    )
    if embeddings.ndim != 2 or codes.ndim != 2:
        raise CheckpointError(f"{path}: its embeddings are no tables: not a Janus-Pro checkpoint")
    numbers = re.compile(re.escape(layout.language) + r"layers\.(\d{1,4})\.")
    layers = 1 + max((int(found[1]) for found in map(numbers.match, state) if found), default=-1)
    check_size(path, name, layers, embeddings.shape[1])
    return from_file(state, layout, config, path), {"vocab_size": len(codes), "text_vocab": len(embeddings)}


def language_head(path: str | Path) -> Tensor | None:
    """`lm_head`, or of tied weights the embeddings; None where a file has neither."""
    state = {unwrapped(str(key)): value for key, value in contained(load_file_checked(path), Path(path), False).items()}
    embeddings = (f"{layout.language}embed_tokens.weight" for layout in (ORIGINAL, TRANSFORMERS))
    return next((state[name] for name in (*HEADS, *embeddings) if isinstance(state.get(name), Tensor)), None)


def check_size(path: str | Path, name: str, layers: int, width: int) -> None:
    config = named_size(JANUS_CONFIGS, name)
    if (layers, width) != (config.layers, config.width):
        fitting = [size for size, c in JANUS_CONFIGS.items() if (c.layers, c.width) == (layers, width)]
        raise CheckpointError(
            f"{path}: holds {layers} layers of width {width}, but --model {name} has {config.layers} of width "
            f"{config.width}: {f'pass --model {fitting[0]}' if fitting else 'no known size fits it'}"
        )


def check_config(path: Path, config: JanusConfig, name: str) -> None:
    """Raise CheckpointError where the config.json beside the weights cannot be read, or is another model's.

    Janus, which came before Janus-Pro-1B, has its shapes: only the name tells it.
    """
    if EARLIER.search(str(path.resolve())):
        raise CheckpointError(f"{path}: is Janus, which was trained on other prompts: pass Janus-Pro")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return
    try:
        found = json.loads(read_regular(file))
        kind = found["model_type"]
        language = found[LANGUAGE[kind]] if kind in LANGUAGE else {}
        if not isinstance(language, dict):
            raise TypeError(f"its {LANGUAGE[kind]} is no object")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {error}); copy it again") from error
    if EARLIER.search(str(found.get("_name_or_path"))):
        raise CheckpointError(f"{file}: is Janus's, which was trained on other prompts: pass Janus-Pro")
    if kind not in LANGUAGE:
        raise CheckpointError(f"{file}: is of a {kind}, expected {' or '.join(LANGUAGE)} (Janus-Pro)")
    if "vision_gen_enc_config" in found:
        raise CheckpointError(f"{file}: is JanusFlow, which draws by rectified flow, without tokens: pass Janus-Pro")
    if {"num_hidden_layers", "hidden_size"} <= language.keys():
        check_size(file, name, language["num_hidden_layers"], language["hidden_size"])
    heads = language.get("num_attention_heads", config.heads)
    rope = language.get("rope_theta", (language.get("rope_parameters") or {}).get("rope_theta", LLAMA["rope_theta"]))
    expected = {
        "num_attention_heads": (heads, config.heads),
        "num_key_value_heads": (language.get("num_key_value_heads", heads), config.heads),
        "rms_norm_eps": (language.get("rms_norm_eps", LLAMA["rms_norm_eps"]), config.norm_eps),
        "rope_theta": (rope, LLAMA["rope_theta"]),
    }
    for field, (value, needed) in expected.items():
        if value != needed:
            raise CheckpointError(f"{file}: {field} is {value}, and {needed} in Janus-Pro: pass Janus-Pro's own files")


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection with a pair's two side by side, from halves as in the files."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `paired`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def from_file(state: dict[str, Tensor], layout: Layout, config: JanusConfig, path: str | Path) -> dict[str, Tensor]:
    """A file's weights under our names; what has none keeps its own, for `load_into` to complain of."""
    rest, found, width = dict(state), {}, config.width
    for ours, theirs in names(layout, config):
        if theirs in rest:
            found[ours] = rest.pop(theirs)
    for layer in range(config.layers):
        keys = [f"{layout.language}layers.{layer}.self_attn.{each}.weight" for each in PROJECTIONS]
        if not all(key in rest for key in keys):
            continue
        q, k, v = (rest.pop(key) for key in keys)
        for key, weight in zip(keys, (q, k, v), strict=True):
            if weight.shape != (width, width):
                raise CheckpointError(f"{path}: {key} is {list(weight.shape)}, expected [{width}, {width}]")
        rows = [paired(q, config.heads), paired(k, config.heads), v]
        found[f"layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    return found | rest


def names(layout: Layout, config: JanusConfig) -> Iterator[tuple[str, str]]:
    """Our names and the file's, of all that is stored as it is."""
    yield "text_embeddings.weight", f"{layout.language}embed_tokens.weight"
    yield "norm.weight", f"{layout.language}norm.weight"
    for ours, theirs in layout.parts.items():
        for kind in ("weight",) if ours == "gen_embed" else ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"
    for layer in range(config.layers):
        for ours, theirs in LAYER.items():
            yield f"layers.{layer}.{ours}.weight", f"{layout.language}layers.{layer}.{theirs}.weight"


def to_file(weights: dict[str, Tensor], layout: Layout, config: JanusConfig) -> dict[str, Tensor]:
    """`Janus`'s weights, or some of them, under a file's names: the inverse of `from_file`."""
    found = {theirs: weights[ours] for ours, theirs in names(layout, config) if ours in weights}
    for ours, weight in weights.items():
        if layer := FUSED.fullmatch(ours):
            q, k, v = weight.chunk(3)
            rows = halved(q, config.heads), halved(k, config.heads), v.clone()  # a view would be saved whole
            for each, part in zip(PROJECTIONS, rows, strict=True):
                found[f"{layout.language}layers.{layer[1]}.self_attn.{each}.weight"] = part
    return found


def tokenizer_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VQ model's weights under LlamaGen's names; a file of a VQ model alone is as it was."""
    inside = {
        name.removeprefix(prefix): value
        for prefix in TOKENIZERS
        for name, value in state.items()
        if name.startswith(prefix)
    }
    for pattern, name in RENAMED if inside else ():
        inside = {pattern.sub(name, key): value for key, value in inside.items()}
    return inside or state


def save_weights(folder: Path, source: Path, weights: dict[str, Tensor], config: JanusConfig) -> None:
    """Write `source`, a file or folder, to `folder` with `weights` of `Janus`, or some of them, in place of its own.

    Files have the names and layout that they have there, and what else lies beside them (configuration, tokenizer) is
    copied. `weights` keep their dtype: float32 where they were trained, as the grid of bf16 is coarser than what an
    alignment of 100 steps at 1e-7 changes.
    """
    first, *shards = checkpoint_files(local_path(source))
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(shards_of(first)) if shards else list(contained(load_file_checked(first), first, averaged=False))
    replaced = to_file(weights, layout_of(dict.fromkeys(map(unwrapped, map(str, keys))), first), config)
    total = sum(write_file(folder / path.name, path, replaced) for path in shards or [first])
    if shards:
        index = json.loads(read_regular(first))
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": total}
        text = json.dumps(index, indent=2) + "\n"
        write_atomically(folder / first.name, lambda temporary: temporary.write_text(text, "utf-8"))
    for path in map(first.with_name, COMPANIONS):
        if path.is_file():
            write_atomically(folder / path.name, partial(shutil.copyfile, path))


def write_file(path: Path, source: Path, replaced: dict[str, Tensor]) -> int:
    """One of a checkpoint's files, as `source` but for what is `replaced`; returns the bytes of its tensors."""
    state = contained(load_file_checked(source), source, averaged=False)
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    found = {key: replaced.get(unwrapped(key), value).cpu().contiguous() for key, value in tensors.items()}
    if is_safetensors(source):
        from safetensors.torch import save_file

        write_atomically(path, lambda temporary: save_file(found, temporary, {"format": "pt"}))
    else:
        save_generator(path, found)
    return sum(value.nbytes for value in found.values())
