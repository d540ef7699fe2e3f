"""The login side starts without torch and its relatives, and the program that a person types is the same as the functions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Asker
from run_folders import write_run, write_training

from orchestrator.metrics.screen import MARK

LORA = "+experiment=llama_lora"
HEAVY = ("torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes", "datasets", "wandb")
PROBE = """
import contextlib, io, json, sys
from orchestrator.cli.main import main
found = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    found[words[0]] = [code, sorted(set(json.loads(sys.argv[2])) & sys.modules.keys())]
print(json.dumps(found))
"""


def test_no_verb_of_the_login_side_imports_torch(tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "llama_lora")
    commands = [["--help"], ["plan", LORA], ["render", LORA], ["status", run], ["plan", LORA, "seeed=3"]]
    argv = [sys.executable, "-c", PROBE, json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    codes = {"--help": 0, "plan": 2, "render": 0, "status": 0}
    assert json.loads(done.stdout) == {verb: [code, []] for verb, code in codes.items()}


def test_the_program_tells_a_fault_on_stderr_and_answers_two(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "orchestrator", "plan", LORA, "stages.sft.optimzer.lr=1"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    told = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith(MARK))
    assert told == "error: stages.sft.optimzer.lr: unknown key; did you mean stages.sft.optimizer.lr?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    argv = f"{sys.executable} -m orchestrator plan {LORA} format=json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {argv}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "{" and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_ctrl_c_ends_what_only_looks_silently_and_says_how_a_run_goes_on(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(ask.folder, "a")
    write_training(run.stage("sft"), [2.0], evaluations={0: 2.0})
    run.stage("sft").logs.mkdir()
    (run.stage("sft").logs / "node-0.attempt-1.log").write_text("a line\n")

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)  # the first pause of either is where Ctrl-C finds it
    for words in (("logs", "a", "-f"), ("status", "a", "--watch")):
        answer = ask(*words)
        assert (answer.code, answer.errors) == (130, ()), (words, answer)
    monkeypatch.setattr("orchestrator.commands.resume.resume", lambda _folder: interrupt(0))
    answer = ask("resume", "a")
    assert (answer.code, answer.errors) == (75, ("interrupted; the same command continues with what is left",))
