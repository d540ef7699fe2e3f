"""What the chunked loss head takes, for the head itself and for the forecast: pure arithmetic, no torch.

- A chunk has `chunk_rows` rows: as many as fit `CPU_CHUNK_BYTES` or `GPU_CHUNK_BYTES` of fp32 logits; at least `LEAST_ROWS`, and
  where the head's weight is trained at least a quarter of the hidden size, because each chunk adds to a gradient of V x W.
- Kept from forward to backward: `kept_bytes_per_token` a trained token (a gradient where the head's weights are frozen, the
  hidden state where they are trained; never logits).
- For the time of the call: `TEMPORARY_LOGITS` times a chunk's fp32 logits; where the weights are trained, in the backward
  pass also V x W x (4 bytes + 2 x those of the compute type) at the end of it, of which the last part is the gradient that
  stays; where autocast runs fp32 weights in 16 bits, a 16-bit copy (V x W x 2 bytes) in each of the two passes.

Liger's kernel (`model.loss_head`) keeps as much and has chunks of about K x W numbers (K trained tokens), in the compute type: less than
torch's. The forecast reckons with torch's.
"""

from __future__ import annotations

CPU_CHUNK_BYTES = 48 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
"""Of a chunk's fp32 logits. Below about 64 rows the products slow down; above, more rows win nothing (`benchmarks/head.py`)."""
LEAST_ROWS = 32
"""Of a chunk: fewer make a matrix product slow."""
TEMPORARY_LOGITS = 3.5
"""fp32 logits, their log-probabilities, those of the chunk before, and 16-bit copies; 2 more with a soft cap or entropies."""
TARGET_BYTES = 8


def chunk_rows(vocabulary: int, device_type: str, *, trained_width: int = 0) -> int:
    """How many tokens are scored at a time; `trained_width` is the hidden size where the head's weight is trained."""
    allowed = CPU_CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    return max(LEAST_ROWS, trained_width // 4, allowed // (4 * vocabulary))


def kept_bytes_per_token(hidden_size: int, compute_bytes: int) -> int:
    """Kept from forward to backward for each trained token."""
    return hidden_size * compute_bytes + TARGET_BYTES
