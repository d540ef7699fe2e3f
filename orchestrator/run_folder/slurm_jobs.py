"""The Slurm jobs that a stage has had, from its folder. Must not import torch."""

from __future__ import annotations

from launchers.submission import read_jobs
from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import StageFolder


def jobs_of(folder: StageFolder) -> tuple[str, ...]:
    """Every Slurm job that the stage has had, oldest first."""
    submitted = read_json(folder.submission).get("job") if folder.submission.exists() else None
    known = read_jobs(folder.logs)
    return known if submitted is None or submitted in known else (submitted, *known)
