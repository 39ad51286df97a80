"""The families of generators: which class builds a configuration, and which one a name belongs to."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path

from vapi_fast.runtime.errors import CheckpointError

from .janus import Janus
from .llamagen import LlamaGen
from .sizes import GeneratorConfig, JanusConfig, LlamaGenConfig, named_size
from .tokenizer import VQTokenizer
from .transformer import Generator

FAMILIES: dict[type[GeneratorConfig], type[Generator]] = {LlamaGenConfig: LlamaGen, JanusConfig: Janus}


def generator_config(name: str) -> GeneratorConfig:
    """The size of that name, in any case; raises ValueError for one that no family has."""
    return named_size(ChainMap(*(family.sizes for family in FAMILIES.values())), name)


def random_generator(config: GeneratorConfig) -> Generator:
    """Of this size, with random weights (on the meta device: without any)."""
    return FAMILIES[type(config)](config)


def load_generator(path: str | Path, name: str, *, grid_size: int | None = None, averaged: bool = False) -> Generator:
    """The generator `name` with the weights at `path`; arguments and errors as of `LlamaGen.from_checkpoint`."""
    return FAMILIES[type(generator_config(name))].from_checkpoint(path, name, grid_size=grid_size, averaged=averaged)


def check_vocabulary(
    generator: Generator, path: str | Path, tokenizer: VQTokenizer, tokenizer_path: str | Path
) -> None:
    """Raise CheckpointError where the generator's tokens are not the tokenizer's."""
    vocabulary, codes = generator.config.vocab_size, len(tokenizer.codebook())
    if vocabulary != codes:
        raise CheckpointError(
            f"{path} has a vocabulary of {vocabulary} tokens, and {tokenizer_path} a codebook of {codes}: pass the "
            "tokenizer that the generator was trained with"
        )


def require_unconditional(generator: Generator, path: str | Path | None, what: str, advice: str) -> None:
    """Raise CheckpointError where no condition of the generator's stands for "none", which `what` needs."""
    if not generator.config.has_unconditional:
        raise CheckpointError(
            f"{path} was trained without an unconditional class (class_dropout_prob 0: it has a row for each of its "
            f"{generator.config.condition.count} classes, and none besides), which {what} needs: {advice}"
        )
