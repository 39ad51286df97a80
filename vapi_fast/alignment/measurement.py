"""Measure a generator: draw samples at fixed seeds, score them against held-out images, and its rollouts' rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vapi_fast import ops, tiny
from vapi_fast.alignment.config import AlignConfig, RolloutOptions
from vapi_fast.alignment.data_sets import open_data
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.rollout import condition_of, roll_out, token_uncertainty
from vapi_fast.data.caption_data import CaptionedData
from vapi_fast.data.dataset import ImageBatch, ImageStream
from vapi_fast.data.features import FeatureSource
from vapi_fast.data.splits import canonical
from vapi_fast.evaluation import metrics as evaluation
from vapi_fast.evaluation.geneval_scores import TaskScores
from vapi_fast.evaluation.networks import FeatureNetwork, inception_network, tiny_network
from vapi_fast.evaluation.scene_judge import SceneJudge
from vapi_fast.generation.sequences import generate
from vapi_fast.models import Generator
from vapi_fast.models.tokenizer import resized_images
from vapi_fast.runtime.distributed import gather_rows, rank, world_size
from vapi_fast.runtime.errors import NonFiniteError, warn
from vapi_fast.runtime.progress import progress_bar

REWARD_IMAGES = 512  # at most so many held-out images are rolled out
PAPER_SIDE = 256  # pixels that papers score images at, whatever they were drawn at
DECODED = 16  # images in the tokenizer at once
BATCHES_A_CAPTURE = 16  # drawn by one engine: on a GPU each casts the weights and captures its step anew
SEED_STREAM = 1 << 62  # samples for evaluation never share draws with a training step


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out images: of their rollouts' rewards, and of what these are drawn from.

    entropy, cross_entropy: in nats a token, of the teacher-forced distributions at temperature 1 (around noise, where
    there is `--noise-prob`); the latter to the images' own tokens. A sharper generator has less of the first, one that
    has over-fitted more of the second.
    """

    reward: float
    mse: float
    lpips: float
    entropy: float
    cross_entropy: float


@dataclass(frozen=True)
class Scored:
    """Figures of one set of samples. geneval: of captions that a preset's detector can judge."""

    scores: evaluation.Scores
    geneval: TaskScores | None

    def as_record(self) -> dict[str, Any]:
        found = {name: value for name, value in dataclasses.asdict(self.scores).items() if value is not None}
        return found | ({"geneval": dataclasses.asdict(self.geneval)} if self.geneval else {})


@dataclass(frozen=True)
class Measurement:
    """One generator's figures: scores of its samples without and with guidance, and those of held-out images."""

    plain: Scored
    cfg: Scored | None  # without guidance it would be the plain ones again
    held_out: HeldOut

    def as_record(self) -> dict[str, Any]:
        """The layout of `run.json`: the plain scores on top with the held-out figures, the guided ones under `cfg`."""
        plain, *guided = (each.as_record() for each in (self.plain, self.cfg) if each)
        return plain | ({"cfg": guided[0]} if guided else {}) | dataclasses.asdict(self.held_out)


class Evaluator:
    """Holds the held-out images and their features, so that base and aligned generator meet the same test."""

    @torch.no_grad()
    def __init__(
        self, config: AlignConfig, models: Models, device: torch.device, features: FeatureSource | None = None
    ) -> None:
        """features: of the run's captions, so that those that it has foreseen are not cleaned and looked for again."""
        from vapi_fast.data.pictures import spread  # takes Pillow, which a run without measurements does without

        self.config = config
        self.models = models
        self.device = device
        self.network = feature_network(config, models, device)
        self.scored_side = config.image_size if config.lpips in tiny.NETWORKS else PAPER_SIDE
        self.data = open_data(config, models.generator.config.condition, device, held_out=True, features=features)
        measured, trained = canonical(self.data.split or "train"), canonical(config.split or "train")
        alone = not config.split and measured not in ("validation", "test")  # whatever it is called
        if config.eval_data is None and (measured == trained or alone):
            warn(f"--data {config.data}: the measurement takes the split that is aligned on; pass --eval-data")
        scored = self.data.at(self.scored_side)
        count = min(len(self.data), config.eval_samples)
        features, labels, positions = [], [], []
        for position, batch in shard_of(scored, count, config.eval_batch):
            features.append(self.network.features(batch.images.to(device)).pooled.cpu())
            labels.append(batch.labels)
            positions.append(position)
        order = gather_rows(torch.cat(positions)).argsort()  # the same for any number of ranks
        self.reference = gather_rows(torch.cat(features))[order].to(device)
        self.labels = gather_rows(torch.cat(labels))[order]
        rewarded = list(shard_of(self.data, min(count, REWARD_IMAGES), config.micro_batch))
        self.rewarded = [batch for _, batch in rewarded]
        self.positions = [position for position, _ in rewarded]
        # Of these images, the ones that pictures show, and their classes' samples, which have the positions as ids.
        self.shown, self.columns = spread(self.labels[:REWARD_IMAGES], config.image_size)
        captioned = isinstance(self.data, CaptionedData)
        captions = [self.data.caption(label) for label in self.labels.tolist()] if captioned else []
        self.captions = [captions[place] for place in self.shown.tolist()] if captioned else []
        self.judge = SceneJudge.of(captions, device) if config.lpips == "scenes" else None

    @torch.no_grad()
    def measure(self, generator: Generator, name: str, temperature: float | None = None) -> Measurement:
        """Score `generator`; draws depend on the config's seed alone, so two generators get the same ones.

        temperature: of samples and rollouts. None: 1 for samples, as papers draw them, whatever `config.temperature`
        a run learns at, and that one for rollouts.
        """
        scale, drawn_at = self.config.cfg_scale, temperature or 1.0
        plain = self.score(generator, 1.0, name, drawn_at)
        guided = self.score(generator, scale, name, drawn_at) if scale > 1 else None
        return Measurement(plain, guided, self.held_out(generator, temperature or self.config.temperature))

    def score(self, generator: Generator, cfg_scale: float, name: str, temperature: float) -> Scored:
        features, logits, correct = [], [], []
        for images in self.samples(generator, cfg_scale, self.config.eval_samples, name, temperature):
            found = self.network.features(images)
            features.append(found.pooled.cpu())
            logits.append(found.logits.cpu())
            if self.judge:
                correct += self.judge.correct(images, self.sample_ids(self.config.eval_samples)[len(correct) :])
        scores = evaluation.score(
            self.reference,
            gather_rows(torch.cat(features)).to(self.device),
            gather_rows(torch.cat(logits)).to(self.device),
            feature_network=self.network.name,
        )
        return Scored(scores, self.judge.scores(correct) if self.judge else None)

    def sample_ids(self, count: int) -> Tensor:
        """This rank's of `count` samples."""
        return torch.arange(rank(), count, world_size())

    def samples(
        self, generator: Generator, cfg_scale: float, count: int, name: str, temperature: float
    ) -> Iterator[Tensor]:
        """This rank's share of `count` sampled images as they are scored, `[n,3,S,S]`, S = `scored_side`.

        Classes are in the proportions of the held-out images; captions are theirs, in turn.
        """
        ids = self.sample_ids(count)
        guided = f"{name}, CFG {cfg_scale:g}" if cfg_scale > 1 else f"{name}, no CFG"
        with progress_bar(len(ids), desc=f"samples ({guided})", unit="image", disable=rank() > 0) as progress:
            batches = BATCHES_A_CAPTURE if self.device.type == "cuda" else 1
            for part in ids.split(batches * self.config.eval_batch):
                for tokens in self.draw(generator, part, cfg_scale, temperature).split(self.config.eval_batch):
                    yield self.decode(tokens, self.scored_side)
                    progress.update(len(tokens))

    @torch.no_grad()
    def originals(self) -> list[tuple[str, Tensor]]:
        """The held-out images that are shown and the tokenizer's reconstructions of them; all ranks call it."""
        wanted = [torch.isin(position, self.shown) for position in self.positions]
        positions = gather_rows(torch.cat([each[rows] for each, rows in zip(self.positions, wanted, strict=True)]))
        mine = [batch.images[rows] for batch, rows in zip(self.rewarded, wanted, strict=True)]
        images = gather_rows(torch.cat(mine))[(positions == self.shown[:, None]).int().argmax(1)]
        tokens = [self.models.tokenizer.encode(part.to(self.device)) for part in images.split(DECODED)]
        return [("original", images), ("reconstruction", self.decode(torch.cat(tokens), self.config.image_size).cpu())]

    def sample(self, generator: Generator, sample_ids: Tensor) -> Tensor:
        """Images `[N,3,H,W]` in [−1, 1] of the given sample ids, without guidance."""
        return self.decode(self.draw(generator, sample_ids, cfg_scale=1.0), self.config.image_size)

    @torch.no_grad()
    def draw(self, generator: Generator, sample_ids: Tensor, cfg_scale: float, temperature: float = 1.0) -> Tensor:
        """Tokens int64 `[N,T]` of the given sample ids, `eval_batch` sequences at a time."""
        labels = self.labels[sample_ids % len(self.labels)]
        rows, mask = self.data.condition(labels)
        options = {"sample_ids": sample_ids.to(self.device), "batch_size": self.config.eval_batch}
        seed = ops.fold_seed(self.config.seed, SEED_STREAM)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            options |= {"condition_mask": mask, "cfg_scale": cfg_scale, "temperature": temperature}
            return generate(generator, rows, seed=seed, **options)

    @torch.no_grad()
    def decode(self, tokens: Tensor, side: int) -> Tensor:
        decode = self.models.tokenizer.decode
        images = torch.cat([resized_images(decode(part), side) for part in tokens.split(DECODED)])
        if not images.isfinite().all():
            raise NonFiniteError("the tokenizer decodes samples to values that are not finite: pass another --vq-ckpt")
        return images

    def held_out(self, generator: Generator, temperature: float) -> HeldOut:
        """Means over teacher-forced rollouts around held-out images."""
        fields = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(RolloutOptions)}
        options = RolloutOptions(**fields | {"temperature": temperature})
        seed = ops.fold_seed(self.config.seed, SEED_STREAM + 1)
        rows = []
        for batch in self.rewarded:
            batch = batch.trimmed().to(self.device)
            tokens = self.models.codec.encode(batch.images)
            draw = {"seed": seed, "sample_ids": batch.image_ids}
            rollout = roll_out(generator, tokens, condition_of(batch), options, **draw)
            reward = self.models.reward.score(rollout.tokens, batch.images)
            uncertainty = token_uncertainty(rollout.hidden, generator.head, tokens)
            rows.append(torch.cat([torch.stack([value.mean(1) for value in reward], dim=1), uncertainty], dim=1).cpu())
        return HeldOut(*gather_rows(torch.cat(rows)).double().mean(0).tolist())


def shard_of(data: ImageStream, count: int, batch_size: int) -> Iterator[tuple[Tensor, ImageBatch]]:
    """This rank's part of the first `count` images of the data's own shuffled order: batches and their positions.

    Of at least as many images as ranks, every rank gets some in the first batch.
    """
    size = max(1, min(batch_size, count // world_size())) * world_size()
    steps = -(-count // size)
    for step, batch in enumerate(data.batches(size, steps, seed=0, rank=rank(), world_size=world_size())):
        positions = step * size + batch.sample_ids
        wanted = positions < count
        if wanted.any():
            yield positions[wanted], batch.take(wanted)


def feature_network(config: AlignConfig, models: Models, device: torch.device) -> FeatureNetwork:
    """The presets score with their own classifiers; every other model with Inception."""
    if config.lpips in tiny.NETWORKS:
        return tiny_network(models.reward.lpips)
    return inception_network(config.inception_weights, device)
