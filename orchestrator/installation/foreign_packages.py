"""Refuse to start where another project's `launchers` or `slurm` would be imported instead of ours.

Standard library only.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

DISTRIBUTION = "finetune-orchestrator"
TOP_LEVEL = ("launchers", "slurm")
ROOT = Path(__file__).resolve().parents[2]


def foreign_packages() -> list[str]:
    """One sentence for each of our top-level packages that Python would import from elsewhere; imports none of them."""
    # Jobs run with PYTHONSAFEPATH=1: what Python put first for this process alone (the working folder) must not hide a
    # package that they would import.
    inherited = sys.path if sys.flags.safe_path else sys.path[1:]
    return [problem for name in TOP_LEVEL for problem in _problems(name, inherited)]


def _problems(name: str, inherited: list[str]) -> list[str]:
    for path in (inherited, sys.path):
        found = _location(name, path)
        if found is None:
            continue  # a checkout that is not installed is found through sys.path[0] alone
        if found == ROOT / name:
            # Two distributions in one site-packages share the folder; whoever was installed last owns its files.
            if not _is_ours(found):
                return [_sentence(name, f"{found} was overwritten by it")]
        elif not (found.parent / "orchestrator" / "worker.py").is_file():  # else another copy of this project
            return [_sentence(name, f"{found} comes before {ROOT / name} on Python's path")]
    return []


def _location(name: str, path: list[str]) -> Path | None:
    # PathFinder, not importlib.util.find_spec, which would answer from sys.modules. Neither runs the package's code.
    spec = PathFinder.find_spec(name, path)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent


def _is_ours(folder: Path) -> bool:
    text = (folder / "__init__.py").read_text(encoding="utf-8", errors="replace")
    return f'DISTRIBUTION = "{DISTRIBUTION}"' in text


def _sentence(name: str, cause: str) -> str:
    return (
        f"another project's package is called {name} too: {cause}. Take it out of PYTHONPATH, or install {DISTRIBUTION} "
        f"into a virtual environment of its own: python3 -m venv .venv && .venv/bin/pip install {DISTRIBUTION}"
    )
