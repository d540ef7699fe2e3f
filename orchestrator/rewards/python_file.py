"""Finds, checks (without running the file) and loads a user's function, named `FILE.py:function`.

Must not import torch.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from orchestrator.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Form:
    """Purpose of a user's function, and the parameters it takes."""

    what: str
    """The noun of error messages: reward, metric, callback."""
    inputs: tuple[tuple[str, ...], ...]
    """Alternative signatures; parameters are passed by name, so their order does not matter."""

    @property
    def sentence(self) -> str:
        return " or ".join(f"({', '.join(names)}, ...)" for names in self.inputs)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A user's function with its options bound."""

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    """The alternative that its signature matches."""
    path: Path


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str
    functions: tuple[str, ...]
    """Names of the functions that it defines."""
    bound: Mapping[str, inspect.Signature | None]
    """Names that may be a function; None if the signature is only known by running the file."""
    has_star_import: bool


def file_problems(name: str, options: Mapping[str, Any], form: Form) -> list[str]:
    """Problems of `FILE.py:function` and its options, in sentences; the file is parsed, not executed."""
    try:
        source, function = _source_and_function(name, form)
    except ConfigError as error:
        return list(error.problems)
    if not function or (function not in source.bound and not source.has_star_import):
        near = nearest(function, source.functions)
        hint = f"did you mean '{near}'? " if near else ""
        said = f"has no function '{function}'" if function else f"is named without a function; write {source.path}:NAME"
        return [f"{source.path} {said}; {hint}its functions: {', '.join(source.functions) or 'none'}"]
    signature = source.bound.get(function)
    return _signature_problems(name, signature, options, form) if signature else []


def load_function(name: str, options: Mapping[str, Any], form: Form) -> Loaded:
    """Run the file and bind the options; ConfigError if there is no such function, or it takes other parameters."""
    source, function_name = _source_and_function(name, form)
    value = vars(_executed(source)).get(function_name)
    if not callable(value) or inspect.isclass(value) or inspect.iscoroutinefunction(value):
        raise ConfigError(f"{name} is {repr(value)[:80]} once the file was run; allowed is a function {form.sentence}")
    signature = inspect.signature(value)
    problems = _signature_problems(name, signature, options, form)
    if problems:
        raise ConfigError(problems)
    inputs = _inputs_of(signature, form)
    assert inputs is not None, "a signature without inputs is a problem"
    return Loaded(function=partial(value, **options), inputs=inputs, path=source.path)


def no_option(name: str, option: str, allowed: Mapping[str, Any]) -> str:
    """The sentence about an option that a function does not take."""
    near = nearest(option, allowed)
    hint = f"did you mean '{near}'? " if near else ""
    return f"{name} takes no option '{option}'; {hint}allowed: {', '.join(allowed) or 'none'}"


def error_text(error: BaseException, path: Path | None = None) -> str:
    """The error's message and type (except for our own sentences), and the line of the user's file that it came
    through.
    """
    if path is None and isinstance(error, ValueError):
        return str(error)
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]} of {path})" if lines else "")


def _source_and_function(name: str, form: Form) -> tuple[_Source, str]:
    """The file read and parsed, and the function's name or ""; raises ConfigError if it is not Python."""
    written, function = name, ""
    if not name.endswith(".py"):
        written, _, function = name.rpartition(":")
    try:
        path = Path(written).expanduser()
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{form.what} '{name}': there is no file {written}, looked for from {Path.cwd()}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{form.what} '{name}': {written or 'the empty path'} cannot be read: {error}") from error
    try:
        compile(text, str(path), "exec", dont_inherit=True)
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{form.what} '{name}': {written} is not Python: {error}") from error
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


def _signature_problems(name: str, signature: inspect.Signature, options: Mapping[str, Any], form: Form) -> list[str]:
    parameters = signature.parameters.values()
    inputs = _inputs_of(signature, form)
    if inputs is None:
        return [
            f"{name} takes ({', '.join(signature.parameters)}); allowed is {form.sentence}, with exactly these names"
        ]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_name = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name not in inputs
    }
    wrong = [option for option in options if option in inputs or (option not in by_name and not takes_any)]
    missing = [key for key, value in by_name.items() if value.default is value.empty and key not in options]
    return [no_option(name, option, by_name) for option in wrong] + [
        f"{name} needs the option '{option}': give it, or a default in the function" for option in missing
    ]


def _inputs_of(signature: inspect.Signature, form: Form) -> tuple[str, ...] | None:
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {parameter.name for parameter in parameters if parameter.kind in by_name}
    return next((names for names in form.inputs if named >= set(names)), None)


def _executed(source: _Source) -> ModuleType:
    """The file as a module, without writing byte code next to it."""
    module = ModuleType(f"orchestrator_user_{source.path.stem}")
    module.__file__ = str(source.path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source.text, str(source.path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{source.path} cannot be run: {error_text(error, source.path)}") from error
    return module
