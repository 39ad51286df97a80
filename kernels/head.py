"""Matrix products of the language-model head: by cuBLAS, a chunk of logits at a time, never all of them at once.

| product                       | FLOPs a row | written                                                   |
|-------------------------------|-------------|-----------------------------------------------------------|
| logits = hidden · weightᵀ     | 2·V·D       | fp32, 4·V bytes a row                                     |
| ∇hidden = ∇logits · weight    | 2·V·D       | hidden's dtype                                            |
| ∇weight += ∇logitsᵀ · hidden  | 2·V·D       | fp32, 4·V·D bytes a chunk, and as many read from the 2nd  |

Products of 16-bit operands are summed in fp32 by the matrix units, and the sums of the first and the third written
out unrounded; those of fp32 operands are as `torch.backends.cuda.matmul` says, like any other. A bias is added where a
kernel loads logits: 4·V bytes a row from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vapi_fast.reference.precision import product

# Logits held at once. At V = 16384 it is 2560 rows, so that 16 images of 576 tokens make 4 chunks of 2304 rows. Tiles
# of 128 × 256 then fill 97 % of an H100's last wave, and the 151 MB with 101 MB of ∇weight at D = 1536 are a tenth of
# what plain PyTorch takes. Each chunk more is 201 MB more traffic for ∇weight, 0.07 ms.
CHUNK_BYTES = 160 * 2**20
# Rows of a chunk are a multiple of a tile's, where they are not all there are.
ROW_MULTIPLE = 128


@triton.jit
def load_logits(row_ptr, bias_ptr, index, V):
    """Logits of a row at these indices, with their bias in fp32 unless it is None; −∞ beyond V."""
    x = tl.load(row_ptr + index, mask=index < V, other=float("-inf"))
    if bias_ptr is not None:
        x = x.to(tl.float32) + tl.load(bias_ptr + index, mask=index < V, other=0.0).to(tl.float32)
    return x


def head_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """hidden `[..., D]` as rows `[n, D]`, and the weight `[V, D]`: contiguous, in hidden's dtype, as under autocast.

    So an fp32 weight is rounded for a 16-bit hidden state, and a 16-bit one promoted for an fp32 hidden state.
    """
    return hidden.reshape(-1, hidden.shape[-1]).contiguous(), weight.to(hidden.dtype).contiguous()


def rows_at_once(rows: int, vocab_size: int) -> int:
    """Rows of a chunk: as few chunks as CHUNK_BYTES allows, of about equal size."""
    rows, most = max(rows, 1), max(CHUNK_BYTES // (4 * vocab_size), 1)
    chunks = triton.cdiv(rows, most)
    return min(most, triton.cdiv(triton.cdiv(rows, chunks), ROW_MULTIPLE) * ROW_MULTIPLE)


def logits_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Logits of consecutive rows: the index of the first one, and fp32 `[rows, V]`, contiguous.

    hidden `[n, D]` and weight `[V, D]` as `head_operands` gives them. The chunks share their memory and the caller may
    overwrite it: use one before taking the next.
    """
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    size = rows_at_once(rows, vocab_size)
    scratch = torch.empty(min(size, rows), vocab_size, dtype=torch.float32, device=hidden.device)
    for start in range(0, rows, size):
        logits = scratch[: rows - start]
        product(hidden[start : start + size], weight.t(), logits)
        yield start, logits
