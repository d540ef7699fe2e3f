"""The advice against an exhaustive search of its own, on thirty cases; auto values; what is said where nothing fits."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from command_line import Asker

from orchestrator.architecture.base_model import Base
from orchestrator.composition.compose import compose
from orchestrator.config.rules import rule_problems
from orchestrator.config.run import RunConfig, training_stages
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.auto_settings import choices_of, judge_of
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.plan import make_plan
from orchestrator.planning.settings_search import Advice, advise, axes_of

EXPERIMENTS = {
    "llama3_8b_lora": ["cluster=h100x8"],
    "llama3_8b_full_zero3": ["cluster=h100x8"],
    "llama3_70b_qlora_zero3": ["cluster=h100x8"],
    "qwen3_8b_qlora": ["cluster=a100x8"],
    "mixtral_8x7b_lora_zero3": ["cluster=h100x8"],
}
CHANGES = ([], ["hardware@cluster.hardware=l40s"], ["cluster.nodes=2"])
LENGTHS = (2048, 8192)
CASES = [
    (experiment, tuple(cluster), tuple(change), length)
    for (experiment, cluster), change, length in product(EXPERIMENTS.items(), CHANGES, LENGTHS)
]


def case(experiment: str, *words: str) -> tuple[RunConfig, Base, dict[str, DataFacts]]:
    config = resolve(compose([f"+experiment={experiment}", "launcher=slurm", *words]), Path.cwd())
    return config, *inspect_inputs(config)


def brute_force(config: RunConfig, base: Base, data: dict[str, DataFacts]) -> list[tuple[str, float]]:
    """(verdict, seconds of a step) of every setting, made one by one without the search's own code."""
    judge = judge_of(base, data)
    (name,) = training_stages(config)
    found: list[tuple[str, float]] = []
    batch = config.stages[name].batch  # type: ignore[union-attr]
    for sharding, checkpointing in product(choices_of(config, None).shardings.values(), (True, False)):
        for size in range(batch.global_size, 0, -1):
            stage = config.stages[name].model_copy(update={"batch": batch.model_copy(update={"micro_size": size})})
            model = config.model.model_copy(update={"gradient_checkpointing": checkpointing})
            tried = config.model_copy(
                update={"stages": {**config.stages, name: stage}, "model": model, "sharding": sharding}
            )
            if batch.global_size % (size * config.world_size) == 0 and not rule_problems(tried):
                judged = judge(tried)[name]
                found.append((judged.verdict, judged.step_seconds))
    return found


def advice_of(config: RunConfig, base: Base, data: dict[str, DataFacts]) -> Advice:
    choices = choices_of(config, None)
    axes = axes_of(config, shardings=choices.shardings, quantizations=choices.quantizations)
    return advise(config, axes, judge_of(base, data))


def test_thirty_cases() -> None:
    assert len(CASES) == 30


@pytest.mark.parametrize(("experiment", "cluster", "change", "length"), CASES)
def test_no_cheaper_feasible_setting_is_missed(
    experiment: str, cluster: tuple[str, ...], change: tuple[str, ...], length: int
) -> None:
    words = [*cluster, *change, f"stages.sft.data.max_length={length}", "stages.sft.batch.global_size=64"]
    config, base, data = case(experiment, *words)
    tried = brute_force(config, base, data)
    best = advice_of(config, base, data).best
    assert len(tried) >= 20
    for verdict in ("FIT", "TIGHT"):
        seconds = [second for known, second in tried if known == verdict]
        if seconds:
            assert best is not None and best.verdict == verdict
            (chosen,) = best.step_seconds.values()
            assert chosen <= min(seconds) * 1.011, (best, min(seconds))
            return
    assert best is None


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "llama3_8b_rlhf"])
def test_what_ships_for_real_hardware_fits_it(experiment: str) -> None:
    config, base, data = case(experiment, *EXPERIMENTS.get(experiment, ["cluster=h100x8"]))
    planned = make_plan(config, base=base, data=data)
    verdicts = {stage.name: stage.memory.verdict for stage in planned.stages if stage.memory is not None}
    assert set(verdicts.values()) == {"FIT"} and len(verdicts) == len(config.pipeline), verdicts
    assert not any("advise=true" in warning for warning in planned.warnings)


def test_checkpointing_is_off_where_memory_allows() -> None:
    config, base, data = case("llama3_8b_lora", "cluster=h100x8", "stages.sft.data.max_length=2048")
    best = advice_of(config, base, data).best
    assert best is not None and not best.checkpointing and best.verdict == "FIT"


def test_auto_is_settled_and_shown(ask: Asker) -> None:
    words = ["+experiment=llama3_8b_lora", "cluster=h100x8", "launcher=slurm", "sharding=auto"]
    words += ["stages.sft.batch.micro_size=auto", "model.gradient_checkpointing=auto", "format=json"]
    answer = ask("plan", *words)
    assert answer.code == 0, answer.errors
    stage = json.loads(answer.out)["stages"][0]
    assert isinstance(stage["micro_size"], int) and stage["memory"]["verdict"] == "FIT"
    assert json.loads(answer.out)["sharding"] in ("none", "zero1", "zero2", "zero3")


def test_a_rerun_keeps_what_was_settled(ask: Asker) -> None:
    """Also where the search would find something else by now: here the devices have become smaller."""
    words = ["+experiment=llama3_8b_lora", "cluster=h100x8", "launcher=slurm", "sharding=auto", "name=kept"]
    words += ["stages.sft.batch.micro_size=auto"]
    assert ask("render", *words).code == 0
    frozen = json.loads((ask.folder / "runs" / "kept" / "run.json").read_text())["config"]
    settled = (frozen["sharding"]["strategy"], frozen["stages"]["sft"]["batch"]["micro_size"])
    smaller = [*words, "cluster.hardware.memory_gib=18", "format=json"]
    again = json.loads(ask("plan", *smaller).out)
    assert (again["sharding"], again["stages"][0]["micro_size"]) == settled
    renamed = ["name=new" if word == "name=kept" else word for word in smaller]
    other = json.loads(ask("plan", *renamed).out)
    assert (other["sharding"], other["stages"][0]["micro_size"]) != settled


def test_where_nothing_fits_the_nearest_changes_are_told(ask: Asker) -> None:
    answer = ask(
        "plan", "+experiment=llama3_70b_qlora_zero3", "cluster=h100x8", "launcher=slurm", "hardware@cluster.hardware=rtx4090",
        "cluster.processes_per_node=1", "cluster.gpus_per_node=1", "tuning=full", "quantization=none", "sharding=auto",
        "cluster.node_memory_gib=256",
        "stages.sft.batch.micro_size=auto",
    )  # fmt: skip
    told = "\n".join(answer.errors)
    assert answer.code == 2
    assert "auto finds no setting that fits" in told and "every setting needs at least" in told
    assert "a node's host needs" in told and "it has 256" in told


def test_advice_is_printed(ask: Asker) -> None:
    answer = ask("plan", "+experiment=llama3_8b_full_zero3", "cluster=h100x8", "launcher=slurm", "advise=true")
    assert answer.code == 0, answer.errors
    assert "settings that fit, fastest first" in answer.out and "the fastest that fits: " in answer.out
    assert "against" in answer.out and "seconds a step" in answer.out
    words = ("+experiment=llama3_8b_full_zero3", "cluster=h100x8", "launcher=slurm", "advise=true", "format=json")
    told = json.loads(ask("plan", *words).out)
    assert told["fitting"][0]["verdict"] == "FIT" and told["nearest"] == []


def test_auto_in_a_scaling_table_is_refused(ask: Asker) -> None:
    words = ("+experiment=llama3_8b_lora", "cluster=h100x8", "sharding=auto", "cluster.nodes=1,2")
    assert "sharding: auto is resolved for one number of nodes" in "\n".join(ask.refused("plan", *words))


def test_a_device_of_unknown_memory_is_refused_with_what_to_type(ask: Asker) -> None:
    answer = ask(
        "plan",
        "+experiment=llama3_8b_lora",
        "cluster=h100x8",
        "launcher=slurm",
        "sharding=auto",
        "hardware@cluster.hardware=unknown",
    )
    assert answer.code == 2 and "hardware@cluster.hardware=" in "\n".join(answer.errors)
