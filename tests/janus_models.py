"""A small Janus-Pro with random weights: `transformers`' own model of it, and its files in both formats."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import JanusConfig as PublicConfig
from transformers import JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from vapi_fast.models.sizes import JanusConfig, VQTokenizerConfig

NAME = "small-janus"
SMALL = JanusConfig(
    layers=2,
    heads=2,
    width=32,
    vocab_size=50,
    grid_size=3,
    hidden_width=48,
    text_vocab=40,
    prompt_tokens=12,
    bos=0,
    pad=2,
    begin_image=3,
)
SMALL_VQ = VQTokenizerConfig(channels=32, multipliers=(1, 2), latent_channels=32, codebook_size=50, code_width=8)
# Of `transformers`' names, in turn, those of DeepSeek's files; its script of conversion has them the other way round.
ORIGINAL = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vision_model\.", "vision_model.vision_tower."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\.(?:en|de)coder)\.(?:up|down)\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..*)\.block\.", r"\1.res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)


def public_model(seed: int = 0) -> JanusForConditionalGeneration:
    text = LlamaConfig(
        hidden_size=SMALL.width,
        intermediate_size=SMALL.hidden_width,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        vocab_size=SMALL.text_vocab,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=6,
        patch_size=2,
        projection_dim=SMALL.width,
        num_image_tokens=9,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=SMALL.vocab_size,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 2],
        projection_dim=SMALL.width,
        image_token_embed_dim=SMALL.width,
    )
    torch.manual_seed(seed)
    config = PublicConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    model = JanusForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # so that nothing is left out unseen, biases and norms among them
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn_like(parameter) * scale + (parameter.ndim == 1 and "norm" in name)
    return model.eval()


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `transformers`' model under the names of DeepSeek's files."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in ORIGINAL:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def write(folder: Path, layout: str, model: JanusForConditionalGeneration | None = None) -> Path:
    """The model's files: `transformers`, DeepSeek's `bin`, or that in `bin-shards` or `safetensors-shards`."""
    model = public_model() if model is None else model
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "transformers":
        model.save_pretrained(folder)
        return folder
    state = original({key: value.detach().clone() for key, value in model.state_dict().items()})
    language = {"hidden_size": SMALL.width, "num_hidden_layers": SMALL.layers, "num_attention_heads": SMALL.heads}
    (folder / "config.json").write_text(json.dumps({"model_type": "multi_modality", "language_config": language}))
    if layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    suffix, stem = ("bin", "pytorch_model") if layout == "bin-shards" else ("safetensors", "model")
    keys = list(state)
    places = {key: f"{stem}-{1 + (n % 2)}-of-2.{suffix}" for n, key in enumerate(keys)}
    for file in set(places.values()):
        part = {key: state[key] for key in keys if places[key] == file}
        torch.save(part, folder / file) if suffix == "bin" else save_file(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path, *, without: str = "") -> None:
    """A tokenizer of whole words with the special tokens of `SMALL`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = ["<bos>", "<eos>", "<pad>", "<begin_of_image>", "<|User|>", "<|Assistant|>"]
    words = [*special, "<unk>", ":", "a", "red", "blue", "cup", "cat", "on", "table", "two", "\n\n"]
    words = [word for word in words if word != without]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special if word != without])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Prompts of so many tokens behind padding, int64 `[n,12]`, and their mask."""
    tokens = SMALL.prompt_tokens
    rows = torch.randint(4, SMALL.text_vocab, (len(lengths), tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]
    rows[torch.arange(len(lengths)), tokens - torch.tensor(lengths)] = SMALL.bos
    rows[:, -1] = SMALL.begin_image
    return rows.where(mask, SMALL.pad), mask
