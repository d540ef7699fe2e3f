"""Arguments that several verbs share: overrides, the run folder, a stage, numbers and choices. No heavy imports."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.parser import VerbParser
from orchestrator.cli.verbs import VERBS
from orchestrator.errors import ConfigError, nearest

if TYPE_CHECKING:
    from orchestrator.run_folder.folder import RunFolder


def add_overrides(parser: VerbParser, *, multirun: bool = False) -> None:
    """Declare overrides in Hydra's grammar and their options; read them with `overrides_of`."""
    parser.takes = "overrides"
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="+experiment=NAME, group=choice or key=value, as Hydra reads them",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with experiments and groups of your own")
    if multirun:
        parser.add_argument(
            "-m", "--multirun", action="store_true", help="one run for each combination of values: key=a,b"
        )


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The overrides, preceded by -m and --config-dir if given; ConfigError for two values of one key."""
    from orchestrator.composition.overrides import duplicated_keys

    overrides: list[str] = arguments.overrides
    problems = [f"{text}: one verb at a time; leave it out" for text in overrides if text in VERBS]
    problems += duplicated_keys(overrides)
    if problems:
        raise ConfigError(problems)
    flags = ["-m"] if vars(arguments).get("multirun") else []
    directory: str | None = arguments.config_dir
    return [*flags, *([] if directory is None else ["--config-dir", directory]), *overrides]


def add_run_folder(parser: VerbParser) -> None:
    """Declare one run folder; read it with `run_folder_of`."""
    parser.takes = "one run folder and nothing else"
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a run: output_dir/name, or wherever it was moved")


def run_folder_of(arguments: argparse.Namespace) -> RunFolder:
    """The given run folder, absolute; ConfigError if it has no run.json."""
    return open_run_folder(arguments.run)


def open_run_folder(text: str) -> RunFolder:
    """The run folder of a typed path."""
    from orchestrator.run_folder.folder import RunFolder

    folder = Path(text).expanduser()
    if not RunFolder(folder).is_run:
        raise ConfigError(f"{text} is not a run folder: {_why_no_run(folder)}")
    return RunFolder(folder.resolve())


def _why_no_run(folder: Path) -> str:
    """What the folder is instead, and the run that may have been intended."""
    from orchestrator.run_folder.folder import RUN_FILE, RunFolder

    above = next((parent for parent in folder.parents if RunFolder(parent).is_run), None)
    if above is not None and str(above) != ".":
        return f"it is part of the run {above}; type that"
    inside = sorted(file.parent for file in folder.glob(f"*/{RUN_FILE}"))
    if inside:
        more = f" or one of {len(inside) - 1} others in it" if len(inside) > 1 else ""
        return f"it holds no run.json; type {inside[-1]}{more}"
    if folder.is_dir():
        return "it holds no run.json"
    others = [str(file.parent) for file in folder.parent.glob("*/run.json")]
    guess = nearest(str(folder), others)
    return "it holds no run.json, since there is no such folder" + (f"; did you mean {guess}?" if guess else "")


def add_stage(parser: VerbParser, help: str) -> None:
    """Declare --stage; None if omitted."""
    parser.add_argument("--stage", metavar="STAGE", help=help)


def whole_number(smallest: int) -> Callable[[str], int]:
    """The type of an option: a whole number from `smallest`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text}: an integer of at least {smallest} is required")
        return int(text)

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """The type of an option: one of some names. Unlike argparse's `choices`, it refuses with our sentence."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text}: {', '.join(choices[:-1])} or {choices[-1]} is allowed")
        return text

    return parse


def add_format(parser: VerbParser) -> None:
    """Declare format=json among the overrides, for machine-readable output."""
    parser.add_setting(
        "format", parse=one_of("json", "table"), default="table", help="json       for machines; table is for people"
    )


def number(text: str) -> float:
    """The type of an option: a number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # nan too
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 0 is required")
    return value
