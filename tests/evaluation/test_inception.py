"""Our FID-Inception-v3 against values of torch-fidelity's, and its resize against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.error import URLError

import golden
import pytest
import torch
from torch import Tensor

from vapi_fast.evaluation import inception
from vapi_fast.evaluation.inception import InceptionV3, load_inception, resize_like_tensorflow
from vapi_fast.runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    values = golden.formula_weights(golden.public_state_dict("FID-Inception"))
    return {key: 1 + 4 * value if key.endswith("running_var") else value for key, value in values.items()}


@pytest.fixture(scope="module")
def network(weights: dict[str, Tensor]) -> InceptionV3:
    # as some copies of the file have them
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    return inception.inception_from_state(weights | counters, "formula")


def test_names_and_shapes_are_the_published_files() -> None:
    with torch.device("meta"):
        ours = {key: list(value.shape) for key, value in InceptionV3().state_dict().items()}
    assert ours == golden.public_state_dict("FID-Inception")


@pytest.mark.parametrize("name", ["pooled", "spatial", "logits"])
def test_features_are_the_public_networks(network: InceptionV3, name: str) -> None:
    values = golden.read("inception")
    ours = getattr(network(values["images"]), name)
    assert golden.relative_error(ours, values[name]) < 1e-5
    difference = values[name][0] - values[name][1]  # what tells the two images apart, not only what they share
    assert golden.relative_error(ours[0] - ours[1], difference) < 1e-4


def test_mode_does_not_matter_and_nothing_is_trained(network: InceptionV3) -> None:
    images = golden.read("inception")["images"][:1]
    expected = network.eval()(images).pooled
    assert torch.equal(network.train()(images).pooled, expected)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_images_are_seen_as_rounded_8_bit_pixels(network: InceptionV3, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(InceptionV3, "forward", lambda self, pixels: seen.append(pixels))
    levels = torch.tensor([-1.0, 1.0, 0.0, 100.4 / 127.5 - 1, 1.2, -7.0])
    network.image_features(levels.view(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert seen[0].dtype == torch.uint8
    assert seen[0][0, 2, 0].tolist() == [0, 255, 128, 100, 255, 0]


@pytest.mark.parametrize("shape", [(5, 3), (40, 57)])
def test_resize_is_tensorflows(shape: tuple[int, int]) -> None:
    """TensorFlow 1's resize_bilinear, align_corners=False, pixel by pixel."""
    side = 11
    image = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 255
    expected = torch.empty(side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            y, x = i * shape[0] / side, j * shape[1] / side
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, shape[0] - 1), min(left + 1, shape[1] - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            expected[i, j] = upper + (lower - upper) * (y - top)
    resized = resize_like_tensorflow(image[None, None].expand(2, 3, *shape), side)
    torch.testing.assert_close(resized, expected.expand(2, 3, side, side), rtol=0, atol=1e-3)


def test_an_image_of_the_networks_size_is_not_resampled() -> None:
    image = torch.rand(1, 3, 7, 7)
    assert torch.equal(resize_like_tensorflow(image, 7), image)


def test_a_file_of_another_network_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1008)}, path)
    with pytest.raises(CheckpointError, match=r"fc.weight is \[1000, 2048\], expected \[1008, 2048\].*pass the file"):
        load_inception(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_inception(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [URLError("offline"), RuntimeError("invalid hash:\n\tmany lines")])
def test_without_the_weights_it_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(
        CheckpointError,
        match=r"fetch that file .* pass --inception-weights FILE, or put it at .*2015-12-05-6726825d.pth",
    ) as caught:
        load_inception()
    assert "\n" not in str(caught.value)
