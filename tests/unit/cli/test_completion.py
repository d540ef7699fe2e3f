"""What the shells are given to complete; bash for real, zsh and fish where they are installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Asker

from orchestrator.cli.complete import candidates

LORA = "+experiment=llama_lora"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], ["plan"]),
        (["plan", "+exp"], ["+experiment="]),
        (["plan", "+experiment=llama_l"], ["+experiment=llama_lora", "+experiment=llama_lpft"]),
        (["plan", "tuning=lo"], ["tuning=lora", "tuning=loreft"]),
        (["plan", "tun"], ["tuning.", "tuning="]),
        (["plan", LORA, "stages.sft.opt"], ["stages.sft.optimizer."]),
        (["plan", LORA, "stages.sft.optimizer.l"], ["stages.sft.optimizer.layer_decay=", "stages.sft.optimizer.lr="]),
        (["plan", LORA, "stages.sft.data.packing="], ["stages.sft.data.packing=best_fit", "stages.sft.data.packing=none", "stages.sft.data.packing=split"]),
        (["plan", "model.dtype="], ["model.dtype=auto", "model.dtype=bfloat16", "model.dtype=float32"]),
        (["plan", "stages.sft.batch.micro_size="], ["stages.sft.batch.micro_size=auto"]),
        (["generate", "--pro"], ["--prompt"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["help", "stat"], ["status"]),
        (["plan", "+experiment=nowhere", "stages.x"], []),
    ],
)  # fmt: skip
def test_candidates(words: list[str], expected: list[str]) -> None:
    assert [found for found in candidates(words) if found in expected or len(expected) < 4] == expected


def test_run_folders_and_their_stages(ask: Asker) -> None:
    assert ask("render", LORA).code == 0
    assert candidates(["status", ""]) == candidates(["status", "runs/"]) == ["runs/llama_lora"]
    assert candidates(["logs", "runs/llama_lora", "--stage", ""]) == ["sft"]


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A command `orchestrator` of this checkout, alone in its folder."""
    file = tmp_path / "bin" / "orchestrator"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m orchestrator "$@"\n')
    file.chmod(0o755)
    return file


def test_bash_completes_behind_an_equals_sign(command: Path, ask: Asker) -> None:
    script = ask("completion", "bash").out
    lines = 'COMP_LINE="orchestrator plan tuning=lo"; COMP_POINT=${#COMP_LINE}; _orchestrator; printf "%s\\n" "${COMPREPLY[@]}"'
    program = f"PATH={shlex.quote(str(command.parent))}:$PATH\n{script}\n{lines}\ncomplete -p orchestrator"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["lora", "loreft"]
    assert "-F _orchestrator orchestrator" in done.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_zsh_and_fish(command: Path, ask: Asker, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    script = command.parent / f"completion.{shell}"
    script.write_text(ask("completion", shell).out)
    subprocess.run([shell, "-n", str(script)], check=True)
    if shell == "zsh":  # what it hands to the line editor, which only an interactive shell has
        stand_in = 'compdef() { }; compadd() { print -l -- "$@" }; words=(orchestrator plan tuning=lo); CURRENT=3'
        asked = f"path=({command.parent} $path); source {script}; {stand_in}; _orchestrator"
        done = subprocess.run(["zsh", "-fc", f"compdef() {{ }}; {asked}"], capture_output=True, text=True, check=True)
        assert {"tuning=lora", "tuning=loreft"} <= set(done.stdout.splitlines())
    if shell == "fish":
        asked = f"set -x PATH {command.parent} $PATH; source {script}; complete -C 'orchestrator plan tuning=lo'"
        done = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, check=True)
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} >= {"tuning=lora", "tuning=loreft"}
