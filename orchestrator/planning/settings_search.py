"""The fastest setting that fits, at the same global batch: an exhaustive search over forecasts. Must not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from orchestrator.config.model import NoQuantization
from orchestrator.config.rules import rule_problems
from orchestrator.config.run import Quantization, RunConfig, Sharding, Stage, training_stages
from orchestrator.config.tuning import LoraTuning

Verdict = Literal["FIT", "TIGHT", "NO"]
RANK: dict[Verdict, int] = {"FIT": 0, "TIGHT": 1, "NO": 2}
SAME_TIME = 0.01
"""Times whose relative difference is smaller count as equal: the simpler setting wins."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The forecasts of one training stage under one setting."""

    verdict: Verdict
    low_gib: float
    high_gib: float
    """Device memory in the binding phase."""
    node_gib: float
    """Host memory of all ranks of a node."""
    step_seconds: float
    steps: int
    """1 if the number is not known yet."""


Judge = Callable[[RunConfig], Mapping[str, Judgement]]
"""Evaluates every training stage of a configuration."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The settings that may change; each axis is ordered from simple to complex."""

    shardings: Mapping[str, Sharding]
    """By the name of their preset."""
    checkpointing: tuple[bool, ...]
    quantizations: Mapping[str, Quantization]
    micro_sizes: Mapping[str, tuple[int, ...]]
    """Of each training stage."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting of a whole run."""

    sharding: str
    checkpointing: bool
    quantization: str
    micro_sizes: Mapping[str, int]
    verdict: Verdict
    """The worst verdict of its stages."""
    high_gib: float
    """The highest need of its stages."""
    node_gib: float
    seconds: float
    """Of all steps of all stages."""
    step_seconds: Mapping[str, float]

    def overrides(self, than: Option | None = None) -> list[str]:
        """The overrides for this option; with `than`, only those that differ from it."""
        typed = {
            "sharding": self.sharding,
            "model.gradient_checkpointing": str(self.checkpointing).lower(),
            "quantization": self.quantization,
            **{f"stages.{name}.batch.micro_size": str(size) for name, size in self.micro_sizes.items()},
        }
        known = {} if than is None else dict(override.split("=", 1) for override in than.overrides())
        return [f"{key}={value}" for key, value in typed.items() if known.get(key) != value]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Every evaluated setting, the best first."""

    options: tuple[Option, ...]
    nearest: tuple[str, ...] = ()
    """Overrides of the smallest changes that would fit, if nothing does."""

    @property
    def best(self) -> Option | None:
        """None if nothing fits, not even tightly."""
        first = self.options[0] if self.options else None
        return None if first is None or first.verdict == "NO" else first

    @property
    def fitting(self) -> tuple[Option, ...]:
        return tuple(option for option in self.options if option.verdict != "NO")


def axes_of(config: RunConfig, *, shardings: Mapping[str, Sharding], quantizations: Mapping[str, Quantization]) -> Axes:
    """All settings that change the result by no more than rounding: 4 bits only if the configuration already uses
    them.
    """
    name = next(name for name, known in quantizations.items() if known.scheme == config.quantization.scheme)
    return Axes(
        shardings=shardings,
        checkpointing=(False, True),
        quantizations={name: config.quantization},
        micro_sizes=micro_sizes_of(config),
    )


def micro_sizes_of(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """The micro-batches that each training stage may have."""
    return {
        name: micro_sizes(stage.batch.global_size, config.world_size) if stage.data.tokens_per_batch is None else (1,)
        for name, stage in training_stages(config).items()
    }


def micro_sizes(global_size: int, world_size: int) -> tuple[int, ...]:
    """Every micro-batch that divides a rank's share of the global batch."""
    share = global_size // world_size
    return tuple(size for size in range(1, share + 1) if share % size == 0)


def advise(config: RunConfig, axes: Axes, judge: Judge) -> Advice:
    """Every combination, the best first: by verdict, then speed, then simplicity."""
    options = [option for variant in _variants(config, axes) for option in _options(variant, axes, judge)]
    return Advice(options=tuple(sorted(options, key=_order_of(options, axes))))


def nearest_changes(config: RunConfig, axes: Axes, judge: Judge, *, nf4: Quantization) -> tuple[str, ...]:
    """For each kind of change by itself, the smallest one that makes something fit."""
    found: list[str] = []
    for kind in (_more_nodes, _four_bits, _shorter):
        for overrides, changed, wider in kind(config, axes, nf4):
            best = advise(changed, wider, judge).best
            if best is not None:
                found.append(" ".join([*overrides, *best.overrides()]))
                break
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _Variant:
    sharding: str
    checkpointing: bool
    quantization: str
    config: RunConfig


def _variants(config: RunConfig, axes: Axes) -> Iterator[_Variant]:
    for sharding, checkpointing, quantization in product(axes.shardings, axes.checkpointing, axes.quantizations):
        model = config.model.model_copy(update={"gradient_checkpointing": checkpointing})
        changed = config.model_copy(
            update={
                "sharding": axes.shardings[sharding],
                "model": model,
                "quantization": axes.quantizations[quantization],
            }
        )
        yield _Variant(sharding=sharding, checkpointing=checkpointing, quantization=quantization, config=changed)


def _options(variant: _Variant, axes: Axes, judge: Judge) -> list[Option]:
    """One option with the best micro-batch of each stage, and one option for every other size of a stage."""
    judged: dict[str, dict[int, Judgement]] = {name: {} for name in axes.micro_sizes}
    for index in range(max((len(sizes) for sizes in axes.micro_sizes.values()), default=0)):
        sizes = {name: known[min(index, len(known) - 1)] for name, known in axes.micro_sizes.items()}
        changed = with_micro_sizes(variant.config, sizes)
        if rule_problems(changed):
            continue
        for name, judgement in judge(changed).items():
            judged[name][sizes[name]] = judgement
    if not all(judged.values()):
        return []
    best = {name: min(sizes, key=lambda size: _preference(sizes[size], size)) for name, sizes in judged.items()}
    chosen = [best]
    chosen += [{**best, name: size} for name, sizes in judged.items() for size in sizes if size != best[name]]
    return [_option(variant, sizes, {name: judged[name][size] for name, size in sizes.items()}) for sizes in chosen]


def _preference(judgement: Judgement, size: int) -> tuple[int, float, int]:
    return RANK[judgement.verdict], judgement.step_seconds, size


def _option(variant: _Variant, sizes: Mapping[str, int], judged: Mapping[str, Judgement]) -> Option:
    return Option(
        sharding=variant.sharding,
        checkpointing=variant.checkpointing,
        quantization=variant.quantization,
        micro_sizes=dict(sizes),
        verdict=max((one.verdict for one in judged.values()), key=RANK.__getitem__),
        high_gib=max(one.high_gib for one in judged.values()),
        node_gib=max(one.node_gib for one in judged.values()),
        seconds=sum(one.step_seconds * one.steps for one in judged.values()),
        step_seconds={name: one.step_seconds for name, one in judged.items()},
    )


def _order_of(options: Sequence[Option], axes: Axes) -> Callable[[Option], tuple[int, float, int, bool, int]]:
    """Verdict, then time in steps of 1 % of the fastest, then simplicity."""
    fastest = min((option.seconds for option in options), default=1.0) or 1.0
    ranking = {name: index for index, name in enumerate(axes.shardings)}

    def key(option: Option) -> tuple[int, float, int, bool, int]:
        time = round(option.seconds / fastest / SAME_TIME)
        return (
            RANK[option.verdict],
            time,
            ranking[option.sharding],
            option.checkpointing,
            sum(option.micro_sizes.values()),
        )

    return key


def with_micro_sizes(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """The same configuration with other micro-batches."""
    stages: dict[str, Stage] = dict(config.stages)
    for name, stage in training_stages(config).items():
        if name in sizes:
            batch = stage.batch.model_copy(update={"micro_size": sizes[name]})
            stages[name] = stage.model_copy(update={"batch": batch})
    return config.model_copy(update={"stages": stages})


Change = tuple[list[str], RunConfig, Axes]


def _more_nodes(config: RunConfig, axes: Axes, _nf4: Quantization) -> Iterator[Change]:
    for factor in (2, 4, 8, 16):
        nodes = config.cluster.nodes * factor
        changed = config.model_copy(update={"cluster": config.cluster.model_copy(update={"nodes": nodes})})
        if any(stage.batch.global_size % changed.world_size for stage in training_stages(changed).values()):
            return
        yield [f"cluster.nodes={nodes}"], changed, replace(axes, micro_sizes=micro_sizes_of(changed))


def _four_bits(config: RunConfig, axes: Axes, nf4: Quantization) -> Iterator[Change]:
    if isinstance(config.tuning, LoraTuning) and isinstance(config.quantization, NoQuantization):
        yield [], config.model_copy(update={"quantization": nf4}), replace(axes, quantizations={"nf4": nf4})


def _shorter(config: RunConfig, axes: Axes, _nf4: Quantization) -> Iterator[Change]:
    for factor in (2, 4, 8):
        stages: dict[str, Stage] = dict(config.stages)
        overrides: list[str] = []
        for name, stage in training_stages(config).items():
            if name not in axes.micro_sizes:
                continue
            length = stage.data.max_length // factor
            if length < 1:
                return
            data = stage.data.model_copy(update={"max_length": length})
            stages[name] = stage.model_copy(update={"data": data})
            overrides.append(f"stages.{name}.data.max_length={length}")
        yield overrides, config.model_copy(update={"stages": stages}), axes
