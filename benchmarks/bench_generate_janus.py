"""Janus-Pro's guided images by the engine against a loop of the public form: images/s, equal tokens.

    pytest benchmarks/bench_generate_janus.py --benchmark-only [--benchmark-json FILE]

The public form, `generation_inference.py` of deepseek-ai/Janus: `transformers`' Llama, a prompt at a time, 16 images of
it in rows with and without the prompt in turn, a cache that grows by concatenation, multinomial draws. The engine draws
the images of all prompts at once. On a GPU Janus-Pro-1B with random weights at 384² in bf16, where the loop draws one
prompt's images and its time is multiplied; on a CPU the preset tiny-janus in fp32. Guidance 5.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from race import OURS, YARDSTICK, Contestant, Race, yardstick
from torch import Tensor

from vapi_fast.data.prompt_tokens import PromptTokens
from vapi_fast.data.text import padded
from vapi_fast.generation.sequences import Generation, sample_groups
from vapi_fast.models import Janus
from vapi_fast.models.janus_files import ORIGINAL, to_file
from vapi_fast.models.sizes import JANUS_CONFIGS
from vapi_fast.tiny import TEXT_FILES

if TYPE_CHECKING:
    from conftest import Guard
    from transformers import LlamaModel

PUBLIC = "public loop"
IMAGES, SCALE, SEED = 16, 5.0, 20251219  # a prompt; of the guidance
WORDS = "language_model.model."  # what the public model's names begin with
PROMPTS = ("a photo of two dogs", "a photo of a blue cup and a green book")
CPU_SECONDS = 12.0  # of rounds


@dataclass(frozen=True)
class Setting:
    """prompts: token ids, each without padding. looped: of them, those that the public loop draws."""

    name: str
    model: Janus
    public: LlamaModel
    prompts: list[Tensor]
    looped: int


def public_model(model: Janus) -> LlamaModel:
    """`transformers`' Llama with the generator's weights; embeddings and head of the images stay with the generator."""
    from transformers import LlamaConfig, LlamaModel

    config, weight = model.config, model.head.weight
    sizes = {"hidden_size": config.width, "intermediate_size": config.hidden_width, "vocab_size": config.text_vocab}
    sizes |= {"num_hidden_layers": config.layers, "num_attention_heads": config.heads, "rms_norm_eps": config.norm_eps}
    with weight.device:
        public = LlamaModel(LlamaConfig(**sizes)).to(weight.dtype).eval()
    state = to_file(dict(model.state_dict()), ORIGINAL, config)
    state = {name.removeprefix(WORDS): each for name, each in state.items() if name.startswith(WORDS)}
    public.load_state_dict(state)
    return public


@pytest.fixture(scope="module")
def setting() -> Setting:
    pytest.importorskip("transformers", reason="the public loop is made of its Llama")
    if not torch.cuda.is_available():
        pytest.importorskip("tokenizers", reason="prompts are read by it")
        model = Janus.from_checkpoint(TEXT_FILES.janus, "tiny-janus").eval()
        config = model.config
        words = PromptTokens(TEXT_FILES.janus, config.prompt_tokens, bos=config.bos, begin_image=config.begin_image)
        prompts = [words.ids(text) for text in PROMPTS]
        return Setting("tiny-janus", model, public_model(model), prompts, looped=len(prompts))
    torch.manual_seed(SEED)
    config = replace(JANUS_CONFIGS["janus-pro-1b"], prompt_tokens=48)
    with torch.device("cuda"):
        model = Janus(config).eval()
        for parameter in model.parameters():  # the rotary table stays in fp32
            parameter.data = parameter.data.to(torch.bfloat16)
        first, last = torch.tensor([config.bos]), torch.tensor([config.begin_image])
        prompts = [torch.cat([first, torch.randint(config.bos, (n,)), last]) for n in (22, 27, 31, 46) * 2]
    return Setting("janus-pro-1b 384²", model, public_model(model), prompts, looped=1)


@torch.no_grad()
def public_loop(setting: Setting, ids: Tensor, *, greedy: bool = False) -> Tensor:
    """Tokens `[IMAGES,T]` of one prompt."""
    model, config = setting.model, setting.model.config
    rows = ids.repeat(2 * IMAGES, 1)
    rows[1::2, 1:-1] = config.pad
    inputs, cache, tokens = setting.public.embed_tokens(rows), None, []
    for _ in range(config.grid_size**2):
        found = setting.public(inputs_embeds=inputs, use_cache=True, past_key_values=cache)
        cache = found.past_key_values
        logits = model.head.logits(model.readout(found.last_hidden_state[:, -1]))
        shares = (logits[1::2] + SCALE * (logits[0::2] - logits[1::2])).softmax(-1)
        tokens.append(shares.argmax(-1) if greedy else torch.multinomial(shares, 1)[:, 0])
        inputs = model.embed_tokens(tokens[-1].repeat_interleave(2))[:, None]
    return torch.stack(tokens, 1)


def engine(setting: Setting, images: int = IMAGES, top_k: int = 0) -> Generation:
    """`images` of each prompt, all at once."""
    rows, mask = padded(setting.prompts, max(map(len, setting.prompts)))
    model = setting.model
    model.fit_prefix(rows.shape[1])
    filled, mask = (each.to(model.head.weight.device) for each in (rows.where(mask, model.config.pad), mask))
    options = {"condition_mask": mask, "cfg_scale": SCALE, "seed": SEED, "batch_size": images * len(rows)}
    return sample_groups(model, filled, group_size=images, top_k=top_k, **options)


def differing(setting: Setting) -> float:
    """Share of the tokens that both draw greedily and that are not the same."""
    ours = engine(setting, images=1, top_k=1).tokens[: setting.looped, 0]
    theirs = torch.stack([public_loop(setting, ids, greedy=True)[0] for ids in setting.prompts[: setting.looped]])
    return (ours != theirs).double().mean().item()


@pytest.mark.filterwarnings(
    "ignore:.*past_key_values:FutureWarning"
)  # what it is called from 5.40 on, older ones do not know
def test_generate_janus(setting: Setting, guard: Guard, capsys: pytest.CaptureFixture[str]) -> None:
    device, count = setting.model.head.weight.device, len(setting.prompts)
    rivals = {
        PUBLIC: Contestant(lambda _: [public_loop(setting, ids) for ids in setting.prompts[: setting.looped]]),
        YARDSTICK: yardstick(device),
    }
    differs = differing(setting)
    race = Race(lambda _: engine(setting), rivals, itertools.repeat(None))
    race.warm_up()
    row = guard.measure(
        f"generate {setting.name}",
        race,
        references=[PUBLIC],
        error=differs,
        bound=0.99 if device.type == "cuda" else 0.0,  # greedy tokens of random weights part at the first rounding
        seconds=None if device.type == "cuda" else CPU_SECONDS,
        fewest=2 if device.type == "cuda" else 5,
    )
    row["seconds"][PUBLIC] *= count / setting.looped
    seconds = {name: row["seconds"][name] for name in (OURS, PUBLIC)}
    faster = seconds[PUBLIC] / seconds[OURS]
    row["images_per_second"] = {name: count * IMAGES / each for name, each in seconds.items()}
    row["targets"] = [{"target": "10× the public loop", "met": faster >= 10}] if device.type == "cuda" else []
    with capsys.disabled():
        print(f"\n{setting.name}, {count} prompts × {IMAGES} images at guidance {SCALE:g}, on {guard.bench.name}")
        for name, rate in row["images_per_second"].items():
            print(f"  {name:<12}{rate:10.2f} images/s")
        print(f"  engine {faster:.2f}× as fast, {1 - differs:.2%} of greedy tokens equal")
    guard.judge(row)
