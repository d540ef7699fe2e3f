"""The first minute: memory that runs out for real (an address space too small for long rows), and a disk that is too small."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Bench, make_bench

from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows
from orchestrator.run_folder.folder import RunFolder

GIB = 2**30
TOKENS = 9000
"""Eager attention over 4 rows x 4 heads of so many tokens: 4.8 GiB a matrix."""


def test_an_autopsy_says_phase_plan_and_change(tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "bench")
    rows = bench.root / "long.jsonl"
    rows.write_text("".join(json.dumps({"instruction": "Say", "output": "a " * TOKENS}) + "\n" for _ in range(8)))
    words = bench.words(
        "starved",
        f"stages.sft.data.train.path={rows}",
        "stages.sft.data.eval.path=none",
        f"stages.sft.data.max_length={TOKENS}",
        "stages.sft.data.packing=none",
        "stages.sft.data.truncation=accept",
        "stages.sft.batch.micro_size=4",
        "stages.sft.checkpoint.probe_rows=0",
        "model.attention=eager",
        "launcher=local",
    )
    command = f'ulimit -v {7 * GIB // 1024}; exec "$0" "$@"'
    argv = ["bash", "-c", command, sys.executable, "-m", "orchestrator", "run", *words]
    environment = bench.environment({"OMP_NUM_THREADS": "1"})
    ended = subprocess.run(argv, cwd=bench.root, env=environment, capture_output=True, text=True, timeout=300)
    files = RunFolder(bench.runs / "starved").stage("sft")
    assert ended.returncode == 93, ended.stdout + ended.stderr
    attempt = read_json(files.attempt(1))
    assert attempt["state"] == "failed" and "out of memory in the" in attempt["why"]
    log = "".join(file.read_text() for file in files.logs.glob("*.log"))
    assert "out of memory in the forward of step 1, rank 0" in log
    assert "address space limited to 7.0 GiB" in log
    assert "planned: forward" in log and "<- here" in log
    assert "this needs less at the same global batch: " in log and "stages.sft.batch.micro_size=" in log
    assert not files.result.exists()


@pytest.fixture
def cramped(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose run `cramped` has 64 KiB for its checkpoints."""
    bench = make_bench(tmp_path / "bench")
    folder = RunFolder(bench.runs / "cramped").stage("sft").checkpoints
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine mounts nothing")
    yield bench
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_too_small_is_known_after_the_first_step(cramped: Bench) -> None:
    done = cramped.run("cramped", "launcher=local")
    assert done.code == 93 and "the trial checkpoint after the first step could not be written" in done.error
    assert "MiB are free there" in done.error
    assert max(int(str(row["step"])) for row in read_rows(done.sft.metrics) if "loss" in row) == 1


def test_the_trial_leaves_nothing(tmp_path: Path) -> None:
    done = make_bench(tmp_path / "bench").run("tried", "launcher=local", "stages.sft.checkpoint.every_steps=null")
    (tried,) = [row for row in read_rows(done.sft.events) if row["event"] == "rehearsal"]
    assert done.code == 0 and tried["step"] == 1
    assert [path.name for path in done.sft.checkpoints.iterdir()] == ["step-00000006"]
