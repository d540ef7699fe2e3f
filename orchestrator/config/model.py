"""Types and ranges of the base model and its quantisation. Must not import torch."""

from __future__ import annotations

from typing import Literal

from orchestrator.config.base import NaturalInt, PositiveFloat, PositiveInt, Section, Text


class Architecture(Section):
    """The facts of a config.json that the plan's arithmetic needs."""

    model_type: str
    """transformers' name of the architecture, such as llama."""
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    """Inner width of the feed-forward; in a mixture of experts, of one expert."""
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    tie_word_embeddings: bool
    num_experts: NaturalInt
    """Experts of a layer; 0 for a dense model."""
    num_experts_per_token: NaturalInt
    attention_bias: bool
    """Biases in attention, if the family leaves it to the model (Llama, Qwen3, Gemma)."""
    feed_forward_bias: bool
    """Biases in the feed-forward, likewise."""
    num_positions: NaturalInt
    """Learned positions; 0 for rotary ones."""
    sliding_window: PositiveInt | None
    """Tokens that a layer with local attention sees; null if every layer sees all."""


class ModelPreset(Section):
    """Facts about the preset's own base, known without a hub; unused if `model.base` was changed."""

    base: str
    """The hub id that the facts below belong to."""
    package: str | None
    """A Python distribution that carries the weights as GGUF, or null."""
    architecture: Architecture


class ModelConfig(Section):
    """The pretrained base model."""

    base: Text
    """Hub id or folder."""
    revision: str | None
    """Branch, tag or commit on the hub; null is the default branch."""
    dtype: Literal["float32", "bfloat16"]
    """Compute dtype; trainable parameters keep fp32 master weights in any case. `auto` in a file or on the command line
    is resolved when the configuration is composed: bfloat16 if the device computes it natively, else float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"]
    """Attention implementation; `auto` is the fastest exact one: by document on packed rows, else sdpa."""
    loss_head: Literal["auto", "torch", "liger"]
    """Implementation of SFT's summed cross-entropy: `liger` is Liger's Triton kernel (GPUs; package liger-kernel),
    `auto` uses it if it runs, else torch. All other losses use torch."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third (full) to a half (LoRA) more time."""
    checkpoint_every: PositiveInt
    """With `gradient_checkpointing`: recompute every n-th layer and keep the activations of the others; 1 recomputes
    all."""
    compile: bool
    """Compile every layer (torch.compile): fused kernels at the cost of some minutes of compilation; best with packed
    rows, which have one shape."""
    shard_gib: PositiveFloat
    """Largest file of weights in an artifact, in GiB; the files of a larger model get an index."""
    preset: ModelPreset | None

    def recomputed_layers(self, layers: int) -> int:
        """How many of `layers` gradient checkpointing recomputes."""
        return -(-layers // self.checkpoint_every) if self.gradient_checkpointing else 0


class NoQuantization(Section):
    """The base is held in `model.dtype`."""

    scheme: Literal["none"]

    @property
    def is_4bit(self) -> bool:
        return False


class Nf4Quantization(Section):
    """The frozen base is held in 4-bit NormalFloat (QLoRA, 2305.14314)."""

    scheme: Literal["nf4"]
    double_quantization: bool
    """Quantise the block constants too: 0.5 -> 0.127 bits per parameter."""

    @property
    def is_4bit(self) -> bool:
        return True
