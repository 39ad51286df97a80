"""Rewards by name and weight: what `--reward` says, the networks' cosines, and what is learned from several."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import CLIP_WORDS, HEAD, PATCH, SIDE, VOCABULARY, clip, louder
from PIL import Image
from torch import Tensor, nn

from vapi_fast import AlignConfig, align, ops
from vapi_fast.alignment.control import advantages_of
from vapi_fast.alignment.figures import metrics_of
from vapi_fast.alignment.image_text import class_names, in_8_bits, levels, load_networks
from vapi_fast.alignment.losses import rewards_of
from vapi_fast.alignment.models import Models
from vapi_fast.alignment.reward_terms import reward_terms
from vapi_fast.data.dataset import ImageBatch
from vapi_fast.data.splits import read_class_names
from vapi_fast.evaluation import clip as networks_of_clip
from vapi_fast.evaluation.clip import network_pixels
from vapi_fast.runtime.errors import CheckpointError, ConfigError, DataError

Make = Callable[..., AlignConfig]
CPU = torch.device("cpu")
NAMES = {0: "tench", 1: "a red fox", 2: "sea lion"}
TEXTS = {label: f"a photo of {name}" for label, name in NAMES.items()}.__getitem__


def darkness(images: Tensor, labels: Tensor) -> Tensor:
    return -images.mean((1, 2, 3))


DARKNESS = f"{__name__}:darkness"


# ---- what the flag says


def test_names_functions_and_weights() -> None:
    assert reward_terms(None) == (("pixel", 1.0),)
    found = reward_terms("clip:5, clip-levels,hpsv2:1e-1,my.module:fn:-2,other:fn")
    expected = [("clip", 5.0), ("clip-levels", 1.0), ("hpsv2", 0.1), ("my.module:fn", -2.0), ("other:fn", 1.0)]
    assert list(found) == expected
    assert [term.network for term in found] == ["clip", "clip", "hpsv2", None, None]
    assert [term.is_users for term in found] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clop", "--reward clop: unknown, expected pixel, classifier, clip, clip-levels, hpsv2"),
        ("clop:5", "--reward clop:5: unknown, expected"),
        ("", "--reward : unknown"),
        ("pixel,", "--reward : unknown"),
        ("clip:much", "--reward clip:much: the weight of clip must be a number, got 'much'"),
        ("clip:", "the weight of clip must be a number, got ''"),
        ("clip:nan", "the weight of clip must be a number, got 'nan'"),
        ("pixel:1:2", "the weight of pixel must be a number, got '1:2'"),
        (f"{DARKNESS}:x", f"the weight of {DARKNESS} must be a number, got 'x'"),
        ("pixel,clip:2,pixel:3", "pixel is there twice, give it one weight"),
        ("pixel:0,classifier:0", "all weights are 0"),
        ("no_such_module_at_all:fn:2", "No module named 'no_such_module_at_all'"),
    ],
)
def test_a_reward_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        AlignConfig(model="tiny", reward=text)
    assert message in str(refused.value)


def test_what_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / name for name in ("gpt_ckpt", "vq_ckpt", "data")}
    for path in files.values():
        path.touch()
    with pytest.raises(ConfigError, match="--reward classifier needs --model tiny"):
        AlignConfig(model="xxl", reward="classifier", **files)
    with pytest.raises(ConfigError, match="--rollout-cfg-scale 2 needs --rollouts free"):
        AlignConfig(model="tiny", rollout_cfg_scale=2.0)
    monkeypatch.setattr("vapi_fast.alignment.config.installed", lambda module: module != "transformers")
    with pytest.raises(ConfigError, match=r"--reward hpsv2-levels needs transformers.*'vapi-fast\[rewards\]'"):
        AlignConfig(model="tiny", reward="hpsv2-levels")


# ---- the networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `--reward-networks` names one: `clip` as transformers saves it, `hpsv2` in open_clip's names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("networks")
    clip(root / "clip")
    transformers.CLIPTokenizer.from_pretrained(root / "clip").save_pretrained(root / "hpsv2")
    torch.save({"state_dict": louder(OpenClip()).state_dict()}, root / "hpsv2" / "HPS_v2.1_compressed.pt")
    return root


class OpenClipBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // HEAD, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 96))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(96, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTransformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE // PATCH) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, out))
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenClipTransformer(width, layers=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP by PyTorch's own attention, with its weights' names."""

    def __init__(self, width: int = 2 * HEAD, out: int = 24) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(CLIP_WORDS, width))
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.visual = OpenClipVision(3 * HEAD, out)
        self.transformer = OpenClipTransformer(width, layers=2)
        self.token_embedding = nn.Embedding(len(VOCABULARY), width)
        self.ln_final = nn.LayerNorm(width)

    def encode_text(self, words: Tensor) -> Tensor:
        x = self.token_embedding(words) + self.positional_embedding[: words.shape[1]]
        mask = torch.full((words.shape[1],) * 2, -math.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[range(len(x)), words.argmax(-1)] @ self.text_projection


def pictures(count: int, side: int) -> Tensor:
    """Smooth random images in [−1, 1]."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    return F.interpolate(noise, (side, side), mode="bicubic").clamp(-1, 1)


def pictures_of(images: Tensor) -> list[Image.Image]:
    """As torchvision's `to_pil_image` makes pictures of images in [0, 1]."""
    pixels = ((images + 1) / 2).mul(255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]


@pytest.mark.parametrize("side", [SIDE, 32, 61])
@pytest.mark.parametrize("as_pillow", [True, False])
def test_pixels_are_those_of_the_authors_preprocessing(side: int, as_pillow: bool) -> None:
    """Pillow's resizing, but for its weights of 22 bits; or that of the same pixels as tensors."""
    images = pictures(5, side)
    pixels = pictures_of(images)
    if as_pillow:
        pixels = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pixels]
    expected = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    if not as_pillow:
        expected = F.interpolate(expected, (SIDE, SIDE), mode="bicubic", antialias=True)
        assert side == SIDE or expected.max() > 255.5
    found = network_pixels(in_8_bits(images), SIDE, as_pillow) * torch.tensor(networks_of_clip.STD).view(3, 1, 1)
    found = (found + torch.tensor(networks_of_clip.MEAN).view(3, 1, 1)) * 255
    difference = (found - expected).abs()
    assert difference.max() < 1.01
    assert difference.mean() < 1e-3


def test_clip_is_the_cosine_that_transformers_gives(networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(networks_of_clip, "BATCH", 2)
    reward = load_networks(["clip"], networks, TEXTS, CPU)["clip"]
    images, labels = pictures(5, 32), torch.tensor([2, 0, 1, 1, 2])
    model = transformers.CLIPModel.from_pretrained(networks / "clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(networks / "clip")
    words = tokenizer([f"a photo of {NAMES[label]}" for label in labels.tolist()], padding=True, return_tensors="pt")
    with torch.no_grad():
        given = model(pixel_values=network_pixels(in_8_bits(images), SIDE, True), **words)
    expected = given.logits_per_image.diagonal() / model.logit_scale.exp()
    found = reward(images, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.02
    assert (found - reward(images, labels.flip(0))).abs().max() > 0.02  # the classes decide
    assert reward.read.keys() == {0, 1, 2}  # each text once


def test_hpsv2_is_read_from_open_clip_s_file(networks: Path) -> None:
    """The same embeddings by PyTorch's attention under open_clip's names."""
    import transformers

    reward = load_networks(["hpsv2"], networks, TEXTS, CPU)["hpsv2"]
    public = OpenClip().eval()
    public.load_state_dict(torch.load(networks / "hpsv2" / "HPS_v2.1_compressed.pt")["state_dict"])
    images, labels = pictures(4, 32), torch.tensor([0, 2, 1, 0])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(networks / "hpsv2")
    words = tokenizer([f"a photo of {NAMES[label]}" for label in labels.tolist()], padding=True, return_tensors="pt")
    with torch.no_grad():
        seen, read = public.visual(network_pixels(in_8_bits(images), SIDE, False)), public.encode_text(words.input_ids)
    torch.testing.assert_close(reward(images, labels), F.cosine_similarity(seen, read), rtol=1e-4, atol=1e-5)


def test_levels_are_ar_grpo_s() -> None:
    cosines = torch.tensor([-0.5, -1e-6, 0.0, 0.29, 0.3, 0.59, 0.6, 0.99, torch.nan])
    assert levels(cosines)[:-1].tolist() == [-1.0, -1.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5]
    assert levels(cosines)[-1].isnan()


def test_a_network_that_is_missing_or_damaged(networks: Path, tmp_path: Path) -> None:
    for name, files in (("clip", "openai/clip-vit-base-patch32"), ("hpsv2", "HPS_v2.1_compressed.pt of xswu/HPSv2")):
        with pytest.raises(CheckpointError) as refused:
            load_networks([name], tmp_path, TEXTS, CPU)
        assert f"--reward {name}: cannot be read from {tmp_path / name} (there is no config.json" in str(refused.value)
        assert files in str(refused.value)
        assert str(refused.value).endswith(f"into {tmp_path / name}")
    (tmp_path / "hpsv2").mkdir()
    torch.save({"positional_embedding": torch.ones(2, 2)}, tmp_path / "hpsv2" / "HPS_v2.1_compressed.pt")
    with pytest.raises(CheckpointError, match="--reward hpsv2: cannot be read from"):
        load_networks(["hpsv2"], tmp_path, TEXTS, CPU)
    state = OpenClip().state_dict() | {"visual.extra": torch.ones(1)}
    torch.save(state, tmp_path / "hpsv2" / "HPS_v2.1_compressed.pt")
    with pytest.raises(CheckpointError, match=r"no CLIP of open_clip's: visual\.extra"):
        load_networks(["hpsv2"], tmp_path, TEXTS, CPU)


def test_the_hub_is_asked_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def offline(repository: str, **_: object) -> None:
        raise OSError(f"no way to {repository}\nfrom here")

    monkeypatch.setattr(networks_of_clip, "see", lambda network: None)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", offline)
    with pytest.raises(CheckpointError) as refused:
        load_networks(["clip"], None, TEXTS, CPU)
    assert "cannot be read from the hub (no way to openai/clip-vit-base-patch32 from here)" in str(refused.value)
    assert "into DIR/clip, and pass --reward-networks DIR" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tench, Tinca tinca\na red fox\n", {0: "tench, Tinca tinca", 1: "a red fox"}),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish\n", {0: "tench, Tinca tinca", 1: "goldfish"}),
        ('{"0": ["n01440764", "tench"], "7": ["n01514668", "cock"]}', {0: "tench", 7: "cock"}),
        ('["tench", "goldfish"]', {0: "tench", 1: "goldfish"}),
        ("n01440764\n", {}),
    ],
)
def test_class_names_of_a_file(text: str, names: dict[int, str], tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text(text)
    assert read_class_names(path) == names
    if names:
        assert class_names(path, {0: "n01440764"}, [0]) == {0: names[0]}
    with pytest.raises(ConfigError, match="class 5 has none: pass --class-names FILE"):
        class_names(path, None, [5])


def test_class_names_of_the_data(tmp_path: Path) -> None:
    assert class_names(None, NAMES, [2, 0]) == {2: "sea lion", 0: "tench"}
    with pytest.raises(ConfigError, match="class 1 has only 'n01443537': pass --class-names FILE"):
        class_names(None, {0: "tench", 1: "n01443537"}, [0, 1])
    with pytest.raises(ConfigError, match="class 0 has none: pass --class-names FILE"):
        class_names(None, None, [0])
    (tmp_path / "names").write_text("")
    with pytest.raises(DataError, match=r"--class-names .*holds no names"):
        class_names(tmp_path / "names", NAMES, [0])


# ---- what is learned


def test_rewards_are_summed_by_weight(tiny_config: Make, tiny_models: Models, tiny_batch: ImageBatch) -> None:
    config = tiny_config(reward=f"pixel:2,classifier:-0.5,{DARKNESS}:0.25")
    rollouts = torch.randint(512, (4, 3, 64), generator=torch.Generator().manual_seed(2))
    found = rewards_of(tiny_models, config, rollouts, tiny_batch, nullcontext)
    alone = rewards_of(tiny_models, tiny_config(), rollouts, tiny_batch, nullcontext)
    for name, as_named in (("reward", "reward/pixel"), ("mse", "mse"), ("lpips", "lpips")):
        assert torch.equal(found[as_named], alone[name])
    images = tiny_models.codec.decode(rollouts.flatten(0, 1)).clamp(-1, 1)
    lpips = tiny_models.reward.lpips
    shares = lpips.classifier(lpips.feature_maps(images)[-1].mean((2, 3))).softmax(-1).unflatten(0, (4, 3))
    for image, label in enumerate(tiny_batch.labels.tolist()):
        torch.testing.assert_close(found["reward/classifier"][image], shares[image, :, label])
    torch.testing.assert_close(found[f"reward/{DARKNESS}"], -images.mean((1, 2, 3)).view(4, 3))
    total = 2 * found["reward/pixel"] - 0.5 * found["reward/classifier"] + 0.25 * found[f"reward/{DARKNESS}"]
    torch.testing.assert_close(found["reward"], total)
    assert set(found) <= set(metrics_of(config))


def test_advantages_of_the_sum_and_of_each(tiny_config: Make) -> None:
    """Rewards of another scale decide a sum; of each on its own the weights alone do."""
    ids, new = torch.arange(4), torch.Generator().manual_seed(1)
    small, large = (scale * torch.randn(4, 8, generator=new) for scale in (1e-3, 10.0))
    rewards = {"reward": 3 * small + large, "reward/pixel": small, "reward/classifier": large}

    def advantages(**changes: object) -> Tensor:
        return advantages_of(rewards, tiny_config(reward="pixel:3,classifier", **changes), 0, ids)

    of_small, of_large = ((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True) for r in (small, large))
    torch.testing.assert_close(advantages(), of_large, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(advantages(advantage="each"), 0.75 * of_small + 0.25 * of_large, rtol=1e-4, atol=1e-4)
    for reward in (None, "pixel", "pixel:-2"):  # one alone is its sum
        config = tiny_config(reward=reward, advantage="each")
        assert torch.equal(advantages_of({"reward": large}, config, 0, ids), ops.group_advantages(large))
    mixed = (small - small.mean(1, keepdim=True)) / (small.std(1, keepdim=True) + 1e-4)  # AR-GRPO's
    found = advantages_of({"reward": small}, tiny_config(advantage_eps=1e-4), 0, ids)
    torch.testing.assert_close(found, mixed)
    assert (found - of_small).abs().max() > 0.01


@pytest.mark.usefixtures("image_sets")
def test_a_run_writes_each_reward_down(networks: Path, tiny_config: Make, tmp_path: Path) -> None:
    weights = {"clip": 5.0, "clip-levels": 1.0, "hpsv2": 2.0, "pixel": 0.5, DARKNESS: -1.0}
    text = ",".join(f"{name}:{weight:g}" for name, weight in weights.items())
    config = tiny_config(reward=text, reward_networks=networks, advantage="each", steps=2)
    record = align(config)
    lines = [json.loads(line) for line in (config.output_dir / "progress.jsonl").read_text().splitlines()]
    for step in range(2):
        figures = {name: record["curves"][f"reward/{name}"][step] for name in weights}
        total = sum(weight * figures[name] for name, weight in weights.items())
        assert record["reward"][step] == pytest.approx(total, rel=1e-4)
        assert {name: lines[step][f"reward/{name}"] for name in weights} == figures
        assert figures["pixel"] == pytest.approx(-lines[step]["mse"] - lines[step]["lpips"], rel=1e-5)
    stored = json.loads((config.output_dir / "run.json").read_text())
    assert stored["curves"]["reward/hpsv2"] == record["curves"]["reward/hpsv2"]
    assert stored["config"]["reward"] == text
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = events.EventAccumulator(str(config.output_dir / "tensorboard")).Reload()
    logged = [event.value for event in curves.Scalars("reward/clip")]
    assert logged == pytest.approx(record["curves"]["reward/clip"])


@pytest.mark.usefixtures("image_sets")
def test_a_reward_that_is_not_finite_is_named(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from vapi_fast.runtime.errors import NonFiniteError

    monkeypatch.setitem(globals(), "darkness", lambda images, labels: images.mean((1, 2, 3)) * torch.nan)
    with pytest.raises(NonFiniteError, match=rf"reward/{DARKNESS} is not finite \(stage reward\)"):
        align(tiny_config(reward=f"pixel,{DARKNESS}"))
