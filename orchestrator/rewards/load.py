"""A reward's name and options -> the function; `problems_of` runs no user code; must not import torch."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, cast

from orchestrator.errors import ConfigError, nearest
from orchestrator.rewards.builtin import BUILT_INS, Reward, Sample

_GYM = "reasoning_gym:"
_FORMS = "(sample, ...) or (prompt, completion, row, ...)"


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str
    functions: tuple[str, ...]
    """Names of the functions that it defines."""
    bound: Mapping[str, inspect.Signature | None]
    """Names that may be a function; None where only running the file tells the signature."""
    has_star_import: bool


def load_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward that `name` says: a built-in, `path/to/file.py:function` or `reasoning_gym:data_set`.

    Raises ConfigError with all problems; the reward itself raises one where the function fails on a sample or
    returns something that is not a finite number.
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
    """What is wrong with a reward's name and options, in sentences; a user's file is parsed and not executed."""
    if name.startswith(_GYM):
        return _gym_problems(name, options)
    if name in BUILT_INS:
        return _built_in_problems(name, options)
    if ":" in name or name.endswith(".py") or "/" in name:
        return _file_problems(name, options)
    near = nearest(name, BUILT_INS)
    hint = f"did you mean '{near}'? " if near else ""
    return [f"there is no reward '{name}'; {hint}allowed: {', '.join(BUILT_INS)}, path/to/file.py:function"]


def _built_in_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    parameters = inspect.signature(BUILT_INS[name], eval_str=True).parameters
    problems = [_no_option(name, option, parameters) for option in options if option not in parameters]
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


def _no_option(name: str, option: str, allowed: Mapping[str, Any]) -> str:
    near = nearest(option, allowed)
    hint = f"did you mean '{near}'? " if near else ""
    return f"{name} takes no option '{option}'; {hint}allowed: {', '.join(allowed) or 'none'}"


def _gym_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    problems = [_no_option(name, option, {}) for option in options]
    if name == _GYM:
        problems.append(f"'{name}' names no data set; write {_GYM}NAME, such as {_GYM}leg_counting")
    if find_spec("reasoning_gym") is None:
        problems.append(f"'{name}' needs a package that is not installed: pip install reasoning-gym")
    return problems


def _gym_reward(name: str) -> Reward:
    """The package's own score of what stands in the last <answer> tags, or of the whole completion without them."""
    try:
        score = import_module("reasoning_gym").get_score_answer_fn(name.removeprefix(_GYM))
    except Exception as error:
        raise ConfigError(f"reasoning_gym gives no score for '{name}': {_told(error)}") from error

    def reward(sample: Sample) -> float:
        answer = sample.completion.rpartition("<answer>")[2].partition("</answer>")[0]
        return score(answer=answer.strip(), entry=dict(sample.row))

    return reward


def _file_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    try:
        source, function = _source_and_function(name)
    except ConfigError as error:
        return list(error.problems)
    if not function or (function not in source.bound and not source.has_star_import):
        near = nearest(function, source.functions)
        hint = f"did you mean '{near}'? " if near else ""
        said = f"has no function '{function}'" if function else f"is named without a function; write {source.path}:NAME"
        return [f"{source.path} {said}; {hint}its functions: {', '.join(source.functions) or 'none'}"]
    signature = source.bound.get(function)
    return _signature_problems(name, signature, options) if signature else []


def _source_and_function(name: str) -> tuple[_Source, str]:
    """The file read and parsed, and the function's name or ""; raises ConfigError where it is not Python."""
    written, function = name, ""
    if not name.endswith(".py"):
        written, _, function = name.rpartition(":")
    try:
        path = Path(written).expanduser()
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"reward '{name}': there is no file {written}, looked for from {Path.cwd()}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"reward '{name}': {written or 'the empty path'} cannot be read: {error}") from error
    try:
        compile(text, str(path), "exec", dont_inherit=True)
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"reward '{name}': {written} is not Python: {error}") from error
    bound = dict(_bound(body))
    functions = tuple(dict.fromkeys(statement.name for statement in body if isinstance(statement, ast.FunctionDef)))
    return _Source(path, text, functions, bound, has_star_import="*" in bound), function


def _bound(body: list[ast.stmt]) -> Iterator[tuple[str, inspect.Signature | None]]:
    """What a module's statements may bind to a function, in their order; "*" for a star import."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            yield statement.name, None if statement.decorator_list else _signature_of(statement.args)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, None) for alias in statement.names)
        elif isinstance(statement, ast.Assign):
            yield from ((target.id, None) for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, None
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            branches = [statement.body, *(handler.body for handler in getattr(statement, "handlers", []))]
            for branch in (*branches, getattr(statement, "orelse", []), getattr(statement, "finalbody", [])):
                yield from ((key, None) for key, _ in _bound(branch))


def _signature_of(arguments: ast.arguments) -> inspect.Signature:
    kinds = inspect.Parameter
    positional = [(argument, kinds.POSITIONAL_ONLY) for argument in arguments.posonlyargs]
    positional += [(argument, kinds.POSITIONAL_OR_KEYWORD) for argument in arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = [
        kinds(argument.arg, kind, default=kinds.empty if i < num_required else None)
        for i, (argument, kind) in enumerate(positional)
    ]
    parameters += [kinds(argument.arg, kinds.VAR_POSITIONAL) for argument in (arguments.vararg,) if argument]
    parameters += [
        kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    parameters += [kinds(argument.arg, kinds.VAR_KEYWORD) for argument in (arguments.kwarg,) if argument]
    return inspect.Signature(parameters)


def _signature_problems(name: str, signature: inspect.Signature, options: Mapping[str, Any]) -> list[str]:
    parameters = signature.parameters.values()
    inputs = _inputs_of(signature)
    if inputs is None:
        return [f"{name} takes ({', '.join(signature.parameters)}); allowed is {_FORMS}, with these very names"]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_name = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name not in inputs
    }
    wrong = [option for option in options if option in inputs or (option not in by_name and not takes_any)]
    missing = [key for key, value in by_name.items() if value.default is value.empty and key not in options]
    return [_no_option(name, option, by_name) for option in wrong] + [
        f"{name} needs the option '{option}': give it, or a default in the function" for option in missing
    ]


def _inputs_of(signature: inspect.Signature) -> tuple[str, ...] | None:
    """The parameters that take the sample, which are passed by name, so that no order of them is wrong."""
    named = {
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in signature.parameters.values()):
        return None
    if "sample" in named:
        return ("sample",)
    return ("prompt", "completion", "row") if named >= {"prompt", "completion", "row"} else None


def _user_reward(name: str, options: Mapping[str, Any]) -> Reward:
    source, function_name = _source_and_function(name)
    value = vars(_executed(source)).get(function_name)
    if not callable(value) or inspect.isclass(value) or inspect.iscoroutinefunction(value):
        raise ConfigError(f"{name} is {repr(value)[:80]} once the file was run; allowed is a function {_FORMS}")
    signature = inspect.signature(value)
    problems = _signature_problems(name, signature, options)
    if problems:
        raise ConfigError(problems)
    function = cast("Callable[..., float]", partial(value, **options))
    if _inputs_of(signature) == ("sample",):
        return _checked(name, lambda sample: function(sample=sample), path=source.path)

    def reward(sample: Sample) -> float:
        return function(prompt=sample.prompt, completion=sample.completion, row=sample.row)

    return _checked(name, reward, path=source.path)


def _executed(source: _Source) -> ModuleType:
    """The file as a module; no byte code is written beside it."""
    module = ModuleType(f"orchestrator_reward_{source.path.stem}")
    module.__file__ = str(source.path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source.text, str(source.path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{source.path} cannot be run: {_told(error, source.path)}") from error
    return module


def _checked(name: str, function: Reward, *, path: Path | None = None) -> Reward:
    """The function with its faults told: what it raised or returned, and on which sample."""

    def reward(sample: Sample) -> float:
        where = f"on completion {sample.completion[:80]!r} to prompt {sample.prompt[:80]!r}"
        try:
            value: object = function(sample)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"reward {name} failed {where}: {_told(error, path)}") from error
        number = _finite(value)
        if number is None:
            said = f"{repr(value)[:80]} ({type(value).__name__})"
            raise ConfigError(f"reward {name} returned {said} {where}; allowed is a finite number")
        return number

    return reward


def _is_numpy_bool(value: object) -> bool:
    """numpy's truth values count as numbers here; numpy itself is slow to import, and the plan comes through this module."""
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def _finite(value: object) -> float | None:
    if not isinstance(value, Real) and not _is_numpy_bool(value):
        return None
    try:
        number = float(cast("float", value))
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _told(error: BaseException, path: Path | None = None) -> str:
    """The error's words and kind (but for our own sentences), and the line of the user's file it came through."""
    if path is None and isinstance(error, ValueError):
        return str(error)
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]} of {path})" if lines else "")
