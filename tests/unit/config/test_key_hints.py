"""What was meant: other tools' names of keys, paths as a shell passes them on, arguments that are no overrides, two values for one key."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from command_line import ROW, Asker, write_rows

from orchestrator.composition.compose import compose, dotted_keys
from orchestrator.composition.overrides import CONF, choices_of, parse_override
from orchestrator.config.key_hints import ALIASES, CHOICE_HINTS, key_hint
from orchestrator.config.run import RunConfig
from orchestrator.config.validation_messages import PATTERNS

LORA = "+experiment=llama_lora"


@pytest.fixture(scope="module")
def keys() -> list[str]:
    return dotted_keys(compose([LORA, "sharding=zero2"]).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.learning_rate", "stages.sft.optimizer.lr"),
        ("optimizer.lr", "stages.sft.optimizer.lr"),
        ("lr", "stages.sft.optimizer.lr"),
        ("learning_rate", "stages.sft.optimizer.lr"),
        ("stages.sft.learning_rate", "stages.sft.optimizer.lr"),
        ("per_device_train_batch_size", "stages.sft.batch.micro_size"),
        ("gradient_accumulation_steps", "stages.sft.batch.global_size"),
        ("num_train_epochs", "stages.sft.epochs"),
        ("lora_r", "tuning.rank"),
        ("lora_alpha", "tuning.alpha"),
        ("max_seq_length", "stages.sft.data.max_length"),
        ("model_name_or_path", "model.base"),
        ("load_in_4bit", "quantization=nf4"),
        ("train_file", "stages.sft.data.train.path"),
        ("save_steps", "stages.sft.checkpoint.every_steps"),
        ("nproc_per_node", "cluster.processes_per_node"),
        ("optimzer.weight_deca", "stages.sft.optimizer.weight_decay"),
        ("evaluate_every", "stages.sft.evaluate_every_steps"),
    ],
)
def test_the_key_that_was_meant(keys: list[str], key: str, meant: str) -> None:
    assert key_hint(key, keys) == f"; did you mean {meant}?"


def test_no_hint_is_better_than_a_wrong_one(keys: list[str]) -> None:
    assert key_hint("optimizer.foreach", keys) == key_hint("wibble", keys) == ""
    assert key_hint("rollout.num_generations", keys).startswith("; it would be rollout.group_size here, which")


def test_every_alias_ends_at_a_key_or_a_choice_of_ours() -> None:
    stages = ["llama_rlhf", "llama_weak_supervision", "llama_dpo"]
    known = {key for name in stages for key in dotted_keys(compose([f"+experiment={name}"]).model_dump(mode="json"))}
    for target in [*ALIASES.values(), *(word for typed in CHOICE_HINTS.values() for word in typed.split())]:
        group, equals, choice = target.partition("=")
        assert (
            (choice in choices_of(group, [CONF])) if equals else any(f".{key}".endswith(f".{target}") for key in known)
        ), target


def test_stages_of_the_given_name_win(keys: list[str]) -> None:
    several = [*keys, *(key.replace("stages.sft", "stages.align") for key in keys)]
    assert key_hint("stages.align.lr", several) == "; did you mean stages.align.optimizer.lr?"


def test_an_unknown_field_of_an_added_map_and_of_a_file_has_the_hint_too(ask: Asker) -> None:
    (told,) = ask.refused("plan", LORA, "+stages.sft.optimizer.learning_rate=1")
    assert told == "stages.sft.optimizer.learning_rate: unknown key; did you mean lr?"
    (told,) = ask.refused("plan", LORA, "+stages.sft.wibble=1")
    assert told.startswith("stages.sft.wibble: unknown key; allowed are batch, ") and "clip_low" not in told


@pytest.mark.parametrize(
    "value",
    [
        "~/no rows.jsonl", "../x/rows.jsonl", "a=b/rows=1.jsonl", "my (old) rows.jsonl", "rows[1].jsonl", "x{a,b}.jsonl", "Übung/ä.jsonl",
        "a#b.jsonl", "it's.jsonl", "2024", "1e3", "true", "a & b; c.jsonl", "`x`.jsonl", "<x>|y.jsonl",
    ],
)  # fmt: skip
def test_a_path_is_taken_as_it_is_typed(value: str) -> None:
    key = "stages.sft.data.train.path"
    assert compose([LORA, f"{key}={value}"]).stages["sft"].data.train.path == value


def test_a_path_with_a_comma_is_taken_where_there_is_such_a_file(tmp_path: Path, ask: Asker) -> None:
    text = f"stages.sft.data.train.path={tmp_path}/a,b.jsonl"
    (told,) = ask.refused("plan", LORA, text)
    assert told.endswith(
        f"if the comma is part of the text, type 'stages.sft.data.train.path=\"{tmp_path}/a,b.jsonl\"'"
    )
    write_rows(tmp_path / "a,b.jsonl", [ROW])
    assert parse_override(text).value == f"{tmp_path}/a,b.jsonl"


@pytest.mark.parametrize("value", ["{a}.jsonl", "[x", "a,b", "${HOME/x", "'x"])
def test_what_a_hint_says_can_be_pasted(value: str) -> None:
    from orchestrator.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        parse_override(f"output_dir={value}")
    typed = str(error.value).rpartition(" type " if ", type " in str(error.value) else "for text ")[2]
    (word,) = shlex.split(typed)
    assert parse_override(word).value == value


def test_digits_are_a_name_and_a_number_elsewhere() -> None:
    config = compose([LORA, "name=2024", "seed=7"])
    assert (config.name, config.seed) == ("2024", 7)


def test_every_pattern_is_told_in_words() -> None:
    from config_fields import SECTIONS

    def patterns(annotation: Any) -> Iterator[str]:
        for inner in get_args(annotation):
            yield from (str(part.pattern) for part in getattr(inner, "metadata", ()) if getattr(part, "pattern", None))
            yield from patterns(inner)

    fields = [field for section in SECTIONS for field in section.model_fields.values()]
    found = {str(part.pattern) for field in fields for part in field.metadata if getattr(part, "pattern", None)}
    found |= {pattern for field in fields for pattern in patterns(field.annotation)}
    assert found == set(PATTERNS)
    assert RunConfig.model_fields["name"].metadata


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("name=my run",), 'name: letters, digits, ".", "_" and "-" are allowed, up to 100 of them, the first a letter or a digit, not "my run"; try name=my_run'),
        (("tuning=freeze", "tuning.layers=top 3"), 'tuning.layers: all, none, first N or last N is allowed, or a list of layers\' numbers, not "top 3"'),
        (("tuning=qlora",), "tuning=qlora: there is no such tuning; type tuning=lora quantization=nf4"),
        (("seed=1", "seed=2"), "seed is given twice, seed=1 and seed=2: leave one out"),
        (("tuning=full", "tuning=lora"), "tuning is given twice, tuning=full and tuning=lora: leave one out"),
        (("status",), "status: one verb at a time; leave it out"),
        (("zero2",), "zero2 is not an override; did you mean sharding=zero2?"),
        (("stages.sft.data.max_length=~3",), 'stages.sft.data.max_length: input should be a valid integer, not "~3"'),
    ],
)  # fmt: skip
def test_one_fault_is_one_sentence(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in ask.refused("plan", LORA, *words)[:1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("+experiment=llama_lora,llama_full",), "+experiment=llama_lora,llama_full: a run has one experiment; type +experiment=llama_lora, or put -m before it for a run of each"),
        (("+experiment=[llama_lora,llama_full]",), "+experiment=llama_lora,llama_full: a run has one experiment; type +experiment=llama_lora, or put -m before it for a run of each"),
        (("llama_lora",), "llama_lora is not an override; did you mean +experiment=llama_lora?"),
    ],
)  # fmt: skip
def test_without_an_experiment_nothing_else_is_blamed(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    assert ask.refused("plan", *words) == (sentence,)


def test_run_folders_and_rows_where_overrides_are_expected(ask: Asker) -> None:
    assert ask("render", LORA).code == 0
    run = "runs/llama_lora"
    for typed in (run, f"{run}/run.json"):
        (told,) = ask.refused("plan", LORA, typed)
        assert (
            told
            == f"{typed} is a run, not an override; type resume {run} to continue it, or config {run} to see its keys"
        )
    write_rows(ask.folder / "rows.jsonl", [ROW])
    assert ask.refused("plan", LORA, "rows.jsonl") == (
        "rows.jsonl is not an override; did you mean stages.sft.data.train.path=rows.jsonl?",
    )


def test_the_run_that_was_meant_by_a_folder_without_run_json(ask: Asker) -> None:
    assert ask("render", LORA).code == 0
    run = "runs/llama_lora"
    assert ask.refused("resume", f"{run}/scripts") == (
        f"{run}/scripts is not a run folder: it is part of the run {run}; type that",
    )
    assert ask.refused("logs", "runs") == (f"runs is not a run folder: it holds no run.json; type {run}",)
    assert ask.refused("audit", "runs/llama_lara") == (
        f"runs/llama_lara is not a run folder: it holds no run.json, since there is no such folder; did you mean {run}?",
    )
