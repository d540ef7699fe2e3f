"""The text of `logs`: the training output of the newest attempts, without the result's JSON. Must not import torch."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from orchestrator.display.status_table import ENDED, WATCH_SECONDS
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.monitoring.stage_status import StageStatus, pipeline_of, stage_statuses, warn_damaged
from orchestrator.run_folder.folder import PREPARATION, RunFolder, StageFolder

LINES = 40
FEWEST_LINES = 8
"""Lines per stage if several share the screen."""
_BAR = re.compile(r"\d+%\|.*\|")
"""Progress bars of tqdm, useless once finished."""


def show_logs(run: RunFolder, *, stage: str | None, node: int | None, lines: int | None, follow: bool) -> int:
    """The last lines of each stage's newest log (of `node`, 0 by default; 0 lines means all); with `follow`, also new
    ones.
    """
    found = {
        name: file for name in _stages(run, stage) if (file := _newest_log(run.stage(name), node or 0)) is not None
    }
    if not found:
        raise ConfigError(f"{run.root}: no log of {stage or 'any stage'} on node {node or 0} yet")
    shown = max(FEWEST_LINES, LINES // len(found)) if lines is None else lines
    statuses = {status.stage: status for status in stage_statuses([run])}
    warn_damaged(list(statuses.values()))
    for number, (name, file) in enumerate(found.items()):
        if number:
            print()
        _print_end(file, head=_head(name, statuses.get(name)), lines=shown)
    if follow:
        _follow(run, list(found.values())[-1])
    return EXIT_DONE


def readable(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a log without the final JSON of a stage (it is in result.json) and without libraries' progress
    bars.
    """
    held: list[str] | None = None
    for line in lines:
        text = line.rsplit("\r", 1)[-1]
        if held is None and text == "{":
            held = []
        if held is None:
            if not _BAR.search(text):
                yield text
            continue
        held.append(text)
        if text == "}":
            if not _is_result("\n".join(held)):
                yield from held
            held = None
    yield from held or []


def _is_result(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return "stage" in found and "artifact" in found


def _print_end(file: Path, *, head: str, lines: int) -> None:
    kept = list(readable(file.read_text(encoding="utf-8", errors="replace").splitlines()))
    left_out = len(kept) - lines if lines else 0
    print(f"== {head}  {file}")
    if left_out > 0:
        print(f"... {left_out} earlier lines (-n 0 shows all)")
    print("\n".join(kept[-lines:] if lines else kept), flush=True)


def _head(name: str, status: StageStatus | None) -> str:
    if status is None:
        return name
    steps = "" if status.steps is None else f" at step {status.step} of {status.steps}"
    return f"{name}: {status.state}{steps}"


def _stages(run: RunFolder, stage: str | None) -> Sequence[str]:
    pipeline = pipeline_of(run)
    if stage == PREPARATION and run.stage(PREPARATION).logs.is_dir():
        return (PREPARATION,)
    if stage is not None and stage not in pipeline:
        raise ConfigError(f"--stage {stage}: the run has {', '.join(pipeline)}")
    return pipeline if stage is None else (stage,)


def _newest_log(files: StageFolder, node: int) -> Path | None:
    """The newest attempt's log; the job's own log if no attempt has begun."""
    logs = sorted(files.logs.glob(f"node-{node}.attempt-*.log"), key=lambda file: int(file.stem.rsplit("-", 1)[1]))
    logs = logs or sorted(files.logs.glob("slurm-*.log"), key=lambda file: file.stat().st_mtime)
    return logs[-1] if logs else None


def _follow(run: RunFolder, file: Path) -> None:
    for line in readable(_added_lines(run, file)):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _added_lines(run: RunFolder, file: Path) -> Iterator[str]:
    """Complete lines added from now on, until every stage has ended."""
    rest = ""
    with open(file, encoding="utf-8", errors="replace") as log:
        log.seek(0, 2)
        while True:
            text = log.read()
            *lines, rest = (rest + text).split("\n")
            yield from lines
            if not text and all(status.state in ENDED for status in stage_statuses([run])):
                yield from [rest] if rest else []
                return
            time.sleep(0.0 if text else WATCH_SECONDS)
