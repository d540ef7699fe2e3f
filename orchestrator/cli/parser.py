"""argparse for one verb: options anywhere among the positionals, errors as sentences with the nearest option. No heavy
imports.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from orchestrator.cli.verbs import VERBS, Verb
from orchestrator.errors import ConfigError, nearest

PROGRAM = "python -m orchestrator"
HELP = ("-h", "--help")
_FAULT = re.compile(r"argument (?P<option>\S+): (?P<reason>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A `name=value` of the verb itself, given among the overrides, such as format=json."""

    name: str
    parse: Callable[[str], object]
    default: object
    help: str


class VerbParser(argparse.ArgumentParser):
    """The arguments of one verb. `takes` names its positionals in a refusal, such as "one run folder and nothing else"."""

    def __init__(self, verb: Verb) -> None:
        self.verb = verb
        self.takes = "no arguments"
        self.options: dict[str, argparse.Action] = {}
        """Every spelling of every option."""
        self.positionals: list[argparse.Action] = []
        self.settings: dict[str, Setting] = {}
        super().__init__(
            prog=f"{PROGRAM} {verb.name}",
            description=verb.summary[0].upper() + verb.summary[1:] + "." + (verb.details and f"\n{verb.details}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument(*HELP, action="store_true", help="show this help")

    def _add_action(self, action: argparse.Action) -> argparse.Action:
        # Options declared through an argument group also end up here.
        self.options |= dict.fromkeys(action.option_strings, action)
        if not action.option_strings:
            self.positionals.append(action)
        return super()._add_action(action)

    def add_setting(self, name: str, *, parse: Callable[[str], object], default: object, help: str) -> None:
        """`name=value` among the overrides; `parse` raises ArgumentTypeError."""
        self.settings[name] = Setting(name=name, parse=parse, default=default, help=help)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; ConfigError with a sentence for what is invalid."""
        options, rest = self._split(words)
        found, rest = self._take_settings(rest)
        arguments = super().parse_args([*options, *(("--", *rest) if rest else ())])
        for name, value in found.items():
            setattr(arguments, name, value)
        return arguments

    def asks_for_help(self, words: Sequence[str]) -> bool:
        """Whether help is requested, even if other arguments are missing."""
        before = list(words)[: list(words).index("--")] if "--" in words else words
        return any(word in HELP for word in before)

    def format_help(self) -> str:
        settings = [f"  {setting.name}={setting.help}" for setting in self.settings.values()]
        examples = [f"  {PROGRAM} {example}" for example in self.verb.examples]
        more = ["", "settings, among the overrides:", *settings] if settings else []
        return "\n".join([super().format_help().rstrip("\n"), *more, "", "examples:", *examples, ""])

    def error(self, message: str) -> NoReturn:
        """argparse's complaints as our sentences."""
        fault = _FAULT.fullmatch(message)
        if fault is None:  # too many or too few positionals
            raise ConfigError(f"{self.verb.name} takes {self.takes}: {PROGRAM} {self.verb.examples[0]}")
        option, reason = fault["option"].split("/")[-1], fault["reason"]
        if reason.startswith("not allowed with argument "):
            raise ConfigError(f"{option} and {reason.split()[-1].split('/')[-1]}: give one of them")
        raise ConfigError(f"{option} {reason}")

    def _split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Options with their values, and the positionals, in any order."""
        options: list[str] = []
        rest: list[str] = []
        given: dict[str, str] = {}
        left = iter(words)
        for word in left:
            if word == "--":
                rest += left
            elif not word.startswith("-") or word == "-":
                rest.append(word)
            else:
                action, value = self._option(word)
                if action.nargs == 0:
                    options.append(word)
                    continue
                value = next(left, None) if value is None else value
                name = action.option_strings[-1]
                if value is None:
                    raise ConfigError(f"{name}: a value is required")
                if name in given:
                    raise ConfigError(f"{name} is given twice, {given[name]} and {value}: give it once")
                given[name] = value
                # Joined with =, a value may begin with a dash: --prompt "-5 degrees?"
                options.append(f"{name}={value}" if name.startswith("--") else f"{name}{value}")
        return options, rest

    def _option(self, word: str) -> tuple[argparse.Action, str | None]:
        """The option of an argument, and the value joined to it; ConfigError if this verb has no such option."""
        name, equals, value = word.partition("=")
        if name in self.options:
            return self.options[name], value if equals else None
        short = self.options.get(word[:2]) if not word.startswith("--") else None
        if short is not None and short.nargs == 0:  # argparse would call its value an "explicit argument"
            raise ConfigError(f"{word}: {word[:2]} takes no value; type {word[:2]}{self._meant(word[2:])}")
        if short is not None:
            return short, word[2:]
        raise ConfigError(self._no_option(name))

    def _meant(self, text: str) -> str:
        """` --all` for the rest of `-mall`; nothing if there is no such option."""
        return f" --{text}" if f"--{text}" in self.options else ""

    def _no_option(self, name: str) -> str:
        sentence = f"{name}: {self.verb.name} has no such option"
        long = {option.lstrip("-"): option for option in self.options}  # the dashes would make all names similar
        guess = nearest(name.lstrip("-"), long)
        if guess is not None:
            return f"{sentence}; did you mean {long[guess]}?"
        elsewhere = [verb.name for verb in VERBS.values() if name in parser_of(verb).options]
        if elsewhere:
            return f"{sentence}; it belongs to {', '.join(elsewhere)}"
        own = [action.option_strings[-1] for action in dict.fromkeys(self.options.values())]
        return f"{sentence}; it has {', '.join(own)}"

    def _take_settings(self, rest: Sequence[str]) -> tuple[dict[str, object], list[str]]:
        found: dict[str, object] = {name: setting.default for name, setting in self.settings.items()}
        left: list[str] = []
        for word in rest:
            name, equals, value = word.partition("=")
            if not equals or name not in self.settings:
                left.append(word)
                continue
            try:
                found[name] = self.settings[name].parse(value)
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{name}={error}") from None
        return found, left


def parser_of(verb: Verb) -> VerbParser:
    """The parser of a verb, as its module configures it."""
    parser = VerbParser(verb)
    verb.load().configure(parser)
    return parser
