from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vapi_fast import ops
from vapi_fast.models import LPIPS
from vapi_fast.models.frozen import FrozenLPIPS
from vapi_fast.models.lpips import VGG16_URL
from vapi_fast.runtime.errors import CheckpointError

TOLERANCE = 1e-5  # relative L2, float32
VGG16_CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512}
VGG16_CONVOLUTIONS |= {24: 512, 26: 512, 28: 512}


def vgg16_weights() -> dict[str, Tensor]:
    """A state dict laid out like torchvision's VGG16 file, with formula weights and a narrow classifier."""
    shapes, channels = {}, 3
    for index, width in VGG16_CONVOLUTIONS.items():
        shapes[f"features.{index}.weight"] = [width, channels, 3, 3]
        shapes[f"features.{index}.bias"] = [width]
        channels = width
    classifier = {f"classifier.{i}.{kind}": [8, 8] for i in (0, 3, 6) for kind in ("weight", "bias")}
    return golden.formula_weights(shapes | classifier)


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> LPIPS:
    path = tmp_path_factory.mktemp("vgg16") / "vgg16-397923af.pth"
    torch.save(vgg16_weights(), path)
    model = LPIPS.from_checkpoint(path, "vgg16").requires_grad_(False)
    path.unlink()  # 59 MB
    return model


@pytest.fixture(scope="module")
def tiny() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS.from_name("tiny").requires_grad_(False)


def golden_images() -> tuple[Tensor, Tensor]:
    public = golden.read("lpips")
    return public["images_a"].float() / 127.5 - 1, public["images_b"].float() / 127.5 - 1


# ---- equal to LlamaGen's public code


def test_distances_equal_the_public_code(vgg16: LPIPS) -> None:
    public = golden.read("lpips")["distance"]
    assert public.min() == 0 < public.max()
    assert golden.relative_error(vgg16(*golden_images()), public) <= TOLERANCE


def test_each_level_equals_the_public_code(vgg16: LPIPS) -> None:
    maps_a, maps_b = ([level[:1] for level in vgg16.feature_maps(images)] for images in golden_images())
    levels = [ops.lpips_distance([a], [b], [w]) for a, b, w in zip(maps_a, maps_b, vgg16.heads, strict=True)]
    assert golden.relative_error(torch.cat(levels), golden.read("lpips")["level_distances"]) <= TOLERANCE


def test_deepest_features_equal_the_public_code(vgg16: LPIPS) -> None:
    features = vgg16.feature_maps(golden_images()[0][:1])
    assert [level.shape[1] for level in features] == [64, 128, 256, 512, 512]
    assert golden.relative_error(features[-1], golden.read("lpips")["relu5_3"]) <= TOLERANCE


def test_vgg16_heads_are_torchmetrics(vgg16: LPIPS) -> None:
    path = str(files("torchmetrics") / "functional/image/lpips_models/vgg.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    for level, width in enumerate((64, 128, 256, 512, 512)):
        assert torch.equal(vgg16.heads[level], stored[f"lin{level}.model.1.weight"].view(width))
        assert (vgg16.heads[level] >= 0).all()


def test_vgg16_loads_torchvisions_keys(vgg16: LPIPS) -> None:
    expected = {key: value for key, value in vgg16_weights().items() if key.startswith("features.")}
    loaded = {key: value for key, value in vgg16.state_dict().items() if key.startswith("features.")}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


# ---- behaviour


def test_a_group_shares_its_reference(tiny: LPIPS) -> None:
    images = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    reference = torch.rand(2, 3, 16, 16) * 2 - 1
    grouped = [level.unflatten(0, (2, 3)) for level in tiny.feature_maps(images.flatten(0, 1))]
    together = tiny.distance(grouped, tiny.feature_maps(reference))
    assert together.shape == (2, 3)
    single = torch.stack([tiny(images[:, g], reference) for g in range(3)], dim=1)
    assert golden.relative_error(together, single) <= TOLERANCE


def test_distance_of_a_picture_to_itself_is_zero(tiny: LPIPS) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert tiny(images, images).tolist() == [0.0, 0.0]
    assert (tiny(images, images.flip(-1)) > 0).all()
    assert torch.equal(tiny(images, images.flip(-1)), tiny(images.flip(-1), images))


def test_tiny_classifier_sees_the_pooled_last_level(tiny: LPIPS) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    pooled, logits = tiny.features_and_logits(images)
    assert torch.allclose(pooled, tiny.feature_maps(images)[-1].mean((2, 3)))
    assert torch.allclose(logits, pooled @ tiny.classifier.weight.T + tiny.classifier.bias, atol=1e-6)
    assert logits.shape == (2, 9)


@pytest.mark.parametrize("shape", [(1, 3, 3, 32), (3, 32, 32), (1, 1, 32, 32)])
def test_images_too_small_or_of_another_form_are_refused(shape: tuple[int, ...], tiny: LPIPS) -> None:
    with pytest.raises(ValueError, match=r"images must be \[N,3,H,W\] of at least 4 pixels a side, got \["):
        tiny(torch.zeros(shape), torch.zeros(shape))


def test_vgg16_has_no_classifier(vgg16: LPIPS) -> None:
    with pytest.raises(ValueError, match="no classifier: only the tiny preset's has one"):
        vgg16.features_and_logits(torch.zeros(1, 3, 32, 32))


def test_tiny_round_trip(tiny: LPIPS, tmp_path: Path) -> None:
    path = tmp_path / "perceptual.pt"
    torch.save(tiny.state_dict(), path)
    images = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    assert torch.equal(LPIPS.from_checkpoint(path, "tiny")(*images), tiny(*images))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown LPIPS network 'squeeze': choose one of vgg16, alex, tiny"):
        LPIPS.from_name("squeeze")


def test_another_file_than_vgg16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vgg11.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}, path)
    with pytest.raises(CheckpointError) as error:
        LPIPS.from_checkpoint(path, "vgg16")
    message = str(error.value)
    assert message.startswith(
        f"{path}: does not fit this LPIPS: 24 weights missing (features.2.weight, features.2.bias)"
    )
    assert message.endswith("pass torchvision's VGG16 (vgg16-397923af.pth)")


def test_vgg16_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError, match=rf"{re.escape(VGG16_URL)}.*no route to host.*pass --vgg-weights FILE$"):
        LPIPS.from_name("vgg16")


def test_vgg16_online_uses_the_download(monkeypatch: pytest.MonkeyPatch, vgg16: LPIPS) -> None:
    asked = []

    def download(url: str, **options: object) -> dict[str, Tensor]:
        asked.append((url, options["weights_only"], options["check_hash"]))
        return vgg16_weights()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model = LPIPS.from_name("vgg16")
    assert asked == [("https://download.pytorch.org/models/vgg16-397923af.pth", True, True)]
    assert torch.equal(model.features[28].weight, vgg16.features[28].weight)


# ---- AlexNet, which Janus-Pro's alignment is rewarded by


def alexnet_weights() -> dict[str, Tensor]:
    """A state dict laid out like torchvision's AlexNet file."""
    shapes = {0: [64, 3, 11, 11], 3: [192, 64, 5, 5], 6: [384, 192, 3, 3], 8: [256, 384, 3, 3], 10: [256, 256, 3, 3]}
    weights = {f"features.{index}.weight": shape for index, shape in shapes.items()}
    biases = {f"features.{index}.bias": shape[:1] for index, shape in shapes.items()}
    return golden.formula_weights(weights | biases | {"classifier.1.weight": [8, 8], "classifier.1.bias": [8]})


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> LPIPS:
    path = tmp_path_factory.mktemp("alex") / "alexnet-owt-7be5be79.pth"
    torch.save(alexnet_weights(), path)
    return LPIPS.from_checkpoint(path, "alex").requires_grad_(False)


def test_alexnet_is_the_published_networks_formula(alex: LPIPS) -> None:
    """Five taps behind the ReLUs; poolings of side 3 that halve; each pixel's vector of unit length, then weighted."""
    weights, a, b = alexnet_weights(), *(torch.rand(2, 2, 3, 64, 64) * 2 - 1)
    stored = torch.load(
        str(files("torchmetrics") / "functional/image/lpips_models/alex.pth"), map_location="cpu", weights_only=True
    )
    total = torch.zeros(2)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = [(x - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for x in (a, b)]
    steps = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
    for level, (index, stride, padding) in enumerate(steps):
        if level in (1, 2):
            maps = [F.max_pool2d(x, 3, 2) for x in maps]
        kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
        maps = [F.relu(F.conv2d(x, kernel, bias, stride, padding)) for x in maps]
        first, second = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in maps)
        total += F.conv2d((first - second).square(), stored[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
    assert golden.relative_error(alex(a, b), total) <= TOLERANCE
    frozen = FrozenLPIPS(alex, torch.float32)
    assert golden.relative_error(frozen(b[:, None], a)[:, 0], total) <= TOLERANCE


def test_alexnets_maps_have_the_sides_that_its_config_says(alex: LPIPS) -> None:
    for side in (31, 64, 384):
        found = [level.shape[-1] for level in alex.feature_maps(torch.zeros(1, 3, side, side))]
        assert found == alex.config.sides(side)
    assert alex.config.sides(384) == [95, 47, 23, 23, 23]
    with pytest.raises(ValueError, match="of at least 31 pixels a side"):
        alex.feature_maps(torch.zeros(1, 3, 30, 30))
