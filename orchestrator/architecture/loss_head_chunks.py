"""Chunk sizes and memory of the chunked loss head, for the head itself and for the forecast: pure arithmetic, no torch.

- A chunk has `chunk_rows` rows: as many as fit `CPU_CHUNK_BYTES` or `GPU_CHUNK_BYTES` of fp32 logits; at least
  `LEAST_ROWS`, and if the head's weight is trained, at least a quarter of the hidden size, because each chunk adds to a
  gradient of V x W.
- Kept from forward to backward: `kept_bytes_per_token` per trained token (a gradient if the head's weights are frozen,
  the hidden state if they are trained; never logits).
- During the call, `temporary_bytes`: a chunk's products in the compute type, and a block's logits and
  probabilities in fp32 (the logits are the products themselves if these are fp32; one more copy with a soft cap). A
  block is scored at once: `block_rows`.
- If the weights are trained, also V x W x (4 bytes + 2 x those of the compute type) at the end of the backward pass, of
  which the last part is the gradient that remains; if autocast runs fp32 weights in 16 bits, a 16-bit copy (V x W x 2
  bytes) in each of the two passes.

Liger's kernel (`model.loss_head`) keeps as much and has chunks of about K x W numbers (K trained tokens), in the
compute type: less than torch's. The forecast assumes torch's.
"""

from __future__ import annotations

import math

CPU_CHUNK_BYTES = 48 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
"""Of a chunk's fp32 logits. Below about 64 rows the products slow down; above, more rows gain nothing
(`benchmarks/head.py`)."""
LEAST_ROWS = 32
"""Of a chunk: fewer make a matrix product slow."""
CPU_BLOCK_BYTES = 4 * 2**20
"""Of a block's fp32 logits, so that scoring them stays in a core's cache: a third of the head's time (`benchmarks/head.py`)."""
LEAST_BLOCK_ROWS = 8
CAPPED = ("gemma2",)
"""Families whose logits have a soft cap (2408.00118)."""
TARGET_BYTES = 8


def chunk_rows(vocabulary: int, device_type: str, *, trained_width: int = 0) -> int:
    """Tokens scored at a time; `trained_width` is the hidden size if the head's weight is trained."""
    allowed = CPU_CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    # Each chunk of a trained head adds to a gradient of V x W, which too small chunks would do too often.
    return max(LEAST_ROWS, trained_width // 4, allowed // (4 * vocabulary))


def block_rows(vocabulary: int, device_type: str, *, rows: int) -> int:
    """Tokens of a chunk of `rows` with fp32 logits at the same time; all of them on a GPU."""
    return rows if device_type != "cpu" else min(rows, max(LEAST_BLOCK_ROWS, CPU_BLOCK_BYTES // (4 * vocabulary)))


def temporary_bytes(vocabulary: int, device_type: str, *, rows: float, compute_bytes: int, is_capped: bool) -> float:
    """Temporary bytes of a chunk of `rows` tokens during the call."""
    block = 4 * vocabulary * min(rows, block_rows(vocabulary, device_type, rows=math.ceil(rows)))
    return compute_bytes * vocabulary * rows + block * ((1 if compute_bytes == 4 else 2) + is_capped)


def kept_bytes_per_token(hidden_size: int, compute_bytes: int) -> int:
    """Kept from forward to backward for each trained token."""
    return hidden_size * compute_bytes + TARGET_BYTES
