"""Every experiment under every launcher composes, validates, plans and renders; what cannot start is refused."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import pytest
from command_line import SLURM_SIZE, Asker

from launchers.spec import InvalidValueError
from orchestrator.composition.compose import CONF, compose, experiments
from orchestrator.config.run import RunConfig
from orchestrator.execution.job_specs import render
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.plan import make_plan

LAUNCHERS = ("local", "torchrun", "slurm")
RUN_HERE = (
    "llama_classify",
    "llama_dpo",
    "llama_full",
    "llama_lora",
    "llama_lpft",
    "llama_qlora",
    "llama_reward",
    "llama_rlhf",
    "llama_weak_supervision",
)
RECIPES = (
    "llama3_70b_qlora_zero3",
    "llama3_8b_full_zero3",
    "llama3_8b_lora",
    "llama3_8b_rlhf",
    "mixtral_8x7b_lora_zero3",
    "qwen3_8b_qlora",
)
TWO_NODES = ("llama3_70b_qlora_zero3", "mixtral_8x7b_lora_zero3")
CASES = list(product(sorted(RUN_HERE + RECIPES), LAUNCHERS))


def config_of(experiment: str, launcher: str, folder: Path) -> RunConfig:
    on_this_machine = experiment in (*RUN_HERE, "qwen3_8b_qlora")
    size = SLURM_SIZE if launcher == "slurm" and on_this_machine else ()
    return resolve(compose([f"+experiment={experiment}", f"launcher={launcher}", *size]), folder)


def test_the_experiments_are_those_of_the_issue() -> None:
    assert experiments() == sorted(RUN_HERE + RECIPES)
    assert len(CASES) == 15 * 3


@pytest.mark.parametrize(("experiment", "launcher"), CASES)
def test_experiment_under_launcher(experiment: str, launcher: str, tmp_path: Path) -> None:
    config = config_of(experiment, launcher, tmp_path)
    if experiment in TWO_NODES and launcher == "local":
        with pytest.raises(InvalidValueError, match=r"cluster\.nodes is 2: .* use launcher=torchrun or launcher=slurm"):
            render(config, "sft")
        return
    base, data = inspect_inputs(config)
    stages = make_plan(config, base=base, data=data).stages
    assert [stage.name for stage in stages] == list(config.pipeline)
    for stage in stages:
        if stage.global_size is None:
            assert stage.kind in ("evaluate", "merge")
        else:
            assert stage.world_size == config.cluster.nodes * config.cluster.processes_per_node
            assert stage.accumulation_steps is not None and stage.memory is not None and stage.memory.total > 0
            assert stage.global_size == stage.micro_size * stage.world_size * stage.accumulation_steps
            assert (stage.deepspeed is None) == (config.sharding.strategy == "none")
        assert stage.parameters is not None
        script = render(config, stage.name)
        assert script.path == stage.script == str(tmp_path / "runs" / experiment / "scripts" / Path(stage.script).name)
        assert script.path.endswith(".sbatch" if launcher == "slurm" else ".sh")
        assert "orchestrator.worker" in script.text and "@{" not in script.text
        subprocess.run(["bash", "-n"], input=script.text, text=True, check=True)
        assert render(config, stage.name).text == script.text


def test_slurm_on_the_local_profile_names_what_the_site_must_say(ask: Asker) -> None:
    told = ask.refused("plan", "+experiment=llama_lora", "launcher=slurm")
    assert [line.split(" ")[0] for line in told] == ["cluster.cpus_per_task", "cluster.memory", "cluster.time_limit"]


@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_says_purpose_command_hardware_and_time(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    lines = text.splitlines()
    assert lines[0] == "# @package _global_"
    for number, word in enumerate(("Purpose", "Command", "Hardware", "Expected time"), start=1):
        assert lines[number].startswith(f"# {word}: ") and len(lines[number]) > len(word) + 10
    assert f"+experiment={experiment}" in lines[2]
    assert f"\nname: {experiment}\n" in text


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_file_says_its_purpose(file: Path) -> None:
    header = [line for line in file.read_text().splitlines()[:2] if line.startswith("# Purpose: ")]
    assert len(header) == 1


def test_stages_that_read_each_other_share_a_chat_template(ask: Asker) -> None:
    told, missing = ask.refused(
        "plan", "+experiment=llama_rlhf", "stages.reward.data.chat_template=/x/other.jinja", "pipeline=[sft,reward]"
    )
    assert told.startswith(
        "stages.reward.data.chat_template: /x/other.jinja, but it reads sft, which uses the tokenizer's own"
    )
    assert missing.startswith("stages.reward.data.chat_template: /x/other.jinja is not a file")
