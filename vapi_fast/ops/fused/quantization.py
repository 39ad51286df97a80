"""The vector quantizer's codebook on Triton: launches, registration with PyTorch, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from vapi_fast.kernels import quantization as kernels

from .launch import check_dtypes, launch, next_power_of_2, seed_tensor, settings
from .normalization import rows_of

LOG2E = math.log2(math.e)
MIN_DOT = 16  # the least that a matrix product takes in any dimension
MAX_OPERAND = 4096  # numbers of a matrix product's operand that has the channels: more do not fit, with C large


def row_blocks(kernel: str, x: Tensor, channels: int) -> dict[str, int]:
    """A table's BLOCK_ELEMENTS, split into all channels and as many rows as remain."""
    block = dict(settings(kernel, x))
    block_c = next_power_of_2(channels)
    return {"BLOCK_ROWS": max(1, block.pop("BLOCK_ELEMENTS") // block_c), "BLOCK_C": block_c} | block


def dot_blocks(kernel: str, x: Tensor, channels: int) -> dict[str, int]:
    """A table's blocks of rows and of codes, smaller ones where channels are many, and all channels."""
    block = dict(settings(kernel, x))
    block_c = next_power_of_2(max(channels, MIN_DOT))
    most = max(MAX_OPERAND // block_c, MIN_DOT)
    return block | {"BLOCK_C": block_c} | {name: min(block[name], most) for name in ("BLOCK_ROWS", "BLOCK_V")}


def code_splits(block: dict[str, int], vocab_size: int) -> tuple[int, int]:
    """Programs that share the codes of a block of rows, and the codes of each; takes CODES_PER_SPLIT out of block."""
    codes = triton.cdiv(block.pop("CODES_PER_SPLIT"), block["BLOCK_V"]) * block["BLOCK_V"]
    return triton.cdiv(vocab_size, codes), codes


def unit_tiles(rows: Tensor, l2_norm: bool, block_rows: int, padding: float) -> tuple[Tensor, Tensor]:
    """Rows of `[n, C]` as fp32 tiles `[blocks, C, block_rows]`; the first row with a NaN of each block, or n."""
    count, channels = rows.shape
    blocks = triton.cdiv(count, block_rows)
    tiles = torch.empty(blocks, channels, block_rows, dtype=torch.float32, device=rows.device)
    invalid = torch.empty(blocks, dtype=torch.int32, device=rows.device)
    launch(
        kernels.unit_tiles,
        (blocks,),
        rows,
        tiles,
        invalid,
        count,
        channels,
        PADDING=padding,
        L2_NORM=l2_norm,
        BLOCK_ROWS=block_rows,
        BLOCK_C=next_power_of_2(channels),
        **settings("unit_tiles", rows),
    )
    return tiles, invalid


def vq_lookup_forward(z: Tensor, codebook: Tensor, l2_norm: bool) -> tuple[Tensor, Tensor]:
    rows, codebook = rows_of(z).contiguous(), codebook.contiguous()
    (count, channels), vocab_size = rows.shape, len(codebook)
    z_q = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    indices = torch.empty(z.shape[:-1], dtype=torch.int64, device=z.device)

    block = dict(settings("nearest_code", z))
    splits, codes_per_split = code_splits(block, vocab_size)
    latents, _ = unit_tiles(rows, l2_norm, block["BLOCK_ROWS"], 0.0)
    codes, invalid = unit_tiles(codebook, l2_norm, block["BLOCK_V"], math.inf)
    distances = torch.empty(splits, count, dtype=torch.float32, device=z.device)
    nearest = torch.empty(splits, count, dtype=torch.int32, device=z.device)
    launch(
        kernels.nearest_code,
        (len(latents) * splits,),
        latents,
        codes,
        distances,
        nearest,
        count,
        len(latents),
        len(codes),
        codes_per_split // block["BLOCK_V"],
        C=channels,
        **block,
    )
    block = row_blocks("nearest_entry", z, channels)
    launch(
        kernels.nearest_entry,
        (triton.cdiv(count, block["BLOCK_ROWS"]),),
        rows,
        codebook,
        distances,
        nearest,
        invalid,
        z_q,
        indices,
        count,
        vocab_size,
        channels,
        splits,
        len(invalid),
        L2_NORM=l2_norm,
        BLOCK_BLOCKS=next_power_of_2(len(invalid)),
        **block,
    )
    return z_q, indices


def unit_backward(dunit: Tensor, x: Tensor) -> Tensor:
    """Gradient of vectors `[..., C]` from that of the vectors scaled to unit length."""
    rows, dunit = rows_of(x).contiguous(), dunit.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = row_blocks("unit_backward", x, x.shape[-1])
    launch(
        kernels.unit_backward,
        (triton.cdiv(len(rows), block["BLOCK_ROWS"]),),
        dunit,
        rows,
        dx,
        len(rows),
        x.shape[-1],
        **block,
    )
    return dx


def codebook_lookup_forward(indices: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    vocab_size, channels = codebook.shape
    entries = torch.empty(*indices.shape, channels, dtype=codebook.dtype, device=codebook.device)
    block = row_blocks("codebook_gather", codebook, channels)
    launch(
        kernels.codebook_gather,
        (triton.cdiv(indices.numel(), block["BLOCK_ROWS"]),),
        indices.contiguous(),
        codebook.contiguous(),
        entries,
        indices.numel(),
        vocab_size,
        channels,
        L2_NORM=l2_norm,
        **block,
    )
    return entries


def codebook_lookup_backward(dentries: Tensor, indices: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    vocab_size, channels = codebook.shape
    sums = torch.zeros(vocab_size, channels, dtype=torch.float32, device=codebook.device)
    block = row_blocks("codebook_scatter", codebook, channels)
    launch(
        kernels.codebook_scatter,
        (triton.cdiv(indices.numel(), block["BLOCK_ROWS"]),),
        dentries.contiguous(),
        indices.contiguous(),
        sums,
        indices.numel(),
        vocab_size,
        channels,
        **block,
    )
    return unit_backward(sums, codebook) if l2_norm else sums.to(codebook.dtype)


def straight_through_forward(
    logits: Tensor, codebook: Tensor, seed: Tensor, sample_ids: Tensor | None, tau: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_q and indices; with `soft` also the softmax's statistics `[2, B·T]` and mean entries `[B·T, C]`."""
    (batch, length, vocab_size), channels = logits.shape, codebook.shape[1]
    rows, device = rows_of(logits), logits.device
    z_q = torch.empty(batch, length, channels, dtype=codebook.dtype, device=device)
    indices = torch.empty(batch, length, dtype=torch.int64, device=device)
    statistics, mean_entry = empty_softmax(logits, channels, soft)

    block = dot_blocks("straight_through_forward", logits, channels + 1)  # one more for the sum of the weights
    splits, codes_per_split = code_splits(block, vocab_size)
    maximum, total = torch.empty(2, splits, len(rows), dtype=torch.float32, device=device).unbind()
    first = torch.empty(splits, len(rows), dtype=torch.int32, device=device)
    sums = torch.empty(splits, len(rows), channels if soft else 0, dtype=torch.float32, device=device)
    sample_ids = None if sample_ids is None else sample_ids.contiguous()
    inputs = (rows, codebook.contiguous(), seed, sample_ids)
    sizes = (len(rows), length, vocab_size, channels, rows.stride(0), LOG2E / tau, splits)
    launch(
        kernels.straight_through_forward,
        (triton.cdiv(len(rows), block["BLOCK_ROWS"]) * splits,),
        *inputs,
        maximum,
        first,
        total,
        sums,
        *sizes,
        codes_per_split,
        SOFT=soft,
        **block,
    )
    tiles = {name: block[name] for name in ("BLOCK_V", "BLOCK_C")}
    block = settings("straight_through_finish", logits)
    launch(
        kernels.straight_through_finish,
        (triton.cdiv(len(rows), block["BLOCK_ROWS"]),),
        *inputs,
        maximum,
        first,
        total,
        sums,
        z_q,
        indices,
        statistics,
        mean_entry,
        *sizes,
        SOFT=soft,
        **tiles,
        **block,
    )
    return z_q, indices, statistics, mean_entry


def empty_softmax(logits: Tensor, channels: int, soft: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0] * logits.shape[1] if soft else 0
    return logits.new_empty(2, rows, dtype=torch.float32), logits.new_empty(rows, channels, dtype=torch.float32)


def straight_through_backward(
    dz: Tensor,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    statistics: Tensor,
    mean_entry: Tensor,
    tau: float,
    needs_logits: bool,
    needs_codebook: bool,
) -> list[Tensor]:
    """Gradients to logits and to the codebook, as far as needed, in this order."""
    (vocab_size, channels), rows = codebook.shape, rows_of(logits)
    dz = dz.reshape(-1, channels).contiguous()
    block = dot_blocks("straight_through_backward", logits, channels)
    rows_per_split = triton.cdiv(block.pop("ROWS_PER_SPLIT"), block["BLOCK_ROWS"]) * block["BLOCK_ROWS"]
    splits, v_blocks = triton.cdiv(len(rows), rows_per_split), triton.cdiv(vocab_size, block["BLOCK_V"])
    dlogits = dcodebook = None
    if needs_logits:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if needs_codebook:
        dcodebook = torch.empty(splits, vocab_size, channels, dtype=torch.float32, device=logits.device)
    launch(
        kernels.straight_through_backward,
        (splits * v_blocks,),
        dz,
        rows,
        codebook.contiguous(),
        seed,
        None if sample_ids is None else sample_ids.contiguous(),
        statistics,
        (mean_entry * dz).sum(-1) / tau,
        dlogits,
        dcodebook,
        len(rows),
        logits.shape[1],
        vocab_size,
        channels,
        rows.stride(0),
        LOG2E / tau,
        1 / tau,
        v_blocks,
        rows_per_split,
        NEEDS_LOGITS=needs_logits,
        NEEDS_CODEBOOK=needs_codebook,
        **block,
    )
    total = dcodebook.sum(0).to(codebook.dtype) if needs_codebook else None
    return [gradient for gradient in (dlogits, total) if gradient is not None]


vq_lookup_op = torch.library.custom_op("vapi_fast::vq_lookup", vq_lookup_forward, mutates_args=())
unit_backward_op = torch.library.custom_op("vapi_fast::unit_backward", unit_backward, mutates_args=())
codebook_lookup_op = torch.library.custom_op("vapi_fast::codebook_lookup", codebook_lookup_forward, mutates_args=())
codebook_lookup_backward_op = torch.library.custom_op(
    "vapi_fast::codebook_lookup_backward", codebook_lookup_backward, mutates_args=()
)
straight_through_lookup_op = torch.library.custom_op(
    "vapi_fast::straight_through_lookup", straight_through_forward, mutates_args=()
)
straight_through_lookup_backward_op = torch.library.custom_op(
    "vapi_fast::straight_through_lookup_backward", straight_through_backward, mutates_args=()
)


@vq_lookup_op.register_fake
def _(z: Tensor, codebook: Tensor, l2_norm: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int64)


@unit_backward_op.register_fake
def _(dunit: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@codebook_lookup_op.register_fake
def _(indices: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    return codebook.new_empty(*indices.shape, codebook.shape[1])


@codebook_lookup_backward_op.register_fake
def _(dentries: Tensor, indices: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    return codebook.new_empty(codebook.shape)


@straight_through_lookup_op.register_fake
def _(
    logits: Tensor, codebook: Tensor, seed: Tensor, sample_ids: Tensor | None, tau: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_q = codebook.new_empty(*logits.shape[:2], codebook.shape[1])
    indices = logits.new_empty(logits.shape[:2], dtype=torch.int64)
    return z_q, indices, *empty_softmax(logits, codebook.shape[1], soft)


@straight_through_lookup_backward_op.register_fake
def _(
    dz: Tensor,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    statistics: Tensor,
    mean_entry: Tensor,
    tau: float,
    needs_logits: bool,
    needs_codebook: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in ((logits, needs_logits), (codebook, needs_codebook)) if needed]


def _vq_lookup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, _, ctx.l2_norm = inputs
    ctx.save_for_backward(z)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _vq_lookup_gradient(ctx: Any, dz_q: Tensor, _: None) -> tuple[Tensor, None, None]:
    return unit_backward_op(dz_q, *ctx.saved_tensors) if ctx.l2_norm else dz_q, None, None


def _codebook_lookup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, codebook, ctx.l2_norm = inputs
    ctx.save_for_backward(indices, codebook)


def _codebook_lookup_gradient(ctx: Any, dentries: Tensor) -> tuple[None, Tensor, None]:
    return None, codebook_lookup_backward_op(dentries, *ctx.saved_tensors, ctx.l2_norm), None


def _straight_through_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.tau, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _straight_through_gradient(ctx: Any, dz: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    gradients = iter(straight_through_lookup_backward_op(dz, *ctx.saved_tensors, ctx.tau, *needs))
    return *(next(gradients) if need else None for need in needs), None, None, None, None


vq_lookup_op.register_autograd(_vq_lookup_gradient, setup_context=_vq_lookup_context)
codebook_lookup_op.register_autograd(_codebook_lookup_gradient, setup_context=_codebook_lookup_context)
straight_through_lookup_op.register_autograd(_straight_through_gradient, setup_context=_straight_through_context)


def vq_lookup(z: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest codes without the distances in memory; see `vapi_fast.ops.vq_lookup`."""
    check_dtypes("vq_lookup", z=z, codebook=codebook)
    return vq_lookup_op(z, codebook, l2_norm)


def codebook_lookup(indices: Tensor, codebook: Tensor, *, l2_norm: bool = True) -> Tensor:
    """Entries gathered and normalised in one pass; see `vapi_fast.ops.codebook_lookup`.

    An index outside 0…V−1 gives NaN. The gradient is added up by atomics: repeated, it may differ by rounding.
    """
    check_dtypes("codebook_lookup", codebook=codebook)
    return codebook_lookup_op(indices, codebook, l2_norm)


def straight_through_lookup(
    logits: Tensor, codebook: Tensor, *, tau: float, seed: int | Tensor, sample_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw and softmax from one read of the logits; see `vapi_fast.ops.straight_through_lookup`."""
    check_dtypes("straight_through_lookup", logits=logits, codebook=codebook)
    soft = torch.is_grad_enabled() and (logits.requires_grad or codebook.requires_grad)
    seed = seed_tensor(seed, logits.device)
    return straight_through_lookup_op(logits, codebook, seed, sample_ids, float(tau), soft)[:2]
