"""Presets give way to what is typed and to the number of ranks, by name; own rows are trained by epochs."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from command_line import ROW, Asker, write_model, write_rows

from orchestrator.composition.compose import CONF, examine, experiments
from orchestrator.composition.recipes import Origins, fit
from orchestrator.config.alignment import PolicyStage
from orchestrator.config.demonstration import DEMONSTRATIONS
from orchestrator.config.rules import rule_problems
from orchestrator.config.run import RunConfig, training_stages

LORA = "+experiment=llama_lora"
OWN = "stages.sft.data.train.path=rows.jsonl"
COUNTS = (1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 100)


def sizes(*words: str) -> tuple[int, int]:
    composed = examine([LORA, *words])
    assert composed.problems == [], composed.problems
    batch = training_stages(composed.config)["sft"].batch
    return batch.global_size, batch.micro_size


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (4, 4)),
        (("cluster.processes_per_node=2",), (4, 2)),
        (("cluster.processes_per_node=4",), (4, 1)),
        (("cluster.processes_per_node=3",), (6, 2)),
        (("cluster.processes_per_node=32",), (32, 1)),
        (("stages.sft.batch.global_size=6",), (6, 3)),
        (("stages.sft.batch.micro_size=8",), (8, 8)),
        (("stages.sft.batch.micro_size=3", "cluster.nodes=2"), (6, 3)),
        (("stages.sft.batch.global_size=16", "cluster.processes_per_node=8"), (16, 2)),
        ((OWN,), (8, 4)),
        ((OWN, "cluster.processes_per_node=8"), (8, 1)),
        (("stages.sft.batch={global_size: 12, micro_size: 6}",), (12, 6)),
    ],
)
def test_batch_sizes_of_presets_fit_the_ranks(words: tuple[str, ...], expected: tuple[int, int]) -> None:
    assert sizes(*words) == expected


@pytest.fixture(scope="module")
def presets() -> dict[str, RunConfig]:
    """Every experiment as it is, composed once: a composition costs a good part of a second."""
    return {name: examine([f"+experiment={name}"]).config for name in experiments()}


def test_every_preset_fits_every_number_of_ranks(presets: dict[str, RunConfig]) -> None:
    fitted = 0
    for (name, preset), count in product(presets.items(), COUNTS):
        cluster = preset.cluster.model_copy(update={"processes_per_node": count, "nodes": 1})
        config, _ = fit(preset.model_copy(update={"cluster": cluster}), Origins(typed=(), find_locations=None))
        assert [problem for problem in rule_problems(config) if ".batch" in problem or ".rollout" in problem] == [], (
            name
        )
        for stage in training_stages(config).values():
            assert stage.batch.global_size % (stage.batch.micro_size * count) == 0
            assert not isinstance(stage, PolicyStage) or stage.rollout.prompts % count == 0
            fitted += 1
    assert fitted == 22 * len(COUNTS)


def test_every_change_is_named_once_and_with_its_effect() -> None:
    told = examine([LORA, "cluster.processes_per_node=2"]).notes
    assert told == (
        "stages.sft.batch: micro_size=2 (preset: 4): 4 rows a step = 2 x 2 ranks x 1 accumulation; the global batch is unchanged",
    )
    (told_more,) = examine([LORA, "cluster.processes_per_node=32"]).notes
    assert told_more == (
        "stages.sft.batch: global_size=32 (preset: 4), micro_size=1 (preset: 4): 32 rows a step = 1 x 32 ranks x 1 accumulation; "
        "the learning rate is unchanged, so results differ from those with 4 rows a step"
    )
    (paired,) = examine(
        ["+experiment=llama_weak_supervision", "pipeline=[self_training]", "cluster.processes_per_node=2"]
    ).notes
    assert paired.endswith("results differ from those with pairs among 16 rows")
    assert examine([LORA]).notes == ()
    policy = examine(["+experiment=llama_rlhf", "pipeline=[sft,grpo]", "cluster.processes_per_node=8"]).notes
    assert sum("rollout.prompts=8 (preset: 4)" in note for note in policy) == 1


def test_typed_sizes_are_refused_with_what_can_be_pasted(ask: Asker) -> None:
    words = ("stages.sft.batch.global_size=4", "stages.sft.batch.micro_size=4", "cluster.processes_per_node=2")
    (sentence,) = ask.refused("plan", LORA, *words)
    assert sentence.endswith("try stages.sft.batch.micro_size=2, or stages.sft.batch.global_size=8")
    assert sizes(*words[::2], "stages.sft.batch.micro_size=2") == (4, 2)
    assert sizes(*words[1:], "stages.sft.batch.global_size=8") == (8, 4)
    (sentence,) = ask.refused("plan", LORA, "stages.sft.batch.global_size=7", "cluster.processes_per_node=2")
    assert "global_size 7" in sentence and sizes(sentence.rsplit(" ", 1)[1], "cluster.processes_per_node=2")


@pytest.mark.parametrize(
    ("words", "steps", "epochs", "note"),
    [
        ((), 104, None, None),
        (("stages.sft.epochs=2",), None, 2, "stages.sft.epochs=2 replaces max_steps=104 of the preset"),
        (("stages.sft.max_steps=400",), 400, None, None),
        ((OWN,), None, 3, None),
        ((OWN, "stages.sft.max_steps=400"), 400, None, "stages.sft.max_steps=400 replaces epochs=3 of the preset"),
        ((OWN, "stages.sft.epochs=0.5"), None, 0.5, None),
        (
            (OWN, "stages.sft.epochs=2", "stages.sft.max_steps=400"),
            400,
            2,
            "stages.sft: max_steps=400 and epochs=2 are both set; max_steps decides",
        ),
    ],
)
def test_one_of_steps_and_epochs_decides(
    words: tuple[str, ...], steps: int | None, epochs: float | None, note: str | None
) -> None:
    composed = examine([LORA, *words])
    stage = training_stages(composed.config)["sft"]
    assert (stage.max_steps, stage.epochs) == (steps, epochs)
    assert composed.notes == (() if note is None else (note,))


def test_a_file_of_the_user_stands_between_presets_and_the_command_line(tmp_path: Path) -> None:
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    head = "# @package _global_\ndefaults: [/stage@stages.sft: sft, _self_]\nname: mine\npipeline: [sft]\n"
    mine.write_text(head + "stages: {sft: {max_steps: 400, batch: {global_size: 4, micro_size: 4}}}\n")

    def composed(*words: str):
        return examine(["+experiment=mine", *words], config_directory=tmp_path)

    one = composed()
    assert training_stages(one.config)["sft"].max_steps == 400
    assert one.notes == ("stages.sft.max_steps=400 replaces epochs=3 of the preset",)
    two = composed("stages.sft.epochs=2")
    assert (training_stages(two.config)["sft"].max_steps, training_stages(two.config)["sft"].epochs) == (None, 2)
    assert two.notes == ("stages.sft.epochs=2 replaces max_steps=400 of the experiment file",)
    assert "try stages.sft.batch.micro_size=2, or" in composed("cluster.processes_per_node=2").problems[0]

    built_on = "# @package _global_\ndefaults: [llama_lora, _self_]\nname: mine\nstages: {sft: {epochs: 2}}\n"
    mine.write_text(built_on)
    three = composed()
    assert (training_stages(three.config)["sft"].max_steps, training_stages(three.config)["sft"].epochs) == (None, 2)
    assert three.notes == ("stages.sft.epochs=2 replaces max_steps=104 of the preset",)


def test_the_recipe_of_the_demonstration_is_for_its_rows_alone(presets: dict[str, RunConfig]) -> None:
    """Every experiment that trains so many steps of the demonstration's rows goes by epochs over rows of the user's own."""
    seen = 0
    with_recipe = [name for name in presets if "demonstration:" in (CONF / "experiment" / f"{name}.yaml").read_text()]
    for name in with_recipe:
        ours = training_stages(presets[name])
        own = examine([f"+experiment={name}", *(f"stages.{stage}.data.train.path=rows.jsonl" for stage in ours)])
        for stage, theirs in training_stages(own.config).items():
            if ours[stage].max_steps is None:
                continue
            assert ours[stage].data.train.path in DEMONSTRATIONS
            assert ours[stage].epochs is None and theirs.max_steps is None and theirs.epochs in (1, 3)
            assert theirs.optimizer.lr <= 5e-4 < 1e-3 or theirs.optimizer.lr < ours[stage].optimizer.lr
            seen += 1
    assert seen == 9
    mixed = examine([LORA, "stages.sft.data.mix=[{path: rows.jsonl}]"]).config
    assert training_stages(mixed)["sft"].epochs == 3, "with rows of the user's own among them"
    typed = examine([LORA, "stages.sft.optimizer.lr=1e-4", "stages.sft.demonstration.max_steps=20"])
    stage = training_stages(typed.config)["sft"]
    assert (typed.problems, stage.optimizer.lr, stage.max_steps) == ([], 1e-4, 20)


@pytest.mark.parametrize(
    ("words", "ratio"),
    [
        ((), 4.0),
        (("tuning.lora_plus_ratio=null",), None),
        ((OWN,), None),
        (("tuning=full",), "no such key"),
        (("stages.sft.data.packing=best_fit",), 4.0),
        (("stages.sft.data.tokens_per_batch=512", "stages.sft.batch.micro_size=1"), 4.0),
    ],
)
def test_a_recipe_reaches_the_tuning_of_the_run_where_it_has_the_key(
    words: tuple[str, ...], ratio: float | str | None
) -> None:
    composed = examine([LORA, *words])
    assert composed.problems == []
    assert composed.config.tuning.model_dump().get("lora_plus_ratio", "no such key") == ratio


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        (
            1000,
            ("stages.sft.max_steps=10", "stages.sft.batch.global_size=4"),
            "stages.sft.max_steps=10 sees 0.04 of a pass over the 1,000 rows: most are never trained on; for a whole pass type "
            "stages.sft.epochs=1 instead (250 steps)",
        ),
        (
            40,
            ("stages.sft.max_steps=130", "stages.sft.batch.global_size=4"),
            "stages.sft.max_steps=130 is 13 passes over the 40 rows; for 3 passes type stages.sft.epochs=3 instead (30 steps)",
        ),
        (
            40,
            ("stages.sft.max_steps=9", "stages.sft.batch.global_size=4"),
            "stages.sft.max_steps=9 ends before one pass over the 40 rows (0.90 of it); for a whole pass type "
            "stages.sft.epochs=1 instead (10 steps)",
        ),
        (40, ("stages.sft.max_steps=20", "stages.sft.batch.global_size=4"), None),
        (40, ("stages.sft.epochs=13",), None),
    ],
)
def test_a_plan_says_how_often_the_rows_are_seen(
    ask: Asker, rows: int, words: tuple[str, ...], sentence: str | None
) -> None:
    write_rows(ask.folder / "rows.jsonl", [ROW] * rows)
    base = f"model.base={write_model(ask.folder / 'base')}"
    planned = ask("plan", LORA, base, OWN, "stages.sft.data.eval.path=none", *words, "format=json")
    assert planned.code == 0, planned.errors
    warnings = json.loads(planned.out)["warnings"]
    assert [line for line in warnings if "pass" in line] == ([] if sentence is None else [sentence])


def test_notes_are_printed_by_plan_and_frozen_with_it(ask: Asker) -> None:
    answer = ask("render", LORA, "cluster.processes_per_node=2", "sharding=zero2", "launcher=torchrun")
    assert answer.code == 0, answer.errors
    frozen = json.loads((ask.folder / "runs/llama_lora/plan.json").read_text())
    assert frozen["notes"] and frozen["stages"][0]["micro_size"] == 2
    config = json.loads((ask.folder / "runs/llama_lora/run.json").read_text())["config"]
    assert config["stages"]["sft"]["batch"] == {"global_size": 4, "micro_size": 2}
    told = ask("plan", LORA, "cluster.processes_per_node=2", "sharding=zero2")
    assert any(line.startswith("note: stages.sft.batch: micro_size=2 (preset: 4)") for line in told.errors)


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (("tuning=full",), "stages.sft.optimizer.lr=5e-05"),
        (("tuning=full", "stages.sft.optimizer.lr=1e-4"), None),
        (("tuning=lora",), None),
    ],
)
def test_a_rate_for_adapters_is_named_where_the_whole_model_is_trained(
    words: tuple[str, ...], typed: str | None, ask: Asker
) -> None:
    write_rows(ask.folder / "rows.jsonl", [ROW] * 20)
    planned = ask("plan", LORA, OWN, *words, "format=json")
    warnings = [warning for warning in json.loads(planned.out)["warnings"] if "a rate for adapters" in warning]
    assert [typed in warning for warning in warnings] == ([] if typed is None else [True])
