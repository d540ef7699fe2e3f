"""Jobs that the version before has queued call modules by the names of that version."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.composition.compose import compose
from orchestrator.files.atomic import write_json
from orchestrator.run_folder.folder import RunFolder


@pytest.mark.parametrize("exit_code", [1, 75, 143])
def test_a_queued_chain_decides_as_it_would_now(tmp_path: Path, exit_code: int) -> None:
    """`orchestrator.attempts` is in the text of every Slurm script that waits."""
    answers: list[tuple[int, str, str]] = []
    for module in ("orchestrator.attempts", "orchestrator.run_state.attempts"):
        run = RunFolder(tmp_path / "run")
        write_json(run.run, {"config": compose(["+experiment=llama_lora"]).model_dump(mode="json")})
        words = [str(run.root), "sft", "--attempt", "1", "--exit-code", str(exit_code)]
        done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=tmp_path)
        assert (run.stage("sft").attempts / "1.json").exists(), done.stderr
        answers.append((done.returncode, done.stdout, done.stderr))
        shutil.rmtree(run.root)
    assert answers[0] == answers[1] and answers[0][1].strip() in ("retry", "stop")
