"""Bytes that a forward and a backward pass take besides weights, gradients and states. Must not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from orchestrator.architecture.adapter_parameters import kept_numbers_per_token, low_rank
from orchestrator.architecture.families import linear_layers
from orchestrator.architecture.loss_head_chunks import CAPPED, chunk_rows, kept_bytes_per_token, temporary_bytes
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture
from orchestrator.config.run import RunConfig
from orchestrator.estimate.activation_polynomials import Dimensions, Polynomial, moments_of, peak, value
from orchestrator.estimate.model_states import adapter_width, compute_width, trained_width

Logits = Literal["whole", "chunked", "none"]
"""The loss head has some rows of logits at a time (`loss_head.py`), all at once (a head that it does not know), or none (scores)."""
AttentionPath = Literal["sdpa", "masked", "eager"]
"""A fused kernel without a mask (flash, by document), one with a dense mask, none."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchShape:
    """One micro-batch and its loss."""

    rows: int
    length: int
    trained_share: float
    """Of the tokens, those whose logits the loss copies."""
    logits: Logits
    is_packed: bool
    on_cpu: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Peaks of a training micro-batch, and of one without gradients."""

    kept: float
    """What waits for backward, logits left out."""
    logits: float
    """Logits, and what the loss makes of them, at most."""
    forward: float
    """Largest moment until the loss is there."""
    backward: float
    """Largest moment of backward through the loss, the head and the last layer."""
    bottom: float
    """Largest moment of backward through the first layer and the embedding."""
    evaluation: float


def activation_memory(model: Architecture, config: RunConfig, load: MicroBatchShape) -> ActivationMemory:
    """The peaks; between those of keeping all layers and of recomputing all by the share of layers that is recomputed."""
    peaks = _peaks(model, config, load)
    if not config.model.gradient_checkpointing or config.model.checkpoint_every == 1:
        return peaks
    keeping = config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": False})})
    recomputed, kept = asdict(peaks), asdict(_peaks(model, keeping, load))
    share = config.model.recomputed_layers(model.num_hidden_layers) / model.num_hidden_layers
    return ActivationMemory(**{name: share * recomputed[name] + (1 - share) * kept[name] for name in kept})


def _peaks(model: Architecture, config: RunConfig, load: MicroBatchShape) -> ActivationMemory:
    """From the traced moments of the way that the run trains."""
    at = _dimensions(model, config, load)
    moments = moments_of(model, mode_of(model, config, load))
    extra = _dropout_bytes(model, config, load) + _dora_bytes(model, config, load) + _adapter_bytes(model, config, load)
    logits_width = 4 if config.model.dtype == "float32" else 2
    own = at.logits_rows * model.vocab_size * logits_width
    kept = value(moments.kept, at) - own + extra
    if load.logits == "chunked":
        head = chunked_head_bytes(model, config, load)
        kept, (loss_forward, loss_backward) = kept + head.kept, (head.forward, head.backward)
    else:
        loss_forward, loss_backward = loss_bytes(model, load, logits_width)
    tied = _tied_gradient(model, config)
    dequantised = dequantised_bytes(model, config)
    return ActivationMemory(
        kept=kept,
        logits=max(loss_forward, loss_backward),
        forward=max(peak(moments.forward, at) + extra + dequantised, kept + loss_forward),
        backward=max(
            kept + loss_backward,
            max(value(moment, at) + (0.0 if _has_head_gradient(moment) else tied) for moment in moments.backward)
            + extra
            + dequantised,
        ),
        bottom=peak(moments.bottom, at) + 2 * tied + dequantised,  # both, and their sum
        evaluation=max(peak(moments.evaluation, at), at.logits_rows * model.vocab_size * logits_width + loss_forward)
        + dequantised,
    )


def mode_of(model: Architecture, config: RunConfig, load: MicroBatchShape) -> str:
    """The name of the trace."""
    tuning = "lora" if config.tuning.is_adapter else "full"
    half = "bfloat16" if config.sharding.is_deepspeed else "autocast"
    if half == "bfloat16" and tuning == "lora" and adapter_width(config) == 4:
        half = "adapters32"
    precision = half if config.model.dtype == "bfloat16" else "float32"
    checkpointing = "checkpointed" if config.model.gradient_checkpointing else "kept"
    return f"{tuning}/{precision}/{attention_path(model, config, load)}/{checkpointing}"


def attention_path(model: Architecture, config: RunConfig, load: MicroBatchShape) -> AttentionPath:
    """Which kernels attention takes. A window shorter than the row, and packed rows under plain sdpa, need a dense mask."""
    chosen = config.model.attention
    if chosen == "eager" or model.model_type == "gemma2":
        return "eager"
    has_window = model.sliding_window is not None and model.sliding_window < load.length
    if chosen == "flash_attention_2":
        return "sdpa"
    return "masked" if has_window or (chosen == "sdpa" and load.is_packed) else "sdpa"


@dataclass(frozen=True, kw_only=True)
class HeadBytes:
    """What the chunked loss head takes: to the end of backward, and on top of it at most in each pass."""

    kept: float
    forward: float
    backward: float


def chunked_head_bytes(model: Architecture, config: RunConfig, load: MicroBatchShape) -> HeadBytes:
    """As `loss_head.py` says. The gradient of a trained head that stays is counted with the gradients."""
    trains_head = not config.tuning.is_adapter
    matrix, width = model.vocab_size * model.hidden_size, compute_width(config)
    device = "cpu" if load.on_cpu else "cuda"
    rows = chunk_rows(model.vocab_size, device, trained_width=model.hidden_size if trains_head else 0)
    scored = load.tokens * load.trained_share
    is_capped = model.model_type in CAPPED
    chunk = temporary_bytes(model.vocab_size, device, rows=min(rows, scored), compute_bytes=width, is_capped=is_capped)
    copied = 2.0 * matrix if trains_head and trained_width(config) > width else 0.0
    gradient = matrix * (4.0 + width) if trains_head else 0.0
    return HeadBytes(
        kept=scored * kept_bytes_per_token(model.hidden_size, width),
        forward=chunk + copied,
        backward=chunk + copied + gradient if trains_head else 0.0,
    )


def loss_bytes(model: Architecture, load: MicroBatchShape, width: int) -> tuple[float, float]:
    """(forward, backward) peaks of the loss, logits and their gradient included; `training/losses.py` has the operations.

    Forward: the logits, an fp32 copy of the trained rows and their log-softmax. Backward: the log-softmax, the gradients of
    both of its operations; then the gradient of the trained rows, put into zeros, put into those of all positions.
    """
    vocabulary = model.vocab_size
    if load.logits == "none":
        return 8.0 * load.tokens, 8.0 * load.tokens
    trained = load.tokens * load.trained_share
    whole = load.tokens * vocabulary * width
    cut = whole if load.rows > 1 else 0.0  # rows are cut by one position and laid end to end
    single = trained * vocabulary
    forward = whole + max(cut + single * width, 8.0 * single)
    backward = max(12.0 * single, 4.0 * single + single * width, single * width + 2 * whole)
    return forward, backward


def dequantised_bytes(model: Architecture, config: RunConfig) -> float:
    """The largest 4-bit matrix in `model.dtype`: each is unpacked when it is used."""
    if not config.quantization.is_4bit:
        return 0.0
    layers = [linear for linear in linear_layers(model) if linear.is_attention or not model.num_experts]
    return float(max(linear.inputs * linear.outputs for linear in layers) * compute_width(config))


def layer_parameters(model: Architecture) -> int:
    """The largest thing that is gathered at a time: a layer, or the embedding."""
    return max(count_parameters(model).layer, model.vocab_size * model.hidden_size)


def _dimensions(model: Architecture, config: RunConfig, load: MicroBatchShape) -> Dimensions:
    rank = low_rank(config.tuning)
    rows: dict[Logits, float] = {
        "whole": load.tokens,
        "chunked": 0.0,
        "none": load.tokens / model.vocab_size,
    }
    return Dimensions(
        layers=model.num_hidden_layers,
        logits_rows=rows[load.logits],
        values={
            "N": load.tokens, "T": load.length, "V": model.vocab_size, "h": model.hidden_size,
            "q": model.num_attention_heads * model.head_dim, "k": model.num_key_value_heads * model.head_dim,
            "f": model.intermediate_size, "H": model.num_attention_heads, "K": model.num_key_value_heads,
            "D": model.head_dim, "r": rank, "E": model.num_experts, "A": model.num_experts_per_token,
            "P": model.num_positions,
        },
    )  # fmt: skip


def _tied_gradient(model: Architecture, config: RunConfig) -> float:
    """A tied head's gradient waits for that of the embedding."""
    if config.tuning.is_adapter or not model.tie_word_embeddings:
        return 0.0
    return float(model.vocab_size * model.hidden_size * trained_width(config))


def _has_head_gradient(moment: Polynomial) -> bool:
    return "V.h" in moment


def _dropout_bytes(model: Architecture, config: RunConfig, load: MicroBatchShape) -> float:
    """LoRA's dropout keeps, for every adapted layer, what it let through and its mask."""
    if not config.tuning.input_dropout:
        return 0.0
    layers = 1 if config.model.gradient_checkpointing else model.num_hidden_layers
    width = compute_width(config) if config.sharding.is_deepspeed else 4
    return float(sum(linear.inputs for linear in linear_layers(model)) * load.tokens * (width + 1) * layers)


def _dora_bytes(model: Architecture, config: RunConfig, load: MicroBatchShape) -> float:
    """DoRA keeps every adapted layer's output once more, and makes its whole weight."""
    if not config.tuning.uses_dora:
        return 0.0
    layers = 1 if config.model.gradient_checkpointing else model.num_hidden_layers
    linears = linear_layers(model)
    width = compute_width(config)
    whole = max(linear.inputs * linear.outputs for linear in linears) * 4
    return float(sum(linear.outputs for linear in linears) * load.tokens * width * 2 * layers + 2 * whole)


def _adapter_bytes(model: Architecture, config: RunConfig, load: MicroBatchShape) -> float:
    """What other adapters than LoRA keep, by arithmetic: no trace was made of them."""
    layers = 1 if config.model.gradient_checkpointing else model.num_hidden_layers
    return kept_numbers_per_token(model, config.tuning) * load.tokens * layers * 4
