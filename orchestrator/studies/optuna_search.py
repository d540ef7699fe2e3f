"""The search: Optuna chooses the values of each trial, which is an ordinary run; resumes after a kill.

Must not import torch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from orchestrator.config.base import JsonValue
from orchestrator.config.run import RunConfig
from orchestrator.config.study import SearchStudy
from orchestrator.errors import EXIT_DONE, EXIT_SAVED, ConfigError, OrchestratorError
from orchestrator.execution.run_pipeline import execute
from orchestrator.metrics.jsonl import Tail, number_of, step_of
from orchestrator.studies.search_space import (
    Axis,
    CategoricalAxis,
    axis_of,
    first_overrides,
    override_list,
    samples,
    split_space,
    text_of,
)
from orchestrator.studies.seed_grid import PlanRun, as_resolved, plan_trials
from orchestrator.studies.statistics import best_first
from orchestrator.studies.trials import (
    Standing,
    StudyFolder,
    Trial,
    WrongMetric,
    as_trial,
    freeze_study,
    metric_watch,
    standing_of,
    studied_stage,
)

if TYPE_CHECKING:
    import optuna

STUDY = "search"
WHY = "why"
"""Optuna's key for why a trial failed or was stopped."""
NUMBERS_OF_A_SEED = 1_000_003
"""Larger than any number of trials, so that no two seeds share the draws of a trial."""
SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended."""

    state: str
    """finished, weak, failed or interrupted."""
    value: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings common to all trials."""

    overrides: tuple[str, ...]
    axes: tuple[Axis, ...]
    study: SearchStudy
    stage: str
    name: str
    folder: StudyFolder
    plan_run: PlanRun


Report = Callable[[int, float], bool]
"""Report the metric at a step; returns whether the trial is weak."""
Evaluate = Callable[[int, Mapping[str, str], Report], Outcome]
"""Run trial `number` with these values."""


def trial_name(name: str, number: int) -> str:
    return f"{name}-trial_{number}"


def run_search(overrides: Sequence[str], config: RunConfig, plan_run: PlanRun) -> int:
    """Run the remaining trials; return the exit code."""
    study = config.study
    assert isinstance(study, SearchStudy)
    if find_spec("optuna") is None:
        raise ConfigError("study=optuna: Optuna is not installed; type pip install 'finetune-orchestrator[sweep]'")
    plain, axes = split_space(overrides)
    listed: list[JsonValue] = json.loads(json.dumps([asdict(axis) for axis in axes]))  # as read back
    folder = freeze_study(as_resolved(config, _checked(plain, axes, plan_run)), {"axes": listed})
    search = Search(
        overrides=tuple(plain),
        axes=tuple(axes),
        study=study,
        stage=studied_stage(config),
        name=config.name,
        folder=folder,
        plan_run=plan_run,
    )
    return run_trials(open_study(folder, study), axes, study, partial(_run_trial, search))


def run_trials(opened: optuna.Study, axes: Sequence[Axis], settings: SearchStudy, evaluate: Evaluate) -> int:
    """Ask-and-tell until all trials have ended; EXIT_SAVED after an interrupted one.

    ConfigError with every cause if more failed than allowed.
    """
    from optuna.trial import TrialState

    states = {"finished": TrialState.COMPLETE, "weak": TrialState.PRUNED, "failed": TrialState.FAIL}
    while (trial := next_trial(opened, axes, settings)) is not None:
        values = {axis.key: text_of(axis, trial.params[axis.key]) for axis in axes}
        outcome = evaluate(trial.number, values, partial(_is_weak, trial))
        if outcome.state == "interrupted":
            return EXIT_SAVED
        trial.set_user_attr(WHY, outcome.why)
        opened.tell(trial, outcome.value, state=states[outcome.state])
        print(f"trial {trial.number}: {outcome.state}{outcome.why and f': {outcome.why}'}", flush=True)
    return EXIT_DONE


def open_study(folder: StudyFolder, settings: SearchStudy) -> optuna.Study:
    """The search from its journal, or a new one."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rule = settings.pruning
    pruner = (
        optuna.pruners.NopPruner()
        if rule is None
        else optuna.pruners.MedianPruner(n_startup_trials=rule.startup_trials, n_warmup_steps=rule.after_step + 1)
    )
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder.journal))),
        study_name=STUDY,
        direction="minimize" if settings.mode == "min" else "maximize",
        pruner=pruner,
        load_if_exists=True,
    )


def next_trial(opened: optuna.Study, axes: Sequence[Axis], settings: SearchStudy) -> optuna.Trial | None:
    """The interrupted trial, or a new one; None if all have ended. ConfigError if too many failed.

    The draws of a trial depend on the seed, its number and the results before it, not on how often the search was
    interrupted.
    """
    import optuna
    from optuna.trial import TrialState

    trials = opened.get_trials(deepcopy=False)
    failed = [f"trial {old.number}: {old.user_attrs[WHY]}" for old in trials if old.state == TrialState.FAIL]
    if len(failed) > settings.max_failures:
        bound = f"{len(failed)} trials failed, and study.max_failures={settings.max_failures} is the limit"
        raise ConfigError([*failed, bound])
    begun = next((old for old in trials if old.state == TrialState.RUNNING), None)
    if begun is None and len(trials) >= settings.num_trials:
        return None
    opened.sampler = _sampler(settings, len(trials) if begun is None else begun.number)
    # Optuna has no public way to return to a started trial; its values are not drawn again.
    trial = opened.ask() if begun is None else optuna.Trial(opened, begun._trial_id)  # pyright: ignore[reportPrivateUsage]
    for axis in axes:
        _draw(trial, axis)
    return trial


def search_report(folder: StudyFolder, record: Mapping[str, Any], study: SearchStudy) -> dict[str, Any]:
    """The report of a search, from its journal and the folders of its trials."""
    axes = {axis["key"]: axis for axis in record["axes"]}
    names = {"COMPLETE": "finished", "PRUNED": "stopped as weak", "FAIL": "failed", "RUNNING": "not ended"}
    trials: list[dict[str, Any]] = []
    for trial in open_study(folder, study).get_trials(deepcopy=False):
        name = trial_name(record["config"]["name"], trial.number)
        value = trial.value if trial.state.name == "COMPLETE" else None
        values = {key: text_of(axis_of(axes[key]), drawn) for key, drawn in trial.params.items()}
        trials.append(
            {
                "name": name,
                "values": values,
                "state": names[trial.state.name],
                "why": trial.user_attrs.get(WHY, ""),
                "steps": standing_of(folder.trial(name), record["stage"], study.metric).steps,
                "value": value,
            }
        )
    best = best_first([(t["name"], t["value"]) for t in trials if t["value"] is not None], mode=study.mode)
    return {
        "kind": study.kind,
        "stage": record["stage"],
        "metric": study.metric,
        "mode": study.mode,
        "axes": list(axes.values()),
        "trials": trials,
        "finished": sum(trial["state"] == "finished" for trial in trials),
        "best": best[0] if best else None,
    }


def _checked(plain: Sequence[str], axes: Sequence[Axis], plan_run: PlanRun) -> RunConfig:
    """The run with the first values; ConfigError with every problem of every choice and both ends of every range."""
    first = first_overrides(axes)
    corners = [first, *({**first, axis.key: text} for axis in axes for text in samples(axis)[1:])]
    runs, problems = plan_trials([[*plain, *override_list(corner)] for corner in corners], plan_run)
    if problems:
        raise ConfigError(problems)
    return runs[0][0]


def _run_trial(search: Search, number: int, values: Mapping[str, str], report: Report) -> Outcome:
    trial = Trial(name=trial_name(search.name, number), values=values)
    folder = search.folder.trial(trial.name)
    print(f"trial {number + 1} of {search.study.num_trials}: {', '.join(override_list(values))}", flush=True)
    weak_at: list[int] = []
    judge = partial(_judge, search, Tail(folder.stage(search.stage).metrics), report, weak_at)
    try:
        config, planned = search.plan_run([*search.overrides, *trial.overrides])
        check = metric_watch(config)
        code = EXIT_SAVED
        if not judge(search.stage):
            code = execute(as_trial(config), planned, watch=lambda stage: check(stage) or judge(stage))
    except WrongMetric:
        raise
    except OrchestratorError as error:
        return Outcome(state="failed", why="; ".join(error.problems))
    judge(search.stage)
    return outcome_of(standing_of(folder, search.stage, search.study.metric), code, weak_at)


def outcome_of(standing: Standing, code: int, weak_at: Sequence[int]) -> Outcome:
    """The outcome of a launched trial; `weak_at` are the steps at which it was weak. None is stopped at its last
    step.
    """
    if weak_at and not (standing.state == "finished" and weak_at[0] >= standing.steps):
        return Outcome(state="weak", why=f"worse than the median at step {weak_at[0]}")
    if code == EXIT_SAVED and standing.state != "finished":
        return Outcome(state="interrupted")
    if standing.value is None:
        return Outcome(state="failed", why=standing.why or f"it ended with exit code {code}")
    if not math.isfinite(standing.value):
        return Outcome(state="failed", why=f"its result is {standing.value}")
    return Outcome(state="finished", value=standing.value)


def _judge(search: Search, tail: Tail, report: Report, weak_at: list[int], stage: str) -> bool:
    """Report every new evaluation of the compared stage until one is weak; returns whether one was."""
    if search.study.pruning is None or stage != search.stage:
        return False
    for row in tail.poll():
        value = number_of(row, search.study.metric)
        if value is not None and "step" in row and step_of(row) and not weak_at and report(step_of(row), value):
            weak_at.append(step_of(row))
    return bool(weak_at)


def _is_weak(trial: optuna.Trial, step: int, value: float) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value reported before the search was interrupted
        trial.report(value, step)
    return bool(trial.should_prune())


def _sampler(settings: SearchStudy, number: int) -> optuna.samplers.BaseSampler:
    import optuna

    seed = (settings.seed * NUMBERS_OF_A_SEED + number) % SEEDS
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=settings.startup_trials)


def _draw(trial: optuna.Trial, axis: Axis) -> None:
    if isinstance(axis, CategoricalAxis):
        trial.suggest_categorical(axis.key, axis.options)
    elif axis.whole:
        step = 1 if axis.step is None else int(axis.step)
        trial.suggest_int(axis.key, int(axis.low), int(axis.high), step=step, log=axis.log)
    else:
        trial.suggest_float(axis.key, axis.low, axis.high, step=axis.step, log=axis.log)
