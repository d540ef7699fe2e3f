"""Studies, without training: statistics, the rule that stops weak trials, spaces, the search's course, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from command_line import SLURM_SIZE, Asker

from orchestrator.config.study import SearchStudy, SeedsStudy, WeakRule
from orchestrator.errors import EXIT_DONE, EXIT_SAVED, ConfigError
from orchestrator.studies.optuna_search import Outcome, open_study, outcome_of, run_trials
from orchestrator.studies.report import write_report
from orchestrator.studies.search_space import Axis, CategoricalAxis, Range, axis_of, samples, split_space, text_of
from orchestrator.studies.seed_grid import judge, judging_step, seed_trials
from orchestrator.studies.statistics import best_first, expected_best, standard_deviation, two_way
from orchestrator.studies.trials import Standing, StudyFolder

LORA = "+experiment=llama_lora"
RATE = "stages.sft.optimizer.lr=tag(log, interval(1e-4,1e-2))"
AXES: tuple[Axis, ...] = (
    Range(key="lr", low=1e-4, high=1e-1, whole=False, log=True, step=None),
    CategoricalAxis(key="rank", options=("4", "8", "16")),
)


def search(**changes: Any) -> SearchStudy:
    whole = {
        "kind": "optuna", "stage": "auto", "metric": "eval_loss", "mode": "min", "num_trials": 12, "sampler": "tpe",
        "startup_trials": 4, "seed": 3, "pruning": None, "max_failures": 2,
    }  # fmt: skip
    return SearchStudy.model_validate({**whole, **changes})


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [0.5, 0.5, 0.5, 1.0], [7.0], [-1.0, 2.0, 2.0, -4.0]])
def test_expected_best_is_the_mean_over_every_draw(values: list[float], mode: Any) -> None:
    choose = min if mode == "min" else max
    by_hand = [
        sum(choose(draw) for draw in product(values, repeat=n)) / len(values) ** n for n in range(1, len(values) + 1)
    ]
    assert expected_best(values, mode=mode) == pytest.approx(by_hand, rel=1e-12)


def test_variance_by_source_of_a_table_worked_by_hand() -> None:
    """Rows differ by 2, columns by 0, 1, 5, and one cell is off: m = 3.5, rest worked out by hand."""
    rows, columns, rest = two_way([[0.0, 1.0, 5.0], [2.0, 3.0, 10.0]], rows="rows", columns="columns")
    assert (rows.degrees, columns.degrees, rest.degrees) == (1, 2, 2)
    assert (rows.sum_of_squares, columns.sum_of_squares, rest.sum_of_squares) == pytest.approx((13.5, 147 / 3, 3.0))
    assert rows.share + columns.share + rest.share == pytest.approx(1.0)
    assert (rows.f, columns.f, rest.f) == (pytest.approx(9.0), pytest.approx(49 / 3), None)
    assert rows.deviation == pytest.approx(((13.5 - 1.5) / 3) ** 0.5)
    assert columns.deviation == pytest.approx(((24.5 - 1.5) / 2) ** 0.5)


def test_sums_of_squares_add_up_to_the_whole_and_effects_are_found() -> None:
    draw = random.Random(0)
    table = [[10.0 * i + j + draw.gauss(0, 0.1) for j in range(5)] for i in range(4)]
    sources = two_way(table, rows="rows", columns="columns")
    values = [value for row in table for value in row]
    deviation = standard_deviation(values)
    assert deviation is not None
    assert sum(source.sum_of_squares for source in sources) == pytest.approx(deviation**2 * 19)
    assert sources[0].share > 0.9 > sources[1].share > sources[2].share


def test_tables_that_tell_less() -> None:
    row, column, rest = two_way([[1.0, 2.0]], rows="rows", columns="columns")
    assert (row.mean_square, row.deviation, rest.mean_square, rest.deviation) == (None, None, None, None)
    assert column.mean_square == pytest.approx(0.5) and column.f is None and column.deviation is None
    assert [source.share for source in two_way([[1.0, 1.0], [1.0, 1.0]], rows="r", columns="c")] == [0.0, 0.0, 0.0]
    assert two_way([[0.0, 1.0], [1.0, 0.0]], rows="r", columns="c")[0].deviation == 0.0, "a negative variance is none"
    assert standard_deviation([1.0]) is None


# ---- seeds ---------------------------------------------------------------------------------------


def test_every_seed_of_weights_meets_every_seed_of_data() -> None:
    study = SeedsStudy(
        kind="seeds", stage="auto", metric="eval_loss", mode="min", weights=(1, 2), data=(5, 6, 7), stopping=None
    )
    trials = seed_trials("x", study)
    assert [trial.name for trial in trials] == [f"x-weights_{w}-data_{d}" for w in (1, 2) for d in (5, 6, 7)]
    assert trials[-1].overrides == ["seeds.weights=2", "seeds.data=7", "name=x-weights_2-data_7"]


def test_the_best_go_on_and_the_others_are_weak() -> None:
    values = {"a": 2.0, "b": 1.0, "c": float("nan"), "d": 1.0}
    assert judge(values, step=5, keep=2, mode="min").kept == ("b", "d")
    assert judge(values, step=5, keep=2, mode="min").weak == ("a", "c")
    assert judge(values, step=5, keep=1, mode="max").kept == ("a",)
    assert best_first(list(values.items()), mode="max") == ["a", "b", "d", "c"]


def test_the_common_step_is_before_the_end() -> None:
    assert judging_step(WeakRule(share=0.3, keep=1), 10, stage="sft") == 3
    assert judging_step(WeakRule(share=0.31, keep=1), 10, stage="sft") == 4
    with pytest.raises(ConfigError, match=r"0\.95 of 10 steps, rounded up, is the end"):
        judging_step(WeakRule(share=0.95, keep=1), 10, stage="sft")
    with pytest.raises(ConfigError, match=r"type stages\.sft\.max_steps=N"):
        judging_step(WeakRule(share=0.5, keep=1), None, stage="sft")


# ---- spaces --------------------------------------------------------------------------------------


def test_words_of_several_values_are_axes() -> None:
    words = ["-m", LORA, RATE, "tuning.rank=4,8", "stages.sft.max_steps=int(interval(2,9))", "a=range(1,8,3)", "x=1"]
    plain, axes = split_space(words)
    assert plain == [LORA, "x=1"]
    rate, rank, steps, a = axes
    assert rate == Range(key="stages.sft.optimizer.lr", low=1e-4, high=1e-2, whole=False, log=True, step=None)
    assert rank == CategoricalAxis(key="tuning.rank", options=("4", "8"))
    assert steps == Range(key="stages.sft.max_steps", low=2, high=9, whole=True, log=False, step=None)
    assert a == Range(key="a", low=1, high=7, whole=True, log=False, step=3)
    assert samples(rate) == ["0.0001", "0.01"] and samples(steps) == ["2", "9"] and samples(rank) == ["4", "8"]
    assert float(text_of(rate, 0.1 + 0.2)) == 0.1 + 0.2, "a value comes back to the bit"
    assert [axis_of(json.loads(json.dumps(vars(axis)))) for axis in axes] == axes


def test_wrong_spaces_are_told_all_at_once() -> None:
    words = [
        "name=a,b", "seed=1,2", "seeds.split=1,2", "a=interval(2,1)", "b=tag(log, interval(0,1))", "c=tag(odd, choice(1,2))",
        "d=shuffle(1,2)", "e=range(1,2)", "f=1,2", "f=interval(1,2)", "+experiment=x,y",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        split_space(words)
    told = caught.value.problems
    assert len(told) == 10, told
    for part in (
        "name is not searched",
        "other held-out rows",
        "lower one",
        "no logarithm",
        "not a tag",
        "shuffle",
        "f: it has two",
    ):
        assert any(part in problem for problem in told), part
    with pytest.raises(ConfigError, match="nothing to search"):
        split_space([LORA, "x=1"])


# ---- the search ----------------------------------------------------------------------------------


def far(values: Mapping[str, str]) -> float:
    """A result that is best at lr = 0.01 and rank 8."""
    import math

    return (math.log10(float(values["lr"])) + 2) ** 2 + (values["rank"] != "8")


class Trials:
    """Stands in for training: remembers what was asked, and ends as it is told."""

    def __init__(self, ends: Mapping[int, Outcome] | None = None) -> None:
        self.asked: dict[int, dict[str, str]] = {}
        self.ends = dict(ends or {})

    def __call__(self, number: int, values: Mapping[str, str], report: Any) -> Outcome:
        self.asked[number] = dict(values)
        return self.ends.pop(number, Outcome(state="finished", value=far(values)))


def studied(folder: Path, settings: SearchStudy, trials: Trials) -> int:
    folder.mkdir(exist_ok=True)
    return run_trials(open_study(StudyFolder(folder), settings), AXES, settings, trials)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_an_interrupted_search_draws_what_a_straight_one_draws(tmp_path: Path, sampler: str) -> None:
    settings = search(sampler=sampler)
    straight = Trials()
    assert studied(tmp_path / "straight", settings, straight) == EXIT_DONE
    assert len(straight.asked) == 12 and all(1e-4 <= float(one["lr"]) <= 0.1 for one in straight.asked.values())
    interrupted = Trials({2: Outcome(state="interrupted"), 7: Outcome(state="interrupted")})
    assert studied(tmp_path / "again", settings, interrupted) == EXIT_SAVED
    assert list(interrupted.asked) == [0, 1, 2]
    assert studied(tmp_path / "again", settings, interrupted) == EXIT_SAVED
    assert studied(tmp_path / "again", settings, interrupted) == EXIT_DONE
    assert interrupted.asked == straight.asked
    more = Trials()
    assert studied(tmp_path / "again", search(sampler=sampler, num_trials=13), more) == EXIT_DONE
    assert list(more.asked) == [12]
    other = Trials()
    assert studied(tmp_path / "other", search(sampler=sampler, seed=4), other) == EXIT_DONE
    assert other.asked != straight.asked


def test_failures_are_passed_over_up_to_a_bound(tmp_path: Path) -> None:
    failing = {number: Outcome(state="failed", why=f"because {number}") for number in (1, 3, 4)}
    trials = Trials(failing)
    with pytest.raises(ConfigError) as caught:
        studied(tmp_path, search(), trials)
    assert caught.value.problems[:3] == ("trial 1: because 1", "trial 3: because 3", "trial 4: because 4")
    assert list(trials.asked) == [0, 1, 2, 3, 4]
    assert studied(tmp_path, search(max_failures=3), trials) == EXIT_DONE
    assert len(trials.asked) == 12


def test_a_trial_worse_than_the_median_is_weak(tmp_path: Path) -> None:
    settings = search(num_trials=5, pruning={"startup_trials": 2, "after_step": 1})
    told: dict[int, list[bool]] = {}

    def course(number: int, _values: Mapping[str, str], report: Any) -> Outcome:
        told[number] = [report(step, float(number)) for step in (1, 2, 2)]  # a step may be told twice
        return Outcome(state="weak", why="x") if any(told[number]) else Outcome(state="finished", value=float(number))

    opened = open_study(StudyFolder(tmp_path), settings)
    assert run_trials(opened, AXES, settings, course) == EXIT_DONE
    assert told == {
        0: [False] * 3,
        1: [False] * 3,
        2: [False, True, True],
        3: [False, True, True],
        4: [False, True, True],
    }
    assert [trial.state.name for trial in opened.trials] == ["COMPLETE"] * 2 + ["PRUNED"] * 3


def test_how_a_launched_trial_ended() -> None:
    done = Standing(state="finished", why="", steps=6, value=1.5, values={3: 2.0, 6: 1.5})
    paused = Standing(state="stopped", why="STOP file", steps=4, value=None, values={3: 2.0})
    assert outcome_of(done, EXIT_DONE, []) == Outcome(state="finished", value=1.5)
    assert outcome_of(done, EXIT_SAVED, [6]).state == "finished", "the last step stops nothing"
    assert outcome_of(done, EXIT_DONE, [3]).state == outcome_of(paused, EXIT_SAVED, [3]).state == "weak"
    assert outcome_of(paused, EXIT_SAVED, []).state == "interrupted"
    assert outcome_of(Standing(state="failed", why="NaN", steps=1, value=None, values={}), 93, []).why == "NaN"


# ---- the command line ----------------------------------------------------------------------------


def test_what_a_study_cannot_be_is_refused_before_anything_is_written(ask: Asker) -> None:
    told = ask.refused(
        LORA, "study=seeds", "study.weights=[1,1]", "study.stopping={share: 0.3, keep: 9}", "study.stage=dpo"
    )
    assert "dpo trains nothing" in told[0]
    told = ask.refused(LORA, "study=seeds", "study.weights=[1,1]", "study.stopping={share: 0.3, keep: 9}")
    assert "a seed appears twice" in told[0] and "9 of 2 x 3 = 6 trials stops none" in told[1]
    assert "no held-out rows" in ask.refused(LORA, "study=seeds", "stages.sft.data.eval.path=none")[0]
    assert "leave out -m" in ask.refused("-m", LORA, "study=seeds", "tuning.rank=4,8")[0]
    assert "nothing to search" in ask.refused(LORA, "study=optuna")[0]
    slurm = ("launcher=slurm", *SLURM_SIZE)
    assert "only submitted" in ask.refused(LORA, "study=seeds", "study.stopping={share: 0.3, keep: 2}", *slurm)[0]
    assert "only submitted" in ask.refused("-m", LORA, "study=optuna", RATE, *slurm)[0]
    assert "queued again" in ask.refused(LORA, "stages.sft.pause_at_step=3", *slurm)[0]
    assert "--only" in ask.refused(LORA, "study=seeds", "--only", "sft")[0]
    assert "render writes the scripts of one run" in ask.refused("render", LORA, "study=seeds")[0]
    assert "evaluate_every_steps=50" in ask.refused(
        "-m", LORA, "study=optuna", RATE, "study.pruning={startup_trials: 2, after_step: 0}"
    )[0]  # fmt: skip
    told = ask.refused(
        "-m", LORA, "study=optuna", "tuning.rank=int(interval(0,8))", "stages.sft.optimizer.lr=1e-4,-1", "x=1"
    )
    assert len(told) == 2 and "x: unknown key" in told[0], told
    told = ask.refused(
        "-m", LORA, "study=optuna", "tuning.rank=int(interval(1,8))", "stages.sft.optimizer.lr=1e-4,-1,-2"
    )
    assert len(told) == 2 and "-1" in told[0] and "-2" in told[1], told


def test_plan_tells_of_a_study_and_loads_nothing_for_it(tmp_path: Path) -> None:
    program = (
        "import sys; from orchestrator.cli.main import main\n"
        f"assert main(['plan', '{LORA}', 'study=seeds']) == 0\n"
        f"assert main(['plan', '-m', '{LORA}', 'study=optuna', '{RATE}']) == 0\n"
        "assert not {'optuna', 'matplotlib', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study seeds: 9 such runs (3 seeds of new weights x 3 of the data order)" in done.stdout.replace("\n", " ")
    assert "study optuna: 20 such runs (searched by tpe" in done.stdout.replace("\n", " ")


def test_a_folder_without_a_study_has_no_report(tmp_path: Path, ask: Asker) -> None:
    assert "holds no study.json" in ask.refused("report", str(tmp_path))[0]
    assert "one folder of a study" in ask.refused("report")[0]
    with pytest.raises(ConfigError):
        write_report(StudyFolder(tmp_path))
