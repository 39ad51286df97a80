"""The sizes that the models come in. The command line takes its choices from here, so nothing imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Classes(NamedTuple):
    """A condition is a class id, 0 … count − 1."""

    count: int


class Captions(NamedTuple):
    """A condition is a text encoder's features `[tokens, width]`, behind padding where the caption is shorter."""

    tokens: int
    width: int


class Prompts(NamedTuple):
    """A condition is a prompt's token ids int64 `[tokens]`, from `bos` to `begin_image`, behind padding if shorter."""

    tokens: int
    vocabulary: int
    bos: int
    begin_image: int


@dataclass(frozen=True)
class GeneratorConfig(ABC):
    """What all generators have. `grid_size`: tokens along one side of the image.

    `has_unconditional`: there is a condition that stands for "none", as guidance and dropping of conditions need it.
    """

    layers: int
    heads: int
    width: int
    vocab_size: int = 16384
    grid_size: int = 24
    has_unconditional: bool = True

    norm_eps: ClassVar[float] = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    @abstractmethod
    def hidden_width(self) -> int:
        """SwiGLU's."""

    @property
    @abstractmethod
    def condition(self) -> Classes | Captions | Prompts:
        """What one condition is."""

    @property
    @abstractmethod
    def prefix_len(self) -> int:
        """Positions that the condition fills in front of the image tokens."""

    def fitted(self, tokens: int) -> Self:
        """With conditions of up to so many positions, where a family leaves their number open."""
        return self


@dataclass(frozen=True)
class LlamaGenConfig(GeneratorConfig):
    """`caption_tokens` > 0 makes a text-conditioned model."""

    num_classes: int = 1000
    caption_tokens: int = 0
    caption_width: int = 2048

    @property
    def hidden_width(self) -> int:
        """⌈(2/3 · 4 · width) / 256⌉ · 256."""
        return -(-int(8 * self.width / 3) // 256) * 256

    @property
    def condition(self) -> Classes | Captions:
        return Captions(self.caption_tokens, self.caption_width) if self.caption_tokens else Classes(self.num_classes)

    @property
    def prefix_len(self) -> int:
        return self.caption_tokens or 1


LLAMAGEN_CONFIGS = {
    "b": LlamaGenConfig(layers=12, heads=12, width=768),
    "l": LlamaGenConfig(layers=24, heads=16, width=1024),
    "xl": LlamaGenConfig(layers=36, heads=20, width=1280),
    "xxl": LlamaGenConfig(layers=48, heads=24, width=1536),
    "xxxl": LlamaGenConfig(layers=48, heads=40, width=2560),
    "3b": LlamaGenConfig(layers=24, heads=32, width=3200),
    "t2i-xl": LlamaGenConfig(layers=36, heads=20, width=1280, grid_size=16, caption_tokens=120),
    "tiny": LlamaGenConfig(layers=6, heads=6, width=192, vocab_size=512, grid_size=8, num_classes=9),
    "tiny-text": LlamaGenConfig(
        layers=5, heads=4, width=256, vocab_size=512, grid_size=8, caption_tokens=12, caption_width=520
    ),
}


@dataclass(frozen=True)
class JanusConfig(GeneratorConfig):
    """`prompt_tokens`: the longest prompt; `bos`, `pad`, `begin_image`: its special tokens' ids."""

    hidden_width: int = 5632
    code_width: int = 8
    text_vocab: int = 102400
    prompt_tokens: int = 512
    bos: int = 100000
    pad: int = 100002
    begin_image: int = 100016

    norm_eps: ClassVar[float] = 1e-6

    def fitted(self, tokens: int) -> Self:
        return replace(self, prompt_tokens=tokens)

    @property
    def condition(self) -> Prompts:
        return Prompts(self.prompt_tokens, self.text_vocab, self.bos, self.begin_image)

    @property
    def prefix_len(self) -> int:
        return self.prompt_tokens


JANUS_CONFIGS = {
    "janus-pro-1b": JanusConfig(layers=24, heads=16, width=2048),
    "janus-pro-7b": JanusConfig(layers=30, heads=32, width=4096, hidden_width=11008),
    "tiny-janus": JanusConfig(
        layers=5,
        heads=4,
        width=256,
        vocab_size=512,
        grid_size=8,
        hidden_width=768,
        text_vocab=128,
        prompt_tokens=32,
        bos=1,
        pad=0,
        begin_image=2,
    ),
}


@dataclass(frozen=True)
class VQTokenizerConfig:
    """Widths of encoder and decoder are `channels × multipliers`, one entry per resolution, highest first."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    latent_channels: int = 256
    codebook_size: int = 16384
    code_width: int = 8
    norm_groups: int = 32

    @property
    def downsample(self) -> int:
        """Image pixels per token along one side."""
        return 2 ** (len(self.multipliers) - 1)


VQ_CONFIGS = {
    "vq-16": VQTokenizerConfig(),
    "vq-8": VQTokenizerConfig(multipliers=(1, 2, 2, 4)),
    "tiny": VQTokenizerConfig(
        channels=32, multipliers=(1, 2, 3), latent_channels=64, codebook_size=512, code_width=8, norm_groups=8
    ),
    "scenes": VQTokenizerConfig(
        channels=16, multipliers=(1, 2, 4), latent_channels=64, codebook_size=512, code_width=8, norm_groups=8
    ),
}


def named_size(sizes: Mapping[str, T], name: str) -> T:
    """The size of that name, in any case; raises ValueError for one that is not among them."""
    if name.lower() not in sizes:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(sizes)}")
    return sizes[name.lower()]
