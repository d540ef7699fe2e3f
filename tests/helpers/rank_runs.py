"""Trains many small runs in one set of ranks, and stops runs early so that others resume; for resume tests.

As a program (under torchrun) it is one rank: argv[1] is a JSON list of cells. As a module it starts such ranks.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.composition.compose import compose
from orchestrator.files.atomic import read_json, write_json
from orchestrator.metrics.jsonl import Row, last_attempt_rows, read_rows
from orchestrator.planning.absolute_paths import resolve
from orchestrator.run_folder.folder import RunFolder, StageFolder
from orchestrator.run_state.artifact_kind import ArtifactKind

STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run within a set of ranks."""

    run: str
    """Folder with run.json."""
    attempt: int = 1
    stop: tuple[str, int] | None = None
    """Ask rank 1 to stop before ("step", k), in ("evaluation", k) or in ("save", k)."""
    poison: tuple[int, ...] = ()
    """Steps whose loss is NaN whenever they are computed."""
    die: tuple[str, int] | None = None
    """SIGKILL rank 0 during ("accumulation", step) or ("evaluation", step)."""
    expect: str | None = None
    """Text contained in the error that the cell must end with."""
    stage: str = "sft"
    """Name and kind of the stage."""
    start: str | None = None
    """Folder of the classifier that the stage starts from."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of a test's runs."""

    root: Path

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def stage(self, name: str) -> StageFolder:
        return RunFolder(self.run(name)).stage("sft")

    def make(self, name: str, *words: str, ranks: int) -> Path:
        """Write run.json of an eight-step fp32 run that saves every second step."""
        common = [
            "+experiment=llama_lora" if "tuning=full" not in words else "+experiment=llama_full",
            f"name={name}",
            f"output_dir={self.root / 'runs'}",
            f"model.base={self.root / 'model'}",
            "model.dtype=float32",
            "cluster.device=cpu",
            f"cluster.processes_per_node={ranks}",
            f"stages.sft.data.train.path={self.root / 'rows.jsonl'}",
            "stages.sft.data.eval.path=none",
            f"stages.sft.max_steps={STEPS}",
            "stages.sft.epochs=null",
            "stages.sft.batch.global_size=8",
            "stages.sft.batch.micro_size=2",
            "stages.sft.optimizer.lr=2e-3",
            "stages.sft.checkpoint.every_steps=2",
            "stages.sft.checkpoint.keep_last=99",
            "tracking=none",
        ]
        config = resolve(compose([*common, *words]), self.root)
        write_json(self.run(name) / "run.json", {"config": config.model_dump(mode="json")})
        return self.run(name)

    def branch(self, source: str, name: str, *, step: int, **changes: Any) -> Path:
        """A run with a single checkpoint copied from another; `changes` are dotted keys with `__` for the dot."""
        shutil.rmtree(self.run(name), ignore_errors=True)
        shutil.copytree(self.stage(source).checkpoint(step), self.stage(name).checkpoint(step))
        record = read_json(self.run(source) / "run.json")
        for dotted, value in changes.items():
            *path, last = dotted.split("__")
            part = record["config"]
            for key in path:
                part = part[key]
            part[last] = value
        write_json(self.run(name) / "run.json", record)
        return self.run(name)

    def bytes_read(self, name: str, attempt: int) -> list[int]:
        """Bytes of tensors that each rank read from a checkpoint, in rank order."""
        files = sorted(self.run(name).glob(f"read-{attempt}-*.json"))
        return [int(read_json(file)["bytes"]) for file in files]

    def rows(self, name: str) -> dict[int, Row]:
        """The training row of every step, from its last attempt."""
        rows = last_attempt_rows(read_rows(self.stage(name).metrics))
        return {int(str(row["step"])): row for row in rows if "loss" in row}

    def events(self, name: str, kind: str) -> list[Row]:
        return [row for row in read_rows(self.stage(name).events) if row["event"] == kind]


def make_place(root: Path, *, rows: int = 64, hidden: int = 32) -> Place:
    import tiny_model

    root.mkdir(parents=True, exist_ok=True)
    tiny_model.write_llama(root / "model", hidden=hidden)
    tiny_model.write_rows(root / "rows.jsonl", rows)
    return Place(root=root)


def command(cells: Sequence[Cell], *, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, __file__, json.dumps([asdict(cell) for cell in cells])]


def environment(place: Place) -> dict[str, str]:
    import forking

    quiet = {"OMP_NUM_THREADS": "1", "ORCHESTRATOR_CACHE": str(place.root / "cache"), "HF_HUB_OFFLINE": "1"}
    here = {**os.environ, **quiet, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "DS_ACCELERATOR": "cpu"}
    return forking.environment(here)


def train(place: Place, cells: Sequence[Cell], *, ranks: int, timeout: float = 600, fresh: bool = False) -> str:
    """Train the cells one after another on this many gloo ranks; return their output. Fails if a cell fails.

    `fresh`: in separate interpreters, as users run them, instead of forks.
    """
    import forking

    done = subprocess.run(
        command(cells, ranks=ranks),
        env=environment(place) | (forking.FRESH if fresh else {}),
        cwd=place.root,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def crash(place: Place, cell: Cell, *, ranks: int) -> None:
    """Train a cell that is killed."""
    done = subprocess.run(
        command([cell], ranks=ranks), env=environment(place), cwd=place.root, capture_output=True, timeout=600
    )
    assert done.returncode != 0, "it did not die"


def largest_difference(one: dict[int, Row], other: dict[int, Row], key: str) -> float:
    """The largest relative difference of a column over the steps present in both."""
    steps = sorted(one.keys() & other.keys())
    assert steps, "no step in common"
    pairs = [(float(str(one[step][key])), float(str(other[step][key]))) for step in steps]
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)


# ---- a rank --------------------------------------------------------------------------------------


def _train_cell(cell: Cell) -> None:
    from accelerate.state import AcceleratorState, GradientState
    from safetensors.torch import save_file

    from orchestrator.classification.model import build_classifier
    from orchestrator.config.run import RunConfig
    from orchestrator.distributed.gather import whole_parameter
    from orchestrator.distributed.runtime import start_runtime
    from orchestrator.metrics.phases import Phases
    from orchestrator.models.tuning import build_policy
    from orchestrator.run_folder.stop_request import StopRequest
    from orchestrator.run_state.recorder import Recorder
    from orchestrator.run_state.stage_context import ParentArtifact, StageContext
    from orchestrator.stages import STAGES
    from orchestrator.training.loop import train as train_job
    from orchestrator.training.loop_state import LoopCallbacks, Progress
    from orchestrator.training.session import assemble, open_session
    from orchestrator.worker import _bring_inputs

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE")]:
        del os.environ[name]
    run = Path(cell.run)
    config = RunConfig.model_validate(read_json(run / "run.json")["config"], strict=False)
    folder = RunFolder(run).stage(cell.stage)
    inputs = _bring_inputs(config, cell.stage, run_directory=run, phases=Phases())
    context = StageContext(
        config=config,
        name=cell.stage,
        stage=config.stages[cell.stage],
        folder=folder,
        run_file=run / "run.json",
        attempt=cell.attempt,
        stop=StopRequest(folder.stop),
        base_folder=Path(inputs["base_folder"]),
        train_data=Path(inputs["train"]),
        evaluation_data=None,
        start=None
        if cell.start is None
        else ParentArtifact(stage="before", folder=Path(cell.start), kind=ArtifactKind.CLASSIFIER_MODEL),
    )
    runtime = start_runtime(config, context.stage)
    record = Recorder(context, rank=runtime.rank)
    build = build_policy if cell.stage == "sft" else build_classifier
    session = open_session(context, runtime, record, build)
    make_recipe = importlib.import_module(STAGES[cell.stage]).make_recipe
    count = _count_checkpoint_bytes()
    job, course, checkpointer, progress = assemble(session, make_recipe)
    write_json(run / f"read-{cell.attempt}-{runtime.rank}.json", {"bytes": sum(count)})
    asked: list[bool] = []

    def passed(place: str, step: int) -> None:
        if cell.stop == (place, step) and runtime.rank == 1:
            asked.append(True)

    def evaluate(at: Progress) -> Progress:
        _die(cell, "evaluation", at.step)
        passed("evaluation", at.step)
        return at

    def save(at: Progress) -> None:
        checkpointer.save(at)
        passed("save", at.step)

    def stop_reason() -> str | None:
        passed("step", record.last_step + 1)
        return "asked" if asked else None

    hooks = LoopCallbacks(
        record=record.metrics,
        evaluate=evaluate,
        save=save,
        rehearse=checkpointer.rehearse,
        roll_back=checkpointer.roll_back,
        fault=record.skipped_update,
        stop_reason=stop_reason,
        before_step=course.before_step,
        rows_consumed=lambda step, rows: None,
    )
    train_job(_dying(_poisoned(job, cell.poison), cell, record), progress, hooks)
    checkpointer.close()
    weights: dict[str, Any] = {}
    for name, parameter in runtime.module_of(job.model).named_parameters():
        if parameter.requires_grad:
            with whole_parameter(runtime, parameter) as whole:
                weights[name] = whole.float().clone()
    if runtime.is_main:
        save_file(weights, run / f"weights-{cell.attempt}.safetensors")
    runtime.barrier()
    runtime.accelerator.free_memory()


def _count_checkpoint_bytes() -> list[int]:
    """A list that grows by the bytes of every read of tensors from a checkpoint, from now on."""
    from orchestrator.tensors.reader import TensorFolder

    counted: list[int] = []
    fill: Any = getattr(TensorFolder._fill, "counted", TensorFolder._fill)

    def counting(self: TensorFolder, view: memoryview, path: Path, offset: int) -> None:
        if "checkpoints" in path.parts:
            counted.append(len(view))
        fill(self, view, path, offset)

    counting.counted = fill  # pyright: ignore[reportFunctionMemberAccess]
    TensorFolder._fill = counting
    return counted


def _poisoned(job: Any, steps: Sequence[int]) -> Any:
    """The job, with a NaN loss wherever the first row of one of these steps occurs."""
    guilty = {job.order.global_batch(step - 1)[0] for step in steps}
    ids = {job.rows.row_ids(int(index)) for index in guilty}

    def terms(model: Any, batch: Any) -> Any:
        (value,) = job.objective.terms(model, batch)
        return (value * math.nan if ids & set(batch.row_ids) else value,)

    return replace(job, objective=replace(job.objective, terms=terms)) if steps else job


def _dying(job: Any, cell: Cell, record: Any) -> Any:
    """The job, killed at the second micro-batch of the chosen step."""

    def terms(model: Any, batch: Any) -> Any:
        if model.training:
            seen.append(record.last_step + 1)
            if seen.count(record.last_step + 1) == 2:
                _die(cell, "accumulation", record.last_step + 1)
        return job.objective.terms(model, batch)

    seen: list[int] = []
    return replace(job, objective=replace(job.objective, terms=terms))


def _die(cell: Cell, place: str, step: int) -> None:
    if cell.die == (place, step) and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    import torch.distributed as dist

    from orchestrator.errors import OrchestratorError

    for values in json.loads(sys.argv[1]):
        cell = Cell(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        try:
            _train_cell(cell)
            assert cell.expect is None, f"{cell.run}: {cell.expect!r} was expected"
        except OrchestratorError as error:
            if cell.expect is None or cell.expect not in str(error):
                raise
        gc.collect()
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
