"""Hydra's multirun: which runs the words ask for, what they are called, and that all problems come before any run."""

from __future__ import annotations

import json

import pytest
from command_line import Asker

from orchestrator.composition.multirun import combinations, first_overrides, is_sweep
from orchestrator.errors import ConfigError

LORA = "+experiment=llama_lora"


def test_one_run_for_each_combination_named_by_its_values() -> None:
    words = ["-m", LORA, "seed=3", "stages.sft.optimizer.lr=1e-4,2e-4", "tuning.rank=4,8"]
    assert is_sweep(words) and not is_sweep(words[1:])
    runs = combinations(words, name="demo")
    assert runs == [
        [LORA, "seed=3", f"stages.sft.optimizer.lr={lr}", f"tuning.rank={rank}", f"name=demo-lr_{lr}-rank_{rank}"]
        for lr in ("0.0001", "0.0002")
        for rank in (4, 8)
    ]
    assert first_overrides(words) == [LORA, "seed=3", "stages.sft.optimizer.lr=0.0001", "tuning.rank=4"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["name=a,b"], ["a", "b"]),
        (["name=mine", "seed=range(1,4)"], ["mine-seed_1", "mine-seed_2", "mine-seed_3"]),
        (["+experiment=llama_lora,llama_full"], ["mine-experiment_llama_lora", "mine-experiment_llama_full"]),
        (["optimizer@stages.sft.optimizer=adamw,adamw_8bit"], ["mine-optimizer_adamw", "mine-optimizer_adamw_8bit"]),
        (["stages.sft.data.train.path=/x/a b.jsonl,/y/c.jsonl"], ["mine-path_x_a_b.jsonl", "mine-path_y_c.jsonl"]),
        (["stages.sft.data.train.path=a*,a?"], ["mine-0", "mine-1"]),
        (["tuning.target_modules=[a,b],[c]"], ["mine-target_modules_a_b", "mine-target_modules_c"]),
    ],
)
def test_names_are_names_of_folders(words: list[str], names: list[str]) -> None:
    found = combinations(["-m", *words], name="mine")
    assert [[word for word in run if word.startswith("name=")][-1] for run in found] == [
        f"name={name}" for name in names
    ]


@pytest.mark.parametrize("words", [["-m"], ["-m", "seed=1"], ["-m", "seed=interval(0,1)"]])
def test_words_that_ask_for_no_list_of_runs_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"several values|list them"):
        combinations(words, name="x")


def test_the_command_line_plans_every_run_and_tells_every_problem(ask: Asker) -> None:
    told = ask("plan", "-m", LORA, "stages.sft.optimizer.lr=1e-4,2e-4", "format=json")
    assert told.code == 0, told.errorss
    decoder, text, names = json.JSONDecoder(), told.out, []
    while text.strip():
        plan, end = decoder.raw_decode(text.lstrip())
        names.append(plan["name"])
        text = text.lstrip()[end:]
    assert names == ["llama_lora-lr_0.0001", "llama_lora-lr_0.0002"]
    bad = ask("-m", LORA, "stages.sft.optimizer.lr=1e-4,-1,-2")
    assert bad.code == 2 and "-1" in str(bad.errors) and "-2" in str(bad.errors), bad.errors
