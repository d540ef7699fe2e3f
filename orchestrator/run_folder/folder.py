"""The only module that knows file names inside a run; atomic writes and manifests. Must not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.run import RunConfig
from orchestrator.files.atomic import read_json

MEASURED = "measured.json"
RUN_FILE = "run.json"
PREPARATION = "prepare"
"""Name of the job that prepares the data of a run; no stage may have it."""


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    root: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def phases(self) -> Path:
        """Current phase of the newest attempt; overwritten continuously, not part of the record."""
        return self.root / "phases.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """Checkpoints that failed their proof."""
        return self.root / "quarantine"

    @property
    def rollbacks(self) -> Path:
        """The data that rollbacks removed, and their number."""
        return self.root / "rollbacks.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def artifact(self) -> Path:
        return self.root / "artifact"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def measured(self) -> Path:
        """Measured speed of the stage, for the next plan."""
        return self.root / MEASURED

    @property
    def stop(self) -> Path:
        """Its existence asks the job to save and end."""
        return self.root / "STOP"

    @property
    def prepared(self) -> Path:
        """Names the prepared data that the ranks map."""
        return self.root / "prepared.json"

    @property
    def proof(self) -> Path:
        """Evaluation of the re-opened artifact."""
        return self.root / "proof.json"

    @property
    def samples(self) -> Path:
        """The rows that each rank used at each step, one file per rank."""
        return self.root / "samples"

    @property
    def curves(self) -> Path:
        """Scores of every blend of an interpolation or a soup; its picture has the suffix .png."""
        return self.root / "curves.json"

    @property
    def reference(self) -> Path:
        """Log-probabilities under the policy that the stage started from, one file per set of rows."""
        return self.root / "reference"

    @property
    def rollouts(self) -> Path:
        """The newest completions that a policy was trained on, in full."""
        return self.root / "rollouts"

    @property
    def generated(self) -> Path:
        """Completions for people to read, with their rewards."""
        return self.root / "samples.jsonl"

    @property
    def submission(self) -> Path:
        """Token and job id of the newest submission to Slurm."""
        return self.root / "submission.json"

    @property
    def jobs(self) -> Path:
        """Every Slurm job that has worked on the stage, one id per line; the job's script appends to it."""
        return self.logs / "jobs"

    @property
    def script(self) -> Path:
        """The script of the job that prepares data; the stages' scripts are in scripts/."""
        return self.root / "job.sbatch"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def deepspeed(self) -> Path:
        """The dict passed to DeepSpeed."""
        return self.root / "deepspeed.json"

    @property
    def profile(self) -> Path:
        """Traces and breakdowns of `profile=true`."""
        return self.root / "profile"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number}.json"

    def open_attempts(self) -> list[int]:
        """Attempts that began but whose end is not on record."""
        begun = [path.name.removeprefix("attempt-") for path in self.logs.glob("attempt-*")]
        return sorted(int(number) for number in begun if number.isdigit() and not self.attempt(int(number)).exists())

    def fault(self, attempt: int, rank: int) -> Path:
        """Where a rank leaves its own cause of death; the earliest one of an attempt is the first cause."""
        return self.attempts / f"{attempt}.fault-{rank}.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_partial(self, step: int) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.checkpoints / f".step-{step:08d}.partial"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / RUN_FILE

    @property
    def is_run(self) -> bool:
        """Whether a configuration was frozen here."""
        return self.run.is_file()

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def location(self) -> Path:
        """The folder's path when a command last wrote into it; distinguishes a copy from its original."""
        return self.root / "location.json"

    @property
    def lock(self) -> Path:
        """Lock held while a command checks whether a stage runs, and starts it."""
        return self.root / ".start.lock"

    @property
    def superseded(self) -> Path:
        """Earlier versions of stages that were run again."""
        return self.root / "superseded"

    @property
    def scripts(self) -> Path:
        return self.root / "scripts"

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.root / name)


def read_result(folder: StageFolder) -> dict[str, Any]:
    """result.json, with its paths to the stage's own files adapted to the folder's current path."""
    result = read_json(folder.result)
    own = {"curves": str(folder.curves)} if "curves" in result else {}
    return {**result, **own, "artifact": {**result["artifact"], "path": str(folder.artifact)}}


# ---- manifests -----------------------------------------------------------------------------------


def run_directory_of(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.name


def script_path(config: RunConfig, stage: str) -> Path:
    suffix = "sbatch" if config.launcher.kind == "slurm" else "sh"
    return run_directory_of(config) / "scripts" / f"{stage}.{suffix}"
