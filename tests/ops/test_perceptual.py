"""LPIPS distance and mean squared error: against the formulas written out, and Triton against float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels.perceptual import row_sums

# C, H, W of the levels
SHAPES = [(5, 7, 9), (3, 1, 1), (16, 3, 2)]
SMALL = ((3, 5, 7), (100, 3, 5), (64, 1, 1))


# ---- the formulas


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


def test_a_level_with_its_pooling_is_both() -> None:
    a, b, weight = torch.randn(2, 3, 5, 7, 8).double(), torch.randn(2, 5, 7, 8).double(), torch.rand(5).double()
    distance, pooled_a, pooled_b = ops.lpips_distance_max_pool(a, b, weight)
    assert torch.equal(distance, ops.lpips_distance([a], [b], [weight]))
    assert torch.equal(ops.lpips_distance_max_pool(a, b, weight, distance)[0], 2 * distance)
    for pooled, maps in ((pooled_a, a), (pooled_b, b)):
        assert pooled.shape == (*maps.shape[:-2], 3, 4)
        for y in range(3):
            for x in range(4):
                window = maps[..., 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                assert torch.equal(pooled[..., y, x], window.amax((-2, -1)))
    first = ops.lpips_distance_max_pool(a[:, 0], b, weight)
    assert torch.equal(first[0], distance[:, 0])
    assert torch.equal(first[1], pooled_a[:, 0])


def test_mse_is_pytorchs() -> None:
    a, b = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    errors = ops.mse(a, b)
    assert errors.shape == (2, 4)
    for i in range(2):
        for g in range(4):
            assert errors[i, g].item() == pytest.approx(torch.nn.functional.mse_loss(a[i, g], b[i]).item(), rel=1e-12)
    torch.testing.assert_close(ops.mse(a[:, 1], b), errors[:, 1])
    assert torch.autograd.gradcheck(ops.mse, (a[:, :2, :, :2].requires_grad_(), b[:, :, :2].requires_grad_()))


def test_scaled_pixels_is_its_formula() -> None:
    x, shift, scale = torch.randn(2, 3, 5, 7, dtype=torch.float64), *torch.randn(2, 3, dtype=torch.float64)
    for channels, dtype in ((3, None), (8, torch.float32), (5, torch.bfloat16)):
        found = ops.scaled_pixels(x, shift, scale, channels=channels, dtype=dtype)
        assert (found.shape, found.dtype) == ((2, channels, 5, 7), dtype or torch.float64)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found[:, 3:].any()
        for c in range(3):
            assert torch.equal(found[:, c], ((x[:, c] - shift[c]) / scale[c]).to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accuracy_of_the_reference(dtype: torch.dtype) -> None:
    inputs = [x + 0.1 for x in (*feature_maps(2, 3), *feature_maps(2), *head_weights())]
    assert_accurate(lambda *x: ops.lpips_distance(x[:3], x[3:6], x[6:]), inputs, dtype)
    assert_accurate(ops.mse, [torch.randn(2, 3, 3, 17, 17), torch.randn(2, 3, 17, 17)], dtype)


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


# ---- on Triton, against float64


def images(batch: int, group: int | None, *shape: int) -> list[Tensor]:
    """a `[B, (G,) C, H, W]` and b `[B, C, H, W]`, channels last in memory."""
    maps = torch.randn(batch * (1 if group is None else group), *shape).to(memory_format=torch.channels_last)
    a = maps if group is None else maps.unflatten(0, (batch, group))
    return [a, torch.randn(batch, *shape).to(memory_format=torch.channels_last)]


def features(batch: int, group: int | None, *levels: tuple[int, ...]) -> list[Tensor]:
    """features_a, features_b and weights, all in one list."""
    maps = [images(batch, group, *level) for level in levels]
    return [a for a, _ in maps] + [b for _, b in maps] + [torch.rand(level[0]) for level in levels]


def lpips_distance(*inputs: Tensor) -> Tensor:
    levels = len(inputs) // 3
    return ops.lpips_distance(inputs[:levels], inputs[levels : 2 * levels], inputs[2 * levels :])


def on_triton(operation: object, *inputs: Tensor) -> Tensor:
    with ops.use_backend("triton"):
        return operation(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [None, 1, 8, 16])
def test_lpips_distance(group: int | None, dtype: torch.dtype) -> None:
    assert_fused_accurate(lpips_distance, features(3, group, *SMALL), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [(512, 9, 11), (64, 24, 24)])
def test_lpips_distance_over_several_blocks(level: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(lpips_distance, features(1, 3, level), dtype)


def test_lpips_distance_of_one_channel() -> None:
    """Unit vectors of one channel are −1 or 1: the distance counts signs, and the gradient is nothing but rounding."""
    inputs = features(2, 3, (1, 3, 5))
    assert_fused_accurate(lpips_distance, inputs, torch.float32, gradients=False)
    a, b, weight = (x.to(DEVICE).requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(on_triton(lpips_distance, a, b, weight).sum(), (a, b))
    assert all(bool((g.abs() <= 1e-6 / x.abs()).all()) for g, x in zip(gradients, (a, b), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.contiguous(),
        lambda a: misaligned(a.contiguous()),
        lambda a: strided(a.contiguous()),
        lambda a: misaligned(a.movedim(2, -1)).movedim(-1, 2),
        lambda a: a.transpose(0, 1).contiguous().transpose(0, 1),
        lambda a: a.repeat(1, 2, 1, 1, 1)[:, ::2],
    ],
)
@pytest.mark.parametrize("operation", [lpips_distance, ops.mse])
def test_any_strides(operation: object, change: object) -> None:
    a, b = images(2, 4, 20, 4, 5)
    b = change(b[:, None].expand(-1, 4, -1, -1, -1))[:, 1]
    weights = [torch.rand(20)] if operation is lpips_distance else []
    assert_fused_accurate(operation, [change(a), b, *weights], torch.float32)


@pytest.mark.parametrize("operation", [lpips_distance, ops.mse])
def test_gradients_of_each_layout_are_dense(operation: object) -> None:
    """A view of channels-last maps is read as it is, and its gradient lies in memory as the maps do."""
    a, b = (x.to(DEVICE).requires_grad_() for x in images(2, 4, 16, 4, 5))
    weights = [torch.rand(16, device=DEVICE)] if operation is lpips_distance else []
    gradients = torch.autograd.grad(on_triton(operation, a, b, *weights).sum(), (a, b))
    assert [g.stride() for g in gradients] == [a.stride(), b.stride()]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_gradients_to_some_inputs(needed: tuple[int, ...]) -> None:
    inputs = features(2, 3, *SMALL)
    leaves = [index for kind in needed for index in range(3 * kind, 3 * kind + 3)]
    low = [x.to(DEVICE).requires_grad_(i in leaves) for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_(i in leaves) for i, x in enumerate(low)]
    direction = torch.randn(2, 3, device=DEVICE)
    lpips_distance(*exact).backward(direction.double())
    on_triton(lpips_distance, *low).backward(direction)
    for i, (x, y) in enumerate(zip(low, exact, strict=True)):
        assert (x.grad is None) == (i not in leaves)
        assert x.grad is None or relative_l2(x.grad, y.grad) < RELATIVE_L2[torch.float32]


@pytest.mark.parametrize("needed", [(0,), (1,)])
def test_mse_gradients_to_one_input(needed: tuple[int, ...]) -> None:
    low = [x.to(DEVICE).requires_grad_(i in needed) for i, x in enumerate(images(2, 3, 3, 5, 7))]
    exact = [x.detach().double().requires_grad_(i in needed) for i, x in enumerate(low)]
    ops.mse(*exact).sum().backward()
    on_triton(ops.mse, *low).sum().backward()
    for i, (x, y) in enumerate(zip(low, exact, strict=True)):
        assert (x.grad is None) == (i not in needed)
        assert x.grad is None or relative_l2(x.grad, y.grad) < RELATIVE_L2[torch.float32]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("group", "level"), [(8, (64, 7, 9)), (None, (100, 2, 3)), (3, (512, 9, 6)), (1, (3, 13, 40))])
def test_a_level_with_its_pooling(group: int | None, level: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b, weight = features(3, group, level)
    lead = (3,) if group is None else (3, group)
    changes = (
        lambda x: x,
        lambda x: x.contiguous(),
        lambda x: misaligned(x.movedim(-3, -1)).movedim(-1, -3),
        lambda x: strided(x.contiguous()),
        lambda x: torch.cat([x, x], dim=-3)[..., : x.shape[-3], :, :],
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    for change in changes:
        given = [change(a), change(b), weight, 0.1 * torch.rand(lead)]

        def distance(a: Tensor, b: Tensor, weight: Tensor, before: Tensor) -> Tensor:
            wide = torch.float64 if before.dtype == torch.float64 else torch.float32
            found, *pooled = ops.lpips_distance_max_pool(a, b, weight, before.to(wide))
            for maps, x in zip(pooled, (a, b), strict=True):
                flat = x.detach().double().flatten(0, -4)
                assert torch.equal(maps.double(), torch.nn.functional.max_pool2d(flat, 2).view(maps.shape))
                assert (maps.dtype, maps.stride(-3)) == (x.dtype, 1)
            return found

        assert_fused_accurate(distance, given, dtype, gradients=False)


def test_a_level_with_its_pooling_in_mixed_dtypes() -> None:
    a, b, weight = (x.to(DEVICE) for x in features(2, 3, (20, 4, 5)))
    found = on_triton(ops.lpips_distance_max_pool, a.half(), b, weight)
    expected = ops.lpips_distance_max_pool(a.half().double(), b.double(), weight.double())
    assert [each.dtype for each in found] == [torch.float32, torch.float16, torch.float32]
    assert relative_l2(found[0], expected[0]) < RELATIVE_L2[torch.float32]
    assert all(torch.equal(each.double(), other) for each, other in zip(found[1:], expected[1:], strict=True))
    more = on_triton(ops.lpips_distance_max_pool, a.half(), b, weight, found[0].bfloat16())[0]
    assert torch.equal(more, found[0] + found[0].bfloat16())
    with pytest.raises(TypeError, match="lpips_distance_max_pool: before must be float32, bfloat16 or float16"):
        on_triton(ops.lpips_distance_max_pool, a, b, weight, found[0].double())


def test_bad_levels() -> None:
    a, b, weight = features(2, 3, (20, 4, 5))
    with pytest.raises(ValueError, match=r"lpips_distance_max_pool: features_a must have H and W > 1, got float32"):
        ops.lpips_distance_max_pool(a[..., :1], b[..., :1], weight)
    with pytest.raises(ValueError, match=r"before must be floating \[B, G\] with B=2, G=3, got float32 \[2\]"):
        ops.lpips_distance_max_pool(a, b, weight, torch.zeros(2))
    with pytest.raises(ValueError, match=r"has no gradient, and features_b requires one: .* or lpips_distance, which"):
        ops.lpips_distance_max_pool(a, b.requires_grad_(), weight)


def test_mixed_dtypes() -> None:
    a, b, weight = features(2, 3, (20, 3, 5))
    a, b, weight = a.to(DEVICE).bfloat16().requires_grad_(), b.to(DEVICE), weight.to(DEVICE)
    for operation, rest in ((lpips_distance, (b, weight)), (ops.mse, (b,))):
        expected = operation(a.detach().double().requires_grad_(), *(x.double() for x in rest))
        actual = on_triton(operation, a, *rest)
        assert actual.dtype == torch.float32
        assert relative_l2(actual.detach(), expected.detach()) < RELATIVE_L2[torch.float32]
        assert torch.autograd.grad(actual.sum(), a)[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"lpips_distance: features_b\[0\] must be float32, bfloat16 or float16"):
        on_triton(lpips_distance, a, b.double(), weight)
    with pytest.raises(TypeError, match="mse: a must be float32, bfloat16 or float16 on the 'triton' backend"):
        on_triton(ops.mse, a.double(), b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_features(dtype: torch.dtype) -> None:
    inputs = features(2, 3, (8, 3, 5))
    inputs[0][:, :, :, 1] = 0
    inputs[1][:, :, 1:] = 0  # in row 1 both vanish, in row 2 only b
    assert_fused_accurate(lpips_distance, inputs, dtype)
    a, b, weight = (x.to(DEVICE, dtype).requires_grad_() for x in inputs)
    for gradient in torch.autograd.grad(on_triton(lpips_distance, a, b, weight).sum(), (a, b, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(dtype: torch.dtype, scale: float) -> None:
    *maps, weight = features(2, 3, (20, 3, 5))
    maps = [scale * x for x in maps]
    assert_fused_accurate(lpips_distance, [*maps, weight], dtype)
    assert_fused_accurate(ops.mse, maps, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "shape"), [(None, (3, 17, 17)), (8, (1, 1, 1)), (16, (3, 9, 11)), (2, (3, 48, 48))])
def test_mse(group: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.mse, images(3, group, *shape), dtype)
    assert_fused_accurate(ops.mse, [x.contiguous() for x in images(1, group, *shape)], dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 9, 11), 8), ((1, 3, 1, 1), 3), ((3, 5, 33, 40), 6)])
def test_scaled_pixels(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape), torch.randn(shape[1]), 0.3 + torch.rand(shape[1])]
    changes = (
        lambda x: x.to(memory_format=torch.channels_last),
        misaligned,
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], dim=1).to(memory_format=torch.channels_last)[:, : x.shape[1]],  # of more channels
    )
    for change in changes:
        given = [change(inputs[0]), *inputs[1:]]
        out = assert_fused_accurate(lambda *t: ops.scaled_pixels(*t, channels=channels), given, dtype, gradients=False)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_scaled_pixels_of_another_dtype(backend: str) -> None:
    x, shift, scale = torch.randn(2, 3, 6, 5, device=DEVICE), *torch.rand(2, 3, device=DEVICE).add(0.5)
    expected = (x.double() - shift.double()[:, None, None]) / scale.double()[:, None, None]
    for dtype in (torch.float16, torch.bfloat16):
        found = ops.scaled_pixels(x, shift, scale, channels=8, dtype=dtype)
        assert found.dtype == dtype
        assert relative_l2(found[:, :3], expected) < RELATIVE_L2[dtype]
        assert not found[:, 3:].any()
    assert ops.scaled_pixels(x[:0], shift, scale, channels=8).shape == (0, 8, 6, 5)


def test_bad_pixels() -> None:
    x, one = torch.zeros(2, 3, 4, 4), torch.ones(3)
    with pytest.raises(ValueError, match="scaled_pixels: channels must be an int >= 3, got 2"):
        ops.scaled_pixels(x, one, one, channels=2)
    with pytest.raises(ValueError, match="scaled_pixels: channels must be at most 1024, got 1025"):
        ops.scaled_pixels(x, one, one, channels=1025)
    with pytest.raises(TypeError, match="scaled_pixels: dtype must be floating or None, got dtype"):
        ops.scaled_pixels(x, one, one, channels=3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"scaled_pixels: has no gradient, and scale requires one"):
        ops.scaled_pixels(x, one, one.clone().requires_grad_(), channels=3)


def level_distance(*inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return ops.lpips_distance_max_pool(*inputs)[0]


def test_a_rollout_has_the_same_distance_in_any_company() -> None:
    a, b, weight = (x.to(DEVICE) for x in features(4, 3, (64, 13, 17)))
    for operation, rest in ((lpips_distance, (weight,)), (level_distance, (weight,)), (ops.mse, ())):
        together = on_triton(operation, a, b, *rest)
        assert torch.equal(together[3:4], on_triton(operation, a[3:4], b[3:4], *rest))
        assert torch.equal(together[:, 2], on_triton(operation, a[:, 2], b, *rest))


@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (2, 5000), (0, 4), (4, 0)])
def test_row_sums(rows: int, columns: int) -> None:
    x, before = torch.rand(rows, columns, device=DEVICE), torch.rand(rows, device=DEVICE)
    torch.testing.assert_close(row_sums(x), x.sum(1))
    assert torch.equal(row_sums(x, before), row_sums(x) + before)


def test_opcheck() -> None:
    a, b, weight = features(2, 3, (5, 3, 4))
    lists = [[x.to(DEVICE).requires_grad_() for x in level] for level in ([a, a.contiguous()], [b, b], [weight] * 2)]
    dy = torch.randn(2, 3, device=DEVICE)
    torch.library.opcheck(torch.ops.vapi_fast.lpips_distance.default, lists)
    single = [[x[0][:, 0] if x[0].ndim == 5 else x[0]] for x in lists]
    torch.library.opcheck(torch.ops.vapi_fast.lpips_distance.default, single)
    lists = [[x.detach() for x in level] for level in lists]
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(torch.ops.vapi_fast.lpips_distance_backward.default, (dy, *lists, *needs))
    pair = lists[0][0], lists[1][0]
    for before in (None, dy):
        given = (*pair, lists[2][0], before)
        torch.library.opcheck(torch.ops.vapi_fast.lpips_distance_max_pool.default, given)
    torch.library.opcheck(torch.ops.vapi_fast.mse.default, [x.clone().requires_grad_() for x in pair])
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.vapi_fast.mse_backward.default, (dy, *pair, *needs))


# ---- on both


def test_one_rollout_expanded_to_a_group(backend: str) -> None:
    a, b, weight = (x.to(DEVICE) for x in features(2, 1, (20, 4, 5)))
    for operation, rest in ((lpips_distance, (b, weight)), (ops.mse, (b,))):
        one = operation(a, *rest)
        rounding = 0.0 if backend == "triton" else 1e-6
        found = operation(a.expand(-1, 4, -1, -1, -1), *rest)
        torch.testing.assert_close(found, one.expand(-1, 4), rtol=rounding, atol=0)


@pytest.mark.parametrize(("batch", "group"), [(0, 2), (0, None), (1, 0)])
def test_empty_batch_and_group(backend: str, batch: int, group: int | None) -> None:
    inputs = [x.to(DEVICE).requires_grad_() for x in features(batch, group, *SMALL)]
    for operation, leaves in ((lpips_distance, inputs), (ops.mse, [inputs[0], inputs[3]])):
        distance = operation(*leaves)
        assert distance.shape == ((batch,) if group is None else (batch, group))
        for x, gradient in zip(leaves, torch.autograd.grad(distance.sum(), leaves), strict=True):
            assert gradient.shape == x.shape
            assert not gradient.any()
    with torch.no_grad():
        distance, *pooled = ops.lpips_distance_max_pool(inputs[0], inputs[3], inputs[6])
    assert [x.shape for x in pooled] == [(*x.shape[:-2], 2, 3) for x in (inputs[0], inputs[3])]
    assert distance.shape == inputs[0].shape[:-3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_have_no_distance(backend: str, dtype: torch.dtype) -> None:
    for level in ((64, 9, 11), (100, 3, 5), (512, 4, 4), (1, 5, 5)):
        _, b, weight = (x.to(DEVICE, dtype) for x in features(2, 3, level))
        a = b[:, None].repeat_interleave(3, 1).movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
        for operation, rest in ((lpips_distance, (b, weight)), (ops.mse, (b,))):
            distance = operation(a, *rest)
            assert distance.tolist() == [[0.0] * 3] * 2
            assert not torch.autograd.grad(distance.sum(), a)[0].any()
        assert level_distance(a, b, weight).tolist() == [[0.0] * 3] * 2


def test_nan_does_not_pass(backend: str) -> None:
    a, b, weight = (x.to(DEVICE) for x in features(2, 3, (20, 3, 5)))
    a[0, 1, 19, 2, 4] = a[0, 1, 19, 1, 3] = torch.nan
    b[1, 0, 0, 0] = torch.nan
    expected = [[False, True, False], [True] * 3]
    a.requires_grad_()
    for operation, rest in ((lpips_distance, (b, weight)), (ops.mse, (b,))):
        distance = operation(a, *rest)
        assert distance.isnan().tolist() == expected
        assert torch.autograd.grad(distance.sum(), a)[0].isnan().any(4).any(3).any(2).tolist() == expected
    distance, pooled_a, pooled_b = ops.lpips_distance_max_pool(a.detach(), b, weight)
    assert distance.isnan().tolist() == expected
    assert pooled_a.isnan().nonzero().tolist() == [[0, 1, 19, 0, 1]]
    assert pooled_b.isnan().nonzero().tolist() == [[1, 0, 0, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [(64, 384, 384), (128, 192, 192), (256, 96, 96), (512, 48, 48), (512, 24, 24)])
def test_production_sizes(level: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = features(2, 8, level)
    assert_fused_accurate(lpips_distance, inputs, dtype)
    assert_fused_accurate(lambda *x: ops.lpips_distance_max_pool(*x)[0], inputs, dtype, gradients=False)
    a, b, weight = (x.to(DEVICE, dtype) for x in inputs)
    for x, pooled in zip((a, b), on_triton(ops.lpips_distance_max_pool, a, b, weight)[1:], strict=True):
        assert torch.equal(pooled, torch.nn.functional.max_pool2d(x.flatten(0, -4), 2).view(pooled.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_mse_at_production_size(dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.mse, images(4, 8, 3, 384, 384), dtype)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    shape, options = (29 * 8, 64, 384, 384), {"dtype": torch.bfloat16, "device": DEVICE}
    maps = torch.empty(shape, memory_format=torch.channels_last, **options).normal_()
    a = maps.unflatten(0, (29, 8))
    b = a[:, 3].contiguous(memory_format=torch.channels_last)
    distance, error = on_triton(lpips_distance, a, b, torch.ones(64, device=DEVICE)), on_triton(ops.mse, a, b)
    assert not distance[:, 3].any()
    assert not error[:, 3].any()
    # Of independent normal numbers, |â − b̂|² and (a − b)² are 2 on average.
    for values in (distance[:, :3], error[:, :3]):
        torch.testing.assert_close(values, torch.full_like(values, 2.0), rtol=0, atol=1e-2)
