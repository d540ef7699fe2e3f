"""The report of a study from its folder: report.json, report.txt and, if matplotlib is installed, report.png.

Must not import torch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.config.rules import parse
from orchestrator.config.study import SearchStudy, SeedsStudy
from orchestrator.errors import ConfigError
from orchestrator.files.atomic import read_json, write_json, write_text
from orchestrator.studies.seed_grid import judgement
from orchestrator.studies.statistics import Source, best_first, expected_best, standard_deviation, two_way
from orchestrator.studies.trials import Standing, StudyFolder, finite, standing_of

WIDTH = 160
SOURCES = {"seeds.weights": "seed of new weights", "seeds.data": "seed of the data order"}


def write_report(folder: StudyFolder) -> str:
    """Write the files of the report; return its text. ConfigError if the folder has no study."""
    if not folder.record.is_file():
        raise ConfigError(
            f"{folder.root} is not a folder of a study: it holds no study.json; those of runs end in -study"
        )
    record: dict[str, Any] = read_json(folder.record)
    study = parse(record["config"]).study
    if isinstance(study, SeedsStudy):
        report = _seeds_report(folder, record, study)
    else:
        assert isinstance(study, SearchStudy)
        from orchestrator.studies.optuna_search import search_report

        report = search_report(folder, record, study)
    write_json(folder.report, report)
    text = "\n".join([_text(report), *_picture(folder, report)])
    write_text(folder.table, text + "\n")
    return text


def _seeds_report(folder: StudyFolder, record: dict[str, Any], study: SeedsStudy) -> dict[str, Any]:
    """Variance is computed over comparable results: at the end or, if weak trials were stopped, at the step of the
    comparison.
    """
    stage, step = str(record["stage"]), record["judged_at_step"]
    trials = _seed_trials(folder, record, study)
    finished = [(trial["name"], trial["value"]) for trial in trials if trial["value"] is not None]
    at_end = step is None or len(finished) == len(trials)
    column = "value" if at_end else "judged_value"
    compared = [float(trial[column]) for trial in trials if trial[column] is not None]
    best = best_first(finished, mode=study.mode)
    return {
        "kind": study.kind,
        "stage": stage,
        "metric": study.metric,
        "mode": study.mode,
        "trials": trials,
        "judged_at_step": step,
        "finished": len(finished),
        "best": best[0] if best else None,
        "compared": {"column": column, "at": "the end" if at_end else f"step {step}", "results": len(compared)},
        "mean": sum(compared) / len(compared) if compared else None,
        "deviation": standard_deviation(compared),
        "expected_best": expected_best(compared, mode=study.mode),
        "variance": [asdict(source) for source in _variance(trials, study, column)],
    }


def _seed_trials(folder: StudyFolder, record: dict[str, Any], study: SeedsStudy) -> list[dict[str, Any]]:
    step: int | None = record["judged_at_step"]
    listed: list[dict[str, Any]] = record["trials"]
    standings = {
        trial["name"]: standing_of(folder.trial(trial["name"]), record["stage"], study.metric) for trial in listed
    }
    weak: tuple[str, ...] = ()
    if step is not None and all(step in one.values for one in standings.values() if one.state != "failed"):
        weak = judgement(study, standings, step=step).weak
    return [
        {
            **trial,
            "state": _state(standings[trial["name"]], is_weak=trial["name"] in weak),
            "why": standings[trial["name"]].why,
            "steps": standings[trial["name"]].steps,
            "value": finite(standings[trial["name"]].value),
            "judged_value": None if step is None else finite(standings[trial["name"]].values.get(step)),
        }
        for trial in listed
    ]


def _state(standing: Standing, *, is_weak: bool) -> str:
    return "stopped as weak" if is_weak and standing.state == "stopped" else standing.state


def _variance(trials: Sequence[dict[str, Any]], study: SeedsStudy, column: str) -> list[Source]:
    """Empty until every cell has a number, and with fewer than two."""
    values = [trial[column] for trial in trials]
    width = len(study.data)
    if len(values) < 2 or any(value is None for value in values):
        return []
    table = [values[start : start + width] for start in range(0, len(values), width)]
    return two_way(table, rows=SOURCES["seeds.weights"], columns=SOURCES["seeds.data"])


def _text(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(_trial_table(report))
    done = f"{report['finished']} of {len(report['trials'])} trials finished"
    console.print(done if report["best"] is None else f"{done}; the best is {report['best']}", soft_wrap=True)
    if report["kind"] == "seeds":
        _tell_luck(console, report)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _trial_table(report: dict[str, Any]) -> Table:
    keys = list(dict.fromkeys(key for trial in report["trials"] for key in trial["values"]))
    judged = "" if report.get("judged_at_step") is None else f"at step {report['judged_at_step']}"
    table = Table(box=None, pad_edge=False, title=f"{report['metric']} of {report['stage']}", title_justify="left")
    for column in ("trial", *keys, "state", "steps", *([judged] if judged else []), report["metric"]):
        table.add_column(column, no_wrap=column == "trial", justify="left" if column in ("trial", "state") else "right")
    for trial in report["trials"]:
        why = f": {trial['why']}" if trial["state"] == "failed" else ""
        table.add_row(
            trial["name"],
            *(_shown(trial["values"].get(key, "")) for key in keys),
            trial["state"] + why,
            str(trial["steps"]),
            *([_number(trial["judged_value"])] if judged else []),
            _number(trial["value"]),
        )
    return table


def _tell_luck(console: Console, report: dict[str, Any]) -> None:
    if report["mean"] is None:
        return
    of = report["compared"]
    spread = "" if report["deviation"] is None else f", standard deviation {report['deviation']:.5f}"
    console.print(f"{of['results']} results at {of['at']}: mean {report['mean']:.5f}{spread}")
    if report["expected_best"]:
        console.print("\nexpected best of n trials")
        curve = Table(box=None, pad_edge=False)
        for n in range(1, len(report["expected_best"]) + 1):
            curve.add_column(str(n), justify="right")
        curve.add_row(*(_number(value) for value in report["expected_best"]))
        console.print(curve)
    console.print("")
    is_whole = bool(report["variance"])
    console.print(_variance_table(report) if is_whole else "variance by source: it needs a result of every trial")


def _variance_table(report: dict[str, Any]) -> Table:
    table = Table(
        box=None, pad_edge=False, title=f"variance by source, at {report['compared']['at']}", title_justify="left"
    )
    for column in ("source", "degrees of freedom", "sum of squares", "share", "F", "standard deviation"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source in report["variance"]:
        table.add_row(
            source["name"],
            str(source["degrees"]),
            f"{source['sum_of_squares']:.3g}",
            f"{source['share']:.1%}",
            "" if source["f"] is None else f"{source['f']:.2f}",
            "" if source["deviation"] is None else f"{source['deviation']:.3g}",
        )
    return table


def _picture(folder: StudyFolder, report: dict[str, Any]) -> list[str]:
    """Draw the available results; return the line that says where, or how to get the plot."""
    if not any(trial["value"] is not None for trial in report["trials"]):
        return []
    if find_spec("matplotlib") is None:
        return [
            "no picture: pip install 'finetune-orchestrator[plots]', then python -m orchestrator report "
            + str(folder.root)
        ]
    from orchestrator.studies.plots import draw_search, draw_seeds

    draw = draw_seeds if report["kind"] == "seeds" else draw_search
    draw(report, Path(folder.picture))
    return [f"picture: {folder.picture}"]


def _shown(text: str) -> str:
    """A value of a trial; long numbers are rounded to five digits (report.json has them all)."""
    try:
        return f"{float(text):.5g}" if len(text) > 9 else text
    except ValueError:
        return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
