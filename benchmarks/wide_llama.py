"""A random Llama of any size, streamed into a folder a tensor at a time; the inputs of benchmarks that need a large base."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
import tiny_model

VOCABULARY = 260
"""The tokens of the tests' tokenizer: the layers are what counts here."""
PIECE_ELEMENTS = 4 << 20
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The dimensions of a Llama with untied embeddings, in fp32."""

    hidden: int
    intermediate: int
    layers: int
    heads: int = 16
    kv_heads: int = 4

    @property
    def linear(self) -> int:
        """Elements of the linear layers of one decoder layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate

    @property
    def elements(self) -> int:
        return self.layers * (self.linear + 2 * self.hidden) + self.hidden + 2 * VOCABULARY * self.hidden

    @property
    def largest_layer_bytes(self) -> int:
        return FLOAT_BYTES * max(self.linear + 2 * self.hidden, VOCABULARY * self.hidden)


def write_base(folder: Path, shape: Shape) -> None:
    """Write model.safetensors, config.json and a tokenizer; nothing if they are there already."""
    from transformers import LlamaConfig

    if (folder / "tokenizer.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    _write_weights(folder / "model.safetensors", dict(_tensors(shape)))
    tiny_model.write_tokenizer(folder)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", shape.intermediate, hidden),
            ("mlp.up_proj", shape.intermediate, hidden),
            ("mlp.down_proj", hidden, shape.intermediate),
        ):
            yield f"model.layers.{layer}.{name}.weight", (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def _write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Normal values for matrices and ones for norms, in pieces of a few MiB."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        stop = offset + FLOAT_BYTES * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    dice = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, PIECE_ELEMENTS)
                drawn = dice.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((drawn if len(shape) == 2 else np.ones(count, np.float32)).tobytes())
                left -= count
