"""A cache of keys and values: filling it, attention against it by full attention, and Triton against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import RELATIVE_L2, assert_accurate, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops
from vapi_fast.kernels import attention
from vapi_fast.kernels.launch import recorded

# ---- the formulas


def exact_inputs(sequences: int, slots: int, groups: int, prefix_len: int) -> dict[str, Tensor]:
    own, shared = (sequences, 3, slots, 8), (groups, 3, prefix_len, 8)
    shapes = {"q": (sequences, 3, 8), "k_cache": own, "v_cache": own, "prefix_k": shared, "prefix_v": shared}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("position", [0, 4, 8])
def test_append_to_cache_rotates_and_stores(position: int, as_tensor: bool) -> None:
    qkv, table = torch.randn(5, 3, 2, 8, dtype=torch.float64), ops.rotary_2d_table(3, 8, 0).double()
    caches = torch.randn(2, 5, 2, 9, 8, dtype=torch.float64)
    expected = caches.clone()
    q, k = ops.rotary_2d(qkv[:, :2], table[position].expand(2, 4, 2)).unbind(1)
    expected[0, :, :, position], expected[1, :, :, position] = k, qkv[:, 2]
    found = ops.append_to_cache(qkv, table, *caches, torch.tensor(position) if as_tensor else position)
    torch.testing.assert_close(found, q)
    torch.testing.assert_close(caches, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("position", [2, torch.tensor(2)])
def test_append_to_a_cache_of_another_dtype(position: int | Tensor, dtype: torch.dtype) -> None:
    qkv, table = torch.randn(5, 3, 2, 8) * 10, torch.tensor([1.0, 0.0]).expand(4, 4, 2)  # no rotation
    qkv[0, 1, 0, :6] = torch.tensor([1e6, -1e6, 449.0, 1.0, torch.nan, torch.nan])
    caches = torch.zeros(2, 5, 2, 4, 8).to(dtype)
    ops.append_to_cache(qkv, table, *caches, position)
    largest = 448.0 if dtype is torch.float8_e4m3fn else 1e9
    for cache, new in zip(caches, (qkv[:, 1], qkv[:, 2]), strict=True):
        stored = cache[:, :, 2]
        assert torch.equal(
            stored.float().nan_to_num(7.0), new.clamp(-largest, largest).to(dtype).float().nan_to_num(7.0)
        )
        assert cache.float()[:, :, [0, 1, 3]].abs().max() == 0


@pytest.mark.parametrize("position", [0, 4, 8])
def test_decode_attention_without_prefix(position: int) -> None:
    x = exact_inputs(5, 9, 1, 1)
    keys, values = x["k_cache"][:, :, : position + 1], x["v_cache"][:, :, : position + 1]
    expected = F.scaled_dot_product_attention(x["q"][:, :, None], keys, values)[:, :, 0]
    for cache in (x["k_cache"], x["v_cache"]):
        cache[:, :, position + 1 :] = torch.nan  # slots not written yet
    for where in (position, torch.tensor(position)):
        torch.testing.assert_close(ops.decode_attention(x["q"], x["k_cache"], x["v_cache"], where), expected)


@pytest.mark.parametrize(("sequences", "groups", "prefix_len"), [(6, 2, 5), (6, 6, 1), (4, 1, 63), (3, 3, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_prefix_is_shared_by_its_group(sequences: int, groups: int, prefix_len: int, masked: bool) -> None:
    x = exact_inputs(sequences, 7, groups, prefix_len)
    mask = torch.rand(groups, prefix_len) < 0.5 if masked else None
    out = ops.decode_attention(**x, position=3, prefix_mask=mask)
    for n in range(sequences):
        group = n // (sequences // groups)
        keep = mask[group] if masked else torch.ones(prefix_len, dtype=torch.bool)
        keys = torch.cat([x["prefix_k"][group][:, keep], x["k_cache"][n, :, :4]], dim=1)
        values = torch.cat([x["prefix_v"][group][:, keep], x["v_cache"][n, :, :4]], dim=1)
        for head in range(3):
            scores = keys[head] @ x["q"][n, head] / math.sqrt(8)
            torch.testing.assert_close(out[n, head], scores.softmax(-1) @ values[head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_attention_accuracy_under_autocast(dtype: torch.dtype) -> None:
    x = exact_inputs(4, 9, 2, 5)

    def attend(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.decode_attention(**dict(zip(x, tensors, strict=True)), position=6)

    assert_accurate(attend, list(x.values()), dtype)


def test_a_cache_in_fp8_is_read_as_it_is() -> None:
    x = exact_inputs(4, 9, 2, 5)
    for name in ("k_cache", "v_cache"):
        x[name] = x[name].to(torch.float8_e4m3fn)
    wide = {name: value.double() for name, value in x.items()}
    torch.testing.assert_close(ops.decode_attention(**x, position=6), ops.decode_attention(**wide, position=6))


def in_int8(x: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of `[..., slots, head_dim]`, by the formula."""
    scale = (x.abs().amax(-1).double() / 127).to(scale_dtype)
    return (x / scale[..., None].double()).round().clamp(-127, 127).to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [2, torch.tensor(2)])
def test_append_to_a_cache_in_int8(position: int | Tensor, dtype: torch.dtype) -> None:
    """Nothing is off by more than half a step, and rows of one magnitude use all of the range."""
    qkv, table = torch.randn(5, 3, 2, 8).to(dtype), torch.tensor([1.0, 0.0]).expand(4, 4, 2)  # no rotation
    qkv[0, :, 0], qkv[1, :, 1] = 0.0, torch.tensor([3e4, -3e4]).repeat(4).to(dtype)
    caches, scales = torch.full((2, 5, 2, 4, 8), 9, dtype=torch.int8), torch.full((2, 5, 2, 4), 7.0)
    ops.append_to_cache(qkv, table, *caches, position, k_scale=scales[0], v_scale=scales[1])
    stored, steps = caches[:, :, :, 2].double(), scales[:, :, :, 2].double()
    new = qkv[:, 1:].transpose(0, 1).double()
    torch.testing.assert_close(steps, new.abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert ((stored * steps[..., None] - new).abs() <= 0.50001 * steps[..., None]).all()
    assert stored[:, 1, 1].tolist() == [[127, -127] * 4] * 2
    assert stored[:, 0, 0].abs().max() == steps[:, 0, 0].max() == 0
    assert (caches[:, :, :, [0, 1, 3]] == 9).all()
    assert (scales[:, :, :, [0, 1, 3]] == 7).all()


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.0055, 0.0062), ("fp8", 0.025, 0.028)])
def test_rounding_of_normal_numbers(kind: str, least: float, most: float) -> None:
    """What documentation says of both kinds of cache: the root mean square of what rounding moves, of heads of 64."""
    qkv, table = torch.randn(500, 3, 4, 64), torch.tensor([1.0, 0.0]).expand(1, 32, 2)  # no rotation
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    keys, values = torch.zeros(2, 500, 4, 1, 64).to(dtype)
    scales = dict(zip(("k_scale", "v_scale"), torch.zeros(2, 500, 4, 1), strict=True)) if kind == "int8" else {}
    ops.append_to_cache(qkv, table, keys, values, 0, **scales)
    read = keys.float() * scales["k_scale"][..., None] if scales else keys.float()
    assert least < relative_l2(read[:, :, 0], qkv[:, 1].double()) < most


def test_a_cache_in_int8_is_read_as_its_multiples() -> None:
    x = exact_inputs(4, 9, 2, 5)
    low = dict(x)
    for name in ("k", "v"):
        low[f"{name}_cache"], low[f"{name}_scale"] = in_int8(x[f"{name}_cache"])
        x[f"{name}_cache"] = low[f"{name}_cache"].double() * low[f"{name}_scale"].double()[..., None]
    for position in (6, torch.tensor(6)):
        torch.testing.assert_close(
            ops.decode_attention(**low, position=position), ops.decode_attention(**x, position=6)
        )


def test_bad_arguments() -> None:
    x = exact_inputs(4, 9, 2, 5)
    qkv, table, cache = torch.zeros(4, 3, 3, 8), torch.zeros(9, 4, 2), torch.zeros(4, 3, 9, 8)
    with pytest.raises(ValueError, match=r"append_to_cache: qkv must be floating \[N, 3, heads, head_dim\], got"):
        ops.append_to_cache(qkv[:, :2], table, cache, cache, 0)
    with pytest.raises(ValueError, match=r"table must be .* head_dim=8, got float32 \[9, 3, 2\]"):
        ops.append_to_cache(qkv, table[:, :3], cache, cache, 0)
    with pytest.raises(
        ValueError, match=r"k_cache must be .* with N=4, heads=3, S=9, head_dim=8, got .*\[4, 3, 8, 8\]"
    ):
        ops.append_to_cache(qkv, table, cache[:, :, 1:], cache, 0)
    with pytest.raises(ValueError, match="append_to_cache: position must be below k_cache's S=9, got 9"):
        ops.append_to_cache(qkv, table, cache, cache, 9)
    with pytest.raises(ValueError, match="decode_attention: position must be below k_cache's S=9, got 9"):
        ops.decode_attention(**x, position=9)
    with pytest.raises(TypeError, match=r"position must be an int or a 0-d int64 tensor, got int64 \[1\]"):
        ops.decode_attention(**x, position=torch.tensor([1]))
    int8, scale = cache.to(torch.int8), torch.zeros(4, 3, 9)
    both = "k_scale and v_scale must be given with k_cache and v_cache in int8, and only then, got "
    for caches, scales in (((int8, int8), {}), ((cache, cache), {"k_scale": scale, "v_scale": scale})):
        with pytest.raises(ValueError, match=f"append_to_cache: {both}"):
            ops.append_to_cache(qkv, table, *caches, 0, **scales)
        with pytest.raises(ValueError, match=f"decode_attention: {both}"):
            ops.decode_attention(x["q"], *caches, 0, **scales)
    with pytest.raises(ValueError, match=f"{both}int8 .4, 3, 9, 8., float32 .*, float32 .4, 3, 9., NoneType"):
        ops.append_to_cache(qkv, table, int8, cache, 0, k_scale=scale)
    with pytest.raises(ValueError, match=r"v_scale must be floating \[N, heads, S\] with N=4, heads=3, S=9, got .*8\]"):
        ops.append_to_cache(qkv, table, int8, int8, 0, k_scale=scale, v_scale=scale[:, :, 1:])
    with pytest.raises(ValueError, match="append_to_cache: k_scale is written to and must not be expanded"):
        ops.append_to_cache(qkv, table, int8, int8, 0, k_scale=scale[:1].expand(4, 3, 9), v_scale=scale)
    with pytest.raises(
        TypeError, match=r"k_cache must be floating \[N, heads, S, head_dim\], got int16 \[4, 3, 9, 8\]"
    ):
        ops.decode_attention(x["q"], int8.short(), int8, 0, k_scale=scale, v_scale=scale)
    with pytest.raises(ValueError, match="prefix_k and prefix_v must be given together"):
        ops.decode_attention(x["q"], x["k_cache"], x["v_cache"], 1, prefix_k=x["prefix_k"])
    with pytest.raises(ValueError, match="q's N=4 must be a multiple of prefix_k's P=3"):
        ops.decode_attention(**{**x, **{n: torch.zeros(3, 3, 5, 8) for n in ("prefix_k", "prefix_v")}}, position=1)
    with pytest.raises(ValueError, match=r"prefix_mask must be .* with P=2, prefix_len=5, got bool \[2, 4\]"):
        ops.decode_attention(**x, position=1, prefix_mask=torch.ones(2, 4, dtype=torch.bool))


# ---- on Triton, against float64


def on_triton(operation: object, *inputs: object, **options: object) -> Tensor:
    with ops.use_backend("triton"):
        return operation(*inputs, **options)


def appended(backend: str, qkv: Tensor, table: Tensor, caches: Tensor, position: int | Tensor) -> tuple[Tensor, Tensor]:
    """The rotated queries, and the caches as they are afterwards."""
    caches = caches.clone(memory_format=torch.preserve_format)
    with ops.use_backend(backend):
        return ops.append_to_cache(qkv, table, *caches, position), caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sequences", "slots", "heads", "head_dim"),
    [(5, 9, 3, 32), (1, 1, 1, 8), (3, 5, 6, 100), (2, 7, 1, 2), (0, 3, 2, 4)],
)
def test_append_to_cache(sequences: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(sequences, 3, heads, head_dim, device=DEVICE).to(dtype)
    table = torch.randn(slots, head_dim // 2, 2, device=DEVICE)
    caches = torch.randn(2, sequences, heads, slots, head_dim, device=DEVICE).to(dtype)
    for position in {0, slots // 2, slots - 1}:
        q, filled = appended("triton", qkv, table, caches, torch.tensor(position, device=DEVICE))
        expected_q, expected = appended("reference", qkv.double(), table.double(), caches.double(), position)
        if sequences:
            assert relative_l2(q, expected_q) < RELATIVE_L2[dtype]
            assert relative_l2(filled, expected) < RELATIVE_L2[dtype]
        others = [slot for slot in range(slots) if slot != position]
        assert torch.equal(filled[:, :, :, others], caches[:, :, :, others])
        assert q.dtype == dtype
        assert q.shape == expected_q.shape


@pytest.mark.parametrize("cut", [lambda x: x[..., ::2], lambda x: x.transpose(2, 3)[..., 3:11]])
def test_append_to_caches_of_any_strides(cut: Callable[[Tensor], Tensor]) -> None:
    """And from a slice of a wider projection; position beyond the cache: the nearest slot."""
    caches, whole = cut(torch.randn(2, 3, 6, 6, 16, device=DEVICE)), torch.randn(3, 5, 6, 8, device=DEVICE)
    table = torch.randn(6, 4, 2, device=DEVICE)
    for position, slot in ((0, 0), (100, 5), (-3, 0)):
        q, filled = appended("triton", whole[:, 1:4], table, caches, torch.tensor(position, device=DEVICE))
        expected = appended("reference", whole[:, 1:4], table, caches, slot)
        torch.testing.assert_close((q, filled), expected)


@pytest.mark.parametrize("scale", [1, pytest.param(0.9, marks=pytest.mark.gpu)])
def test_append_to_cache_in_fp8(scale: float) -> None:
    """Numbers that fp8 holds; interpreted, Triton rounds others just below a power of 2 to half of it."""
    held = (torch.randn(3, 3, 2, 20, device=DEVICE) * 100).to(torch.float8_e4m3fn)
    qkv, table = held.float() * scale, torch.tensor([1.0, 0.0], device=DEVICE).expand(4, 10, 2)  # no rotation
    qkv[1, 1:, 0, :2] = torch.tensor([1e5, -1e5])
    caches = torch.zeros(2, 3, 2, 4, 20, device=DEVICE).to(torch.float8_e4m3fn)
    _, filled = appended("triton", qkv, table, caches, 2)
    _, expected = appended("reference", qkv, table, caches, 2)
    assert torch.equal(filled.float(), expected.float())
    assert filled.float()[:, 1, 0, 2, :2].tolist() == [[448.0, -448.0]] * 2
    with pytest.raises(TypeError, match="k_cache must be float32, bfloat16, float16, float8_e4m3fn or int8"):
        appended("triton", qkv, table, caches.double(), 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("sequences", "slots", "heads", "head_dim"),
    [(1, 1, 1, 8), (3, 5, 6, 100), (2, 7, 1, 2), (2, 2, 11, 64), (0, 3, 2, 4)],
)
def test_append_to_cache_in_int8(sequences: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Each within half a step of float64's number, and the step within the rounding of its dtype."""
    scale_dtype = torch.float16 if dtype is torch.float16 else torch.float32
    qkv = torch.randn(sequences, 3, heads, head_dim, device=DEVICE).to(dtype)
    table = torch.randn(slots, head_dim // 2, 2, device=DEVICE)
    exact = torch.zeros(2, sequences, heads, slots, head_dim, device=DEVICE, dtype=torch.float64)
    position = slots // 2
    _, exact = appended("reference", qkv.double(), table.double(), exact, position)
    for cut in (lambda x: x, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), strided):
        caches = cut(torch.full((2, sequences, heads, slots, head_dim), 9, device=DEVICE, dtype=torch.int8))
        scales = cut(torch.full((2, sequences, heads, slots), 7.0, device=DEVICE).to(scale_dtype))
        with ops.use_backend("triton"):
            ops.append_to_cache(qkv, table, *caches, torch.tensor(position), k_scale=scales[0], v_scale=scales[1])
        new, steps = exact[:, :, :, position], scales[:, :, :, position].double()
        rounding = 4 * torch.finfo(scale_dtype).eps
        torch.testing.assert_close(steps, new.abs().amax(-1) / 127, rtol=rounding, atol=0)
        assert ((caches[:, :, :, position] * steps[..., None] - new).abs() <= 0.501 * steps[..., None]).all()
        others = [slot for slot in range(slots) if slot != position]
        assert (caches[:, :, :, others] == 9).all()
        assert (scales[:, :, :, others] == 7).all()


def test_rows_that_int8_cannot_hold(backend: str) -> None:
    """Zeros stay, a NaN or an infinity makes its row NaN, what underflows is at most the row's own size."""
    qkv, table = torch.randn(2, 3, 2, 20, device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE).expand(1, 10, 2)
    qkv[0, 1:, 0], qkv[0, 1:, 1, 3] = 0.0, torch.nan
    qkv[1, 1:, 0, 2], qkv[1, 1:, 1] = torch.inf, 1e-42
    caches, scales = torch.zeros(2, 2, 2, 1, 20, device=DEVICE).to(torch.int8), torch.ones(2, 2, 2, 1, device=DEVICE)
    ops.append_to_cache(qkv, table, *caches, 0, k_scale=scales[0], v_scale=scales[1])
    read = (caches * scales[..., None])[:, :, :, 0]
    assert read[:, 0, 0].abs().max() == 0
    assert read[:, 0, 1].isnan().all()
    assert read[:, 1, 0].isnan().all()
    assert read[:, 1, 1].abs().max() < 1e-40


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("slots", "head_dim", "change"),
    [
        (70, 36, lambda x: x),
        (131, 64, strided),
        (70, 100, misaligned),
        (70, 64, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        (70, 8, lambda x: x.repeat(1, 1, 2, *[1] * (x.ndim - 3))[:, :, :70]),
    ],
)
@pytest.mark.usefixtures("splits")
def test_decode_attention_of_a_cache_in_int8(
    slots: int, head_dim: int, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    q, keys, values, *prefix = attention_inputs(4, slots, 2, head_dim, groups=2, prefix_len=5)
    low = [x.to(DEVICE, dtype) for x in (q, *prefix)]
    for position, shared in ((66, low[1:]), (0, [])):
        stored, exact = {}, {}
        for name, rows in (("k", keys * torch.rand(4, 2, slots, 1)), ("v", values)):
            whole, scale = (x.to(DEVICE) for x in in_int8(rows))
            exact[name] = whole.double() * scale.double()[..., None]
            scale[:, :, position + 1 :] = torch.nan  # slots not written yet
            stored |= {f"{name}_cache": change(whole), f"{name}_scale": change(scale)}
        prefixes = dict(zip(("prefix_k", "prefix_v"), shared, strict=False))
        for unlike in (stored, stored | {"v_scale": stored["v_scale"].contiguous()}):
            out = on_triton(ops.decode_attention, low[0], position=position, **unlike, **prefixes)
            with ops.use_backend("reference"):
                expected = attend(position)(low[0].double(), exact["k"], exact["v"], *(x.double() for x in shared))
            assert out.dtype == dtype
            assert relative_l2(out, expected) < RELATIVE_L2[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("splits")
def test_decode_attention_of_a_cache_in_fp8(dtype: torch.dtype) -> None:
    q, keys, values, *prefix = attention_inputs(4, 70, 2, 36, groups=2, prefix_len=5)
    keys, values = (x.to(DEVICE, torch.float8_e4m3fn) for x in (keys, values))
    low = [x.to(DEVICE, dtype) for x in (q, *prefix)]
    out = on_triton(attend(66), low[0], keys, values, *low[1:])
    with ops.use_backend("reference"):
        expected = attend(66)(low[0].double(), keys.double(), values.double(), *(x.double() for x in low[1:]))
    assert out.dtype == dtype
    assert relative_l2(out, expected) < RELATIVE_L2[dtype]


def attention_inputs(
    sequences: int, slots: int, heads: int = 2, head_dim: int = 64, groups: int = 0, prefix_len: int = 0
) -> list[Tensor]:
    """q, keys and values, and the prefix's keys and values if there are groups."""
    own, shared = (sequences, heads, slots, head_dim), (groups, heads, prefix_len, head_dim)
    shapes = [(sequences, heads, head_dim), own, own, *[shared] * (2 if groups else 0)]
    return [torch.randn(shape) for shape in shapes]


def attend(position: int | Tensor, mask: Tensor | None = None) -> object:
    """Decode attention of q, caches and prefix, given in this order."""

    def operation(q: Tensor, keys: Tensor, values: Tensor, *prefix: Tensor) -> Tensor:
        options = {"prefix_mask": mask} | dict(zip(("prefix_k", "prefix_v"), prefix, strict=False))
        return ops.decode_attention(q, keys, values, position, **options)

    return operation


def assert_attention_accurate(
    inputs: list[Tensor], position: int | Tensor, dtype: torch.dtype = torch.float32, mask: Tensor | None = None
) -> Tensor:
    return assert_fused_accurate(attend(position, mask), inputs, dtype, gradients=False)


@pytest.fixture(params=["one split", "many splits"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query's keys all in one program, or each tile of them in a program of its own."""
    few_or_many = 0 if request.param == "one split" else 10**6
    monkeypatch.setattr(attention, "PROGRAMS_PER_MULTIPROCESSOR", few_or_many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("sequences", "slots", "heads", "head_dim"),
    [(1, 577, 1, 64), (5, 63, 3, 32), (16, 1, 1, 8), (2, 200, 1, 100), (1, 130, 24, 4), (1, 100, 2, 128)],
)
@pytest.mark.usefixtures("splits")
def test_decode_attention(
    sequences: int, slots: int, heads: int, head_dim: int, place: float, dtype: torch.dtype
) -> None:
    inputs = attention_inputs(sequences, slots, heads, head_dim)
    position = int(place * (slots - 1))
    for cache in inputs[1:]:
        cache[:, :, position + 1 :] = torch.nan  # slots not written yet
    where = torch.tensor(position, device=DEVICE) if dtype is torch.float32 else position
    assert_attention_accurate(inputs, where, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])  # interpreted, only fp16 has dots of 16 bits
@pytest.mark.parametrize(
    ("sequences", "groups", "prefix_len", "heads", "head_dim"),
    [(6, 2, 1, 3, 64), (8, 1, 120, 1, 64), (2, 2, 65, 2, 100), (16, 1, 5, 1, 8), (3, 3, 0, 1, 64)],
)
@pytest.mark.usefixtures("splits")
def test_decode_attention_with_a_shared_prefix(
    sequences: int, groups: int, prefix_len: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = attention_inputs(sequences, 70, heads, head_dim, groups, prefix_len)
    mask = (torch.rand(groups, prefix_len) < 0.5).to(DEVICE)
    mask[0, :33] = False
    for position, kept in ((66, None), (1, mask)):
        for cache in inputs[1:3]:
            cache[:, :, position + 1 :] = 1e4
        assert_attention_accurate(inputs, position, dtype, kept)


@pytest.mark.parametrize(("sequences", "dtype"), [(40, torch.float32), (70, torch.float16)])
def test_a_group_of_several_blocks_of_queries(sequences: int, dtype: torch.dtype) -> None:
    with recorded(carry_out=True) as recording:
        assert_attention_accurate(attention_inputs(sequences, 3, 1, 64, 1, 3), 1, dtype)
    assert recording.launches[0].grid == (2,)


@pytest.mark.usefixtures("splits")
def test_a_prefix_masked_everywhere_changes_nothing() -> None:
    q, keys, values, prefix_k, prefix_v = (x.to(DEVICE) for x in attention_inputs(4, 70, groups=2, prefix_len=80))
    mask = torch.zeros(2, 80, dtype=torch.bool, device=DEVICE)
    for position in (0, 69):
        without = on_triton(ops.decode_attention, q, keys, values, position)
        found = on_triton(attend(position, mask), q, keys, values, prefix_k, prefix_v)
        torch.testing.assert_close(found, without, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        misaligned,
        strided,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat(1, 1, 2, 1)[:, :, :70],
        lambda x: torch.cat([x, x], dim=-1)[..., 3:39],
    ],
)
@pytest.mark.usefixtures("splits")
def test_decode_attention_with_caches_of_any_strides(change: object) -> None:
    q, *caches = attention_inputs(4, 70, 2, 36, groups=2, prefix_len=70)
    assert_attention_accurate([q, *(change(cache) for cache in caches)], 66)
    assert_attention_accurate([q, change(caches[0]), caches[1], caches[2], change(caches[3])], 66)
    assert_attention_accurate([strided(q), *caches], 66)


def test_expanded_inputs() -> None:
    inputs = [x.to(DEVICE) for x in attention_inputs(1, 70, 2, 8)]
    one = on_triton(attend(66), *inputs)
    three = on_triton(attend(66), *(x.expand(3, *x.shape[1:]) for x in inputs))
    torch.testing.assert_close(three, one.expand_as(three))


def test_decode_attention_reads_a_layer_of_a_cache_in_place() -> None:
    keys, values = torch.randn(2, 3, 4, 2, 9, 16, device=DEVICE)[:, 1, :, :, :7]
    with recorded() as recording:
        position = torch.tensor(3, device=DEVICE)
        attention.decode_attention_op(keys[:, :, 0], keys, values, position, None, None, keys, values, None)
    assert len(recording.launches) == 2
    for launch in recording.launches:
        assert [x.data_ptr() for x in launch.args[1:3]] == [keys.data_ptr(), values.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("splits")
def test_scores_of_plus_and_minus_10000(dtype: torch.dtype) -> None:
    inputs = attention_inputs(3, 130, 2, 64, groups=1, prefix_len=70)
    inputs[0] = torch.full_like(inputs[0], 100.0)
    for keys in (inputs[1], inputs[3]):
        keys[:] = torch.where(torch.rand(keys.shape[:3]) < 0.1, 12.5, -12.5)[..., None]
    inputs[1][0], inputs[3][0, 0] = -12.5, -12.5  # in the first sequence, and its head's prefix, all are low
    assert_attention_accurate(inputs, 120, dtype)


@pytest.mark.usefixtures("splits")
def test_scores_of_minus_infinity_and_nan() -> None:
    q, keys, values, prefix_k, prefix_v = attention_inputs(4, 90, 1, groups=2, prefix_len=5)
    q = q.abs()
    keys[0, 0, :65, 7] = -torch.inf  # a whole tile, and a part of the next one
    assert_attention_accurate([q, keys, values], 80)
    inputs = [x.to(DEVICE) for x in (q, keys, values, prefix_k, prefix_v)]
    inputs[0][1, 0, 3] = torch.nan
    inputs[4][1, 0, 2, 5] = torch.nan
    out = on_triton(attend(80), *inputs)
    assert out[:2].isnan().all(-1).flatten().tolist() == [False, True]
    assert out[2:].isnan().nonzero()[:, 2].unique().tolist() == [5]
    for position in (66, 80):  # the last key and value that count are NaN
        for cache in (1, 2):
            broken = [x.nan_to_num() for x in inputs]
            broken[cache][3, 0, position] = torch.nan
            assert on_triton(attend(position), *broken).isnan().flatten(1).all(1).tolist() == [False] * 3 + [True]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_queries_of_another_dtype_than_the_caches(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    q, *caches = attention_inputs(6, 70, groups=2, prefix_len=20)
    q, caches[0], caches[2] = q / 1e5, caches[0] * 1e5, caches[2] * 1e5  # keys that fp16 could not hold
    inputs = [q.to(DEVICE, dtypes[0]), *(cache.to(DEVICE, dtypes[1]) for cache in caches)]
    out = on_triton(attend(66), *inputs)
    with ops.use_backend("reference"):
        expected = attend(66)(*(x.double() for x in inputs))
    assert out.dtype == dtypes[0]
    assert relative_l2(out, expected) < RELATIVE_L2[dtypes[0]]
    with pytest.raises(
        TypeError, match="decode_attention: k_cache must be float32, bfloat16, float16, float8_e4m3fn or int8"
    ):
        on_triton(attend(66), inputs[0], inputs[1].double(), *inputs[2:])


def test_splits_fill_the_gpu_and_no_more() -> None:
    wanted = attention.splits_of(10**6, 1, DEVICE)
    assert wanted == attention.PROGRAMS_PER_MULTIPROCESSOR * attention.multiprocessors(DEVICE)
    assert attention.splits_of(10, 1, DEVICE) == 10
    assert attention.splits_of(10, wanted, DEVICE) == attention.splits_of(0, 0, DEVICE) == 1
    assert attention.splits_of(10, wanted // 4, DEVICE) == 4


def test_opcheck() -> None:
    namespace, position = torch.ops.vapi_fast, torch.tensor(66, device=DEVICE)
    inputs = [x.to(DEVICE) for x in attention_inputs(4, 70, 2, 8, groups=2, prefix_len=3)]
    qkv, table = torch.randn(4, 3, 2, 8, device=DEVICE), torch.randn(70, 4, 2, device=DEVICE)
    scales = torch.rand(2, 4, 2, 70, device=DEVICE)
    wide, whole = (*inputs[1:3], position, None, None), (*(x.to(torch.int8) for x in inputs[1:3]), position, *scales)
    mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    for cache in (wide, whole):
        torch.library.opcheck(namespace.append_to_cache.default, (qkv, table, *cache))
        torch.library.opcheck(namespace.decode_attention.default, (inputs[0], *cache, *inputs[3:], mask))
    torch.library.opcheck(namespace.decode_attention.default, (inputs[0], *wide, None, None, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [100, 576])
@pytest.mark.parametrize(("sequences", "groups", "prefix_len"), [(96, 0, 0), (96, 12, 120), (1, 0, 0), (100, 1, 120)])
@pytest.mark.parametrize(("heads", "head_dim"), [(24, 64), (32, 100)])
def test_decode_attention_at_production_sizes(
    sequences: int, groups: int, prefix_len: int, heads: int, head_dim: int, position: int, dtype: torch.dtype
) -> None:
    inputs = attention_inputs(sequences, 577, heads, head_dim, groups, prefix_len)
    mask = torch.rand(groups, prefix_len, device=DEVICE) < 0.7 if groups else None
    for cache in inputs[1:3]:
        cache[:, :, position + 1 :] = torch.nan
    assert_attention_accurate(inputs, torch.tensor(position, device=DEVICE), dtype, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sequences", "heads", "head_dim"), [(96, 24, 64), (1, 24, 64), (64, 32, 100)])
def test_a_cache_in_int8_at_production_sizes(sequences: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, *caches = (x.to(DEVICE) for x in attention_inputs(sequences, 577, heads, head_dim))
    low, exact = {}, []
    for name, rows in zip(("k", "v"), caches, strict=True):
        low[f"{name}_cache"], low[f"{name}_scale"] = whole, scale = in_int8(rows)
        exact.append(whole.double() * scale.double()[..., None])
    q = q.to(dtype)
    out = on_triton(ops.decode_attention, q, position=torch.tensor(500, device=DEVICE), **low)
    with ops.use_backend("reference"):
        assert relative_l2(out, attend(500)(q.double(), *exact)) < RELATIVE_L2[dtype]


@pytest.mark.gpu
def test_a_captured_graph_follows_the_position() -> None:
    q, keys, values = (x.to(DEVICE) for x in attention_inputs(2, 577))
    position = torch.zeros((), dtype=torch.int64, device=DEVICE)
    expected = {p: on_triton(ops.decode_attention, q, keys, values, p) for p in (0, 5, 300, 576)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = on_triton(ops.decode_attention, q, keys, values, position)
    for p, wanted in expected.items():
        position.fill_(p)
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    options = {"dtype": torch.bfloat16, "device": DEVICE}
    keys, values = torch.randn(2, 60, 24, 24001, 64, **options)
    q, position = torch.randn(60, 24, 64, **options), 24000
    out = on_triton(ops.decode_attention, q, keys, values, position)
    last = on_triton(ops.decode_attention, q[-1:], keys[-1:], values[-1:], position)
    assert relative_l2(out[-1:], last.double()) < RELATIVE_L2[torch.bfloat16]
