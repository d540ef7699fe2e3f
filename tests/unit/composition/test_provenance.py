"""`config` shows the source of every value; `keys` is the reference, and docs/keys.md is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Asker
from config_fields import FIELDS

import orchestrator
from orchestrator.cli.keys import page
from orchestrator.composition.key_reference import Key, reference
from orchestrator.composition.key_search import matching
from orchestrator.composition.overrides import CONF

LORA = "+experiment=llama_lora"


@pytest.fixture(scope="module")
def keys() -> list[Key]:
    return reference()


def shown(ask: Asker, *words: str) -> dict[str, Any]:
    answer = ask("config", *words, "format=json")
    assert answer.code == 0, answer
    return json.loads(answer.out)


def test_every_value_has_the_line_that_gave_it(ask: Asker) -> None:
    found = shown(ask, LORA, "tuning.rank=4", "stages.sft.batch={micro_size: 2}", "+cluster.environment.A=x")
    sources = found["sources"]
    assert set(sources.values()) >= {"command line"} and all(sources.values())
    typed = {key for key, source in sources.items() if source == "command line"}
    assert typed == {"tuning.rank", "stages.sft.batch.micro_size", "cluster.environment.A"}
    for key, source in sources.items():
        if source != "command line":
            file, line = source.removeprefix("conf/").split(":")
            name = key.rpartition(".")[2]
            text = (CONF / file).read_text().splitlines()[int(line) - 1]
            assert f"{name}:" in text or "{" in text, (key, source, text)


def test_what_is_printed_is_yaml_of_the_same_values(ask: Asker) -> None:
    words = (LORA, "stages.sft.data.train.path=a #b: c.jsonl")
    answer = ask("config", *words)
    assert yaml.safe_load(answer.out) == shown(ask, *words)["config"]
    assert "  # command line" in answer.out and "name: llama_lora" in answer.out


def test_a_part_and_the_difference_from_the_experiment(ask: Asker) -> None:
    part = ask("config", LORA, "stages.sft.optimizer").out
    assert list(yaml.safe_load(part)["stages"]["sft"]) == ["optimizer"]
    diff = ask("config", LORA, "tuning=full", "stages.sft.optimizer.lr=1e-4", "--diff").out
    assert yaml.safe_load(diff) == {"tuning": {"method": "full"}, "stages": {"sft": {"optimizer": {"lr": 1e-4}}}}
    assert "# command line; 0.002 in conf/experiment/llama_lora.yaml:" in diff
    assert "# gone: tuning.rank: 16 (conf/tuning/lora.yaml:" in diff
    assert ask("config", LORA, "--diff").out == "# nothing differs from the experiment alone\n"
    assert ask.refused("config", LORA, "stages.sft.optimiser") == (
        "stages.sft.optimiser: unknown key; did you mean stages.sft.optimizer?",
    )
    assert ask.refused("config", "llama_lora") == (
        "llama_lora is not an override; did you mean +experiment=llama_lora?",
    )


def test_an_experiment_file_and_a_frozen_run(ask: Asker) -> None:
    (ask.folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - llama_lora\n  - _self_\nseed: 5\n")
    sources = shown(ask, "mine.yaml")["sources"]
    assert sources["seed"] == "mine.yaml:5" and sources["name"] == "mine.yaml (its own name)"
    assert ask("render", "mine.yaml", "tuning.rank=4").code == 0
    frozen = yaml.safe_load(ask("config", "runs/mine").out)
    assert frozen["tuning"]["rank"] == 4 and frozen["seed"] == 5
    assert yaml.safe_load(ask("config", "runs/mine", "tuning").out) == {"tuning": frozen["tuning"]}
    assert ask.refused("config", "runs") == ("runs is not a run folder: it holds no run.json; type runs/mine",)
    assert ask.refused("config", "runs/mine", "seed=3")[0].startswith("runs/mine is a run: type config runs/mine")


def test_the_reference_has_every_field(keys: list[Key]) -> None:
    names = {key.name.rpartition(".")[2] for key in keys}
    assert {name for _, name in FIELDS} <= names and len(keys) > 300
    by_name = {key.name: key for key in keys}
    lr = by_name["stages.STAGE.optimizer.lr"]
    assert (lr.type, lr.default, lr.sentence) == ("float > 0", "0.0002", "Peak learning rate.")
    assert by_name["tuning=CHOICE"].default == "lora" and "adalora | " in by_name["tuning=CHOICE"].type
    assert by_name["stages.STAGE.data.max_length"].unit == "tokens"
    bare = {key.name.rpartition(".")[2] for key in keys if not key.sentence and ".architecture." not in key.name}
    assert bare <= {
        "batch",
        "checkpoint",
        "cluster",
        "data",
        "faults",
        "model",
        "optimizer",
        "preset",
        "schedule",
        "seeds",
        "architecture",
    }
    ranks = {key.only: key.default for key in keys if key.name == "tuning.rank"}
    assert ranks[("adalora",)] == "8"


def test_defaults_are_those_of_conf(keys: list[Key]) -> None:
    """Every leaf of the default configuration is in the reference."""
    tree = yaml.safe_load((CONF / "tuning/vera.yaml").read_text())
    vera = {
        key.name: key.default for key in keys if key.name.startswith("tuning.") and (not key.only or "vera" in key.only)
    }
    assert {f"tuning.{name}" for name in tree} <= set(vera)
    assert "256 (vera)" in vera["tuning.rank"] and vera["tuning.projection_seed"] == "0"


def test_patterns_and_other_tools_names(ask: Asker, keys: list[Key]) -> None:
    assert {key.name for key in matching(keys, "*.optimizer.lr")} == {"stages.STAGE.optimizer.lr"}
    assert all("packing" in key.name for key in matching(keys, "PACKING")) and matching(keys, "PACKING")
    # Keys as `config` and `plan` print them, with the name of a stage or of a set and the position in a list.
    assert "stages.STAGE.optimizer.lr" in {key.name for key in matching(keys, "stages.own.optimizer.lr")}
    assert [key.name for key in matching(keys, "stages.own.sets.books.split")] == ["stages.STAGE.sets.SET.split"]
    assert [key.name for key in matching(keys, "stages.sft.data.mix.12.path")] == ["stages.STAGE.data.mix.0.path"]
    takes_auto = {key.name for key in keys if key.type.startswith("auto | ")}
    assert takes_auto >= {"model.dtype", "model.gradient_checkpointing", "stages.STAGE.batch.micro_size"}
    answer = ask("keys", "learning_rate")
    assert answer.out.startswith("learning_rate is optimizer.lr here\nstages.STAGE.optimizer.lr ")
    assert ask.refused("keys", "wibble") == ("wibble: no key contains this; type keys without a pattern for all",)


def test_the_page_in_docs_is_the_reference(keys: list[Key]) -> None:
    stored = Path(orchestrator.__file__).parent.parent / "docs" / "keys.md"
    assert stored.read_text(encoding="utf-8") == page(keys), (
        "docs/keys.md is not what the types say: type make docs-keys"
    )
