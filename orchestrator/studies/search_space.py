"""The space of a search, from the overrides with several values (Hydra's grammar). Must not import optuna or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from orchestrator.composition.multirun import FLAGS
from orchestrator.errors import ConfigError

NOT_SEARCHED = ("name", "output_dir", "study", "seed")
"""Keys that name a run or the study itself, and the one seed of all (seeds.weights and seeds.data may be searched)."""


@dataclass(frozen=True, kw_only=True)
class CategoricalAxis:
    """One of several values, as the command line spells them."""

    key: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    key: str
    low: float
    high: float
    whole: bool
    """Whole numbers only."""
    log: bool
    """Sampled on a logarithmic scale."""
    step: float | None
    """Step between allowed numbers; None allows all."""


Axis = CategoricalAxis | Range


def split_space(arguments: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """The overrides with one value, and an axis for each of the others; ConfigError with every override that is no
    axis.
    """
    plain: list[str] = []
    axes: list[Axis] = []
    problems: list[str] = []
    for argument in [argument for argument in arguments if argument not in FLAGS]:
        override = _sweep(argument)
        if override is None:
            plain.append(argument)
            continue
        try:
            axes.append(_axis(argument, override))
        except ConfigError as error:
            problems += error.problems
    keys = [axis.key for axis in axes]
    problems += [
        f"{key}: it has two spaces; leave one out" for key in sorted({key for key in keys if keys.count(key) > 1})
    ]
    if not keys and not problems:
        problems.append(
            "study=optuna: no override holds several values, so there is nothing to search; type for example "
            "-m 'stages.sft.optimizer.lr=tag(log, interval(1e-4,1e-2))' tuning.rank=4,8,16"
        )
    if problems:
        raise ConfigError(problems)
    return plain, axes


def samples(axis: Axis) -> list[str]:
    """Values that must be valid for the whole axis to be: every choice, or both ends."""
    if isinstance(axis, CategoricalAxis):
        return list(axis.options)
    return [text_of(axis, end) for end in (axis.low, axis.high)]


def text_of(axis: Axis, value: float | str) -> str:
    """A value of the axis as an override spells it."""
    if isinstance(value, str):
        return value
    assert isinstance(axis, Range)
    return str(int(value)) if axis.whole else repr(float(value))


def first_overrides(axes: Sequence[Axis]) -> dict[str, str]:
    """The first value of every axis, by key."""
    return {axis.key: samples(axis)[0] for axis in axes}


def axis_of(values: Mapping[str, Any]) -> Axis:
    """The axis with these fields."""
    return (
        CategoricalAxis(key=values["key"], options=tuple(values["options"])) if "options" in values else Range(**values)
    )


def override_list(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _sweep(argument: str) -> Override | None:
    """An override with several values; None for one with a single value, or no override (reported by the
    composition).
    """
    if argument.startswith("-") or "=" not in argument:
        return None
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return None
    return override if override.is_sweep_override() else None


def _axis(argument: str, override: Override) -> Axis:
    key, value = override.get_key_element(), override.value()
    plain = key.lstrip("+")
    if plain == "seeds.split":
        raise ConfigError(f"{argument}: trials with other held-out rows cannot be compared; give it one value")
    if plain.split(".")[0] in NOT_SEARCHED or plain == "experiment":
        raise ConfigError(f"{argument}: {plain} is not searched; give it one value")
    if isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle:
        raise ConfigError(f"{argument}: an order means nothing to a search; leave out shuffle")
    if isinstance(value, ChoiceSweep):
        _refuse_tags(argument, value.tags, allowed=())
        return CategoricalAxis(key=key, options=tuple(str(text) for text in override.sweep_string_iterator()))
    if isinstance(value, RangeSweep):
        _refuse_tags(argument, value.tags, allowed=())
        return _range_axis(argument, key, list(override.sweep_string_iterator()), value)
    if isinstance(value, IntervalSweep):
        _refuse_tags(argument, value.tags, allowed=("log",))
        return _interval_axis(argument, key, value)
    raise ConfigError(f"{argument}: a search takes choices (a,b), range(1,9) and interval(1e-5,1e-3)")


def _range_axis(argument: str, key: str, values: Sequence[Any], sweep: RangeSweep) -> Range:
    numbers = [float(value) for value in values]
    if len(numbers) < 2:
        raise ConfigError(f"{argument}: this range holds {len(numbers)} value; give one with two or more")
    ends = sorted((numbers[0], numbers[-1]))
    whole = all(isinstance(part, int) for part in (sweep.start, sweep.stop, sweep.step))
    return Range(key=key, low=ends[0], high=ends[1], whole=whole, log=False, step=abs(float(sweep.step)))


def _interval_axis(argument: str, key: str, sweep: IntervalSweep) -> Range:
    assert sweep.start is not None and sweep.end is not None
    whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    low, high, log = float(sweep.start), float(sweep.end), "log" in sweep.tags
    if low >= high:
        raise ConfigError(
            f"{argument}: the interval goes from {low:g} to {high:g}; the first end must be the lower one"
        )
    if log and low <= 0:
        raise ConfigError(
            f"{argument}: {low:g} has no logarithm; the lower end must be above 0, or leave out tag(log, ...)"
        )
    return Range(key=key, low=low, high=high, whole=whole, log=log, step=None)


def _refuse_tags(argument: str, tags: set[str], *, allowed: Sequence[str]) -> None:
    unknown = sorted(set(tags) - set(allowed))
    if unknown:
        raise ConfigError(
            f"{argument}: {', '.join(unknown)} is not a tag of a search; log on an interval is the only one"
        )
