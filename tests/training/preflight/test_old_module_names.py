"""A preparation job that the version before has queued."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import make_bench

from orchestrator.composition.compose import compose
from orchestrator.files.atomic import read_json, write_json


def test_a_queued_preparation_still_prepares(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    file, result = tmp_path / "run" / "run.json", tmp_path / "run" / "prepare" / "result.json"
    result.parent.mkdir(parents=True)
    write_json(file, {"config": compose(bench.words("run")).model_dump(mode="json")})
    argv = [sys.executable, "-m", "orchestrator.training.examine", "prepare", str(file), "--result", str(result)]
    done = subprocess.run(argv, env=bench.environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(result) == {"stages": ["sft"]}
