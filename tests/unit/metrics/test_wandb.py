"""The worker's side of W&B, without the SDK: ids, sentences, modes, and what is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from orchestrator.metrics.wandb.process import run_id, start
from orchestrator.metrics.wandb.protocol import WandbSettings, WandbState, how_to_see, resolve_mode, write_state


def test_one_id_for_the_life_of_the_run(tmp_path: Path) -> None:
    first = run_id(tmp_path / "sft" / "wandb")
    assert len(first) == 8 and first.isalnum() and first == first.lower()
    assert run_id(tmp_path / "sft" / "wandb") == first
    assert run_id(tmp_path / "dpo" / "wandb") != first


def test_how_to_see_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "a run" / "wandb"
    online = WandbState(run_id="abcd1234", mode="online", url="https://wandb.ai/e/p/runs/abcd1234")
    write_state(directory, online)
    assert how_to_see(directory) == "W&B run: https://wandb.ai/e/p/runs/abcd1234"
    write_state(directory, replace(online, mode="offline"))
    assert how_to_see(directory) == f"W&B run is offline; send it with: wandb sync '{directory}'"
    ours = f"-m orchestrator.metrics.wandb '{directory}/settings.json'"
    write_state(directory, replace(online, server_uncertain=True))
    assert how_to_see(directory).startswith(
        "W&B run: https://wandb.ai/e/p/runs/abcd1234; if the job has ended, W&B may"
    )
    assert how_to_see(directory).endswith(ours)
    write_state(directory, replace(online, mode="offline", is_open=True))
    assert how_to_see(directory).endswith(ours) and "when the job has ended" in how_to_see(directory)
    write_state(directory, WandbState(run_id="abcd1234"))
    assert how_to_see(directory).startswith("W&B has no data of this run yet")


@pytest.mark.parametrize(
    ("mode", "wish", "resolved"),
    [
        ("auto", None, "online"), ("auto", "offline", "offline"), ("auto", "dryrun", "offline"), ("auto", "disabled", "disabled"),
        ("auto", "online", "online"), ("online", "offline", "online"), ("offline", "online", "offline"), ("disabled", None, "disabled"),
    ],
)  # fmt: skip
def test_modes(monkeypatch: pytest.MonkeyPatch, mode: str, wish: str | None, resolved: str) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if wish is not None:
        monkeypatch.setenv("WANDB_MODE", wish)
    assert resolve_mode(mode) == resolved


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    assert start(_settings(tmp_path, mode="disabled")) is None
    assert not (tmp_path / "wandb").exists()


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb").write_text("a file where the folder should be")
    assert start(_settings(tmp_path, mode="offline")) is None
    assert capfd.readouterr().err.startswith("W&B: not used: ")


def _settings(folder: Path, *, mode: Literal["offline", "disabled"]) -> WandbSettings:
    return WandbSettings(
        project="p", entity=None, mode=mode, name="n", group="g", job_type="sft", config={}, metrics_file=str(folder / "m.jsonl"), samples_file=str(folder / "s.jsonl"), profile_folder=str(folder / "profile"),
        directory=str(folder / "wandb"), init_timeout_seconds=1, finish_timeout_seconds=1,
    )  # fmt: skip


def test_the_login_side_imports_neither_torch_nor_the_sdk() -> None:
    code = (
        "import sys, orchestrator.metrics.console, orchestrator.metrics.wandb.process, orchestrator.metrics.wandb.supervisor\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'peft', 'datasets', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)
