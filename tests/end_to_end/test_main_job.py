"""The main job on a tiny model, as a user types it: from overrides to a proven adapter, its record, and a rerun that does nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import Bench, Done
from command_line import files_of
from loading_code import check_scripts
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import MANIFEST, read_manifest
from orchestrator.metrics.jsonl import read_rows
from orchestrator.metrics.wandb.protocol import read_state

COLUMNS = {
    "step", "attempt", "epoch", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "tokens_per_second", "step_seconds",
    "data_seconds", "memory_gib", "mfu",
}  # fmt: skip


def training_rows(done: Done) -> list[dict[str, object]]:
    return [row for row in read_rows(done.sft.metrics) if "loss" in row]


def test_it_ends_with_a_result_that_says_what_was_made(done: Done) -> None:
    result = done.result()
    assert (result["stage"], result["kind"], result["attempt"], result["steps"]) == ("sft", "sft", 1, 6)
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["artifact"]["kind"] == "adapter" and result["artifact"]["path"] == "artifact"
    assert result["proof"]["reopened_loss"] == pytest.approx(result["proof"]["loss"], abs=1e-3)
    assert result["proof"]["loss"] == pytest.approx(result["eval_loss_after"], abs=1e-3)
    for told in ("stage sft is done and proven", str(done.sft.artifact), "PeftModel.from_pretrained"):
        assert told in done.out


def test_the_record_has_a_row_a_step_with_the_columns_of_the_contract(done: Done) -> None:
    rows = training_rows(done)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row.keys() >= COLUMNS, COLUMNS - row.keys()
        numbers = {key: row[key] for key in COLUMNS - {"mfu", "step", "attempt"}}
        assert all(isinstance(value, float | int) and value >= 0 for value in numbers.values()), numbers
        assert row["attempt"] == 1 and row["mfu"] is None  # no peak is known for this machine
        assert int(str(row["tokens"])) > int(str(row["trained_tokens"])) > 0


def test_what_was_planned_is_what_was_done(done: Done) -> None:
    (stage,) = read_json(done.folder.plan)["stages"]
    rows = training_rows(done)
    assert stage["steps"] == len(rows) == done.result()["steps"]
    assert (stage["train_rows"], stage["evaluation_rows"], stage["steps_per_epoch"]) == (40, 9, 5)
    assert rows[-1]["epoch"] == pytest.approx(6 / 5)
    rates = [float(str(row["lr"])) for row in rows]
    assert stage["learning_rates"]["0%"] == pytest.approx(rates[0])
    assert stage["learning_rates"]["100%"] == pytest.approx(rates[-1])
    trained = sum(value.numel() for value in load_file(done.sft.artifact / "adapter_model.safetensors").values())
    assert stage["trainable_parameters"] == trained


def test_the_run_folder_holds_the_files_of_the_contract(done: Done) -> None:
    names = {name for name, content in files_of(done.folder.root).items() if content is not None}
    for name in (
        "run.json", "environment.json", "plan.json", "scripts/sft.sh", "sft/metrics.jsonl", "sft/events.jsonl",
        "sft/attempts/1.json", "sft/logs/node-0.attempt-1.log", "sft/result.json", f"sft/artifact/{MANIFEST}",
        "sft/artifact/adapter_model.safetensors", "sft/artifact/adapter_config.json", "sft/artifact/tokenizer.json",
    ):  # fmt: skip
        assert name in names
    assert not [name for name in names if ".tmp" in name or ".partial" in name or name.endswith(".old")]
    attempt = read_json(done.sft.attempt(1))
    assert (attempt["state"], attempt["exit_code"]) == ("finished", 0)
    assert read_manifest(done.sft.artifact)["step"] == 6
    events = [row["event"] for row in read_rows(done.sft.events)]
    assert events[0] == "start" and events[-1] == "finish"


def test_peft_loads_the_adapter_and_it_changes_the_model(bench: Bench, done: Done) -> None:
    base = AutoModelForCausalLM.from_pretrained(bench.model)
    ids_BT = torch.arange(3, 40)[None]
    with torch.no_grad():
        before_BTV = base(ids_BT).logits
        after_BTV = PeftModel.from_pretrained(base, done.sft.artifact)(ids_BT).logits
    assert bool(torch.isfinite(after_BTV).all()) and not torch.allclose(before_BTV, after_BTV, atol=1e-4)


def test_the_printed_and_the_carded_script_load_it(done: Done) -> None:
    check_scripts(done.sft, done.out)


def test_wandb_wrote_one_offline_run_in_two_parts(done: Done) -> None:
    training, proof = sorted(done.sft.wandb.rglob("*.wandb"))
    assert all(file.parent.name.startswith("offline-run-") for file in (training, proof))
    assert training.read_bytes().count(b"trained_tokens") >= 6 and training.stat().st_size > 1000
    assert {file.stem for file in (training, proof)} == {f"run-{read_state(done.sft.wandb).run_id}"}


def test_no_secret_stands_in_any_file_of_the_run(done: Done, secrets: dict[str, str]) -> None:
    assert done.code == 0
    files = {name: content for name, content in files_of(done.folder.root).items() if content is not None}
    assert len(files) > 15
    found = [
        (name, secret)
        for name, content in files.items()
        for secret, value in secrets.items()
        if value.encode() in content
    ]
    assert found == []
    assert not [value for value in secrets.values() if value in done.told]


def test_the_same_command_again_says_done_and_does_nothing(bench: Bench, done: Done, words: tuple[str, ...]) -> None:
    before = files_of(done.folder.root)
    again = bench.run("job", *words)
    assert again.code == 0 and "sft: done already" in again.out
    assert files_of(done.folder.root) == before


def test_another_configuration_is_refused_after_the_run_too(bench: Bench, done: Done, words: tuple[str, ...]) -> None:
    before = files_of(done.folder.root)
    other = bench.run("job", *words, "seed=1")
    assert other.code == 2 and "seed: 0 in the folder, 1 now" in other.error
    assert files_of(done.folder.root) == before


def test_status_tells_the_end_from_the_folder_alone(bench: Bench, done: Done) -> None:
    argv = [sys.executable, "-m", "orchestrator", "status", str(done.folder.root)]
    told = subprocess.run(argv, cwd=Path("/"), capture_output=True, text=True, check=True)
    assert "finished" in told.stdout and "sft" in told.stdout


def test_the_configuration_in_the_folder_is_whole_and_absolute(bench: Bench, done: Done) -> None:
    config = json.loads(done.folder.run.read_text())["config"]
    assert config["model"]["base"] == str(bench.model) and config["output_dir"] == str(bench.runs)
    assert config["stages"]["sft"]["data"]["train"]["path"] == str(bench.root / "rows.jsonl")


def test_a_whole_model_is_scored_as_it_is_saved(bench: Bench) -> None:
    """Masters are fp32 and the file is bfloat16: what is rounded by the save is rounded before the last score."""
    words = ("tuning=full", "model.dtype=bfloat16", "launcher=local", "stages.sft.optimizer.lr=1e-2")
    ended = bench.run("rounded", *words)
    proof = ended.result()["proof"]
    assert proof["reopened_loss"] == pytest.approx(proof["loss"], abs=2e-6)
    check_scripts(ended.sft, ended.out)
