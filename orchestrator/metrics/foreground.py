"""Runs a program of this package in the foreground: `python -m orchestrator.metrics.foreground MODULE ARGUMENTS`. No
torch at the top.

Importing torch and transformers takes seconds, so they are imported while the display is already running.
"""

from __future__ import annotations

import importlib
import sys

from orchestrator.metrics.phases import IMPORTING, Phases
from orchestrator.metrics.screen import Screen


def main() -> int:
    module, *arguments = sys.argv[1:]
    phases = Phases(screen=Screen(sys.stderr))
    phases.begin(IMPORTING)
    program = importlib.import_module(f"orchestrator.{module}")
    sys.argv = [module, *arguments]
    try:
        return program.main(phases)
    finally:
        phases.close()


if __name__ == "__main__":
    sys.exit(main())
