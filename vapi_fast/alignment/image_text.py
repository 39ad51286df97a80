"""Rewards of networks that see an image and read a text: cosines of CLIP's embeddings, and of HPSv2.1's.

Facts from `reward_utils/{clip_score,hpsv2}.py` and `img_gen_grpo_rewards.py` of Kwai-Klear/AR-GRPO: images are cut down
to 8 bits (not rounded), resized bicubically to the network's size (for CLIP by Pillow, for HPSv2.1 as tensors), and
held against "a photo of {class name}", or against the caption. HPSv2.1 is a CLIP ViT-H/14 in open_clip's names,
fine-tuned on what people prefer; its score is the cosine too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vapi_fast.data.splits import SYNSET, read_class_names
from vapi_fast.evaluation.clip import Clip, read_clip
from vapi_fast.evaluation.config import CLIP
from vapi_fast.runtime.checkpoint import load_state_dict
from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.packages import loaded

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

PROMPT = "a photo of {}"
BOUNDS, STEPS = (0.0, 0.3, 0.6), (-1.0, 0.5, 1.0, 1.5)  # AR-GRPO's rewards for cosines below, between and above them


class Source(NamedTuple):
    """Where a network comes from. file: open_clip's weights in `repository`, without which it is `transformers`'."""

    repository: str
    tokenizer: str
    file: str | None
    bytes: int  # on a GPU


SOURCES = {
    "clip": Source(CLIP, CLIP, None, 4 * 151_277_313),
    "hpsv2": Source("xswu/HPSv2", CLIP, "HPS_v2.1_compressed.pt", 2 * 986_109_441),  # in fp16, as its authors run it
}


class ImageTextReward:
    """Cosines of images and the texts of their labels, float32; a text is read when the first image has it."""

    def __init__(self, clip: Clip, text_of: Callable[[int], str]) -> None:
        self.clip = clip
        self.text_of = text_of
        self.read: dict[int, Tensor] = {}  # embeddings of unit length `[D]`

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """`[N]` of images `[N,3,H,W]` in [−1, 1] with labels `[N]`: class ids, or rows of captions."""
        labels = labels.tolist()
        if new := sorted({*labels} - self.read.keys()):
            self.read |= zip(new, self.clip.texts([self.text_of(label) for label in new]), strict=True)
        texts = torch.stack([self.read[label] for label in labels])
        return (self.clip.images(in_8_bits(images)) * texts).sum(-1)


def in_8_bits(images: Tensor) -> Tensor:
    """Images in [−1, 1] as whole numbers of 0 … 255, cut down."""
    return ((images.float() + 1) * 127.5).floor().clamp(0, 255)


def levels(cosines: Tensor) -> Tensor:
    """AR-GRPO's quantised form of cosines."""
    bounds, steps = (torch.tensor(values, device=cosines.device) for values in (BOUNDS, STEPS))
    return torch.where(cosines.isfinite(), steps[torch.bucketize(cosines, bounds, right=True)], cosines)


def load_networks(
    names: list[str], folder: Path | None, text_of: Callable[[int], str], device: torch.device
) -> dict[str, ImageTextReward]:
    """The networks of these names, which hold an image against the text of its label.

    folder: has a sub-folder for each network, by its name; None: they come from Hugging Face's hub or its cache.

    Raises CheckpointError for a network that is missing or damaged, with the file and where it belongs.
    """
    return {name: load_network(name, folder, text_of, device) for name in names}


def load_network(
    name: str, folder: Path | None, text_of: Callable[[int], str], device: torch.device
) -> ImageTextReward:
    source, place = SOURCES[name], None if folder is None else folder / name

    def read() -> tuple[CLIPModel, CLIPTokenizer]:
        from transformers import CLIPTokenizer

        if source.file is not None and (place is None or (place / source.file).is_file()):
            model = from_open_clip(place / source.file if place else downloaded(source))
            return model, CLIPTokenizer.from_pretrained(place or source.tokenizer)
        if place is not None and not (place / "config.json").is_file():
            raise FileNotFoundError(f"there is no config.json{f' or {source.file}' if source.file else ''}")
        return read_clip(place or source.repository)

    files = f"{source.file} of {source.repository} and the tokenizer's files of {source.tokenizer}"
    if source.file is None:
        files = f"the files of {source.repository}"
    advice = f"put {files} into {place or f'DIR/{name}, and pass --reward-networks DIR'}"
    read_from = f" from {place or 'the hub'}"
    clip = Clip(*loaded(f"--reward {name}", advice, read, where=read_from), device, as_pillow=source.file is None)
    if device.type == "cuda" and source.file is not None:
        clip.model.half()
    return ImageTextReward(clip, text_of)


def downloaded(source: Source) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source.repository, source.file))


def from_open_clip(path: Path) -> CLIPModel:
    """A vision transformer of open_clip's in `transformers`' form; sizes are those of its weights."""
    from transformers import CLIPConfig, CLIPModel

    state = load_state_dict(path)
    patches, words = state["visual.positional_embedding"], state["positional_embedding"]
    patch, (projection, width) = state["visual.conv1.weight"].shape[-1], state["text_projection"].T.shape
    vision = {
        "hidden_size": patches.shape[1],
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": depth(state, "visual.transformer.resblocks."),
        "num_attention_heads": patches.shape[1] // (80 if patches.shape[1] == 1280 else 64),  # ViT-H's are wider
        "image_size": patch * round((len(patches) - 1) ** 0.5),
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": depth(state, "transformer.resblocks."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": len(words),
        "vocab_size": len(state["token_embedding.weight"]),
        "eos_token_id": len(state["token_embedding.weight"]) - 1,
        "hidden_act": "gelu",
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    state = {new: value for key, tensor in state.items() for new, value in renamed(key, tensor) if new != "logit_scale"}
    missing, unknown = model.load_state_dict(state, strict=False)
    wrong = [*(key for key in missing if key != "logit_scale" and not key.endswith("position_ids")), *unknown]
    if wrong:
        raise ValueError(f"{path.name} is no CLIP of open_clip's: {wrong[0]}")
    return model


def depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).partition(".")[0]) for key in state if key.startswith(prefix))


MODULES = {  # open_clip's by ours, in the order in which they are looked for
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}


def renamed(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """A weight of open_clip's under the names of `transformers`: three for queries, keys and values in one."""
    for theirs, ours in MODULES.items():
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
            break
    for theirs, ours in PARTS.items():
        key = key.replace(theirs, ours)
    if key in ("visual_projection.weight", "text_projection.weight"):
        return [(key, value.T)]
    before, joined, kind = key.partition(".attn.in_proj_")
    if joined:
        return [(f"{before}.self_attn.{x}_proj.{kind}", part) for x, part in zip("qkv", value.chunk(3), strict=True)]
    return [(key, value)]


def class_texts(path: Path | None, of_data: Mapping[int, str] | None, labels: list[int]) -> Callable[[int], str]:
    """The texts of the classes `labels`, by `class_names`."""
    names = class_names(path, of_data, labels)
    return lambda label: PROMPT.format(names[label])


def class_names(path: Path | None, of_data: Mapping[int, str] | None, labels: list[int]) -> dict[int, str]:
    """What the classes `labels` are called: in the file at `path`, or else as the images' folders or features are.

    Raises ConfigError where a class has no name, or ImageNet's number for one.
    """
    names = read_class_names(path) if path is not None else of_data or {}
    for label in labels:
        if SYNSET.fullmatch(called := names.get(label, "n00000000")):
            there = f"only {called!r}" if label in names else "none"
            raise ConfigError(
                f"--reward asks how an image fits the name of its class, and class {label} has {there}: pass "
                "--class-names FILE, a name a line in the order of the ids, or JSON"
            )
    return {label: names[label] for label in labels}
