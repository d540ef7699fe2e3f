"""Loads a reward by name and options; `problems_of` runs no user code. Must not import torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import ConfigError, nearest
from orchestrator.rewards.builtin import BUILT_INS, Reward, Sample
from orchestrator.rewards.python_file import Form, error_text, file_problems, load_function, no_option

_GYM = "reasoning_gym:"
REWARD = Form(what="reward", inputs=(("sample",), ("prompt", "completion", "row")))


def load_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward called `name`: a built-in, `path/to/file.py:function` or `reasoning_gym:data_set`.

    Raises ConfigError with all problems; the reward itself raises one if the function fails on a sample or returns
    anything but a finite number.
    """
    problems = problems_of(name, options)
    if problems:
        raise ConfigError(problems)
    if name in BUILT_INS:
        return _checked(name, BUILT_INS[name](**options))
    if name.startswith(_GYM):
        return _checked(name, _gym_reward(name))
    return _user_reward(name, options)


def problems_of(name: str, options: Mapping[str, Any]) -> list[str]:
    """Problems of a reward's name and options, in sentences; a user's file is parsed, not executed."""
    if name.startswith(_GYM):
        return _gym_problems(name, options)
    if name in BUILT_INS:
        return _built_in_problems(name, options)
    if ":" in name or name.endswith(".py") or "/" in name:
        return file_problems(name, options, REWARD)
    near = nearest(name, BUILT_INS)
    hint = f"did you mean '{near}'? " if near else ""
    return [f"there is no reward '{name}'; {hint}allowed: {', '.join(BUILT_INS)}, path/to/file.py:function"]


def _built_in_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    parameters = inspect.signature(BUILT_INS[name], eval_str=True).parameters
    problems = [no_option(name, option, parameters) for option in options if option not in parameters]
    for option, parameter in parameters.items():
        if option not in options and parameter.default is parameter.empty:
            problems.append(f"{name} needs the option '{option}' ({parameter.annotation.__name__}): give it")
        elif option in options and type(options[option]) is not parameter.annotation:
            problems.append(f"{name}: {option} is {options[option]!r}; allowed is {parameter.annotation.__name__}")
    if not problems:
        try:
            BUILT_INS[name](**options)
        except ConfigError as error:
            problems.extend(error.problems)
    return problems


def _gym_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    problems = [no_option(name, option, {}) for option in options]
    if name == _GYM:
        problems.append(f"'{name}' names no data set; write {_GYM}NAME, such as {_GYM}leg_counting")
    if find_spec("reasoning_gym") is None:
        problems.append(f"'{name}' needs a package that is not installed: pip install reasoning-gym")
    return problems


def _gym_reward(name: str) -> Reward:
    """The package's own score of the text in the last <answer> tags, or of the whole completion without them."""
    try:
        score = import_module("reasoning_gym").get_score_answer_fn(name.removeprefix(_GYM))
    except Exception as error:
        raise ConfigError(f"reasoning_gym gives no score for '{name}': {error_text(error)}") from error

    def reward(sample: Sample) -> float:
        answer = sample.completion.rpartition("<answer>")[2].partition("</answer>")[0]
        return score(answer=answer.strip(), entry=dict(sample.row))

    return reward


def _user_reward(name: str, options: Mapping[str, Any]) -> Reward:
    found = load_function(name, options, REWARD)
    function = cast("Callable[..., float]", found.function)
    if found.inputs == ("sample",):
        return _checked(name, lambda sample: function(sample=sample), path=found.path)

    def reward(sample: Sample) -> float:
        return function(prompt=sample.prompt, completion=sample.completion, row=sample.row)

    return _checked(name, reward, path=found.path)


def _checked(name: str, function: Reward, *, path: Path | None = None) -> Reward:
    """Wrap the function so that faults are reported: what it raised or returned, and on which sample."""

    def reward(sample: Sample) -> float:
        where = f"on completion {sample.completion[:80]!r} to prompt {sample.prompt[:80]!r}"
        try:
            value: object = function(sample)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"reward {name} failed {where}: {error_text(error, path)}") from error
        number = _finite(value)
        if number is None:
            said = f"{repr(value)[:80]} ({type(value).__name__})"
            raise ConfigError(f"reward {name} returned {said} {where}; allowed is a finite number")
        return number

    return reward


def _is_numpy_bool(value: object) -> bool:
    """numpy's truth values count as numbers here; numpy itself is slow to import, and the plan imports this module."""
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def _finite(value: object) -> float | None:
    if not isinstance(value, Real) and not _is_numpy_bool(value):
        return None
    try:
        number = float(cast("float", value))
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
