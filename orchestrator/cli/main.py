"""Dispatches a command line to its verb; turns every known fault into sentences and an exit code. Must not import torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from launchers.spec import InvalidValueError, LaunchError
from orchestrator import __version__
from orchestrator.cli.parser import HELP, PROGRAM, parser_of
from orchestrator.cli.verbs import DEFAULT, GROUPS, VERBS
from orchestrator.errors import (
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_LAUNCH_FAILED,
    EXIT_SAVED,
    EXIT_USER,
    ConfigError,
    OrchestratorError,
    nearest,
)

_NEVER_VERBS = (".yaml", ".yml")
"""Suffixes of an experiment file, which is accepted in the position of a verb."""
USAGE = """\
{program} [VERB] [overrides | RUN_DIR] [options]
Takes a pretrained language model to a fine-tuned, proven one.
{verbs}

`VERB --help` (or `help VERB`) lists the options of a verb, with examples; options may come anywhere.
Overrides are Hydra's: +experiment=NAME, group=choice, key=value.
Experiments: {experiments}

  {program} +experiment=llama_lora                         the main job
  {program} plan +experiment=llama_lora sharding=zero2     what it would do
  {program} +experiment=llama_lora name=mine stages.sft.data.train.path=rows.jsonl

Exit codes: 0 done or submitted; 2 a mistake in the input; 3 launch failed; 75 saved, can be continued;
93 do not restart; 130 interrupted with nothing to save; 1 a defect or a crash."""


def main(argv: Sequence[str]) -> int:
    """Run one command; return the process's exit code."""
    try:
        return _dispatch(list(argv))
    except OrchestratorError as error:
        return _report(error.problems, error.exit_code)
    except InvalidValueError as error:
        return _report(str(error).splitlines(), EXIT_USER)
    except LaunchError as error:
        return _report(str(error).splitlines(), EXIT_LAUNCH_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except PermissionError as error:
        return _report([f"{error.filename}: no permission to read or write it"], EXIT_USER)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception:
        traceback.print_exc()
        print("error: this is a defect of the orchestrator; please report it with the lines above", file=sys.stderr)
        return EXIT_DEFECT


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if argv[:1] == ["version"]:
        raise ConfigError(f"version: no such verb; type {PROGRAM} --version")
    name, words = find_verb(argv)
    if "--version" in words and (name is None or not words[1:]):
        print(f"orchestrator {__version__}")
        return EXIT_DONE
    if name is None and (not words or any(word in HELP for word in words)):
        return _help()
    verb = VERBS[name or DEFAULT]
    parser = parser_of(verb)
    if parser.asks_for_help(words) or (name is not None and words == ["help"]):
        print(parser.format_help(), end="")
        return EXIT_DONE
    try:
        return verb.load().run(parser.parse(words))
    except KeyboardInterrupt:
        if not verb.interrupted:
            raise
        return _report([verb.interrupted], EXIT_SAVED)


def find_verb(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verb, at any position, and the other arguments; None if there is no verb."""
    bare = list(_bare_words(words))
    for position in bare:
        if words[position] in VERBS:
            return words[position], [*words[:position], *words[position + 1 :]]
    if bare:
        word = words[bare[0]]
        guess = nearest(word, VERBS)
        if guess is not None or bare[0] == 0:
            raise ConfigError(
                f"{word}: no such verb"
                + (
                    f"; did you mean {guess}?"
                    if guess
                    else f"; verbs are {', '.join(verb.name for verb in VERBS.values() if verb.group)}"
                )
            )
    return None, list(words)


def _bare_words(words: Sequence[str]) -> Iterator[int]:
    """Positions of arguments that are neither options, nor their values, nor overrides."""
    position = 0
    while position < len(words) and words[position] != "--":
        word = words[position]
        if word.startswith("-"):
            position += _takes_next(word)
        elif "=" not in word and not word.startswith(("+", "~")) and not word.endswith(_NEVER_VERBS):
            yield position
            if word in VERBS:
                return
        position += 1


def _takes_next(option: str) -> bool:
    """Whether an option before its verb takes a separate value. Consults every verb; tests keep them consistent."""
    actions = [parser_of(verb).options.get(option) for verb in VERBS.values()]
    return any(action is not None and action.nargs != 0 for action in actions)


def _help() -> int:
    from orchestrator.composition.overrides import CONF, choices_of

    width = max(len(name) for name in VERBS)
    lines: list[str] = []
    for group in GROUPS:
        lines += ["", group]
        lines += [f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS.values() if verb.group == group]
    experiments = ", ".join(choices_of("experiment", [CONF]))
    print(USAGE.format(program=PROGRAM, verbs="\n".join(lines), experiments=experiments))
    return EXIT_DONE


def _report(problems: Sequence[str], code: int) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return code
