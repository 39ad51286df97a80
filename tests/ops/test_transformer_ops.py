"""Rotary positions, SwiGLU and cached attention against complex rotation, formulas and full attention."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor
from torch.nn import functional as F

from vapi_fast import ops


@pytest.mark.parametrize(("grid_size", "head_dim", "prefix_len"), [(3, 8, 1), (5, 4, 0), (1, 64, 120), (24, 64, 1)])
def test_rotary_table_turns_by_row_then_column(grid_size: int, head_dim: int, prefix_len: int) -> None:
    table = ops.rotary_2d_table(grid_size, head_dim, prefix_len)
    assert table.shape == (prefix_len + grid_size**2, head_dim // 2, 2)
    assert (table[:prefix_len] == 0).all()
    for row in range(0, grid_size, 2):
        for column in range(0, grid_size, 3):
            for pair in range(head_dim // 2):
                place, i = (row, pair) if pair < head_dim // 4 else (column, pair - head_dim // 4)
                angle = place * 10000 ** (-2 * i / (head_dim / 2))
                cosine, sine = table[prefix_len + row * grid_size + column, pair].tolist()
                assert cosine == pytest.approx(math.cos(angle), abs=4e-6)
                assert sine == pytest.approx(math.sin(angle), abs=4e-6)


def test_rotary_table_of_another_base() -> None:
    cosine = ops.rotary_2d_table(2, 8, 0, base=100.0)[3, :, 0]  # row 1, column 1: frequencies 1 and 100^(−1/2), twice
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.1, 1.0, 0.1]).cos())


@pytest.mark.parametrize("length", [1, 10])
def test_rotary_is_a_complex_product(length: int) -> None:
    x = torch.randn(2, length, 3, 8, dtype=torch.float64)
    table = ops.rotary_2d_table(3, 8, 1).double()[:length] if length > 1 else ops.rotary_2d_table(3, 8, 0).double()[5:6]
    turned = torch.view_as_complex(x.reshape(2, length, 3, 4, 2)) * torch.view_as_complex(table.contiguous())[:, None]
    out = ops.rotary_2d(x, table)
    torch.testing.assert_close(out, torch.view_as_real(turned).reshape(x.shape))
    if length > 1:
        assert (out[:, 0] == 0).all()  # the condition position vanishes
        torch.testing.assert_close(out[:, 1:].norm(dim=-1), x[:, 1:].norm(dim=-1))
    assert torch.autograd.gradcheck(lambda x: ops.rotary_2d(x, table), x.requires_grad_())
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.rotary_2d(strided, table), out)


def test_rotated_products_depend_on_the_offset_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    table = ops.rotary_2d_table(6, 8, 0).double()
    grid_q = ops.rotary_2d(q.expand(1, 36, 1, 8), table).reshape(6, 6, 8)
    grid_k = ops.rotary_2d(k.expand(1, 36, 1, 8), table).reshape(6, 6, 8)
    products = [(grid_q[row, column] @ grid_k[row + 2, column + 1]).item() for row in range(4) for column in range(5)]
    assert products == pytest.approx([products[0]] * 20, abs=1e-5)
    assert (grid_q[0, 0] @ grid_k[1, 2]).item() != pytest.approx(products[0], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_and_swiglu_accuracy(dtype: torch.dtype) -> None:
    table = ops.rotary_2d_table(8, 16, 1)
    assert_accurate(lambda x: ops.rotary_2d(x, table), [torch.randn(2, 65, 3, 16)], dtype)
    assert_accurate(ops.swiglu, [torch.randn(3, 63, 17), torch.randn(3, 63, 17)], dtype)


def test_swiglu() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(ops.swiglu(gate, up), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))
    extremes = torch.tensor([-1e4, 1e4, 0.0])
    assert ops.swiglu(extremes, torch.ones(3)).tolist() == [0.0, 1e4, 0.0]


def attention_inputs(sequences: int, slots: int, groups: int, prefix_len: int) -> dict[str, Tensor]:
    own, shared = (sequences, 3, slots, 8), (groups, 3, prefix_len, 8)
    shapes = {"q": (sequences, 3, 8), "k_cache": own, "v_cache": own, "prefix_k": shared, "prefix_v": shared}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("position", [0, 4, 8])
def test_append_to_cache(position: int, as_tensor: bool) -> None:
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


def test_decode_attention_of_a_cache_in_fp8() -> None:
    x = attention_inputs(4, 9, 2, 5)
    for name in ("k_cache", "v_cache"):
        x[name] = x[name].to(torch.float8_e4m3fn)
    wide = {name: value.double() for name, value in x.items()}
    torch.testing.assert_close(ops.decode_attention(**x, position=6), ops.decode_attention(**wide, position=6))


@pytest.mark.parametrize("position", [0, 4, 8])
def test_decode_attention_without_prefix(position: int) -> None:
    x = attention_inputs(5, 9, 1, 1)
    keys, values = x["k_cache"][:, :, : position + 1], x["v_cache"][:, :, : position + 1]
    expected = F.scaled_dot_product_attention(x["q"][:, :, None], keys, values)[:, :, 0]
    for cache in (x["k_cache"], x["v_cache"]):
        cache[:, :, position + 1 :] = torch.nan  # slots not written yet
    for where in (position, torch.tensor(position)):
        torch.testing.assert_close(ops.decode_attention(x["q"], x["k_cache"], x["v_cache"], where), expected)


@pytest.mark.parametrize(("sequences", "groups", "prefix_len"), [(6, 2, 5), (6, 6, 1), (4, 1, 63), (3, 3, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_prefix_is_shared_by_its_group(sequences: int, groups: int, prefix_len: int, masked: bool) -> None:
    x = attention_inputs(sequences, 7, groups, prefix_len)
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
    x = attention_inputs(4, 9, 2, 5)

    def attend(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.decode_attention(**dict(zip(x, tensors, strict=True)), position=6)

    assert_accurate(attend, list(x.values()), dtype)


def test_bad_arguments() -> None:
    x = attention_inputs(4, 9, 2, 5)
    with pytest.raises(ValueError, match="rotary_2d_table: head_dim must be a multiple of 4, got 6"):
        ops.rotary_2d_table(4, 6, 1)
    with pytest.raises(ValueError, match=r"rotary_2d: table must be .* with T=3, got float32 \[4, 4, 2\]"):
        ops.rotary_2d(torch.zeros(2, 3, 1, 8), torch.zeros(4, 4, 2))
    with pytest.raises(ValueError, match=r"rotary_2d: table must be .* head_dim=8, got float32 \[3, 2, 2\]"):
        ops.rotary_2d(torch.zeros(2, 3, 1, 8), torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match=r"swiglu: up must be .* with ...=\(2,\), D=3, got float32 \[2, 4\]"):
        ops.swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
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
    with pytest.raises(ValueError, match="prefix_k and prefix_v must be given together"):
        ops.decode_attention(x["q"], x["k_cache"], x["v_cache"], 1, prefix_k=x["prefix_k"])
    with pytest.raises(ValueError, match="q's N=4 must be a multiple of prefix_k's P=3"):
        ops.decode_attention(**{**x, **{n: torch.zeros(3, 3, 5, 8) for n in ("prefix_k", "prefix_v")}}, position=1)
    with pytest.raises(ValueError, match=r"prefix_mask must be .* with P=2, prefix_len=5, got bool \[2, 4\]"):
        ops.decode_attention(**x, position=1, prefix_mask=torch.ones(2, 4, dtype=torch.bool))
