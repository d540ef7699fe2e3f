"""Proves for a user's own configuration that a killed run resumes to the same result: one uninterrupted run, one
killed. Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config.run import RunConfig, training_stages
from orchestrator.config.tracking import NoTracking
from orchestrator.errors import ConfigError, LaunchFailed
from orchestrator.metrics.display import PhaseLines, view_of_stage
from orchestrator.metrics.jsonl import Row, attempt_of, last_attempt_rows, read_rows, step_of
from orchestrator.run_folder.folder import RunFolder, StageFolder

COLUMNS = ("loss", "grad_norm", "lr", "rows_digest")
"""Columns of a training row that must be reproduced to the last digit."""
POLL_SECONDS = 0.05
FEWEST_STEPS = 4


class Running(Protocol):
    """A stage that was started."""

    def is_running(self) -> bool: ...
    def kill(self) -> None: ...


Start = Callable[[RunConfig, str], AbstractContextManager[Running]]
"""start(config, stage): freeze the run and launch the stage."""


@dataclass(frozen=True, kw_only=True)
class StepPair:
    """One optimizer step of both runs."""

    step: int
    straight: Row
    resumed: Row

    @property
    def differences(self) -> list[str]:
        """Columns whose value differs in the killed run."""
        return [key for key in COLUMNS if self.straight.get(key) != self.resumed.get(key)]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Result of the proof."""

    stage: str
    went_on_from: int
    """Step of the checkpoint that the killed run resumed from."""
    steps: tuple[StepPair, ...]
    tensors: int
    """Tensors of the artifact."""
    first_difference: str | None
    """None if both runs are equal in every step and every byte of the artifact."""


def small_runs(config: RunConfig, *, steps: int) -> tuple[RunConfig, RunConfig]:
    """The configuration at `steps` optimizer steps of its first stage, twice, in separate folders next to its runs."""
    if steps < FEWEST_STEPS:
        raise ConfigError(f"steps={steps}: at least {FEWEST_STEPS}, so that something is left after the kill")
    if config.launcher.kind == "slurm":
        raise ConfigError("launcher=slurm: verify-resume runs here; type launcher=torchrun inside an allocation")
    name = config.pipeline[0]
    stage = training_stages(config).get(name)
    if stage is None:
        raise ConfigError(f"{name} trains nothing; verify-resume proves the first stage of the pipeline")
    checkpoint = stage.checkpoint.model_copy(update={"every_steps": max(1, steps // 4)})
    small = stage.model_copy(
        update={"max_steps": steps, "epochs": None, "log_every_steps": 1, "checkpoint": checkpoint}
    )

    def run(suffix: str) -> RunConfig:
        update = {
            "name": f"{config.name}-{suffix}",
            "output_dir": str(Path(config.output_dir) / "verify-resume"),
            "pipeline": (name,),
            "stages": {name: small},
            "tracking": NoTracking(kind="none"),
        }
        return config.model_copy(update=update)

    return run("straight"), run("killed")


def verify_resume(config: RunConfig, *, steps: int, start: Start, say: Callable[[str], None]) -> Proof:
    """Train both small runs and compare them. LaunchFailed if one ends without a result."""
    straight, killed = small_runs(config, steps=steps)
    stage = straight.pipeline[0]
    for run in (straight, killed):
        shutil.rmtree(_folder(run, stage).root.parent, ignore_errors=True)
    say(f"{stage}: {steps} steps without interruption")
    _to_the_end(straight, stage, start)
    say(f"{stage}: {steps} steps, killed after the first checkpoint")
    _until_killed(killed, stage, start)
    say(f"{stage}: resuming")
    _to_the_end(killed, stage, start)
    return compare(_folder(straight, stage), _folder(killed, stage), stage=stage)


def compare(straight: StageFolder, killed: StageFolder, *, stage: str) -> Proof:
    """Every step and every tensor of two finished stages."""
    one, other = _training_rows(straight), _training_rows(killed)
    steps = tuple(StepPair(step=step, straight=one[step], resumed=other.get(step, {})) for step in sorted(one))
    tensors = dict(_tensors(straight.artifact))
    resumes = [row for row in read_rows(killed.events) if row["event"] == "resume"]
    if not resumes:
        raise LaunchFailed(
            f"{killed.root}: the run was killed, and the next attempt did not resume from a checkpoint; see {killed.logs}"
        )
    return Proof(
        stage=stage,
        went_on_from=step_of(resumes[-1]),
        steps=steps,
        tensors=len(tensors),
        first_difference=_first_difference(steps, tensors, dict(_tensors(killed.artifact))),
    )


def print_proof(proof: Proof) -> None:
    """The table of a proof, and its verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{proof.stage}: uninterrupted against killed and resumed from step {proof.went_on_from}",
        title_justify="left",
    )
    for column in ("step", "attempt", "loss", "lr", "rows", "the same"):
        table.add_column(column, justify="left" if column == "the same" else "right")
    for pair in proof.steps:
        difference = (
            ", ".join(f"{key} {pair.straight.get(key)} != {pair.resumed.get(key)}" for key in pair.differences) or "yes"
        )
        attempt = str(attempt_of(pair.resumed)) if pair.resumed else "-"
        lr = f"{float(str(pair.straight['lr'])):.3e}"
        table.add_row(
            str(pair.step), attempt, str(pair.straight["loss"]), lr, str(pair.straight.get("rows_digest")), difference
        )
    console = Console()
    console.print(table)
    console.print(
        f"equal: {len(proof.steps)} steps and {proof.tensors} tensors, bit for bit"
        if proof.first_difference is None
        else f"NOT equal: {proof.first_difference}",
        soft_wrap=True,
    )


def _to_the_end(config: RunConfig, stage: str, start: Start) -> None:
    folder = _folder(config, stage)
    phases = _phase_lines(folder, stage)
    with start(config, stage) as running:
        while running.is_running():
            _say_new(phases)
            time.sleep(POLL_SECONDS)
    if not folder.result.exists():
        raise LaunchFailed(f"{config.name}: {stage} ended without a result; see {folder.logs}")


def _until_killed(config: RunConfig, stage: str, start: Start) -> None:
    folder = _folder(config, stage)
    phases = _phase_lines(folder, stage)
    with start(config, stage) as running:
        while running.is_running() and not any(row["event"] == "save" for row in read_rows(folder.events)):
            _say_new(phases)
            time.sleep(POLL_SECONDS)
        running.kill()
    if folder.result.exists():
        raise ConfigError(f"{stage} ended before it could be killed; type more steps=")


def _phase_lines(folder: StageFolder, stage: str) -> PhaseLines:
    """The future phases file of the stage that is about to start."""
    view = view_of_stage(
        stage,
        metrics_file=folder.metrics,
        events_file=folder.events,
        phases_file=folder.phases,
        total_steps=0,
        since=time.time(),
    )
    return PhaseLines(view)


def _say_new(phases: PhaseLines) -> None:
    for sentence in phases.new(time.time()):
        print(f"  {sentence}", flush=True)


def _folder(config: RunConfig, stage: str) -> StageFolder:
    return RunFolder(Path(config.output_dir) / config.name).stage(stage)


def _training_rows(folder: StageFolder) -> dict[int, Row]:
    return {step_of(row): row for row in last_attempt_rows(read_rows(folder.metrics)) if "loss" in row}


def _first_difference(steps: tuple[StepPair, ...], one: dict[str, str], other: dict[str, str]) -> str | None:
    for pair in steps:
        for key in pair.differences:
            return (
                f"step {pair.step}: {key} is {pair.straight.get(key)} straight, {pair.resumed.get(key)} after the kill"
            )
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"tensor {name} of the artifact"
    return None


def _tensors(artifact: Path) -> Iterator[tuple[str, str]]:
    """Names and sha256 of the tensors of a folder, read as safetensors lays them out."""
    for path in sorted(artifact.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    file.seek(8 + length + begin)
                    yield name, hashlib.sha256(file.read(end - begin)).hexdigest()
