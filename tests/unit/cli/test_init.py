"""`init` writes an experiment file that composes, and never over another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import ROW, Asker, write_rows

from orchestrator.composition.compose import examine


@pytest.mark.parametrize(
    ("task", "method", "gpus"), [("sft", "lora", 1), ("sft", "qlora", 2), ("sft", "full", 3), ("dpo", "lora", 2), ("classify", "full", 1)]
)  # fmt: skip
def test_what_is_written_composes(ask: Asker, task: str, method: str, gpus: int) -> None:
    words = ("--task", task, f"--method={method}", "--gpus", str(gpus), "--data", "my rows#1.jsonl", "--base", "a/b")
    assert ask("init", "my first.yaml", *words).code == 0
    composed = examine([str(ask.folder / "my first.yaml")])
    config = composed.config
    assert composed.problems == [] and config.name == "my_first" and config.pipeline == (task,)
    assert config.tuning.method == ("full" if method == "full" else "lora")
    assert (config.quantization.scheme == "nf4") == (method == "qlora")
    assert config.model.base == "a/b" and config.stages[task].data.train.path == "my rows#1.jsonl"
    assert config.cluster.processes_per_node == gpus


def test_the_defaults_can_be_planned(ask: Asker) -> None:
    write_rows(ask.folder / "rows.jsonl", [{**ROW, "output": str(n)} for n in range(20)])
    assert ask("init", "mine.yaml", "--data", "rows.jsonl").code == 0
    answer = ask("plan", "mine.yaml", "format=json")
    assert answer.code == 0, answer


def test_a_file_that_exists_stays(ask: Asker, tmp_path: Path) -> None:
    assert ask("init", "mine.yaml").code == 0
    before = (ask.folder / "mine.yaml").read_text()
    assert ask.refused("init", "mine.yaml", "--method", "full") == (
        "mine.yaml exists; give another name, or --force to replace it",
    )
    assert ask("init", "mine.yaml", "--method", "full", "--force").code == 0
    assert (ask.folder / "mine.yaml").read_text() != before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mine",), "mine: an experiment file ends in .yaml; type init mine.yaml"),
        (("no/mine.yaml",), "no/mine.yaml: there is no folder no"),
        (("mine.yaml", "--method", "dora"), "--method dora: lora, qlora or full is allowed"),
        (("mine.yaml", "--gpus", "0"), "--gpus 0: an integer of at least 1 is required"),
        ((), "init takes one new file that ends in .yaml: python -m orchestrator init my.yaml"),
    ],
)
def test_what_cannot_be_written(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    assert ask.refused("init", *words) == (sentence,)


def test_the_file_of_the_page_composes(ask: Asker) -> None:
    import re

    import orchestrator

    text = (Path(orchestrator.__file__).parent.parent / "docs" / "first_experiment.md").read_text()
    (ask.folder / "my.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert examine([str(ask.folder / "my.yaml")]).config.quantization.scheme == "nf4"
    typed = re.findall(r"^python -m orchestrator ((?:config|keys) .*?)(?:  #.*)?$", text, re.MULTILINE)
    assert len(typed) == 5
    assert (
        ask(
            "render", "my.yaml", "model.base=nobody/nothing", "name=my", "stages.sft.data.train.path=demonstration"
        ).code
        == 0
    )
    assert [ask(*line.split()).code for line in typed] == [0] * 5
