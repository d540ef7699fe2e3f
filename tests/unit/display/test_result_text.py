"""What the end of a run says of a stage that is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.composition.compose import compose
from orchestrator.display.result_text import print_result
from orchestrator.files.atomic import write_json
from orchestrator.run_folder.folder import RunFolder

Told = Callable[..., str]

RESULT: dict[str, Any] = {
    "stage": "sft",
    "kind": "sft",
    "eval_loss_before": None,
    "eval_loss_after": None,
    "best_step": None,
    "tokens_per_second": 10.0,
    "seconds": 1.0,
    "phase_seconds": {
        "importing the libraries": 4.0,
        "loading the model": 5.0,
        "first step": 1.0,
        "training": 11.5,
        "proof": 200.0,
    },
    "artifact": {"kind": "adapter", "path": "runs/a/sft/artifact"},
    "base": {"folder": "base"},
    "proof": {"loss": 1.0, "reopened_loss": 1.0},
    "wandb": None,
}


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    def tell(**changes: Any) -> str:
        folder = RunFolder(tmp_path).stage("sft")
        write_json(folder.result, {**RESULT, **changes})
        print_result(folder, compose(["+experiment=llama_lora"]), wall_seconds=231.4)
        return capsys.readouterr().out

    return tell


@pytest.mark.parametrize(("before", "after", "warns"), [(2.0, 1.5, False), (1.5, 1.7, True), (None, None, False)])
def test_a_stage_that_did_harm_says_so(told: Told, before: float | None, after: float | None, warns: bool) -> None:
    out = told(eval_loss_before=before, eval_loss_after=after)
    assert ("the held-out loss rose by 0.2000: on these rows the result is worse" in out) == warns
    assert "stage sft is done and proven" in out


@pytest.mark.parametrize(("after", "warns"), [(-0.75, False), (-0.25, True)])
def test_a_reward_is_no_negative_loss(told: Told, after: float, warns: bool) -> None:
    out = told(kind="grpo", eval_loss_before=-0.5, eval_loss_after=after)
    assert f"held-out reward   0.5000 before, {-after:.4f} after" in out and "loss " not in out.split("proof")[0]
    assert ("the held-out reward fell by 0.2500" in out) == warns


def test_the_time_is_that_of_the_command_and_of_each_phase(told: Told) -> None:
    line = "time              3 min 51 s in all: start 14 s, load 5.0 s, steps 12 s, proof 3 min 20 s"
    assert line in told().splitlines()


def test_a_confusion_matrix_names_both_axes(told: Told) -> None:
    held = {"rows": 5, "loss": 1.0, "accuracy": 0.8, "confusion": [[3, 1], [0, 1]]}
    out = told(classification={"names": ["cat", "a_very_long_class"], "held_out": held})
    assert out[out.index("confusion") :].splitlines()[:3] == [
        "confusion         true \\ predicted    cat a_very_long~",
        "                  cat                   3            1",
        "                  a_very_long_class     0            1",
    ]
