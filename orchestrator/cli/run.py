"""`run`: check, plan and launch."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_overrides, overrides_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_overrides(parser, multirun=True)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="STAGE", help="run one stage of the pipeline")
    part.add_argument("--from", dest="first", metavar="STAGE", help="run a stage again, with all that depend on it")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.run import run as run_overrides
    from orchestrator.execution.run_pipeline import StageSelection

    return run_overrides(overrides_of(arguments), part=StageSelection(only=arguments.only, rerun_from=arguments.first))
