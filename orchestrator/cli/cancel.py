"""`cancel`: ask a run to save and end."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, run_folder_of
from orchestrator.cli.parser import VerbParser


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.execution.cancel import cancel
    from orchestrator.run_state.frozen import load_config

    run_folder = run_folder_of(arguments)
    return cancel(run_folder, load_config(run_folder))
