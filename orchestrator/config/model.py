"""The base model, how it is tuned, quantised and sharded: types and ranges; no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Fraction, NaturalInt, PositiveFloat, PositiveInt, Section, Text


class Architecture(Section):
    """The facts of a config.json that the plan's arithmetic needs."""

    model_type: str
    """transformers' name of the architecture, such as llama."""
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    """Inner width of the feed-forward; of one expert in a mixture."""
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    tie_word_embeddings: bool
    num_experts: NaturalInt
    """Experts of a layer; 0 for a dense model."""
    num_experts_per_token: NaturalInt
    attention_bias: bool
    """Biases in attention, where the family leaves it to the model (Llama, Qwen3, Gemma)."""
    feed_forward_bias: bool
    """The same for the feed-forward."""
    num_positions: NaturalInt
    """Learned positions; 0 for rotary ones."""
    sliding_window: PositiveInt | None
    """Tokens that a layer with local attention sees; null where every layer sees all."""


class ModelPreset(Section):
    """What is known about the preset's own base without asking a hub; unused where `model.base` was changed."""

    base: str
    """The hub id that the facts below belong to."""
    package: str | None
    """A Python distribution that carries the weights as GGUF, or null."""
    architecture: Architecture


class ModelConfig(Section):
    """The pretrained model that everything starts from."""

    base: Text
    """Hub id or folder."""
    revision: str | None
    """Branch, tag or commit on the hub; null is the default branch."""
    dtype: Literal["float32", "bfloat16"]
    """Compute dtype; trainable parameters keep fp32 master weights either way. `auto` in a file or on the command line is resolved
    when the configuration is composed: bfloat16 where the device computes it natively, else float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"]
    """Attention implementation; `auto` is the fastest exact one: by document on packed rows, else sdpa."""
    loss_head: Literal["auto", "torch", "liger"]
    """What makes the summed cross-entropy of SFT: `liger` is Liger's Triton kernel (GPUs; package liger-kernel), `auto` takes it where
    it runs, else torch's own, which makes everything else either way."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third (full) to a half (LoRA) more time."""
    checkpoint_every: PositiveInt
    """With `gradient_checkpointing`: one layer in so many is recomputed, the others keep their activations; 1: all are."""
    compile: bool
    """Compile every layer (torch.compile): fused kernels after some minutes of compiling; best with packed rows, which have one shape."""
    preset: ModelPreset | None

    def recomputed_layers(self, layers: int) -> int:
        """Of so many layers, those that gradient checkpointing computes again."""
        return -(-layers // self.checkpoint_every) if self.gradient_checkpointing else 0


class FullTuning(Section):
    """Every parameter is trained."""

    method: Literal["full"]


class FreezeTuning(Section):
    """A part of the base's own parameters is trained, the rest stays as it is; the switches add up."""

    method: Literal["freeze"]
    layers: Annotated[str, Field(pattern=r"^(all|none|(first|last) [1-9][0-9]*)$")] | tuple[NaturalInt, ...]
    """Whole layers: `last N`, `first N`, `all`, `none`, or a list of their numbers from 0."""
    embeddings: bool
    """Train the input embeddings."""
    head: bool
    """Train the output head; where it is tied to the embeddings, both are one matrix and both are trained."""
    norms: bool
    """Train every norm of the model, also those in frozen layers and the last one."""
    also: tuple[str, ...]
    """Patterns (fnmatch) of further parameters' names, such as `*.self_attn.q_proj.*`."""
    unfreeze_every_steps: PositiveInt | None
    """Open one level more (head and last norm, the layers from the last to the first, embeddings) every so many steps;
    null with the next null: all from the first step."""
    unfreeze_every_epochs: PositiveFloat | None
    """The same in passes over the rows; 1 is ULMFiT's (1801.06146, section 3.3)."""

    @property
    def is_gradual(self) -> bool:
        return self.unfreeze_every_steps is not None or self.unfreeze_every_epochs is not None


class LoraTuning(Section):
    """LoRA (2106.09685): h = W0 x + (alpha/r) B A x."""

    method: Literal["lora"]
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Fraction
    target_modules: Literal["all-linear"] | tuple[str, ...]
    """`all-linear` (every linear layer but the head) or a list of module names."""
    use_rslora: bool
    """Scale by alpha/sqrt(rank) instead of alpha/rank (2312.03732)."""
    use_dora: bool
    """Train magnitude and direction apart (2402.09353)."""
    init: Annotated[str, Field(pattern=r"^(default|loftq|pissa|pissa_niter_[1-9][0-9]*)$")]
    """`default`: A random, B 0. `pissa` (2404.02948): the base's principal part is trained, its residual is frozen;
    `pissa_niter_16` finds it by 16 steps of a randomised method. `loftq` (2310.08659): A and B make up for nf4's rounding."""
    lora_plus_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None
    """Learning rate of B over that of A (LoRA+, 2402.12354); null is one rate for both."""

    @property
    def is_pissa(self) -> bool:
        return self.init.startswith("pissa")


WHOLE_MODEL_TUNINGS = (FullTuning, FreezeTuning)
"""They train the base's own parameters: the artifact is a whole model, not an adapter."""


class NoQuantization(Section):
    """The base is held in `model.dtype`."""

    scheme: Literal["none"]


class Nf4Quantization(Section):
    """The frozen base is held in 4-bit NormalFloat (QLoRA, 2305.14314)."""

    scheme: Literal["nf4"]
    double_quantization: bool
    """Quantise the block constants too: 0.5 -> 0.127 bit a parameter."""


class NoSharding(Section):
    """One process, or DDP: every rank holds everything."""

    strategy: Literal["none"]


class ZeroSharding(Section):
    """DeepSpeed ZeRO (1910.02054)."""

    strategy: Literal["zero1", "zero2", "zero3"]
    offload_optimizer: Literal["none", "cpu"]
    offload_parameters: Literal["none", "cpu"]
    """Only under zero3."""
    overlap_communication: bool
    bucket_elements: PositiveInt | None
    """Elements of a reduce or gather bucket; null takes one layer of the model."""
    prefetch_elements: NaturalInt | None
    """Elements gathered ahead under zero3; null takes one layer of the model."""
    persistence_elements: NaturalInt | None
    """Parameters smaller than this stay gathered under zero3; null takes ten hidden sizes, 100,000 at least."""
    hpz_partition_size: PositiveInt | None
    """ZeRO++ (2306.10209, hpZ) under zero3: a second copy of the shards within so many ranks, a node's, so that the backward pass
    gathers inside the node; null keeps none."""
    quantized_weights: bool
    """ZeRO++ (qwZ) under zero3: weights are gathered in 8 bits; needs GPUs."""
    quantized_gradients: bool
    """ZeRO++ (qgZ) under zero3: gradients are reduced in 4 and 8 bits; needs GPUs."""
