"""Draw any number of images from a checkpoint into a folder; what an interrupted run left there is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapi_fast.data.image_sets import MANIFEST
from vapi_fast.data.pictures import SHEET_COLUMNS, save_sheets, spread
from vapi_fast.data.sample_files import FORMATS, GenevalFiles, SampleFiles, remove_leftovers
from vapi_fast.data.text import encoder_to_fetch
from vapi_fast.generation.conditions import Conditions, Texts, read_conditions
from vapi_fast.generation.config import GENEVAL, LARGEST_BATCH, GenerateConfig
from vapi_fast.generation.engine import Engine, compute_dtype
from vapi_fast.generation.sequences import (
    CACHE_DTYPES,
    bytes_of_sequence,
    check_engine,
    guidance_scales,
    rows_that_fit,
    sample_groups,
)
from vapi_fast.models import Generator, VQTokenizer
from vapi_fast.models.families import check_vocabulary, generator_config, load_generator, require_unconditional
from vapi_fast.models.frozen import PixelCodec
from vapi_fast.models.sizes import Captions
from vapi_fast.models.tokenizer import resized_images
from vapi_fast.runtime import hub
from vapi_fast.runtime.checkpoint import identity, read_regular, write_atomically
from vapi_fast.runtime.distributed import gather_objects, process_group, rank, world_size
from vapi_fast.runtime.errors import ConfigError, NonFiniteError
from vapi_fast.runtime.options import LIMIT, flag, hub_checkpoints
from vapi_fast.runtime.ownership import LOCK, not_written, owned
from vapi_fast.runtime.packages import require
from vapi_fast.runtime.progress import progress_bar

# Fields that do not touch the images, or stand under "files": a folder may be finished with other values.
FILES = {"gpt_ckpt", "vq_ckpt", "caption_features", "prompts", "ema"}
FREE_FIELDS = FILES | {"out", "batch_size", "caption_cache", "compare_ckpt", "entropy_maps"}
DECODE_BATCH = 16  # images in the tokenizer at once
# In the tokenizer, a pixel: four float32 maps of 128 channels, and as much for cuDNN's workspaces.
DECODED_PIXEL_BYTES = 2 * 4 * 128 * 4
DRAW = "token t of image i takes its random bits from seed, i and t alone"
SHEET_IMAGES = 64
ENTROPY_IMAGES = 12


def draw_samples(config: GenerateConfig) -> None:
    """Draw `config.count` images into `config.out`; under torchrun the ranks share them (id mod world size).

    The folder then holds `images/`, `samples.npz` or GenEval's folders, `contact_sheet.png`, `manifest.json`
    (configuration, names and fingerprints of the checkpoints, condition and seed of every image) and the pictures that
    were asked for.
    An image depends on checkpoint, seed, condition and id alone. What an interrupted run left is kept; what is missing
    is drawn.

    Raises:
        ConfigError: the condition does not fit the checkpoint, or the folder holds something else; nothing was written.
        CheckpointError, DataError: a checkpoint or a file in the folder is damaged.
    """
    if config.entropy_maps:
        require(ConfigError, "--entropy-maps", "matplotlib")
    with process_group() as device, owned(config.out, "--out"):
        before = read_manifest(config.out)
        if before and config.batch_size is None:
            config = dataclasses.replace(config, batch_size=before["batch_size"])
        sources = {flag(name): path for name, path in hub_checkpoints(config).items()}
        encodes = config.texts and isinstance(generator_config(config.model).condition, Captions)
        hub.look_up(sources, encoder_to_fetch(config.text_encoder) if sources and encodes else {})
        sampler = Sampler.load(config, config.gpt_ckpt, device)
        compared = None if config.compare_ckpt is None else Sampler.load(config, config.compare_ckpt, device)
        files = sample_files(config)
        manifest = make_manifest(config, sampler, files)
        if before:
            check_same(config.out, before, manifest)
        gather_objects(None)  # all ranks have looked before one writes
        try:
            if rank() == 0:
                remove_leftovers(config.out)
                if before is None:
                    text = json.dumps(manifest, indent=1) + "\n"
                    write_atomically(config.out / MANIFEST, lambda temporary: temporary.write_text(text, "utf-8"))
                save_views(config, sampler, compared)
            del compared  # its memory is for the draws
            gather_objects(None)
            write_samples(config, sampler, files)
        except OSError as error:
            images = config.count * (2 if config.format == "npz" else 1) + SHEET_IMAGES
            needed = images * 3 * config.save_size**2
            raise not_written(
                error, config.out, "make room: the same command goes on where it stopped", needed
            ) from error


def sample_files(config: GenerateConfig) -> SampleFiles:
    if config.format == GENEVAL:
        return GenevalFiles(config.out, config.count, config.geneval_prompts)
    return FORMATS[config.format](config.out, config.count)


def write_samples(config: GenerateConfig, sampler: Sampler, files: SampleFiles) -> None:
    """The images that are missing, by all ranks, and the contact sheet."""
    draw_missing(files, sampler)
    gather_objects(None)
    if rank() == 0:
        files.finish()
        if config.texts:
            ids, columns, captions = sheet_of_prompts(config)
        else:
            ids, columns = torch.arange(min(SHEET_IMAGES, config.count)), SHEET_COLUMNS
            conditions = sampler.conditions
            captions = [f"{conditions.kind} {number}" for number in conditions.numbers(len(ids)).tolist()]
        save_sheets(config.out / "contact_sheet.png", [("", files.read(ids.tolist()))], columns, captions)


def sheet_of_prompts(config: GenerateConfig) -> tuple[Tensor, int, list[str]]:
    """Ids of images for a sheet, its columns, and the prompt of each: a row has one, where all have several images."""
    prompts = torch.arange(config.count) % len(config.texts)
    ids, columns = spread(prompts, config.save_size, rows=True)
    return ids, columns, [config.texts[number] for number in prompts[ids].tolist()]


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the engine refuses is a matter of the flags: its ValueError becomes a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Sampler:
    """Draws the images of given ids from one checkpoint."""

    def __init__(
        self,
        config: GenerateConfig,
        generator: Generator,
        tokenizer: VQTokenizer,
        conditions: Conditions | Texts,
        device: torch.device,
    ) -> None:
        self.config = config
        self.generator = generator
        self.conditions = conditions
        self.device = device
        # One for all processes, and never of what is missing: products of another size round otherwise.
        self.batch_size = config.batch_size or min(
            config.count, *gather_objects(batch_that_fits(config, generator, device))
        )
        # In float32: bf16 would move a quarter of the pixels.
        self.codec = PixelCodec(tokenizer, min(DECODE_BATCH, self.batch_size), torch.float32)
        self.guidance = {name: getattr(config, f"cfg_{name}") for name in ("scale", "interval", "schedule", "power")}

    @classmethod
    def load(cls, config: GenerateConfig, checkpoint: Path, device: torch.device) -> Sampler:
        """Read the checkpoints and the conditions, and see that they fit each other and the device."""
        with refusals():
            check_engine(device, 1, config.batch_size, config.kv_dtype)
        generator = load_generator(checkpoint, config.model, grid_size=config.grid_size, averaged=config.ema)
        if config.cfg_scale > 1:
            require_unconditional(generator, checkpoint, "--cfg-scale above 1", "pass --cfg-scale 1")
        conditions = read_conditions(config, generator, device)
        tokenizer = VQTokenizer.from_checkpoint(config.vq_ckpt, config.tokenizer)
        check_vocabulary(generator, checkpoint, tokenizer, config.vq_ckpt)
        if device.type == "cuda":  # before they go there: in fp32 they might not fit
            for parameter in generator.parameters():  # the rotary table stays in fp32
                parameter.data = parameter.data.to(torch.bfloat16)
        for module in (generator, tokenizer):
            module.eval().requires_grad_(False).to(device)
        return cls(config, generator, tokenizer, conditions, device)

    @cached_property
    def engine(self) -> Engine:
        """For batches of `batch_size`, made once: on a GPU it holds the cache and a token's CUDA graph."""
        return Engine(
            self.generator,
            groups=self.batch_size,
            rollouts=1,
            scales=guidance_scales(self.config.grid_size**2, **self.guidance),
            masked=self.conditions.masked,
            cache_dtype=CACHE_DTYPES[self.config.kv_dtype],
            **self.config.filters,
        )

    @refusals()
    def draw(self, ids: Tensor) -> Tensor:
        """Images uint8 `[n,3,S,S]`, on the CPU, of n ≤ batch_size ids."""
        filled = fill_up(ids, self.batch_size)
        drawn = self.engine.draw(
            self.conditions.of(filled, self.device),
            sample_ids=filled.to(self.device),
            first_rollout=0,
            seed=self.config.seed,
        )
        return (self.decode(drawn.tokens[: len(ids), 0]) * 127.5 + 127.5).round().to(torch.uint8).cpu()

    @refusals()
    def preview(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [−1, 1], and the entropy in bits of the distribution each token was drawn from."""
        condition, mask = self.conditions.of(ids, self.device)
        drawn = sample_groups(
            self.generator,
            condition,
            group_size=1,
            seed=self.config.seed,
            sample_ids=ids.to(self.device),
            condition_mask=mask,
            kv_dtype=self.config.kv_dtype,
            return_entropies=True,
            **{f"cfg_{name}": value for name, value in self.guidance.items()},
            **self.config.filters,
        )
        return self.decode(drawn.tokens[:, 0]), drawn.entropies[:, 0] / math.log(2)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images `[n,3,S,S]` in [−1, 1], S = save_size."""
        size, chunk = self.config.save_size, self.codec.chunk
        parts = fill_up(tokens, chunk).split(chunk)
        found = torch.cat([resized_images(self.codec.decode(part), size) for part in parts])[: len(tokens)]
        if not found.isfinite().all():
            raise NonFiniteError(
                f"the tokenizer {self.config.vq_ckpt} decodes to values that are not finite: pass another checkpoint"
            )
        return found


def batch_that_fits(config: GenerateConfig, generator: Generator, device: torch.device) -> int:
    """Images drawn at once by default: what memory holds beside a batch in the tokenizer, at most LARGEST_BATCH."""
    cache_dtype, guided = CACHE_DTYPES[config.kv_dtype], config.cfg_scale > 1
    fitting = rows_that_fit(generator, cache_dtype, guided=guided)
    if device.type == "cuda":
        dtype = compute_dtype(generator)
        one = bytes_of_sequence(generator.config, dtype, cache_dtype or dtype, guided=guided)
        fitting -= math.ceil(DECODE_BATCH * DECODED_PIXEL_BYTES * config.image_size**2 / one)
    return min(max(fitting, 1), LARGEST_BATCH)


def fill_up(rows: Tensor, multiple: int) -> Tensor:
    """`rows` with the last repeated up to a multiple: all batches of one size round alike, whatever is missing."""
    return torch.cat([rows, rows[-1:].expand(-len(rows) % multiple, *rows.shape[1:])])


def draw_missing(files: SampleFiles, sampler: Sampler) -> None:
    """This rank's share of the samples that are not on disk yet, with images/s and the time left."""
    missing = files.missing()
    mine = missing[missing % world_size() == rank()]
    with progress_bar(
        sampler.config.count,
        initial=sampler.config.count - len(missing),
        desc="samples",
        unit="image",
        disable=rank() > 0,
    ) as progress:
        try:
            for ids in mine.split(sampler.batch_size) if len(mine) else ():
                files.add(ids.tolist(), sampler.draw(ids))
                progress.update(min(len(ids) * world_size(), progress.total - progress.n))  # other ranks keep pace
        finally:
            files.flush()


def make_manifest(config: GenerateConfig, sampler: Sampler, files: SampleFiles) -> dict[str, Any]:
    """What decides the images, and what each of them is."""
    captions = config.caption_features or config.prompts
    used = {"generator": config.gpt_ckpt, "tokenizer": config.vq_ckpt, "captions": captions}
    identities = {key: identity(path) for key, path in used.items() if path is not None}
    if config.ema:
        identities["generator"]["weights"] = "averaged"
    settings = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in FREE_FIELDS
    }
    if settings["class_ids"] is not None:
        settings["class_ids"] = list(settings["class_ids"])
    kind, texts = sampler.conditions.kind, config.texts
    return {
        "configuration": settings,
        "files": identities,
        "hub": {name: hub.record(path) for name, path in hub_checkpoints(config).items()},
        "batch_size": sampler.batch_size,  # it rounds products: a restart takes the same
        "draw": DRAW,
        "images": [
            {"id": i, "file": files.name(i), kind: number}
            | ({"prompt": texts[number]} if texts else {})
            | {"seed": config.seed}
            for i, number in enumerate(sampler.conditions.numbers(config.count).tolist())
        ],
    }


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What an earlier run left in `out`; None if that is empty. Raises ConfigError where it holds anything else."""
    path = out / MANIFEST
    if not path.exists():
        # A run that was killed while it wrote the manifest leaves a temporary file.
        if out.exists() and any(not found.name.startswith((f".{MANIFEST}.", LOCK)) for found in out.iterdir()):
            raise ConfigError(f"--out {out} holds other files: choose another folder")
        return None
    try:
        found = json.loads(read_regular(path))
        if not all(isinstance(found[part], dict) for part in ("configuration", "files")):
            raise TypeError("no configuration, or no files")
        if not isinstance(found["batch_size"], int) or not 0 < found["batch_size"] < LIMIT:
            raise ValueError("a batch of no size")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"--out {out}: its {MANIFEST} is damaged: choose another folder") from error
    return found


def check_same(out: Path, before: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise ConfigError where `out` holds anything but a part of these samples."""
    there, now = (
        {key: value for part in ("configuration", "files") for key, value in each[part].items()}
        for each in (before, manifest)
    )
    for key in now | there:
        if now.get(key) != there.get(key):
            raise ConfigError(
                f"--out {out} holds samples of another run ({key} is {there.get(key)} there, {now.get(key)} now): "
                "choose another folder"
            )


def save_views(config: GenerateConfig, sampler: Sampler, compared: Sampler | None) -> None:
    """Images beside those of another checkpoint at the same seeds, and the first ones' entropies, where asked for."""
    if compared is not None:
        if config.texts:
            ids, columns, captions = sheet_of_prompts(config)
        else:
            ids, columns = spread(sampler.conditions.numbers(config.count), config.save_size)
            captions = []
        both = ((config.gpt_ckpt, sampler), (config.compare_ckpt, compared))
        sheets = [(checkpoint.stem, each.preview(ids)[0].cpu()) for checkpoint, each in both]
        save_sheets(config.out / "comparison.png", sheets, columns, captions)
    if config.entropy_maps:
        from vapi_fast.generation.heatmaps import save_entropy_maps

        save_entropy_maps(config.out / "entropy.png", *sampler.preview(torch.arange(min(ENTROPY_IMAGES, config.count))))
