"""The proof that a user can ask for: `verify-resume` runs straight, kills, goes on, compares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench import Bench, make_bench

from launchers.process import Launch, launch
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.execution.job_specs import job_spec, render
from orchestrator.execution.resume_proof import compare, print_proof, small_runs, verify_resume
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.manifest import MANIFEST
from orchestrator.planning.absolute_paths import resolve
from orchestrator.run_folder.folder import RunFolder, run_directory_of


@contextmanager
def _start(config: RunConfig, stage: str) -> Iterator[Launch]:
    write_json(RunFolder(run_directory_of(config)).run, {"config": config.model_dump(mode="json")})
    with launch(render(config, stage), job_spec(config, stage)) as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = make_bench(tmp_path)
    for name, value in bench.environment().items():
        monkeypatch.setenv(name, value)
    return bench


def test_a_killed_run_is_proven_equal_and_a_difference_is_found(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    words = bench.words("proof", "tuning=full", "launcher=local", "stages.sft.data.eval.path=none")
    config = resolve(compose(words), bench.root)
    proof = verify_resume(config, steps=12, start=_start, say=print)
    print_proof(proof)
    assert proof.first_difference is None and len(proof.steps) == 12 and proof.tensors == 21
    assert proof.went_on_from >= 3 and all(not pair.differences for pair in proof.steps)
    assert "equal: 12 steps and 21 tensors, bit for bit" in capsys.readouterr().out
    straight, killed = (RunFolder(run_directory_of(run)).stage("sft") for run in small_runs(config, steps=12))
    assert sorted(read_json(straight.result)) == sorted(read_json(killed.result))
    weights = killed.artifact / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "of the artifact" in str(compare(straight, killed, stage="sft").first_difference)
    assert (killed.artifact / MANIFEST).is_file()


def test_too_few_steps_and_slurm_are_refused(bench: Bench) -> None:
    config = resolve(compose(bench.words("proof")), bench.root)
    with pytest.raises(ConfigError, match="steps=3: at least 4"):
        small_runs(config, steps=3)
    with pytest.raises(ConfigError, match="launcher=torchrun inside an allocation"):
        small_runs(resolve(compose(bench.words("proof", "launcher=slurm")), bench.root), steps=8)
