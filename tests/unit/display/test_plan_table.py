"""The plan on one screen, in plain words; everything with `--all`; a sweep as a table."""

from __future__ import annotations

import pytest
from command_line import Asker

from orchestrator.text.plurals import counted

SCREEN_LINES, SCREEN_COLUMNS, LINES_OF_A_FURTHER_STAGE = 24, 100, 8
PRIVATE = (" nodes x ", "1 nodes", "1 processes", "goodput", "context ", "slack", "head=", " or sdpa", "bucket")
"""What a person who wants to know whether to start a run need not read."""


@pytest.mark.parametrize(
    "words",
    [
        ("+experiment=llama_lora",),
        ("+experiment=llama3_8b_lora", "cluster.hardware.dollars_per_hour=2.5", "stages.sft.max_steps=1000"),
        ("+experiment=llama3_70b_qlora_zero3", "cluster.nodes=2"),
        ("+experiment=llama_classify",),
        ("+experiment=llama_rlhf",),
    ],
)
def test_a_plan_is_one_screen_of_plain_words(ask: Asker, words: tuple[str, ...]) -> None:
    answer = ask("plan", *words)
    lines = [line.rstrip() for line in answer.out.splitlines()]
    stages = sum(line.startswith("stage ") for line in lines)
    assert answer.code == 0 and stages >= 1, answer
    assert len(lines) <= SCREEN_LINES + LINES_OF_A_FURTHER_STAGE * (stages - 1), answer.out
    assert max(map(len, lines)) <= SCREEN_COLUMNS
    assert not [word for word in PRIVATE if word in answer.out], answer.out


def test_all_adds_what_the_screen_leaves_out(ask: Asker) -> None:
    words = ("+experiment=llama3_8b_lora", "stages.sft.max_steps=1000")
    brief, everything = ask("plan", *words).out, ask("plan", *words, "--all").out
    for part in ("memory by phase", "learning rate  ", "loss head", "script  ", "goodput", "dollars_per_hour"):
        assert part in everything and part not in brief, part
    assert "`plan --all`" in brief and "`plan --all`" not in everything


def test_a_guessed_number_of_steps_is_called_a_guess(ask: Asker) -> None:
    out = " ".join(ask("plan", "+experiment=llama3_8b_lora").out.split())
    assert "for about 2 steps (the number is guessed from the size of the files), with start 10 min" in out


def test_a_sweep_is_a_table_with_a_line_for_each_run(ask: Asker) -> None:
    words = ("plan", "-m", "+experiment=llama_lora", "stages.sft.max_steps=10,20,30")
    lines = ask(*words).out.splitlines()
    rows = [line.split() for line in lines if line.startswith("llama_lora-")]
    assert [(row[1], row[2]) for row in rows] == [("sft", "10"), ("sft", "20"), ("sft", "30")], lines
    assert len(lines) <= 7
    assert ask(*words, "--all").out.count("memory by phase") == 3


@pytest.mark.parametrize(("number", "words"), [(0, "0 nodes"), (1, "1 node"), (2, "2 nodes"), (1024, "1,024 nodes")])
def test_numbers_and_their_nouns(number: int, words: str) -> None:
    assert counted(number, "node") == words
    assert counted(1, "process", "processes") == "1 process" and counted(3, "process", "processes") == "3 processes"
