"""The families of generators: which class builds a configuration, and which one a name belongs to."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path

from .llamagen import LlamaGen
from .sizes import GeneratorConfig, LlamaGenConfig
from .transformer import Generator

FAMILIES: dict[type[GeneratorConfig], type[Generator]] = {LlamaGenConfig: LlamaGen}


def generator_config(name: str) -> GeneratorConfig:
    """The size of that name, in any case; raises ValueError for one that no family has."""
    sizes = ChainMap(*(family.sizes for family in FAMILIES.values()))
    if name.lower() not in sizes:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(sizes)}")
    return sizes[name.lower()]


def random_generator(config: GeneratorConfig) -> Generator:
    """Of this size, with random weights (on the meta device: without any)."""
    return FAMILIES[type(config)](config)


def load_generator(path: str | Path, name: str, *, grid_size: int | None = None) -> Generator:
    """The generator `name` with the weights at `path`; arguments and errors as of `LlamaGen.from_checkpoint`."""
    return FAMILIES[type(generator_config(name))].from_checkpoint(path, name, grid_size=grid_size)
