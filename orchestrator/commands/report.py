"""The verb report. Must not import torch."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import EXIT_DONE


def report(folder: Path) -> int:
    """Report a study's results so far, from its folder; writes the files of the report."""
    from orchestrator.studies.report import write_report
    from orchestrator.studies.trials import StudyFolder

    print(write_report(StudyFolder(folder)))
    return EXIT_DONE
