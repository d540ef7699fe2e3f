"""`generate`: answers of a tuned model next to those of its base."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, add_stage, run_folder_of, whole_number
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)
    parser.takes = "one run folder; a prompt goes into --prompt TEXT"
    add_stage(parser, "model of this stage; the last one otherwise")
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt")
    parser.add_argument("--examples", type=whole_number(0), metavar="N", help="prompts from the held-out rows")
    parser.add_argument("--max-new-tokens", type=whole_number(1), metavar="N", help="longest answer, in tokens")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.inspection import generate

    options = {
        "--prompt": arguments.prompt,
        "--examples": arguments.examples,
        "--max-new-tokens": arguments.max_new_tokens,
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    return generate(run_folder_of(arguments), stage=arguments.stage, options=given)
