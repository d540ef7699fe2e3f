"""Takes a pretrained language model to a fine-tuned, proven one.

From Python: `from orchestrator import compose, plan, run, resume, status, load`; their types are in `__init__.pyi`.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
API = ("compose", "load", "plan", "resume", "run", "status")


def __getattr__(name: str) -> object:
    """Import the API on first use: the ranks and `--help` must not pay for it."""
    if name in API:
        _refuse_foreign_packages()
        return vars(import_module("orchestrator.api.calls"))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse_foreign_packages() -> None:
    """Raise ImportError if another project's `launchers` or `slurm` would be imported instead of ours, as it would be
    in jobs.
    """
    problems = import_module("orchestrator.installation.foreign_packages").foreign_packages()
    if problems:
        raise ImportError("\n".join(problems))


def __dir__() -> list[str]:
    return sorted([*globals(), *API])
