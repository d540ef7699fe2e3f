"""`verify-resume`: prove that a killed run resumes to the same result."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_overrides, overrides_of, whole_number
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_overrides(parser)
    parser.add_setting("steps", parse=whole_number(1), default=8, help="N           optimizer steps to train")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.verify_resume import verify_resume

    return verify_resume(overrides_of(arguments), steps=arguments.steps)
