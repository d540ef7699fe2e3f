"""Options and verbs: each verb's own help, options before and after the verb and among overrides, faults with the nearest option."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Asker

from orchestrator import __version__
from orchestrator.cli.main import find_verb
from orchestrator.cli.parser import PROGRAM, parser_of
from orchestrator.cli.verbs import GROUPS, HIDDEN, VERBS

LORA = "+experiment=llama_lora"
BEFORE_RUN = "import sys; from orchestrator.cli.main import main; main(sys.argv[1:]); print(*sorted(sys.modules))"


def test_the_top_level_help_lists_every_verb_and_experiment(ask: Asker) -> None:
    answers = [ask(*words) for words in ((), ("--help",), ("-h",), ("help",), (LORA, "-h"))]
    assert {(answer.code, answer.out, answer.errors) for answer in answers} == {(0, answers[0].out, ())}
    assert "llama_rlhf, llama_weak_supervision, mixtral_8x7b_lora_zero3" in answers[0].out
    assert len(answers[0].out.splitlines()) < 50
    shown = [verb for verb in VERBS.values() if verb.group != HIDDEN]
    assert all(f"  {verb.name} " in answers[0].out and verb.group in GROUPS for verb in shown) and len(shown) > 15


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_has_a_help_of_its_own(ask: Asker, name: str) -> None:
    help = ask(name, "--help")
    assert help == ask("help", name) == ask(name, "-h") == ask("--help", name)
    assert help == ask(name, "help")
    assert help.code == 0 and help.errors == ()
    assert len(set(VERBS[name].examples)) == 3
    assert all(f"  {PROGRAM} {example}\n" in help.out for example in VERBS[name].examples)
    assert all(option in help.out for option in parser_of(VERBS[name]).options)


@pytest.mark.parametrize("name", VERBS)
def test_the_examples_of_a_verb_can_be_parsed(name: str) -> None:
    import shlex

    for example in VERBS[name].examples:
        words = shlex.split(example.partition(" < ")[0].partition(" > ")[0].partition(" | ")[0])
        assert words[0] == name
        parser_of(VERBS[name]).parse(words[1:])


def test_help_of_every_verb_imports_nothing_heavy(tmp_path: Path) -> None:
    for words in (["--help"], *([name, "--help"] for name in ("plan", "generate"))):
        argv = [sys.executable, "-c", BEFORE_RUN, *words]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        modules = set(done.stdout.splitlines()[-1].split())
        assert not modules & {"hydra", "omegaconf", "pydantic", "rich", "yaml", "torch"}


def test_an_option_takes_a_value_in_every_verb_or_in_none() -> None:
    """Otherwise an option before its verb could not be read."""
    arity: dict[str, set[bool]] = {}
    for verb in VERBS.values():
        for name, action in parser_of(verb).options.items():
            arity.setdefault(name, set()).add(action.nargs == 0)
    assert [name for name, kinds in arity.items() if len(kinds) > 1] == []


@pytest.mark.parametrize(
    ("words", "verb", "rest"),
    [
        (("--config-dir", "plan", "plan", LORA), "plan", ["--config-dir", "plan", LORA]),
        ((LORA, "--only", "align", "run"), "run", [LORA, "--only", "align"]),
        (("-m", LORA, "seed=1,2", "plan"), "plan", ["-m", LORA, "seed=1,2"]),
        (("--watch", "status", "plan"), "status", ["--watch", "plan"]),
        (("runs/x", "status"), "status", ["runs/x"]),
        (("--stage=sft", "logs", "runs/x"), "logs", ["--stage=sft", "runs/x"]),
        ((LORA, "--from", "sft"), None, [LORA, "--from", "sft"]),
    ],
)
def test_a_verb_is_found_wherever_it_stands(words: tuple[str, ...], verb: str | None, rest: list[str]) -> None:
    assert find_verb(words) == (verb, rest)


def test_options_before_and_between_are_those_behind() -> None:
    forms = [
        ("--config-dir", "own", "-m", LORA, "seed=1,2"),
        (LORA, "--config-dir=own", "seed=1,2", "-m"),
        (LORA, "-m", "seed=1,2", "--config-dir", "own"),
        ("--config-dir", "own", LORA, "--multirun", "--", "seed=1,2"),
    ]
    parsed = [vars(parser_of(VERBS["plan"]).parse(form)) for form in forms]
    assert parsed[0]["overrides"] == [LORA, "seed=1,2"] and parsed[0]["config_dir"] == "own"
    assert all(arguments == parsed[0] for arguments in parsed)


def test_a_value_may_begin_with_a_dash_or_hold_an_equals_sign() -> None:
    parse = parser_of(VERBS["generate"]).parse
    assert parse(["x", "--prompt", "-5 + 3 = ?"]).prompt == parse(["--prompt=-5 + 3 = ?", "x"]).prompt == "-5 + 3 = ?"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("plan", LORA, "--only", "sft"), "--only: plan has no such option; it belongs to run"),
        (("generate", "x", "--prompts", "hi"), "--prompts: generate has no such option; did you mean --prompt?"),
        (("--config-dri", "own", "plan", LORA), "--config-dri: plan has no such option; did you mean --config-dir?"),
        (("generate", "x", "--max-kl=1"), "--max-kl: generate has no such option; it belongs to export"),
        (("logs", "x", "--stage", "a", "--stage", "b"), "--stage is given twice, a and b: give it once"),
        (("logs", "x", "--node", "-1"), "--node -1: an integer of at least 0 is required"),
        (("export", "x", "--max-kl", "nan"), "--max-kl nan: a number of at least 0 is required"),
        (("run", LORA, "--only", "a", "--from", "b"), "--from and --only: give one of them"),
        (("generate", "x", "What", "is"), "generate takes one run folder and at most one prompt, quoted for the shell: python -m orchestrator generate runs/llama_lora --prompt \"Who wrote Faust?\""),
        (("cancel",), "cancel takes one run folder and nothing else: python -m orchestrator cancel runs/llama_lora"),
        (("verify-resume", LORA, "steps=x"), "steps=x: an integer of at least 1 is required"),
        (("help", "plann"), "plann: no such verb; did you mean plan?"),
        ((LORA, "plann"), "plann: no such verb; did you mean plan?"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_obeyed(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    assert ask.refused(*words) == (sentence,)


def test_the_version(ask: Asker) -> None:
    assert ask("--version").out == ask("plan", "--version").out == f"orchestrator {__version__}\n"
