"""`python -m orchestrator`: the one entry of the login side."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

COLLECTED_EVERY = 50_000
"""Allocations between two garbage collections: a command makes many thousands at its start, and hardly any garbage."""


def _forget_working_folder() -> None:
    """Remove the working folder that `python -m` puts first on the path: a user's own conf/ or slurm/ there must not be
    imported.
    """
    root = Path(__file__).resolve().parent.parent
    if sys.path and Path(sys.path[0] or ".").resolve() == Path.cwd():
        sys.path[0] = str(root)


def main() -> int:
    _forget_working_folder()
    gc.set_threshold(COLLECTED_EVERY)
    # Before anything of ours is imported: the command line itself imports launchers.
    from orchestrator.installation.foreign_packages import foreign_packages

    problems = foreign_packages()
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        return 2
    from orchestrator.cli.main import main as run_command
    from orchestrator.machine.openmp import limit_spinning
    from orchestrator.machine.process_group import rank_variables

    limit_spinning(os.environ)
    # This command is no rank: what it starts would wait for the processes of another launcher.
    foreign = rank_variables(os.environ)
    for name in foreign:
        del os.environ[name]
    if foreign:
        print(f"warning: {', '.join(foreign)} of another launcher are set in this shell and ignored", file=sys.stderr)
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
