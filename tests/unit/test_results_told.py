"""What the end of a run says of a stage that is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.compose import compose
from orchestrator.rundir import RunFolder, write_json
from orchestrator.tables import print_result


@pytest.mark.parametrize(("before", "after", "warns"), [(2.0, 1.5, False), (1.5, 1.7, True), (None, None, False)])
def test_a_stage_that_did_harm_says_so(
    before: float | None, after: float | None, warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path).stage("sft")
    result = {
        "stage": "sft",
        "eval_loss_before": before,
        "eval_loss_after": after,
        "tokens_per_second": 10.0,
        "seconds": 1.0,
        "artifact": {"kind": "adapter", "path": "runs/a/sft/artifact"},
        "base": {"folder": "base"},
        "proof": {"loss": 1.0, "reopened_loss": 1.0},
        "wandb": None,
    }
    write_json(folder.result, result)
    print_result(folder, compose(["+experiment=llama_lora"]))
    told = capsys.readouterr().out
    assert ("the held-out loss rose by 0.2000: on these rows this is worse" in told) == warns
    assert "stage sft is done and proven" in told
