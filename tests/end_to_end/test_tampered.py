"""An adapter that was damaged between training and proof ends red: exit code 93, the reason told, no result.json."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import Bench, Done
from safetensors.torch import load_file, save_file

from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.manifest import MANIFEST, file_digest, write_manifest
from orchestrator.run_folder.folder import RunFolder

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(done: Done, tmp_path: Path) -> RunFolder:
    """The run between its two phases: the artifact is written, its proof is outstanding."""
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(done.folder.root, copy.root)
    stage = copy.stage("sft")
    stage.result.unlink()
    write_json(stage.proof, {**read_json(stage.proof), "state": "written", "reopened_loss": None})
    return copy


def prove(bench: Bench, run: RunFolder) -> subprocess.CompletedProcess[str]:
    """A start of the stage's only rank, which finds nothing to do but the proof."""
    argv = [sys.executable, "-m", "orchestrator.worker", str(run.run), "--stage", "sft"]
    environment = bench.environment({"OMP_NUM_THREADS": "1"})
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=300)


def rewrite(run: RunFolder, change: Callable[[Tensors], Tensors]) -> None:
    """Changes the weights and gives them a manifest and a note that agree: only opening and scoring can find it."""
    artifact = run.stage("sft").artifact
    save_file(change(load_file(artifact / WEIGHTS)), artifact / WEIGHTS)
    agree(run)


def agree(run: RunFolder) -> None:
    stage = run.stage("sft")
    write_manifest(stage.artifact, {"step": 6})
    digest = file_digest(stage.artifact / MANIFEST)
    write_json(stage.proof, {**read_json(stage.proof), "manifest_sha256": digest})


def one_lora_b(weights: Tensors) -> str:
    return next(name for name in sorted(weights) if "lora_B" in name)


def flip_a_byte(run: RunFolder) -> None:
    path = run.stage("sft").artifact / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(content)


def empty_a_tensor(run: RunFolder) -> None:
    rewrite(run, lambda weights: {**weights, one_lora_b(weights): torch.zeros(0)})


def leave_out_a_tensor(run: RunFolder) -> None:
    rewrite(run, lambda weights: {name: value for name, value in weights.items() if name != one_lora_b(weights)})


def add_a_tensor(run: RunFolder) -> None:
    rewrite(run, lambda weights: {**weights, "base_model.model.model.layers.9.x.lora_A.weight": torch.ones(4, 32)})


def zero_every_lora_b(run: RunFolder) -> None:
    rewrite(run, lambda weights: {name: value * (0.0 if "lora_B" in name else 1.0) for name, value in weights.items()})


def write_a_nan(run: RunFolder) -> None:
    def change(weights: Tensors) -> Tensors:
        weights[one_lora_b(weights)][0, 0] = torch.nan
        return weights

    rewrite(run, change)


def scale_the_weights(run: RunFolder) -> None:
    rewrite(run, lambda weights: {name: value * (1.5 if "lora_B" in name else 1.0) for name, value in weights.items()})


def change_the_scale_in_the_settings(run: RunFolder) -> None:
    path = run.stage("sft").artifact / "adapter_config.json"
    write_json(path, {**read_json(path), "lora_alpha": 1})
    agree(run)


def write_another_manifest(run: RunFolder) -> None:
    write_manifest(run.stage("sft").artifact, {"step": 7})


def truncate_the_weights(run: RunFolder) -> None:
    path = run.stage("sft").artifact / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def remove_the_artifact(run: RunFolder) -> None:
    shutil.rmtree(run.stage("sft").artifact)


def remove_the_settings(run: RunFolder) -> None:
    (run.stage("sft").artifact / "adapter_config.json").unlink()


DAMAGES: dict[Callable[[RunFolder], None], str] = {
    flip_a_byte: "its sha256 differs from the one that was written",
    empty_a_tensor: "empty|shape|size mismatch",
    leave_out_a_tensor: "lora_B",
    add_a_tensor: "layers.9",
    zero_every_lora_b: "every lora_B is zero|re-opened, it scores",
    write_a_nan: "not finite|scores nan",
    scale_the_weights: "re-opened, it scores",
    change_the_scale_in_the_settings: "re-opened, it scores",
    remove_the_settings: "adapter_config.json: missing",
    truncate_the_weights: f"{WEIGHTS}: [0-9]+ bytes, [0-9]+ were written",
    write_another_manifest: "MANIFEST.json: it is not the one that was written",
    remove_the_artifact: "no MANIFEST.json",
}


def test_the_undamaged_run_passes_its_proof_without_training_again(bench: Bench, run: RunFolder) -> None:
    stage = run.stage("sft")
    rows, expected = stage.metrics.read_bytes(), read_json(stage.proof)["loss"]
    assert prove(bench, run).returncode == 0
    result = read_json(stage.result)
    assert result["proof"]["reopened_loss"] == pytest.approx(expected, abs=1e-3)
    assert stage.metrics.read_bytes() == rows and read_json(stage.proof)["state"] == "proven"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_adapter_is_not_proven(bench: Bench, run: RunFolder, damage: Callable[[RunFolder], None]) -> None:
    damage(run)
    ended = prove(bench, run)
    stage = run.stage("sft")
    assert ended.returncode == 93 and "Traceback" not in ended.stderr
    assert re.search(DAMAGES[damage], ended.stderr), ended.stderr
    assert not stage.result.exists() and read_json(stage.proof)["state"] == "failed"
    assert re.search(DAMAGES[damage], "\n".join(read_json(stage.proof)["problems"]))


def test_after_a_failed_proof_the_same_command_writes_the_artifact_again(bench: Bench, run: RunFolder) -> None:
    flip_a_byte(run)
    assert "the same command writes the artifact again, from the checkpoint of step 6" in prove(bench, run).stderr
    assert prove(bench, run).returncode == 0
    assert read_json(run.stage("sft").result)["attempt"] == 3


def test_another_number_of_ranks_is_refused_before_anything_is_opened(bench: Bench, run: RunFolder) -> None:
    stage = run.stage("sft")
    write_json(stage.proof, {**read_json(stage.proof), "world_size": 4})
    ended = prove(bench, run)
    assert ended.returncode == 2 and "was written by 4 ranks, and its proof was started with 1" in ended.stderr
    stage.proof.unlink()  # as the sentence says
    assert prove(bench, run).returncode == 0
