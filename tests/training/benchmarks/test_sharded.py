"""The benchmark of resident memory: its base, its sampling by phase and process, and its table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SHAPE_WORDS = {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 4, "kv_heads": 2}
RANK = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]) / "sft"
folder.mkdir(parents=True)
held = []
for name, mib in (("loading the model", 32), ("training", 96)):
    report = {"attempt": 1, "began": time.time(), "now": {"name": name, "began": time.time()}, "seconds": {}}
    (folder / "phases.json").write_text(json.dumps(report))
    held.append(bytearray(mib << 20))
    time.sleep(1.5)
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_streamed_base_is_a_llama_of_the_stated_size(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from wide_llama import Shape, write_base

    shape = Shape(**SHAPE_WORDS)
    write_base(tmp_path / "base", shape)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.elements
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert 0.015 < float(model.model.layers[1].mlp.down_proj.weight.detach().std()) < 0.025


def test_memory_is_sampled_below_the_command_and_by_phase(tmp_path: Path) -> None:
    from resident import COMMAND, watch

    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    shell = f"{sys.executable} {tmp_path / 'rank.py'} {tmp_path / 'run'} & wait"
    found = watch(
        ["sh", "-c", shell], run=tmp_path / "run", environment=dict(os.environ), log=tmp_path / "log", kill_when=None
    )
    assert found.code == 0, (tmp_path / "log").read_text()
    small, large = (found.peaks[name]["anonymous"] / (1 << 20) for name in ("loading the model", "training"))
    assert 90 < large - small < 102 and small > 32
    assert found.peaks[COMMAND]["anonymous"] < 8 << 20, "the command is apart from its ranks"


def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    from resident import processes_below, watch

    found = watch(
        ["sh", "-c", "sleep 60 & sleep 60"],
        run=tmp_path,
        environment=dict(os.environ),
        log=tmp_path / "log",
        kill_when=lambda: True,
    )
    assert found.code == -9
    assert not [line for line in processes_below(os.getpid()).values() if line.startswith("sleep 60")]


def test_the_table_sets_peaks_against_share_and_plan() -> None:
    from sharded_table import bound, table
    from wide_llama import Shape

    shape = Shape(hidden=1024, intermediate=4096, layers=23)
    gib = 1 << 30
    share = bound("full", "train", "training", shape, 4)
    assert share == pytest.approx(1.1 * (shape.elements * 32 / 4 + 2 * shape.largest_layer_bytes))
    step = {
        "cell": "full",
        "step": "train",
        "size": "large",
        "planned": {"load": gib, "forward": 2 * gib, "backward": 3 * gib},
        "peaks": {"training": {"resident": 5 * gib, "anonymous": 4 * gib, "processes": 4}},
    }
    bare = {kind: {"resident": gib, "anonymous": gib} for kind in ("training", "scoring")}
    printed = table({"bare": bare, "steps": {"full/train": step}}, {"large": {"full": shape}}, 4)
    assert printed.splitlines()[-1].startswith("| full | train | training | 4.000 | 3.000 | ")
    assert printed.splitlines()[-1].endswith("| no | 3.000 | -25 % |")
