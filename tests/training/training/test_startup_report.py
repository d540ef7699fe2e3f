"""A real run tells the kernels that its plan named; Liger's, where it is installed, through Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

from bench import make_bench

from orchestrator.architecture.kernels import liger_is_installed
from orchestrator.files.atomic import read_json
from orchestrator.metrics.jsonl import read_rows


def test_the_log_tells_what_the_plan_named(tmp_path: Path) -> None:
    bench, has_liger = make_bench(tmp_path / "bench", rows=16), liger_is_installed()
    ended = bench.run(
        "named",
        "cluster.device=cpu",
        "launcher=local",
        "model.dtype=bfloat16",
        "stages.sft.data.packing=best_fit",
        "stages.sft.data.max_length=256",
        "stages.sft.max_steps=1",
        "stages.sft.batch.global_size=2",
        f"model.loss_head={'liger' if has_liger else 'auto'}",
        environment={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ended.result()["steps"] == 1
    (planned,) = read_json(ended.folder.plan)["stages"]
    events = {row["event"]: row for row in read_rows(ended.sft.events)}
    assert events["attention"]["attention"] == planned["attention"]
    assert planned["attention"].startswith("documents: blocks by document")
    assert events["head"]["head"] == planned["loss_head"]
    assert planned["loss_head"].startswith("Liger's" if has_liger else "chunked")
    log = "".join(file.read_text() for file in ended.sft.logs.glob("*.log"))
    assert f"attention: {planned['attention']}" in log and f"loss head: {planned['loss_head']}" in log
