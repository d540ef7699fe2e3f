"""Ends a run from its folder: cancel. Must not import torch."""

from __future__ import annotations

from launchers.cancellation import cancel_jobs
from orchestrator.config.run import RunConfig
from orchestrator.errors import EXIT_DONE, RunFolderError
from orchestrator.execution.job_specs import job_spec
from orchestrator.files.atomic import write_text
from orchestrator.run_folder.folder import PREPARATION, RunFolder
from orchestrator.run_folder.slurm_jobs import jobs_of
from orchestrator.run_state.location import locate
from orchestrator.run_state.moved import Away, away, bring_back

GENTLE_SECONDS = 60.0


def cancel(run: RunFolder, config: RunConfig) -> int:
    """Ask every unfinished stage to save and end; after a minute Slurm ends the rest, which is verified."""
    unfinished = [name for name in config.pipeline if not run.stage(name).result.exists()]
    elsewhere = {name: found for name in unfinished if (found := away(run, name)) is not None}
    location = locate(run)
    if location.is_copy and not elsewhere:  # jobs and processes on record here belong to the original
        print(f"nothing to cancel: {run.root} is a copy of {location.recorded}, and nothing runs here")
        return EXIT_DONE
    for name in unfinished:
        if name in elsewhere:
            _cancel_moved(run, name, elsewhere[name])
        elif run.stage(name).root.is_dir():
            write_text(run.stage(name).stop, "cancel\n")
            print(f"{name}: asked to save and end at its next step")
    jobs = [job for name in (PREPARATION, *unfinished) for job in jobs_of(run.stage(name))]
    if jobs:
        specs = [job_spec(config, name) for name in unfinished]
        # After the stop files: a job that ends by itself saves, one that Slurm ends does not.
        for job, facts in cancel_jobs(specs, also=jobs, gentle_seconds=GENTLE_SECONDS).items():
            print(f"job {job} {facts.sentence}")
    return EXIT_DONE


def _cancel_moved(run: RunFolder, name: str, found: Away) -> None:
    """Write the request where the process looks for it: at the path it was started with."""
    process, old = found.claim.process, found.root
    if found.is_taken:
        raise RunFolderError(
            f"{name}: process {process} was started in {old} and still runs there, but another run is at that path by now; "
            f"`kill {process}` makes it save and end, and its files are in {old / name}"
        )
    write_text(RunFolder(old).stage(name).stop, "cancel\n")
    print(
        f"{name}: process {process} is still running in {old}, from where the run folder was moved; asked it there to save and end at "
        f"its next step. Once `status` shows that it has ended, type `{bring_back(old, run)}` and resume"
    )
