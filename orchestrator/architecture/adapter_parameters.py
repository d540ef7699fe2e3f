"""Trained parameters of every adapter, from the model's facts and the settings alone; must not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orchestrator.architecture.families import Linear, family_of, linear_layers
from orchestrator.config.model import Architecture
from orchestrator.config.tuning import (
    AdaloraTuning,
    AdapterTuning,
    FreezeTuning,
    FullTuning,
    Ia3Tuning,
    LoraTuning,
    LoreftTuning,
    OftTuning,
    PrefixTuning,
    PromptTuning,
    VeraTuning,
)


def count_adapter_parameters(model: Architecture, tuning: AdapterTuning) -> int:
    """Parameters trained in addition to the base. In a mixture of experts only in attention's layers, except for
    LoRA.
    """
    match tuning:
        case LoraTuning():
            return count_lora_parameters(model, tuning)
        case PromptTuning():
            return tuning.virtual_tokens * model.hidden_size
        case PrefixTuning():
            return tuning.virtual_tokens * model.num_hidden_layers * 2 * model.num_key_value_heads * model.head_dim
        case LoreftTuning():
            return count_sites(model, tuning) * (2 * tuning.rank * model.hidden_size + tuning.rank)
        case _:
            of_one = _per_layer(tuning)
            layers = _chosen(model, tuning.target_modules)
            return sum(of_one(linear) for linear in layers) * model.num_hidden_layers


def count_sites(model: Architecture, tuning: LoreftTuning) -> int:
    """Interventions: one per layer, or one each for the first and the last positions."""
    layers = model.num_hidden_layers if tuning.layers == "all" else len(tuning.layers)
    ends = (tuning.first_positions > 0) + (tuning.last_positions > 0)
    return layers * (1 if tuning.share_weights else ends)


def _per_layer(tuning: Ia3Tuning | VeraTuning | OftTuning | AdaloraTuning) -> Callable[[Linear], int]:
    """Parameters of one linear layer."""
    match tuning:
        case Ia3Tuning():
            return lambda linear: linear.inputs if linear.name in tuning.feedforward_modules else linear.outputs
        case VeraTuning():
            return lambda linear: tuning.rank + linear.outputs
        case OftTuning():
            block = tuning.block_size
            return lambda linear: linear.inputs // block * (block * (block - 1) // 2)
        case AdaloraTuning():
            return lambda linear: tuning.initial_rank * (linear.inputs + linear.outputs + 1)


def _chosen(model: Architecture, targets: str | tuple[str, ...]) -> list[Linear]:
    known = [linear for linear in linear_layers(model) if linear.is_attention or not model.num_experts]
    return [linear for linear in known if targets == "all-linear" or linear.name in targets]


def low_rank(tuning: FullTuning | FreezeTuning | AdapterTuning) -> int:
    """Inner rank of an adapter with LoRA's layout; 0 for the others."""
    match tuning:
        case LoraTuning() | VeraTuning():
            return tuning.rank
        case AdaloraTuning():
            return tuning.initial_rank
        case _:
            return 0


def shape_problems(model: Architecture, tuning: FullTuning | FreezeTuning | AdapterTuning) -> list[str]:
    """Limits of a method with a model of these facts, one sentence each."""
    match tuning:
        case OftTuning():
            uneven = [linear for linear in _chosen(model, tuning.target_modules) if linear.inputs % tuning.block_size]
            widths = ", ".join(f"{linear.name} has {linear.inputs}" for linear in uneven)
            return [_uneven_blocks(tuning, widths, uneven)] if uneven else []
        case LoreftTuning():
            layers = () if tuning.layers == "all" else tuning.layers
            beyond = sorted(number for number in layers if number >= model.num_hidden_layers)
            last = model.num_hidden_layers - 1
            return [f"tuning.layers: {beyond}, but the layers are numbered 0 to {last}"] if beyond else []
        case PrefixTuning():
            wide = model.head_dim * model.num_attention_heads
            if wide == model.hidden_size:
                return []
            return [
                f"tuning: PEFT's prefix tuning requires heads x head_dim = hidden_size, this model has {wide} and "
                f"{model.hidden_size}; type tuning=prompt or tuning=lora"
            ]
        case _:
            return []


def _uneven_blocks(tuning: OftTuning, widths: str, uneven: Iterable[Linear]) -> str:
    allowed = [size for size in range(2, 65) if all(linear.inputs % size == 0 for linear in uneven)]
    return (
        f"tuning.block_size: {tuning.block_size} does not divide the input widths ({widths}); "
        f"type tuning.block_size={min(allowed, key=lambda size: abs(size - tuning.block_size)) if allowed else 2}"
    )


def multiplied_per_token(model: Architecture, tuning: AdapterTuning) -> float:
    """Matrix parameters of the adapter per token, weighted as trained ones (6 FLOPs each, including the backward pass).

    VeRA's shared matrices get no gradient: 4 of 6. OFT rotates each input by blocks. Vectors and what acts on few
    tokens are omitted.
    """
    match tuning:
        case LoraTuning() | AdaloraTuning():
            return float(count_adapter_parameters(model, tuning))
        case VeraTuning():
            layers = _chosen(model, tuning.target_modules)
            widths = sum(linear.inputs + linear.outputs for linear in layers)
            return tuning.rank * widths * model.num_hidden_layers * 4 / 6
        case OftTuning():
            widths = sum(linear.inputs for linear in _chosen(model, tuning.target_modules))
            return float(tuning.block_size * widths * model.num_hidden_layers)
        case _:
            return 0.0


def kept_numbers_per_token(model: Architecture, tuning: FullTuning | FreezeTuning | AdapterTuning) -> float:
    """Numbers per token and layer kept for the backward pass, in addition to those of a frozen base and LoRA's own."""
    match tuning:
        case Ia3Tuning():
            return float(sum(_per_layer(tuning)(linear) for linear in _chosen(model, tuning.target_modules)) * 2)
        case OftTuning():
            return float(sum(linear.inputs for linear in _chosen(model, tuning.target_modules)) * 2)
        case VeraTuning():
            return float(sum(tuning.rank + linear.outputs for linear in _chosen(model, tuning.target_modules)))
        case AdaloraTuning():
            return float(sum(linear.inputs for linear in _chosen(model, tuning.target_modules)))
        case LoreftTuning():
            return float(2 * model.hidden_size)
        case _:
            return 0.0


def count_lora_parameters(model: Architecture, tuning: LoraTuning) -> int:
    """Sum of r (in + out) over the adapted layers (2106.09685); DoRA adds a magnitude for every output feature.

    In a mixture `all-linear` means attention, router and the fused experts as PEFT adapts them: one adapter of rank 2 r
    for gate and up of each expert, one of rank r for down. By name, only attention can be selected there.
    """
    is_all = tuning.target_modules == "all-linear"
    known = [linear for linear in linear_layers(model) if linear.is_attention or not model.num_experts]
    chosen = [linear for linear in known if is_all or linear.name in tuning.target_modules]
    per_layer = sum(tuning.rank * (linear.inputs + linear.outputs) for linear in chosen)
    if is_all and model.num_experts:
        hidden, inner, experts = model.hidden_size, model.intermediate_size, model.num_experts
        per_layer += tuning.rank * (hidden + experts + 2 * experts * (hidden + 2 * inner) + experts * (inner + hidden))
    magnitudes = sum(linear.outputs for linear in chosen) if tuning.use_dora else 0
    return (per_layer + magnitudes) * model.num_hidden_layers + _head_lora(model, tuning)


def _head_lora(model: Architecture, tuning: LoraTuning) -> int:
    """An encoder's dense layer before the head is adapted as well."""
    is_meant = tuning.target_modules == "all-linear" or "dense" in tuning.target_modules
    if not family_of(model).head_transform or not is_meant:
        return 0
    return (2 * tuning.rank + (1 if tuning.use_dora else 0)) * model.hidden_size


def adapter_problems(model: Architecture, tuning: FullTuning | FreezeTuning | AdapterTuning) -> list[str]:
    """Limits of PEFT with this model, one sentence each."""
    if not isinstance(tuning, LoraTuning) or not model.num_experts or tuning.target_modules != "all-linear":
        return []
    faults = {"use_dora=true": tuning.use_dora, f"dropout={tuning.dropout}": tuning.dropout > 0}
    return [
        f"tuning.{setting}: PEFT does not support that for the fused experts of a mixture; type "
        f"tuning.target_modules=[{','.join(family_of(model).attention)}]"
        for setting, is_set in faults.items()
        if is_set
    ]
