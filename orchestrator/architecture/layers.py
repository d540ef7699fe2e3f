"""Maps parameter names to depths, frozen or trained parts and unfreezing order. Must not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from orchestrator.architecture.families import family_of, linear_layers
from orchestrator.architecture.parameter_counts import count_parameters
from orchestrator.config.model import Architecture
from orchestrator.config.tuning import FreezeTuning
from orchestrator.errors import ConfigError

BELOW_ALL_LAYERS = -1
"""Depth of the embeddings."""
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_NORM = re.compile(r"norm|(?:^|[._])ln(?:_|\d|\.)", re.IGNORECASE)
_EMBEDDING = re.compile(r"(?:^|\.)(?:wte|wpe|word_emb\w*|embed(?!_out)\w*)(?:\.|$)", re.IGNORECASE)


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter belongs to: the first number in its name; None outside the layers."""
    found = _NUMBER.search(name)
    return int(found[1]) if found is not None else None


def is_norm(name: str) -> bool:
    return _NORM.search(name) is not None


def is_embedding(name: str) -> bool:
    """Token and position embeddings, and what belongs to them, such as BERT's norm of the embeddings."""
    return layer_of(name) is None and _EMBEDDING.search(name) is not None


def is_head(name: str) -> bool:
    """Parameters outside the layers that are neither embedding nor norm: the output head, a pooler, a new scalar
    head.
    """
    return layer_of(name) is None and not is_embedding(name) and not is_norm(name)


def count_layers(names: Iterable[str]) -> int:
    return max((layer_of(name) or 0 for name in names if layer_of(name) is not None), default=-1) + 1


def depth_of(name: str, num_layers: int) -> int:
    """-1 for embeddings, the layer's number, `num_layers` for head and last norm. A tied head is an embedding."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return BELOW_ALL_LAYERS if is_embedding(name) else num_layers


def describe_locations(names: Iterable[str]) -> list[str]:
    """Names of the parameters' locations without duplicates: layer 3, head, norm, embeddings."""

    def location(name: str) -> str:
        layer = layer_of(name)
        if layer is not None:
            return f"layer {layer}"
        return "embeddings" if is_embedding(name) else "norm" if is_norm(name) else "head"

    return list(dict.fromkeys(location(name) for name in names))


def levels_of(trained: Iterable[str], num_layers: int) -> dict[str, int]:
    """The order of gradual unfreezing (1801.06146, section 3.3): 0 for the topmost trained parameters, then
    downwards.
    """
    depths = {name: depth_of(name, num_layers) for name in trained}
    order = sorted(set(depths.values()), reverse=True)
    return {name: order.index(depth) for name, depth in depths.items()}


def rates_of(trained: Iterable[str], num_layers: int, layer_decay: float | None) -> dict[str, float]:
    """Discriminative rates (1801.06146, section 3.1) as shares of the peak: each depth has the one above it x
    `layer_decay`.

    The topmost trained depth has the full rate. ConfigError if no trained parameter is in a layer.
    """
    depths = {name: depth_of(name, num_layers) for name in trained}
    if layer_decay is None:
        return dict.fromkeys(depths, 1.0)
    if not any(layer_of(name) is not None for name in depths):
        raise ConfigError(
            f"optimizer.layer_decay: no trained parameter belongs to a numbered layer: {', '.join(kinds_of(depths))}; "
            "type optimizer.layer_decay=null"
        )
    top = max(depths.values())
    return {name: layer_decay ** (top - depth) for name, depth in depths.items()}


def trained_names(
    names: Sequence[str], tuning: FreezeTuning, *, is_tied: bool, has_new_head: bool = False
) -> frozenset[str]:
    """Which of a model's parameters `tuning=freeze` ever trains. A new head is always trained.

    ConfigError, listing the available names, if layers, a switch or a pattern match nothing, or nothing at all is
    trained.
    """
    num_layers = count_layers(names)
    problems: list[str] = []
    chosen = _chosen_layers(tuning.layers, num_layers, problems)
    trains_head = tuning.head or has_new_head
    parts = {
        "embeddings": {name for name in names if tuning.embeddings and is_embedding(name)},
        "head": {name for name in names if trains_head and (is_head(name) or (is_tied and is_embedding(name)))},
        "norms": {name for name in names if tuning.norms and is_norm(name)},
    }
    wanted = {"embeddings": tuning.embeddings, "head": trains_head, "norms": tuning.norms}
    there = f"the parameters of this model are {', '.join(kinds_of(names))}"
    problems += [
        f"tuning.{part}: this model has none; {there}" for part, found in parts.items() if wanted[part] and not found
    ]
    trained = set[str]().union(*parts.values()) | {name for name in names if layer_of(name) in chosen}
    for pattern in tuning.also:
        met = {name for name in names if fnmatchcase(name, pattern)}
        trained |= met
        if not met:
            problems.append(f"tuning.also: {pattern} matches nothing; {there}")
    if not trained and not problems:
        problems.append(f"tuning: nothing is trained; choose layers, a switch or a pattern in tuning.also; {there}")
    if problems:
        raise ConfigError(problems)
    return frozenset(trained)


def _chosen_layers(layers: str | tuple[int, ...], num_layers: int, problems: list[str]) -> frozenset[int]:
    if not isinstance(layers, str):
        wanted = frozenset(layers)
    elif layers in ("all", "none"):
        wanted = frozenset(range(num_layers if layers == "all" else 0))
    else:
        end, number = layers.split(" ")
        count = int(number)
        if count > num_layers:
            problems.append(f"tuning.layers: {layers}, but the model has {num_layers} layers; type tuning.layers=all")
        wanted = frozenset(range(min(count, num_layers)))
        wanted = wanted if end == "first" else frozenset(num_layers - 1 - index for index in wanted)
    beyond = sorted(number for number in wanted if number >= num_layers)
    if beyond:
        problems.append(f"tuning.layers: {beyond}, but the {num_layers} layers are numbered 0 to {num_layers - 1}")
    return wanted


def kinds_of(names: Iterable[str]) -> list[str]:
    """Names with the layer's number as a star, each once."""
    return list(
        dict.fromkeys(_NUMBER.sub(lambda found: found[0].replace(found[1], "*"), name, count=1) for name in names)
    )


def parameter_sizes(model: Architecture) -> dict[str, int]:
    """Parameter sizes under Llama's names; a family's own parameters are counted with the most similar one."""
    family, hidden, counts = family_of(model), model.hidden_size, count_parameters(model)
    norm = family.norm_vectors * hidden
    layer = {"input_layernorm.weight": family.norms * norm}
    for linear in linear_layers(model):
        part, experts = ("self_attn", 1) if linear.is_attention else ("mlp", max(1, model.num_experts))
        layer[f"{part}.{linear.name}.weight"] = layer.get(f"{part}.{linear.name}.weight", 0)
        layer[f"{part}.{linear.name}.weight"] += linear.inputs * linear.outputs * experts
        if linear.has_bias:
            layer[f"{part}.{linear.name}.bias"] = layer.get(f"{part}.{linear.name}.bias", 0) + linear.outputs * experts
    if family.query_key_norms:
        layer |= {"self_attn.q_norm.weight": model.head_dim, "self_attn.k_norm.weight": model.head_dim}
    if model.num_experts:
        layer["mlp.gate.weight"] = hidden * model.num_experts
    head = 0 if model.tie_word_embeddings else model.vocab_size * hidden
    last_norm = norm if family.final_norm else 0
    extras = counts.total - counts.layer * model.num_hidden_layers - counts.embedding - last_norm
    ends = {"model.embed_tokens.weight": counts.embedding - head, "model.norm.weight": last_norm}
    ends |= {"lm_head.weight": head, "lm_head.bias": extras}
    layers = range(model.num_hidden_layers)
    sizes = {f"model.layers.{number}.{name}": size for number in layers for name, size in layer.items()}
    return {name: size for name, size in (ends | sizes).items() if size}


def _trained_sizes(model: Architecture, tuning: FreezeTuning, *, has_new_head: bool) -> dict[str, int]:
    """Patterns that only match a family's own names are not counted; a new head counts with one output."""
    sizes = parameter_sizes(model)
    if has_new_head:  # it replaces the old one
        sizes = {name: size for name, size in sizes.items() if not is_head(name)} | {"score.weight": model.hidden_size}
    met = tuple(pattern for pattern in tuning.also if any(fnmatchcase(name, pattern) for name in sizes))
    is_uncounted = (
        met != tuning.also
        and tuning.layers == "none"
        and not (tuning.embeddings or tuning.head or tuning.norms or has_new_head)
    )
    if is_uncounted and not met:
        return {}
    known = tuning.model_copy(update={"also": met})
    is_tied = model.tie_word_embeddings and not has_new_head
    return {name: sizes[name] for name in trained_names(list(sizes), known, is_tied=is_tied, has_new_head=has_new_head)}


def count_freeze_parameters(model: Architecture, tuning: FreezeTuning, *, has_new_head: bool = False) -> int:
    """Parameters that `tuning=freeze` ever trains; ConfigError if layers or switches match nothing."""
    return sum(_trained_sizes(model, tuning, has_new_head=has_new_head).values())


def lowest_trained_layer(model: Architecture, tuning: FreezeTuning, *, has_new_head: bool = False) -> int:
    """Number of the lowest layer that the backward pass must reach; the number of layers if only the head is
    trained.
    """
    depths = [
        depth_of(name, model.num_hidden_layers) for name in _trained_sizes(model, tuning, has_new_head=has_new_head)
    ]
    return max(0, min(depths, default=0))
