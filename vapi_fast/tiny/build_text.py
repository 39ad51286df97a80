"""Rebuild the text presets' files from nothing: words, scenes, five networks (two and a half hours on two cores).

    python -m vapi_fast.tiny.build_text [--output-dir DIR] [--only PART …]

Each network shows its loss, what it gets right of held-out scenes, and the time left. A part is written when it is
done: what an interruption has left out is built by `--only`, from the parts that are there.

Needs Debian's packages fonts-noto-color-emoji for the scenes, and PyPI's wordllama for the words' vectors.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vapi_fast import ops
from vapi_fast.data import scenes
from vapi_fast.data.prompt_tokens import BEGIN_IMAGE, TEMPLATE, UNKNOWN, PromptTokens
from vapi_fast.data.scenes import CELLS, KINDS, PAINTS, Sprites, Thing
from vapi_fast.data.text import padded
from vapi_fast.data.words import WordVectors
from vapi_fast.evaluation.scene_detector import NONE, SceneDetector
from vapi_fast.models import LPIPS, Dropout, Janus, LlamaGen, VQTokenizer, janus_files
from vapi_fast.models.sizes import JANUS_CONFIGS, JanusConfig
from vapi_fast.runtime.checkpoint import write_atomically
from vapi_fast.tiny import TEXT_FILES, TextFiles, text_files
from vapi_fast.tiny.build import disturbed
from vapi_fast.tiny.images import BITMAP_SIZE, FONT, glyph_image
from vapi_fast.tiny.training import SEED, build_parts, fit, fit_generator, fit_tokenizer, save_half

TRAINING_SCENES = 1280
PROMPTS_A_TASK, SCENES_A_PROMPT = 72, 2
HELDOUT_SEED, TOKENIZER_SEED, GENERATOR_SEED = 1, 2, 3  # streams of scenes
CYCLES = (2500, 1800)  # steps of the generator, at a rate that falls to zero in each
JANUS_STEPS = 1800
Scene = tuple[scenes.Prompt, list[Thing], np.ndarray]
Example = tuple[Tensor, dict[str, Any]]  # tokens int64 [B,T], and the forward's further arguments


def build_words(output: TextFiles) -> None:
    """Vectors of the captions' words: means of their pieces' in WordLlama's 256-wide table (MIT), at unit scale."""
    found = importlib.util.find_spec("wordllama")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the words' vectors are WordLlama's: pip install wordllama tokenizers")
    from tokenizers import Tokenizer

    folder = Path(found.origin).parent
    table = next(iter(load_file(folder / "weights" / "l2_supercat_256.safetensors").values())).float()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    words = scenes.words()
    vectors = torch.stack([table[tokenizer.encode(word, add_special_tokens=False).ids].mean(0) for word in words])
    vectors = (vectors - vectors.mean(0)) / vectors.std()
    state = {"vectors": vectors.half().contiguous()}
    write_atomically(output.words, lambda path: save_file(state, path, {"words": json.dumps(words)}))
    print(f"{output.words.name}: {len(words)} words")


def sprites() -> Sprites:
    """The objects, of the font's glyphs."""
    if not FONT.is_file():
        raise FileNotFoundError(f"{FONT} is missing: install Debian's package fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), BITMAP_SIZE)
    return Sprites.of(glyph_image(text, font) for text in scenes.GLYPHS.values())


def heldout_scenes(painted: Sprites) -> Iterator[Scene]:
    """The prompts that are measured on, each so many times in turn."""
    draw = random.Random(HELDOUT_SEED)
    prompts = scenes.measured_prompts(PROMPTS_A_TASK, HELDOUT_SEED)
    for prompt in prompts * SCENES_A_PROMPT:
        things = scenes.arrange(prompt, draw)
        yield prompt, things, scenes.render(things, painted, draw)


def build_scenes(output: TextFiles) -> None:
    """The images with captions that are aligned on, and the held-out ones that are measured on."""
    painted = sprites()
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    training = itertools.islice(scenes.stream(painted, SEED, "aligned"), TRAINING_SCENES)
    for path, source in ((output.train_images, training), (output.heldout_images, heldout_scenes(painted))):
        rows = [{"image": {"bytes": png(image), "path": None}, "caption": prompt.text} for prompt, _, image in source]
        write_atomically(path, datasets.Dataset.from_list(rows, features=features).to_parquet)
        print(f"{path.name}: {len(rows)} scenes, {path.stat().st_size / 1e6:.1f} MB")
    lines = [json.dumps(prompt.to_json()) + "\n" for prompt in scenes.measured_prompts(PROMPTS_A_TASK, HELDOUT_SEED)]
    write_atomically(output.prompts, lambda path: path.write_text("".join(lines), "utf-8"))


def load_scenes(path: Path) -> tuple[list[str], Tensor]:
    """A parquet file's captions, and its images float32 `[N,3,32,32]` in [−1, 1]."""
    with tempfile.TemporaryDirectory() as cache:
        table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in table["image"]])
        captions = list(table["caption"])
    return captions, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def drawn(source: Iterator[Scene], count: int) -> tuple[list[str], list[list[Thing]], Tensor]:
    """The next scenes: captions, objects, images float32 `[N,3,32,32]` in [−1, 1]."""
    prompts, things, images = zip(*itertools.islice(source, count), strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [prompt.text for prompt in prompts], list(things), pixels.to(memory_format=torch.channels_last)


def train_perceptual(output: TextFiles, steps: int = 1200, batch_size: int = 64) -> None:
    """A classifier of what kinds of object a scene has, each alike: features for LPIPS and FID, logits for IS."""
    painted = sprites()
    source = scenes.stream(painted, SEED)
    _, heldout_things, heldout = drawn(heldout_scenes(painted), 256)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model = LPIPS.from_name("scenes").to(memory_format=torch.channels_last)
    model.heads.requires_grad_(False)

    def shares(things: list[list[Thing]]) -> Tensor:
        counts = torch.zeros(len(things), len(KINDS))
        for row, scene in enumerate(things):
            for thing in scene:
                counts[row, KINDS.index(thing.kind)] = 1
        return counts / counts.sum(1, keepdim=True)

    def loss_of(_: int) -> Tensor:
        _, things, images = drawn(source, batch_size)
        inputs = disturbed(images, generator).to(memory_format=torch.channels_last)
        return F.cross_entropy(model.features_and_logits(inputs)[1], shares(things))

    def figures() -> dict[str, str | int]:
        best = model.features_and_logits(heldout)[1].argmax(1, keepdim=True)
        return {"heldout_accuracy": f"{(shares(heldout_things).gather(1, best) > 0).float().mean():.3f}"}

    fit("perceptual network", model, steps, loss_of, figures=figures)
    save_half(model, output.perceptual)


def cells(things: list[list[Thing]]) -> tuple[Tensor, Tensor]:
    """What is in each cell: kinds and paints, int64 `[N,4]`; of a cell without an object NONE and −1."""
    kinds = torch.full((len(things), CELLS), NONE)
    paints = torch.full((len(things), CELLS), -1)
    for row, scene in enumerate(things):
        for thing in scene:
            kinds[row, thing.cell] = KINDS.index(thing.kind)
            paints[row, thing.cell] = PAINTS.index(thing.color)
    return kinds, paints


def any_scene(draw: random.Random) -> list[Thing]:
    """Any objects in any colors and cells: a detector of everything must not know what usually goes together."""
    count = draw.randint(0, CELLS)
    return [Thing(draw.choice(KINDS), draw.choice(PAINTS), cell) for cell in draw.sample(range(CELLS), count)]


def train_detector(output: TextFiles, steps: int = 2500, batch_size: int = 64) -> None:
    """Cross-entropy of kinds and paints over the cells of scenes of any objects, half of them disturbed."""
    painted, draw = sprites(), random.Random(SEED)
    _, heldout_things, heldout = drawn(heldout_scenes(painted), 512)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model = SceneDetector().to(memory_format=torch.channels_last)

    def loss_of(_: int) -> Tensor:
        things = [any_scene(draw) for _ in range(batch_size)]
        pixels = np.stack([scenes.render(scene, painted, draw) for scene in things])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        images[::2] = disturbed(images[::2], generator)
        kinds, paints = cells(things)
        of_kinds, of_paints = model(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(of_kinds.flatten(0, 1), kinds.flatten())
        return loss + F.cross_entropy(of_paints.flatten(0, 1), paints.flatten(), ignore_index=-1)

    def figures() -> dict[str, str | int]:
        kinds, paints = cells(heldout_things)
        of_kinds, of_paints = model(heldout)
        there = kinds != NONE
        right = of_kinds.argmax(-1) == kinds
        right_paint = (of_paints.argmax(-1) == paints)[there]
        return {"heldout_objects": f"{right.float().mean():.4f}", "colors": f"{right_paint.float().mean():.4f}"}

    fit("detector", model, steps, loss_of, lr=2e-3, every=100, figures=figures)
    save_half(model, output.detector)


def train_tokenizer(output: TextFiles, steps: int = 1250, batch_size: int = 48, continuous_steps: int = 150) -> None:
    """As `fit_tokenizer` says, on endless scenes."""
    painted = sprites()
    source = scenes.stream(painted, TOKENIZER_SEED)
    heldout, examples = drawn(heldout_scenes(painted), 256)[2], drawn(source, 1000)[2]
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    perceptual = LPIPS.from_checkpoint(output.perceptual, "scenes").requires_grad_(False)
    model = VQTokenizer.from_name("scenes").to(memory_format=torch.channels_last)

    def draw() -> Tensor:
        return drawn(source, batch_size)[2]

    fit_tokenizer(model, perceptual, draw, examples, heldout, steps, continuous_steps, generator)
    save_half(model, output.tokenizer)


def scene_batches(
    output: TextFiles, batch_size: int, conditions: Callable[[list[str]], dict[str, Any]], seed: int = GENERATOR_SEED
) -> tuple[Callable[[int], Example], Example]:
    """What `fit_generator` takes: endless scenes, one caption in ten left out for guidance, and held-out ones.

    No scene comes twice, so there is nothing to learn by heart and no dropout.
    """
    painted = sprites()
    source = scenes.stream(painted, seed)
    tokenizer = VQTokenizer.from_checkpoint(output.tokenizer, "scenes").eval().to(memory_format=torch.channels_last)

    def draw(step: int) -> Example:
        captions, _, images = drawn(source, batch_size)
        dropout = Dropout(0.0, 0.1, ops.fold_seed(SEED, step))
        return tokenizer.encode(images), {**conditions(captions), "dropout": dropout}

    captions, _, images = drawn(heldout_scenes(painted), 256)
    with torch.no_grad():
        return draw, (tokenizer.encode(images), conditions(captions))


def train_generator(output: TextFiles, cycles: Sequence[int] = CYCLES, batch_size: int = 32) -> None:
    """Next-token cross-entropy on scenes behind their captions' words."""
    torch.manual_seed(SEED)
    model, encoder = LlamaGen.from_name("tiny-text"), WordVectors(output.words)

    def conditions(captions: list[str]) -> dict[str, Any]:
        tokens = model.config.caption_tokens
        features, mask = padded(list(encoder.states(captions, tokens)), tokens)
        return {"condition": features, "condition_mask": mask}

    for cycle, steps in enumerate(cycles):
        fit_generator(model, *scene_batches(output, batch_size, conditions, GENERATOR_SEED + 1000 * cycle), steps)
    save_half(model, output.generator)


def build_prompt_tokenizer(folder: Path, config: JanusConfig) -> PromptTokens:
    """A tokenizer of the captions' words, as `tokenizer.json` beside Janus-Pro's files."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    roles = [part for part in re.split(r"(<\|\w+\|>)", TEMPLATE) if part.startswith("<|")]
    special = ["<pad>", "<bos>", BEGIN_IMAGE, *roles, UNKNOWN]
    ids = {word: n for n, word in enumerate([*special, ":", *scenes.words()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    return PromptTokens(folder, config.prompt_tokens, bos=config.bos, begin_image=config.begin_image)


def begin_as(model: Janus, generator: LlamaGen) -> None:
    """Another model's layers, and images that enter them as they do there."""
    model.layers.load_state_dict(generator.layers.state_dict())
    entering = generator.tok_embeddings.weight.detach()
    nn.init.normal_(model.gen_embed.weight)
    model.gen_aligner.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    nn.init.normal_(model.text_embeddings.weight, std=entering.std().item())
    model.gen_head.output_mlp_projector.reset_parameters()
    into = nn.ModuleList([model.gen_embed, model.gen_aligner])

    def loss_of(_: int) -> Tensor:
        return F.mse_loss(model.token_table(), entering) / entering.square().mean()

    fit("image embeddings", into, 1000, loss_of, lr=1e-2, weight_decay=0.0, figures=dict)


def train_janus(output: TextFiles, steps: int = JANUS_STEPS, batch_size: int = 32) -> None:
    """Next-token cross-entropy on scenes behind their prompts, and on these, so that it also writes.

    Its layers begin as the generator's, which see other positions and embeddings, but the same scenes.
    """
    torch.manual_seed(SEED)
    model = Janus(JANUS_CONFIGS["tiny-janus"])
    begin_as(model, LlamaGen.from_checkpoint(output.generator, "tiny-text"))
    config = model.config
    tokenizer = build_prompt_tokenizer(output.janus, config)

    def conditions(captions: list[str]) -> dict[str, Any]:
        prompts = [tokenizer.ids(caption) for caption in captions]
        rows, mask = padded(prompts, max(map(len, prompts)))
        return {"condition": rows.where(mask, config.pad), "condition_mask": mask}

    def text_loss(given: dict[str, Any]) -> Tensor:
        """Of a few prompts each token by those before it."""
        few = zip(given["condition"][:4], given["condition_mask"][:4], strict=True)
        ids = torch.stack([row.roll(int(seen.sum())) for row, seen in few])  # in front of their padding
        states = model.text_states(ids[:, :-1])
        logits = states @ model.text_embeddings.weight.T
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=config.pad)

    fit_generator(model, *scene_batches(output, batch_size, conditions), steps, text_loss)
    language = {"num_hidden_layers": config.layers, "hidden_size": config.width, "num_attention_heads": config.heads}
    text = json.dumps({"model_type": "multi_modality", "language_config": language}, indent=2) + "\n"
    write_atomically(output.janus / "config.json", lambda path: path.write_text(text, "utf-8"))
    save_half(janus_files.to_file(model.state_dict(), janus_files.ORIGINAL, config), output.janus / "model.safetensors")


PARTS: dict[str, Callable[[TextFiles], None]] = {
    "words": build_words,
    "scenes": build_scenes,
    "perceptual": train_perceptual,
    "detector": train_detector,
    "tokenizer": train_tokenizer,
    "generator": train_generator,
    "janus": train_janus,
}


if __name__ == "__main__":
    build_parts("vapi_fast.tiny.build_text", __doc__, PARTS, text_files, TEXT_FILES.words.parent)
