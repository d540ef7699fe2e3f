"""Liger's kernel of the loss head equals plain torch in loss and gradients, and takes only the questions that it can answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.architecture.kernels import liger_is_installed
from orchestrator.composition.compose import compose
from orchestrator.config.training import SftStage
from orchestrator.distributed.runtime import start_runtime
from orchestrator.errors import ConfigError
from orchestrator.losses import liger_head as liger
from orchestrator.losses.chunked_head import Shape, Term


@pytest.mark.skipif(not liger_is_installed(), reason="liger-kernel and triton are not installed (the extra `gpu`)")
def test_liger_equals_torch_through_the_interpreter() -> None:
    """Loss and gradients of Liger's kernel, run by Triton's interpreter on a CPU, beside those of plain torch."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)])
    argv = [sys.executable, str(here / "liger_interpreted.py")]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert not told["empty"], "a batch without a trained token goes through torch, with gradients of zero"
    cases = {case["case"]: case for case in told["cases"]}
    assert len(cases) == 11
    by_torch = cases.pop("untied lora-head")
    assert by_torch["nonzero"] == by_torch["tokens"], "a head of two products is torch's"
    for name, case in cases.items():
        assert case["nonzero"] == 1 < case["tokens"], f"{name}: Liger gives one sum, at the first token"
        half = name.endswith("bfloat16")
        assert case["loss"] <= (1.1 * case["torch_loss"] + 1e-6 if half else 1e-6), case
        assert case["gradients"] <= (1.2 * case["torch_gradients"] if half else 1e-5), case
        assert half or case["without_gradients"] <= 1e-6, case
    trained_head = [name for name, case in cases.items() if "lm_head.weight" in case["names"]]
    assert trained_head == ["untied full", "bias full", "untied head alone", "untied full bfloat16"]
    assert not any("lm_head" in name for name in cases["untied lora"]["names"])
    assert cases["untied head alone"]["names"] == ["lm_head.weight"]


def test_a_question_that_liger_cannot_answer_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU `liger` by name changes nothing without Triton's interpreter; with it, only plain sums are Liger's."""
    hidden_KW, weight_VW, targets_K = torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([1, 2, 3])
    term = Term(hidden_KW=hidden_KW, weight_VW=weight_VW)
    asked = Shape(kernel="liger", is_summed=True)
    assert not liger.takes([term], targets_K, asked)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert liger.takes([term], targets_K, asked)
    for other in ({"kernel": "torch"}, {"is_summed": False}, {"entropies": True}, {"temperature": 0.7}):
        assert not liger.takes([term], targets_K, replace(asked, **other)), other
    assert not liger.takes([term, term], targets_K, asked) and not liger.takes([term], targets_K[:0], asked)


def test_ranks_without_a_gpu_refuse_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan could not know the device, the ranks do."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = compose(["+experiment=llama_lora", "model.loss_head=liger", "cluster.device=cpu"])
    stage = config.stages["sft"]
    assert isinstance(stage, SftStage)
    with pytest.raises(ConfigError, match=r"liger needs a GPU.*type model\.loss_head=auto"):
        start_runtime(config, stage)
