"""`generate` refuses what it cannot do before it loads a model, and lists all its options."""

from __future__ import annotations

import pytest
from command_line import Asker
from run_folders import finish, write_run

from orchestrator.files.atomic import write_json


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--examples", "2"), "--examples: sft held out no rows"),
        (("--top-p", "0.9"), "--top-p needs --temperature"),
        (("--top-p", "1.5", "--temperature", "1"), "a number above 0 and at most 1"),
        (("What is A?", "--prompt", "What is B?"), "a prompt and --prompt: give one of them"),
        (("What", "is", "A?"), "at most one prompt, quoted for the shell"),
        (("What is A?", "--output", "nowhere/answers.jsonl"), "its folder does not exist"),
    ],
)
def test_inputs_are_checked_before_the_model_is_loaded(words: tuple[str, ...], sentence: str, ask: Asker) -> None:
    run = write_run(ask.folder, "a", "stages.sft.data.eval.path=none")
    finish(run.stage("sft"))
    assert sentence in ask.refused("generate", "a", *words)[0]


def test_held_out_rows_that_were_pruned_are_named(ask: Asker) -> None:
    (ask.folder / "rows.jsonl").write_text('{"instruction": "Say red", "output": "red"}')
    run = write_run(
        ask.folder, "a", f"stages.sft.data.train.path={ask.folder}/rows.jsonl", "stages.sft.data.eval.path=auto"
    )
    finish(run.stage("sft"))
    write_json(run.stage("sft").prepared, {"evaluation": str(ask.folder / "gone" / "evaluation")})
    assert "the prepared rows of sft are no longer in" in ask.refused("generate", "a", "--examples", "1")[0]


def test_the_help_lists_every_option(ask: Asker) -> None:
    told = ask("generate", "--help").out
    for option in ("--temperature", "--top-p", "--seed", "--system", "--output", "--max-new-tokens", "--examples"):
        assert option in told
