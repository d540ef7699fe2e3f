"""Facts of one stage of a run, from its files alone: state, losses, speed, cost, evaluation data.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.config.base import JsonValue, flatten
from orchestrator.errors import OrchestratorError
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import Row, last_attempt_rows, number_of, readable_rows, step_of
from orchestrator.metrics.speed import run_speed
from orchestrator.monitoring.stage_status import StageStatus
from orchestrator.run_folder.folder import StageFolder
from orchestrator.run_state.goodput import time_spent

MINIMISED = "loss"
SCORES = ("accuracy", "f1_macro", "mcc", "pearson", "spearman", "reward")
"""Metrics of evaluations besides the loss, by their name after `eval_`."""


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage of one run; None marks what is unknown."""

    stage: str
    kind: str
    state: str
    """proven, running, stopped, failed, ..."""
    why: str
    artifact: str | None
    steps: int
    tokens: int | None
    before: Mapping[str, float]
    """By measure, such as loss, accuracy or reward: the first evaluation, on the model that the stage started from."""
    after: Mapping[str, float]
    best: Mapping[str, tuple[float, int]]
    """The best evaluation and its step."""
    train_loss: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None
    wall_seconds: float | None
    dollars: float | None
    digests: Mapping[str, str]
    """Digests of base, tokenizer, template and data files; empty if an older version wrote the run."""
    held_out: str | None
    """Digest of the prepared rows that it was evaluated on."""
    loss_kind: str
    """Losses are comparable only within the same kind."""


def stage_facts(files: StageFolder, config: Mapping[str, JsonValue], status: StageStatus) -> StageFacts:
    """The facts of a stage of any version; None for what an older one did not write."""
    flat = flatten(cast("JsonValue", dict(config)))
    result = _read(files.result)
    prepared = _read(files.prepared)
    rows = last_attempt_rows(readable_rows(files.metrics)[0])
    kind = str(flat.get(f"stages.{status.stage}.kind") or "unknown")
    is_policy = any("eval_reward" in row for row in rows)
    before, after, best = _evaluations(rows, without_loss=is_policy)
    spent = time_spent(files)
    wall = None if spent is None else spent.wall_seconds
    return StageFacts(
        stage=status.stage,
        kind=kind,
        state="proven" if status.state == "finished" else status.state,
        why=status.why,
        artifact=result.get("artifact", {}).get("kind"),
        steps=int(result.get("steps") or status.step),
        tokens=result.get("tokens"),
        before=before,
        after=after if result else {},
        best=best,
        train_loss=None if is_policy else status.loss,
        tokens_per_second=result.get("tokens_per_second") or run_speed(rows),
        peak_memory_gib=max(
            (value for row in rows if (value := number_of(row, "memory_gib")) is not None), default=None
        ),
        wall_seconds=wall if wall is not None else result.get("seconds"),
        dollars=_dollars(flat, wall),
        digests=result.get("digests") or prepared.get("content") or {},
        held_out=_held_out(prepared),
        loss_kind=f"{kind} ({flat[key]})" if (key := f"stages.{status.stage}.loss") in flat else kind,
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or torn, as may be in an unfinished run."""
    try:
        found: JsonValue = read_json(file)
    except OrchestratorError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _evaluations(
    rows: Sequence[Row], *, without_loss: bool
) -> tuple[dict[str, float], dict[str, float], dict[str, tuple[float, int]]]:
    """First, last and best value of every measure; a policy's loss is omitted, because it is only the negative
    reward.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    best: dict[str, tuple[float, int]] = {}
    measures = SCORES if without_loss else (MINIMISED, *SCORES)
    for row in rows:
        for name in measures:
            value = number_of(row, f"eval_{name}")
            if value is None:
                continue
            if step_of(row) == 0:
                first[name] = value
                continue
            last[name] = value
            sign = 1 if name == MINIMISED else -1
            if name not in best or sign * value < sign * best[name][0]:
                best[name] = (value, step_of(row))
    return first, last, best


def _dollars(flat: Mapping[str, JsonValue], wall_seconds: float | None) -> float | None:
    """Only if the site set a price."""
    price = flat.get("cluster.hardware.dollars_per_hour")
    nodes, processes = flat.get("cluster.nodes"), flat.get("cluster.processes_per_node")
    if not isinstance(price, int | float) or wall_seconds is None:
        return None
    if not isinstance(nodes, int) or not isinstance(processes, int):
        return None
    return price * nodes * processes * wall_seconds / 3600


def _held_out(prepared: Mapping[str, Any]) -> str | None:
    """The last parts of the path: the folder's name is a digest of rows and preparation, independent of the cache's
    location.
    """
    path = prepared.get("evaluation")
    if not isinstance(path, str):
        return None
    parts = Path(path).parts
    return "/".join(parts[-2:]) if parts[-1] == "evaluation" else parts[-1]
