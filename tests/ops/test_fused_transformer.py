"""Rotary positions, SwiGLU and attention against a cache on Triton, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import RELATIVE_L2, relative_l2
from fused import DEVICE, DTYPES, assert_fused_accurate, misaligned, strided
from torch import Tensor

from vapi_fast import ops
from vapi_fast.kernels import attention, rotary_swiglu
from vapi_fast.kernels.launch import recorded


def on_triton(operation: object, *inputs: object, **options: object) -> Tensor:
    with ops.use_backend("triton"):
        return operation(*inputs, **options)


def rotary_table(length: int, head_dim: int) -> Tensor:
    """The first rows of a table with one condition position."""
    return ops.rotary_2d_table(25, head_dim, 1)[:length].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 3, 64), (1, 63, 2, 100), (3, 65, 1, 4), (1, 577, 2, 64), (2, 9, 24, 64)])
def test_rotary(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = ops.rotary_2d_table(25, shape[3], 0)[1 : shape[1] + 1].to(DEVICE)
    assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [torch.randn(shape)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_makes_condition_positions_vanish(dtype: torch.dtype) -> None:
    table = ops.rotary_2d_table(3, 8, 4).to(DEVICE)
    out = assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [torch.randn(2, 13, 3, 8)], dtype)
    assert not out[:, :4].any()
    assert out[:, 4:].all(-1).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        misaligned,
        strided,
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: x.repeat(1, 1, 3, 1)[:, :, 4:8],
        lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
        lambda x: x[:, :, 1:2, ::2],
    ],
)
def test_rotary_of_any_strides(change: object) -> None:
    x = change(torch.randn(2, 10, 4, 40))
    table = rotary_table(10, x.shape[3])
    out = assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [x], torch.float32)
    assert out.is_contiguous()


@pytest.mark.parametrize("length", [1, 6])
def test_rotary_reads_slices_of_a_fused_projection_in_place(length: int) -> None:
    qkv, table = torch.randn(2, length, 3, 4, 16, device=DEVICE), rotary_table(length + 3, 16)[3:]
    for x in qkv.unbind(2)[:2]:
        assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [x], torch.float32)
        with recorded() as recording:
            rotary_swiglu.rotary_2d_op(x, table, False)
        assert recording.launches[0].args[0].data_ptr() == x.data_ptr()


def test_rotary_table_of_other_dtype_and_strides() -> None:
    x, table = torch.randn(2, 10, 3, 8), rotary_table(10, 8)
    for other in (table.bfloat16(), strided(table), table.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_fused_accurate(lambda x, table=other: ops.rotary_2d(x, table), [x], torch.float32)


def test_rotary_of_nothing_and_of_nan() -> None:
    for shape in ((0, 5, 3, 8), (2, 0, 3, 8)):
        x = torch.empty(shape, device=DEVICE, requires_grad=True)
        out = on_triton(ops.rotary_2d, x, rotary_table(shape[1], 8))
        out.sum().backward()
        assert out.shape == x.grad.shape == shape
    x, table = torch.randn(1, 4, 3, 8, device=DEVICE), rotary_table(5, 8)[1:]
    x[0, 2, 1, 5] = torch.nan
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 2, 1, 4:6] = True
    assert torch.equal(on_triton(ops.rotary_2d, x, table).isnan(), expected)
    with pytest.raises(TypeError, match="rotary_2d: table must be float32, bfloat16 or float16 on the 'triton'"):
        on_triton(ops.rotary_2d, x, table.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 1), (65, 63), (3, 7, 192), (2, 3, 1000), (2, 4096), (3, 2, 2, 520)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_fused_accurate(ops.swiglu, [3 * torch.randn(shape), torch.randn(shape)], dtype)


@pytest.mark.parametrize(
    "change",
    [misaligned, strided, lambda x: x.transpose(0, 1), lambda x: x[1:, 2:], lambda x: x.repeat(1, 1, 2)[..., :96]],
)
def test_swiglu_of_any_strides(change: object) -> None:
    gate, up = change(torch.randn(5, 5, 96)), torch.randn(5, 5, 96)
    up = up[: gate.shape[0], : gate.shape[1], : gate.shape[2]]
    for inputs in ([gate, up], [up, gate]):
        assert_fused_accurate(ops.swiglu, inputs, torch.float32)


def test_swiglu_reads_halves_of_one_projection_in_place() -> None:
    gate, up = torch.randn(2, 9, 2 * 48, device=DEVICE).chunk(2, dim=-1)
    assert_fused_accurate(ops.swiglu, [gate, up], torch.float32)
    with recorded() as recording:
        rotary_swiglu.swiglu_op(gate, up)
        rotary_swiglu.swiglu_backward_op(gate, gate, up)
    forward, backward = (launch.args for launch in recording.launches)
    assert [x.data_ptr() for x in forward[:2]] == [gate.data_ptr(), up.data_ptr()]
    assert [x.data_ptr() for x in backward[:3]] == [gate.data_ptr(), gate.data_ptr(), up.data_ptr()]
    dense = [x.contiguous() for x in (gate, up)]
    for mixed in ((gate, *dense), (dense[0], gate, dense[1]), (*dense[:1] * 2, up)):
        found = rotary_swiglu.swiglu_backward_op(*mixed)
        torch.testing.assert_close(found, rotary_swiglu.swiglu_backward_op(dense[0], *dense))


def test_swiglu_of_mixed_dtypes() -> None:
    for gate_dtype, up_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        gate = torch.randn(5, 70, device=DEVICE).to(gate_dtype).requires_grad_()
        up = torch.randn(5, 70, device=DEVICE).to(up_dtype).requires_grad_()
        out = on_triton(ops.swiglu, gate, up)
        exact = [x.detach().double().requires_grad_() for x in (gate, up)]
        with ops.use_backend("reference"):
            expected = ops.swiglu(*exact)
        assert out.dtype == gate_dtype
        assert relative_l2(out.detach(), expected.detach()) < RELATIVE_L2[gate_dtype]
        gradients = torch.autograd.grad(out.sum(), (gate, up))
        assert [g.dtype for g in gradients] == [gate_dtype, up_dtype]
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
            assert relative_l2(gradient, wanted) < RELATIVE_L2[gradient.dtype]


def test_swiglu_at_the_extremes() -> None:
    gate = torch.tensor([-1e4, 1e4, 0.0, -80.0, 80.0, torch.nan, 1.0], device=DEVICE, requires_grad=True)
    up = torch.tensor([1.0, 1.0, 1e4, 1.0, 1.0, 1.0, torch.nan], device=DEVICE, requires_grad=True)
    out = on_triton(ops.swiglu, gate, up)
    assert out.tolist()[:5] == pytest.approx([0.0, 1e4, 0.0, 0.0, 80.0])
    assert out.isnan().tolist() == [False] * 5 + [True] * 2
    dgate, dup = torch.autograd.grad(out.sum(), (gate, up))
    assert dgate.tolist()[:5] == pytest.approx([0.0, 1.0, 5e3, 0.0, 1.0])
    assert dup.tolist()[:5] == pytest.approx([0.0, 1e4, 0.0, 0.0, 80.0])
    assert dgate.isnan().tolist() == [False] * 5 + [True] * 2
    assert dup.isnan().tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_swiglu_of_an_empty_batch(shape: tuple[int, ...]) -> None:
    gate = torch.empty(shape, device=DEVICE, requires_grad=True)
    out = on_triton(ops.swiglu, gate, gate)
    out.sum().backward()
    assert out.shape == gate.grad.shape == shape


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
    with pytest.raises(TypeError, match="k_cache must be float32, bfloat16, float16 or float8_e4m3fn"):
        appended("triton", qkv, table, caches.double(), 2)


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
    row, table = torch.randn(1, 10, 3, 8, device=DEVICE), rotary_table(10, 8)
    q, *caches = (x.to(DEVICE) for x in attention_inputs(1, 70, 2, 8))
    for operation, inputs in (
        (lambda x: ops.rotary_2d(x, table), [row]),
        (ops.swiglu, [row, row + 1]),
        (attend(66), [q, *caches]),
    ):
        one = on_triton(operation, *inputs)
        three = on_triton(operation, *(x.expand(3, *x.shape[1:]) for x in inputs))
        torch.testing.assert_close(three, one.expand_as(three))


def test_decode_attention_reads_a_layer_of_a_cache_in_place() -> None:
    keys, values = torch.randn(2, 3, 4, 2, 9, 16, device=DEVICE)[:, 1, :, :, :7]
    with recorded() as recording:
        attention.decode_attention_op(keys[:, :, 0], keys, values, torch.tensor(3, device=DEVICE), keys, values, None)
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
        TypeError, match="decode_attention: k_cache must be float32, bfloat16, float16 or float8_e4m3fn"
    ):
        on_triton(attend(66), inputs[0], inputs[1].double(), *inputs[2:])


def test_splits_fill_the_gpu_and_no_more() -> None:
    wanted = attention.splits_of(10**6, 1, DEVICE)
    assert wanted == attention.PROGRAMS_PER_MULTIPROCESSOR * attention.multiprocessors(DEVICE)
    assert attention.splits_of(10, 1, DEVICE) == 10
    assert attention.splits_of(10, wanted, DEVICE) == attention.splits_of(0, 0, DEVICE) == 1
    assert attention.splits_of(10, wanted // 4, DEVICE) == 4


def test_opcheck() -> None:
    namespace = torch.ops.vapi_fast
    x, table = torch.randn(2, 5, 3, 8, device=DEVICE, requires_grad=True), rotary_table(5, 8)
    for inverse in (False, True):
        torch.library.opcheck(namespace.rotary_2d.default, (x, table, inverse))
    torch.library.opcheck(namespace.rotary_2d.default, (x.detach()[:, :, ::2], table, False))
    gate, up = (torch.randn(3, 4, 10, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.library.opcheck(namespace.swiglu.default, (gate, up))
    inputs = [x.detach() for x in (up, gate, up)]
    torch.library.opcheck(namespace.swiglu_backward.default, inputs)
    inputs = [x.to(DEVICE) for x in attention_inputs(4, 70, 2, 8, groups=2, prefix_len=3)]
    qkv, slots = torch.randn(4, 3, 2, 8, device=DEVICE), rotary_table(70, 8)
    torch.library.opcheck(namespace.append_to_cache.default, (qkv, slots, *inputs[1:3], torch.tensor(5, device=DEVICE)))
    position, mask = torch.tensor(66, device=DEVICE), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(namespace.decode_attention.default, (*inputs[:3], position, *inputs[3:], mask))
    torch.library.opcheck(namespace.decode_attention.default, (*inputs[:3], position, None, None, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_production_sizes(dtype: torch.dtype) -> None:
    x, table = torch.randn(16, 577, 3, 24, 64)[:, :, 1], rotary_table(577, 64)
    assert_fused_accurate(lambda x: ops.rotary_2d(x, table), [x], dtype)
    assert_fused_accurate(ops.swiglu, [torch.randn(16, 577, 4096), torch.randn(16, 577, 4096)], dtype)


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
    gate = torch.randn(2**31 // 4096 + 5, 4096, **options)
    out = on_triton(ops.swiglu, gate, gate)
    assert torch.equal(out[-3:], on_triton(ops.swiglu, gate[-3:], gate[-3:]))
    del out
    x, table = gate[:-4].view(-1, 1, 64, 64), rotary_table(2, 64)[1:]
    out = on_triton(ops.rotary_2d, x, table)
    assert torch.equal(out[-3:], on_triton(ops.rotary_2d, x[-3:], table))
    del gate, x, out
    keys, values = torch.randn(2, 60, 24, 24001, 64, **options)
    q, position = torch.randn(60, 24, 64, **options), 24000
    out = on_triton(ops.decode_attention, q, keys, values, position)
    last = on_triton(ops.decode_attention, q[-1:], keys[-1:], values[-1:], position)
    assert relative_l2(out[-1:], last.double()) < RELATIVE_L2[torch.bfloat16]
