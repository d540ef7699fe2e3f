"""`plan`: what a run would do and cost; writes nothing."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_format, add_overrides, one_of, overrides_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_overrides(parser, multirun=True)
    add_format(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="also memory by phase, learning rates, kernels, communication, scripts, goodput",
    )
    parser.add_setting(
        "advise",
        parse=one_of("true", "false"),
        default="false",
        help="true       also list other settings that would fit, fastest first",
    )


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.plan import plan

    advise = arguments.advise == "true"
    return plan(overrides_of(arguments), advise=advise, as_json=arguments.format == "json", everything=arguments.all)
