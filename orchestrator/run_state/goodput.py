"""Breakdown of a stage's wall-clock time, from its record: productive training and everything else.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

from orchestrator.metrics.jsonl import Row, attempt_of, number_of, readable_rows, step_of
from orchestrator.run_folder.folder import StageFolder


@dataclass(frozen=True, kw_only=True)
class TimeSpent:
    """Seconds over all attempts of a stage, from the start of the first to the last record of the last."""

    startup: float
    """From the start of a rank to its first step: imports, inputs, model, resume."""
    training: float
    """Optimizer steps that counted."""
    replayed: float
    """Steps repeated after a resume or a rollback, and the rollbacks themselves."""
    evaluation: float
    saving: float
    """Saves during which training was paused; background writing costs nothing."""
    rollout: float
    """Generating completions."""
    proof: float
    """Writing and proving the artifact, whether or not the attempt came to its end."""
    gaps: float
    """Between the last record of an attempt and the start of the next."""
    other: float
    """Time that the record does not explain: logs, ledgers, steps that a killed attempt did not record."""
    goodput: float
    """(training + rollouts of steps that counted) / wall-clock."""

    @property
    def wall_seconds(self) -> float:
        """The sum of the parts."""
        parts = (field.name for field in fields(self) if field.name != "goodput")
        return sum(getattr(self, name) for name in parts)

    def to_json(self) -> dict[str, float]:
        return {"goodput": self.goodput, "wall_seconds": self.wall_seconds, **_rounded(asdict(self))}


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    began: float
    ended: float
    startup: float
    proof: float


def time_spent(folder: StageFolder) -> TimeSpent | None:
    """None if no attempt trained, or an older version wrote the record."""
    (events, _), (rows, _) = readable_rows(folder.events), readable_rows(folder.metrics)
    attempts = [_attempt(number, events, rows) for number in _started(events)]
    if not attempts:
        return None
    wall = attempts[-1].ended - attempts[0].began
    gaps = sum(max(0.0, later.began - one.ended) for one, later in pairwise(attempts))
    training, rollout, replayed = _steps(rows)
    rolled_back = _sum(_of(events, "roll_back"), "seconds")
    known = {
        "startup": sum(attempt.startup for attempt in attempts),
        "training": training,
        "replayed": replayed + rolled_back,
        "evaluation": _sum(rows, "eval_seconds"),
        "saving": _sum(_of(events, "save"), "save_stall_seconds") + _sum(_of(events, "trained"), "close_seconds"),
        "rollout": rollout,
        "proof": sum(attempt.proof for attempt in attempts),
        "gaps": gaps,
    }
    return TimeSpent(**known, other=wall - sum(known.values()), goodput=(training + rollout) / wall if wall else 0.0)


def _attempt(number: int, events: Sequence[Row], rows: Sequence[Row]) -> _Attempt:
    own = [row for row in events if attempt_of(row) == number]
    scored = [row for row in rows if attempt_of(row) == number and number_of(row, "eval_seconds") is not None]
    times = [
        time for row in [*own, *rows] if attempt_of(row) == number and (time := number_of(row, "time")) is not None
    ]
    recorded = number_of(_beginning(own), "began")
    began = min(times) if recorded is None else recorded
    ended = max(times)
    if not _of(own, "start"):  # an earlier attempt wrote the artifact: this one had nothing to do but to prove it
        return _Attempt(began=began, ended=ended, startup=0.0, proof=ended - began)
    train, trained = _time_of(own, "train"), _time_of(own, "trained")
    startup = (ended if train is None else train) - began - _seconds_between(scored, began, train)
    proof = 0.0 if trained is None else ended - trained - _seconds_between(scored, trained, ended)
    return _Attempt(began=began, ended=ended, startup=startup, proof=proof)


def _beginning(events: Sequence[Row]) -> Row:
    """The first record of an attempt: of its training, or of the proof if that was all that was left."""
    return next(row for row in events if row.get("event") in ("start", "prove"))


def _steps(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Seconds of steps that counted, of their rollouts, and of repeated work; the newest execution of a step counts."""
    trained = [row for row in rows if number_of(row, "step_seconds") is not None]
    owner = {step: index for index, row in enumerate(trained) for step in _covered(row)}
    training, rollout, replayed = 0.0, 0.0, 0.0
    for index, row in enumerate(trained):
        covered = _covered(row)
        counted = sum(owner[step] == index for step in covered) / len(covered)
        seconds = (number_of(row, "step_seconds") or 0.0) * len(covered)
        made = number_of(row, "rollout_seconds") or 0.0
        training += seconds * counted
        rollout += made * counted
        replayed += (seconds + made) * (1 - counted)
    return training, rollout, replayed


def _covered(row: Row) -> range:
    """The steps that a row of metrics covers."""
    last = step_of(row)
    return range(last - int(number_of(row, "num_steps") or 1) + 1, last + 1)


def _seconds_between(scored: Sequence[Row], start: float, end: float | None) -> float:
    """Evaluations that ended between two times."""
    inside = [row for row in scored if start <= (number_of(row, "time") or 0.0) <= (end or float("inf"))]
    return _sum(inside, "eval_seconds")


def _started(events: Sequence[Row]) -> list[int]:
    return sorted({attempt_of(row) for name in ("start", "prove") for row in _of(events, name)})


def _of(events: Sequence[Row], name: str) -> list[Row]:
    return [row for row in events if row.get("event") == name]


def _time_of(events: Sequence[Row], name: str) -> float | None:
    found = _of(events, name)
    return number_of(found[-1], "time") if found else None


def _sum(rows: Sequence[Row], key: str) -> float:
    return sum(number_of(row, key) or 0.0 for row in rows)


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {f"{name}_seconds": round(seconds, 3) for name, seconds in parts.items() if name != "goodput"}
