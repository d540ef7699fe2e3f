"""An adapter that was damaged between training and proof ends red: exit code 93, the reason told, no result.json."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import Done
from safetensors.torch import load_file, save_file

from orchestrator.errors import CheckpointError
from orchestrator.evaluation.artifact_proof import prove
from orchestrator.files.atomic import read_json, write_json
from orchestrator.files.manifest import write_manifest
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import load_config

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(done: Done, tmp_path: Path) -> RunFolder:
    """The run as it stands after training, before the proof was passed."""
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(done.folder.root, copy.root)
    stage = copy.stage("sft")
    stage.result.unlink()
    proof = read_json(stage.proof)
    write_json(stage.proof, {key: value for key, value in proof.items() if key != "reopened_loss"})
    return copy


def rewrite(run: RunFolder, change: Callable[[Tensors], Tensors]) -> None:
    """Changes the weights and gives them a manifest that agrees: only opening and scoring can find it."""
    artifact = run.stage("sft").artifact
    save_file(change(load_file(artifact / WEIGHTS)), artifact / WEIGHTS)
    write_manifest(artifact, {"step": 6})


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
    write_manifest(path.parent, {"step": 6})


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
}


def test_the_undamaged_run_passes_the_same_proof(run: RunFolder) -> None:
    expected = read_json(run.stage("sft").proof)
    assert prove(load_config(run), "sft", run.stage("sft")) == pytest.approx(expected["loss"], abs=1e-3)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_adapter_is_not_proven(run: RunFolder, damage: Callable[[RunFolder], None]) -> None:
    damage(run)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]) as error:
        prove(load_config(run), "sft", run.stage("sft"))
    assert error.value.exit_code == 93


def test_the_program_answers_93_and_leaves_the_reason(run: RunFolder) -> None:
    scale_the_weights(run)
    argv = [sys.executable, "-m", "orchestrator.evaluation.artifact_proof", str(run.run), "--stage", "sft"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ended.returncode == 93 and "they differ by" in ended.stderr and "Traceback" not in ended.stderr
    stage = run.stage("sft")
    assert not stage.result.exists() and "reopened_loss" not in read_json(stage.proof)
    assert "they differ by" in read_json(stage.proof)["problems"][0]
