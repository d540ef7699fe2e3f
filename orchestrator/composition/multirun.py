"""Hydra's multirun (-m): one run for each combination of the values; on Slurm optionally as job arrays. Must not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FLAGS = ("-m", "--multirun")
_UNUSUAL = re.compile(r"[^A-Za-z0-9.+-]+")


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the overrides ask for several runs."""
    return any(flag in arguments for flag in FLAGS)


def combinations(arguments: Sequence[str], *, name: str) -> list[list[str]]:
    """The overrides of each run, the last key's values changing fastest; each run is called NAME-key_value-...

    `name` is the name of the run without -m. Raises ConfigError if no override has several values.
    """
    overrides = [argument for argument in arguments if argument not in FLAGS]
    swept = {argument: values for argument in overrides if (values := _values(argument)) is not None}
    if not swept:
        raise ConfigError("-m: no override holds several values; type for example -m stages.sft.optimizer.lr=1e-4,2e-4")
    chosen = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    runs = [[choice.get(argument, argument) for argument in overrides] for choice in chosen]
    if any(_key(argument) == "name" for argument in swept):
        return runs
    kept = [[argument for argument in run if not argument.startswith("name=")] for run in runs]
    names = [f"{name}-{_label(tuple(choice.values()))}" for choice in chosen]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number in range(len(names))]
    return [[*run, f"name={run_name}"] for run, run_name in zip(kept, names, strict=True)]


def first_overrides(arguments: Sequence[str]) -> list[str]:
    """The overrides of one run, with the first value (of an interval, its lower end) of each override that has
    several.
    """
    return [_first(argument) for argument in arguments if argument not in FLAGS]


def _first(argument: str) -> str:
    from hydra.core.override_parser.types import IntervalSweep

    override = _parse(argument)
    value = None if override is None else override.value()
    if isinstance(value, IntervalSweep):
        assert override is not None
        return f"{override.get_key_element()}={value.start}"
    return values[0] if (values := _values(argument)) else argument


def _values(argument: str) -> list[str] | None:
    """`key=a,b` as [key=a, key=b]; None for an override with one value, and for an argument that is not an override
    (reported later).
    """
    override = _parse(argument)
    if override is None or not override.is_sweep_override():
        return None
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{argument}: an interval holds no finite list of values; list them: {override.get_key_element()}=a,b, or search it with study=optuna"
        )
    values = [str(value) for value in override.sweep_string_iterator()]
    return [f"{override.get_key_element()}={value}" for value in values]


def _parse(argument: str) -> Override | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if argument.startswith("-") or "=" not in argument:
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _label(overrides: Sequence[str]) -> str:
    """`lr_0.0001-rank_8`: the last part of each key with its value, as part of a folder name."""
    parts = [(_key(argument).split("@")[0].rpartition(".")[2], argument.partition("=")[2]) for argument in overrides]
    return "-".join(f"{key}_{_UNUSUAL.sub('_', value).strip('_') or 'none'}" for key, value in parts)[:80]
