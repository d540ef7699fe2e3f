"""The Python API on the login side: the same answers as the verbs, typed, and no torch before `load`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import compose, plan, resume, run, status
from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.records import Plan

EXPERIMENT = "+experiment=llama_lora"


@pytest.mark.parametrize(
    "value",
    [
        "my rows.jsonl",
        "it's {odd}, isn't it=?",
        'say "hi"',
        "back\\slash\\",
        "1.5",
        "null",
        "true",
        "~/rows.jsonl",
        "a,b",
    ],
)
def test_a_text_comes_out_of_the_configuration_as_it_went_in(value: str) -> None:
    config = compose(EXPERIMENT, {"model.base": value})
    assert isinstance(config, RunConfig) and config.model.base == value


def test_lists_dicts_numbers_and_none_of_a_mapping() -> None:
    config = compose(
        EXPERIMENT,
        {
            "tuning.target_modules": ["q_proj", "v_proj"],
            "stages.sft.optimizer.lr": 1e-4,
            "stages.sft.evaluate_every_steps": None,
            "stages.sft.data.train.columns": {"prompt": "a question", "completion": "answer"},
            "stages.sft.ledger": False,
        },
    )
    stage = config.stages["sft"]
    assert config.tuning.target_modules == ("q_proj", "v_proj") and stage.optimizer.lr == 1e-4
    assert stage.evaluate_every_steps is None and stage.ledger is False
    assert stage.data.train.columns == {"prompt": "a question", "completion": "answer"}


def test_every_problem_is_raised_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(EXPERIMENT, "stages.sft.optimzer.lr=1", {"stages.sft.batch.global_siz": 3})
    assert len(caught.value.problems) == 2 and "did you mean stages.sft.optimizer.lr?" in caught.value.problems[0]


def test_what_is_no_value_and_what_is_no_override() -> None:
    with pytest.raises(ConfigError, match=r"allowed are None, bool, int, float, str, Path, list, tuple and dict"):
        compose(EXPERIMENT, {"seed": {1, 2}})
    with pytest.raises(ConfigError, match=r"give strings and mappings one by one: run\(\*overrides\)"):
        plan([EXPERIMENT, "name=mine"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--config-dir: options belong to the command line"):
        plan("--config-dir", "elsewhere", EXPERIMENT)


def test_a_key_has_one_value_wherever_it_is_given() -> None:
    with pytest.raises(ConfigError, match="seed is given twice, seed=1 and seed=2: leave one out"):
        compose("+experiment=llama_lora", "seed=1", {"seed": 2})


def test_plan_is_typed_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = plan(EXPERIMENT, {"name": "typed"})
    assert (
        isinstance(planned, Plan) and planned.stages[0].steps and planned.run_directory == str(tmp_path / "runs/typed")
    )
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder, and holds none"):
        status(tmp_path)
    with pytest.raises(ConfigError, match="is not a run folder: it holds no"):
        resume(tmp_path)


def test_a_study_is_many_runs() -> None:
    with pytest.raises(ConfigError, match="study=seeds: a study is many runs"):
        run(EXPERIMENT, "study=seeds")


def test_names_are_found_on_use_and_without_torch() -> None:
    code = (
        "import sys, orchestrator\n"
        "assert 'pydantic' not in sys.modules\n"
        "assert set(orchestrator.API) <= set(dir(orchestrator))\n"
        "from orchestrator import compose, load, plan, resume, run, status\n"
        "plan('+experiment=llama_lora')\n"
        "print(callable(plan), callable(compose), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["True", "True", "False"]
