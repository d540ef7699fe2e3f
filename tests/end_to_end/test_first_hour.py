"""Every command of docs/first_hour.md runs, in its order, as a person types them; a tiny model stands in for the base."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from bench import Bench
from launching import wait_until

import orchestrator
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder.folder import RunFolder

SOURCE = Path(orchestrator.__file__).parent.parent
PAGE = SOURCE / "docs" / "first_hour.md"
PROMPT = re.compile(r"^\$ (?P<command>.*?)(?:\s+# (?P<remark>.*))?$", re.MULTILINE)
CODE = re.compile(r"exit code (\d+)")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A line of the page after its `$`."""

    text: str
    exit_code: int
    is_interrupted: bool


def commands_of(page: str) -> list[Command]:
    """The commands of the console blocks; a remark behind # says how one ends that does not end well."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    found = [match for block in blocks for match in PROMPT.finditer(block)]
    return [
        Command(
            text=match["command"],
            exit_code=int(code[1]) if (code := CODE.search(match["remark"] or "")) else 0,
            is_interrupted="Ctrl-C" in (match["remark"] or ""),
        )
        for match in found
    ]


def as_typed(command: str) -> list[str]:
    """The argv of a command; `make demo` is what the Makefile runs for it."""
    if command.startswith("make "):
        shown = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=SOURCE, capture_output=True, text=True)
        (line,) = [line for line in shown.stdout.splitlines() if "-m orchestrator +experiment" in line]
        command = line.lstrip("@")
    first, *rest = shlex.split(command)
    return [sys.executable if Path(first).name == "python" else first, *rest]


def on_the_tiny_model(argv: list[str], bench: Bench) -> list[str]:
    """Smaller, and otherwise what the page says."""
    smaller = [f"model.base={bench.model}", "model.dtype=float32", "tracking=none"]
    trains = any(word.startswith("+experiment=") for word in argv)
    return [*argv, *smaller] if trains else argv


def run(command: Command, bench: Bench, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in the folder; an interrupted one gets its Ctrl-C after two steps."""
    argv = on_the_tiny_model(as_typed(command.text), bench)
    started = subprocess.Popen(
        argv,
        cwd=folder,
        env=bench.environment({"OMP_NUM_THREADS": "1"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if command.is_interrupted:
        name = next(word.removeprefix("name=") for word in argv if word.startswith("name="))
        metrics = RunFolder(folder / "runs" / name).stage("sft").metrics
        wait_until(lambda: metrics.exists() and len(read_rows(metrics)) > 2, what="the second step", seconds=240)
        os.kill(started.pid, signal.SIGINT)
    output, _ = started.communicate(timeout=400)
    return subprocess.CompletedProcess(argv, started.returncode, output, "")


@pytest.fixture(scope="module")
def outputs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command printed, after all of them ended as the page says."""
    folder = tmp_path_factory.mktemp("first_hour")
    with open(folder / "sums.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(1, 7) for b in range(1, 7)
        )
    found: dict[str, str] = {"folder": str(folder)}
    for command in commands_of(PAGE.read_text(encoding="utf-8")):
        ended = run(command, bench, folder)
        assert ended.returncode == command.exit_code, f"$ {command.text}\n{ended.stdout[-4000:]}"
        found[command.text] = ended.stdout
    return found


def test_every_command_ends_as_the_page_says(outputs: dict[str, str]) -> None:
    verbs = {
        word for text in outputs for word in text.split() if word in ("plan", "resume", "compare", "export", "generate")
    }
    assert len(outputs) >= 12 and verbs == {"plan", "resume", "compare", "export", "generate"}


def test_the_interrupted_run_went_on_and_was_proven(outputs: dict[str, str]) -> None:
    stage = RunFolder(Path(outputs["folder"]) / "runs" / "sums").stage("sft")
    result = read_json(stage.result)
    assert len(list(stage.attempts.glob("?.json"))) == 2 and result["proof"]["reopened_loss"] is not None
    assert result["attempt"] == 2 and result["eval_loss_after"] < result["eval_loss_before"]


def test_the_hints_of_the_page_are_printed(outputs: dict[str, str]) -> None:
    """The sentences that the page shows after its refused commands."""
    page = PAGE.read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith("error: ")]
    printed = " ".join("\n".join(outputs.values()).split())
    starts = [" ".join(line.split())[:60] for line in shown]
    assert len(shown) >= 2 and [start for start in starts if start.split("/")[0] not in printed] == []
