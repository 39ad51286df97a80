"""LPIPS distance and MSE against the formulas written out, broadcasting over a group, and gradients."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from vapi_fast import ops

SHAPES = [(5, 7, 9), (3, 1, 1), (16, 3, 2)]  # C, H, W of the levels


def feature_maps(*lead: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*lead, *shape, dtype=dtype).relu() for shape in SHAPES]


def head_weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.rand(shape[0], dtype=dtype) for shape in SHAPES]


def naive_distance(a: list[Tensor], b: list[Tensor], weights: list[Tensor]) -> float:
    """One image pair, pixel by pixel."""
    distance = 0.0
    for level_a, level_b, weight in zip(a, b, weights, strict=True):
        _, height, width = level_a.shape
        for y in range(height):
            for x in range(width):
                u, v = level_a[:, y, x], level_b[:, y, x]
                u, v = u / (u.square().sum().sqrt() + 1e-10), v / (v.square().sum().sqrt() + 1e-10)
                distance += float((weight * (u - v) ** 2).sum()) / (height * width)
    return distance


def test_lpips_distance_against_pixels() -> None:
    a, b, weights = feature_maps(3), feature_maps(3), head_weights()
    distances = ops.lpips_distance(a, b, weights)
    expected = [naive_distance([x[i] for x in a], [x[i] for x in b], weights) for i in range(3)]
    torch.testing.assert_close(distances, torch.tensor(expected, dtype=torch.float64))
    assert ops.lpips_distance(a, a, weights).tolist() == [0.0] * 3


def test_the_reference_features_serve_the_whole_group() -> None:
    a, b, weights = feature_maps(2, 4), feature_maps(2), head_weights()
    distances = ops.lpips_distance(a, b, weights)
    assert distances.shape == (2, 4)
    for g in range(4):
        torch.testing.assert_close(distances[:, g], ops.lpips_distance([x[:, g] for x in a], b, weights))


def test_lpips_gradients() -> None:
    a, b, weights = feature_maps(1, 2), feature_maps(1), head_weights()
    inputs = [x.abs().add(0.1).requires_grad_() for x in (*a, *b, *weights)]
    assert torch.autograd.gradcheck(lambda *x: ops.lpips_distance(x[:3], x[3:6], x[6:]), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_all_zero_features_is_finite(dtype: torch.dtype) -> None:
    a, b, weights = feature_maps(2, dtype=dtype), feature_maps(2, dtype=dtype), head_weights(dtype)
    for maps in (a, b):
        maps[0][:, :, 2:4] = 0
        maps[1].zero_()
    b[0][:, :, 3] = 1
    inputs = [x.requires_grad_() for x in (*a, *b)]
    distances = ops.lpips_distance(inputs[:3], inputs[3:], weights)
    assert distances.isfinite().all()
    for gradient in torch.autograd.grad(distances.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lpips_accuracy(dtype: torch.dtype) -> None:
    inputs = [x + 0.1 for x in (*feature_maps(2, 3), *feature_maps(2), *head_weights())]
    assert_accurate(lambda *x: ops.lpips_distance(x[:3], x[3:6], x[6:]), inputs, dtype)


def test_channels_last_and_empty_batches() -> None:
    a, b, weights = feature_maps(3), feature_maps(3), head_weights()
    last = [x.to(memory_format=torch.channels_last) for x in a]
    torch.testing.assert_close(ops.lpips_distance(last, b, weights), ops.lpips_distance(a, b, weights))
    assert ops.lpips_distance(feature_maps(0, 2), feature_maps(0), weights).shape == (0, 2)
    assert ops.mse(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2)).shape == (0,)


def test_mse() -> None:
    a, b = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    errors = ops.mse(a, b)
    assert errors.shape == (2, 4)
    for i in range(2):
        for g in range(4):
            assert errors[i, g].item() == pytest.approx(torch.nn.functional.mse_loss(a[i, g], b[i]).item(), rel=1e-12)
    torch.testing.assert_close(ops.mse(a[:, 1], b), errors[:, 1])
    assert torch.autograd.gradcheck(ops.mse, (a[:, :2, :, :2].requires_grad_(), b[:, :, :2].requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mse_accuracy(dtype: torch.dtype) -> None:
    assert_accurate(ops.mse, [torch.randn(2, 3, 3, 17, 17), torch.randn(2, 3, 17, 17)], dtype)


def test_nan_features_and_pixels_do_not_pass() -> None:
    a, b, weights = feature_maps(2), feature_maps(2), head_weights()
    a[1][1, 0, 0, 0] = torch.nan
    assert ops.lpips_distance(a, b, weights).isnan().tolist() == [False, True]
    assert ops.mse(a[1], b[1]).isnan().tolist() == [False, True]


def test_bad_arguments() -> None:
    a, b, weights = feature_maps(2, 3), feature_maps(2), head_weights()
    with pytest.raises(ValueError, match=r"lpips_distance: .* same number of levels .*, got 3, 2 and 3"):
        ops.lpips_distance(a, b[:2], weights)
    with pytest.raises(ValueError, match=r"features_b\[1\] must be floating .* with B=2, C=3, H=1, W=1, got"):
        ops.lpips_distance(a, [b[0], b[0], b[2]], weights)
    with pytest.raises(ValueError, match=r"features_a\[2\] must be .* with B=2, G=3, got float64 \[2, 2, 16, 3, 2\]"):
        ops.lpips_distance([a[0], a[1], a[2][:, :2]], b, weights)
    with pytest.raises(ValueError, match=r"weights\[0\] must be floating \[C\] with C=5, got float64 \[1, 5, 1, 1\]"):
        ops.lpips_distance(a, b, [weights[0].reshape(1, 5, 1, 1), *weights[1:]])
    with pytest.raises(TypeError, match=r"features_a\[0\] must be floating .*, got int64"):
        ops.lpips_distance([x.long() for x in a], b, weights)
    with pytest.raises(ValueError, match=r"mse: b must be floating .* with B=2, C=3, H=4, W=4, got float32"):
        ops.mse(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"mse: a must be floating \[B, C, H, W\], got uint8 \[2, 3, 4, 4\]"):
        ops.mse(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4))
