"""The Python API trains as the command line does, and gives the model back for use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from bench import Bench, make_bench

from orchestrator.files.atomic import read_json
from orchestrator.run_folder.folder import RunFolder

SCRIPT = """
import json, sys
from orchestrator import load, resume, run, status
overrides = json.loads(sys.argv[1])
paused = run(*overrides, {"stages.sft.pause_at_step": 2})
result = run(*overrides, {"stages.sft.pause_at_step": None})
again = resume(result.folder)
stage = result.stages["sft"]
opened = load(result.folder)
chat = [{"role": "user", "content": "red apple"}]
ids = opened.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = opened.model.generate(**ids, max_new_tokens=4, do_sample=False)
print(json.dumps({
    "paused": [paused.outcome, list(paused.stages)],
    "outcome": [result.outcome, again.outcome],
    "losses": [stage.loss_before, stage.loss_after, stage.proven_loss],
    "steps": [row["step"] for row in stage.metrics() if "loss" in row],
    "status": [(one.stage, one.state) for one in status(result.folder)],
    "opened": [opened.stage, opened.kind, type(opened.model).__name__],
    "new_tokens": answer.shape[1] - ids["input_ids"].shape[1],
}))
"""
FAILING = """
import json, sys
from orchestrator import run
from orchestrator.errors import LaunchFailed
try:
    run(*json.loads(sys.argv[1]))
except LaunchFailed as error:
    print("caught", error)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("api"))


def script(bench: Bench, code: str, *overrides: str) -> str:
    argv = [sys.executable, "-c", code, json.dumps(overrides)]
    done = subprocess.run(argv, cwd=bench.root, env=bench.environment(), capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_run_resume_status_and_load(bench: Bench) -> None:
    found = json.loads(script(bench, SCRIPT, *bench.words("api", "stages.sft.max_steps=4")))
    assert found["paused"] == ["saved", []] and found["outcome"] == ["finished", "finished"]
    before, after, proven = found["losses"]
    result = read_json(RunFolder(bench.runs / "api").stage("sft").result)
    assert (before, after) == (result["eval_loss_before"], result["eval_loss_after"]) and after < before
    assert proven == pytest.approx(after, abs=1e-3)
    assert found["steps"] == [1, 2, 3, 4] and found["status"] == [["sft", "finished"]]
    assert found["opened"] == ["sft", "adapter", "PeftModelForCausalLM"] and 0 < found["new_tokens"] <= 4


def test_a_stage_that_fails_raises_with_its_reason(bench: Bench) -> None:
    (bench.root / "broken.py").write_text("def metric(samples):\n    raise KeyError('nothing here')\n")
    overrides = bench.words("broken", "stages.sft.metrics.functions=[{source: broken.py:metric}]")
    said = script(bench, FAILING.replace("LaunchFailed", "OrchestratorError"), *overrides)
    assert said.startswith("caught") and "KeyError: 'nothing here' (line 2 of" in said
