"""What `plan` tells of time, cost and checkpoints: lines, JSON, scaling table, prepared data, measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from command_line import Asker

from orchestrator.architecture.base_model import Base
from orchestrator.composition.compose import CONF, compose
from orchestrator.config.model import Architecture
from orchestrator.config.training import TrainingStage
from orchestrator.data.prepared.meta import Meta, Statistics
from orchestrator.data.prepared.statistics import PreparedFacts, prepared_facts
from orchestrator.errors import DataError
from orchestrator.estimate.step_time import Rate
from orchestrator.files.atomic import write_json
from orchestrator.machine.job_processor import processor_key
from orchestrator.machine.this_machine import this_machine
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.data_facts import DataFacts
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.measured_speed import Measured, find_measured, read_measured
from orchestrator.planning.plan import make_plan
from orchestrator.run_folder.folder import RunFolder

LLAMA = "+experiment=llama3_8b_lora"
NAMES = ("a100_40", "a100_80", "b200", "cpu", "gh200", "h100", "h200", "l40s", "mi300x", "rtx4090", "unknown")
PREPARED = PreparedFacts(
    rows=1000, units=9000, tokens=4_000_000, trained_tokens=1_000_000, evaluation_rows=10, steps_per_epoch=16,
    row_lengths=(4000,), document_lengths=(400, 500),
)  # fmt: skip
MEASURED = Measured(
    hardware="h100", device="cuda:0", tuning="lora", quantization="none", sharding="none", dtype="bfloat16", kind="sft",
    model_type="llama", parameters=8_030_261_248, world_size=8, micro_size=1, max_length=4096, packing="best_fit",
    gradient_checkpointing=True, steps=48, step_seconds=2.0, tokens_per_second=100_000, useful_tflops_per_device=400,
    executed_tflops_per_device=500, useful_mfu=0.4, executed_mfu=0.5, peak_memory_gib=60, rollout_seconds=0,
    startup_seconds=100, save_seconds=3, save_pause_seconds=0.5, time=1.0,
)  # fmt: skip


def llama() -> Architecture:
    return Architecture.model_validate(
        yaml.safe_load((CONF / "model" / "llama3_8b.yaml").read_text())["preset"]["architecture"]
    )


def planned(*words: str, data: DataFacts) -> Any:
    config = resolve(compose([LLAMA, *words]), Path("/w"))
    base = Base(source="hub", location="x", architecture=llama())
    return make_plan(config, base=base, data={"sft": data}).stages[0]


def facts(**changes: Any) -> DataFacts:
    return DataFacts(**{"train_rows": 9000, "evaluation_rows": 10, "format": "alpaca", "bytes": 1, **changes})


# ---- the hardware table --------------------------------------------------------------------------


def test_every_device_of_the_issue_is_in_the_table_and_can_be_chosen() -> None:
    assert sorted(file.stem for file in (CONF / "hardware").glob("*.yaml")) == sorted(NAMES)
    for name in NAMES:
        assert compose([LLAMA, f"hardware@cluster.hardware={name}"]).cluster.hardware.name == name


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"unknown"}))
def test_assumptions_and_sources_stand_beside_the_numbers(name: str) -> None:
    lines = (CONF / "hardware" / f"{name}.yaml").read_text().splitlines()
    for key in ("peak_tflops", "full", "lora", "qlora"):
        (line,) = [line for line in lines if line.strip().startswith(f"{key}:")]
        assert "  # " in line, line


def test_each_cluster_has_its_hardware_and_a_value_of_it_can_be_set() -> None:
    found = {file.stem: compose([LLAMA, f"cluster={file.stem}"]).cluster for file in (CONF / "cluster").glob("*.yaml")}
    assert {name: cluster.hardware.name for name, cluster in found.items()} == {
        "a100x8": "a100_80", "gh200x4": "gh200", "h100x8": "h100", "local": "unknown", "minicluster": "cpu",
    }  # fmt: skip
    assert compose([LLAMA, "cluster.hardware.dollars_per_hour=2.5"]).cluster.hardware.dollars_per_hour == 2.5


def test_hardware_without_its_place_is_told_where_it_belongs(ask: Asker) -> None:
    assert ask.refused("plan", LLAMA, "hardware=h200") == (
        "hardware=h200: hardware belongs to the cluster; type hardware@cluster.hardware=h200",
    )


# ---- lines and JSON ------------------------------------------------------------------------------


def test_the_plan_tells_time_cost_and_checkpoints_in_few_short_lines(ask: Asker) -> None:
    answer = ask("plan", LLAMA, "cluster.hardware.dollars_per_hour=2.5", "stages.sft.max_steps=1000", "--all")
    assert answer.code == 0 and max(len(line) for line in answer.out.splitlines()) <= 100
    for part in ("tokens/s a device", "device hours", "kWh, $", "goodput", "every_steps=", "h100: 40%", "(estimate)"):
        assert part in answer.out, answer.out


def test_json_holds_all(ask: Asker) -> None:
    (stage,) = json.loads(ask("plan", LLAMA, "format=json").out)["stages"]
    assert stage["time"]["step_seconds"] > 0 and stage["time"]["steps_are_guessed"] is True
    assert {"device_hours", "energy_kwh", "dollars"} == set(stage["cost"])
    assert stage["checkpointing"]["recommended_every_steps"] > 0 and 0.9 < stage["checkpointing"]["goodput"] < 1


def test_unknown_hardware_is_no_forecast_and_says_what_to_type(ask: Asker) -> None:
    answer = ask("plan", "+experiment=llama_lora", "cluster.device=cuda")
    assert answer.code == 0 and "no forecast" in answer.out and "hardware@cluster.hardware=h100" in answer.out
    assert "estimate)" not in answer.out


def test_the_plan_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from orchestrator.cli.main import main; code = main(['plan', '+experiment=llama3_8b_lora']); "
        "bad = {'torch', 'numpy', 'transformers'} & set(sys.modules); print(bad, file=sys.stderr); sys.exit(code or bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- prepared data -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_prepared_rows_make_steps_tokens_and_learning_rates_exact(ranks: int) -> None:
    stage = planned(f"cluster.processes_per_node={ranks}", data=facts(prepared=PREPARED))
    assert (stage.steps_per_epoch, stage.steps, stage.warmup_steps) == (16, 32, 2)
    assert (stage.tokens, stage.trained_tokens, stage.time.steps_are_guessed) == (4_000_000, 1_000_000, False)
    assert len(stage.learning_rates) == 4
    assert "counted in the prepared data" in stage.time.basis
    assert stage.flops_per_token == pytest.approx(
        4 * (32 * 218_112_000 + 525_336_576) + 3 * 2 * (410_000 / 900) * 4096 * 32 + 6 * 41_943_040, rel=1e-4
    )


def write_prepared(folder: Path, row_lengths: list[int], documents: list[int]) -> Path:
    folder.mkdir()
    np.save(folder / "row_lengths.npy", np.array(row_lengths, dtype=np.int64))
    np.save(folder / "document_offsets.npy", np.concatenate([[0], np.cumsum(documents)]).astype(np.int64))
    statistics = Statistics(
        source_rows=9, units=len(documents), duplicates=0, documents=len(documents), rows=len(row_lengths),
        tokens=sum(row_lengths), trained_tokens=5, truncated_rows=0, truncated_tokens=0, rows_losing_trained_tokens=0,
        dropped={}, longest_tokens=max(row_lengths), packing_efficiency=1.0,
    )  # fmt: skip
    meta = Meta(
        digest="d", key={}, kind="text", format="alpaca", documents_per_unit=1, max_length=64, packing="best_fit", pad_id=0,
        vocab_size=9, classes=(), file_rows=(9,), statistics=statistics,
    )  # fmt: skip
    (folder / "meta.json").write_text(meta.to_json())
    return folder


def stage_of(global_size: int, **changes: object) -> TrainingStage:
    """An sft stage with other values of `data`."""
    stage = cast("TrainingStage", compose(["+experiment=llama_lora"]).stages["sft"])
    batch = stage.batch.model_copy(update={"global_size": global_size})
    return stage.model_copy(update={"data": stage.data.model_copy(update=changes), "batch": batch})


def test_lengths_are_read_without_numpy_as_numpy_reads_them(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "p", [60, 64, 9], [30, 30, 64, 9])
    found = prepared_facts(folder, folder, stage=stage_of(2), seed=0)
    assert (found.row_lengths, found.document_lengths) == ((60, 64, 9), (30, 30, 64, 9))
    assert (found.rows, found.units, found.tokens, found.steps_per_epoch, found.evaluation_rows) == (3, 4, 133, 2, 3)
    (folder / "row_lengths.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"row_lengths\.npy"):
        prepared_facts(folder, None, stage=stage_of(2), seed=0)


def test_a_large_set_is_sampled_evenly(tmp_path: Path) -> None:
    lengths = list(range(1, 40_001))
    found = prepared_facts(write_prepared(tmp_path / "p", lengths, lengths), None, stage=stage_of(2), seed=0)
    assert 4096 <= len(found.row_lengths) < 5000
    assert np.mean(found.row_lengths) == pytest.approx(np.mean(lengths), rel=0.01)


def test_steps_under_a_token_budget_are_those_of_the_order(tmp_path: Path) -> None:
    from orchestrator.data.order import make_order

    lengths = [3, 50, 7, 20, 33, 8, 2, 60, 12, 12, 5]
    folder = write_prepared(tmp_path / "p", lengths, lengths)
    for budget, size in product((64, 128), (1, 2)):
        stage = stage_of(size, tokens_per_batch=budget)
        order = make_order(stage.data, lengths=np.array(lengths, dtype=np.int64), global_size=size, seed=3)
        found = prepared_facts(folder, None, stage=stage, seed=3)
        assert found.steps_per_epoch == order.steps_per_epoch


# ---- measurements --------------------------------------------------------------------------------


def test_the_newest_fitting_measurement_takes_the_place_of_the_table(tmp_path: Path) -> None:
    runs = {
        "old": MEASURED.model_copy(update={"tokens_per_second": 1}),
        "new": MEASURED.model_copy(update={"time": 2.0}),
        "other_method": MEASURED.model_copy(update={"time": 3.0, "tuning": "full"}),
        "other_hardware": MEASURED.model_copy(update={"time": 3.0, "hardware": "h200"}),
        "other_sharding": MEASURED.model_copy(update={"time": 3.0, "sharding": "zero2"}),
    }
    for name, measured in runs.items():
        folder = RunFolder(tmp_path / name).stage("sft")
        write_json(folder.measured, measured.model_dump(mode="json"))
        assert read_measured(folder) == measured
    (tmp_path / "torn" / "sft").mkdir(parents=True)
    RunFolder(tmp_path / "torn").stage("sft").measured.write_text("{")
    found = find_measured(compose([LLAMA, f"output_dir={tmp_path}"]), "sft", llama())
    assert found is not None and found[1] == "new" and found[0].time == 2.0
    assert find_measured(compose([LLAMA, f"output_dir={tmp_path}", "tuning=full"]), "sft", llama()) is not None
    assert find_measured(compose([LLAMA, f"output_dir={tmp_path}", "sharding=zero3"]), "sft", llama()) is None


def test_a_measurement_holds_for_its_own_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    gpu = [LLAMA, f"output_dir={tmp_path}"]
    cpu = [*gpu, "launcher=local", "cluster.device=cpu", "model.dtype=bfloat16"]
    here = processor_key(this_machine().processor, {"OMP_NUM_THREADS": "2"})
    folder = RunFolder(tmp_path / "before").stage("sft")

    def holds(words: list[str], **changes: Any) -> bool:
        write_json(folder.measured, MEASURED.model_copy(update=changes).model_dump(mode="json"))
        return find_measured(compose(words), "sft", llama()) is not None

    # made on a processor under a GPU's name
    assert not holds(gpu, device="cpu", processor=here) and holds(cpu, device="cpu", processor=here)
    assert holds(gpu) and not holds(cpu)
    for key in ("name", "onednn_limit", "aten_limit", "threads"):
        assert not holds(cpu, device="cpu", processor=here.model_copy(update={key: "other"}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not holds(cpu, device="cpu", processor=here)
    # a file of an older version proves what a GPU did, and nothing of a processor
    old = MEASURED.model_copy(update={"device": "cpu"}).model_dump(mode="json", exclude={"processor"})
    write_json(folder.measured, old)
    assert find_measured(compose(cpu), "sft", llama()) is None
    write_json(folder.measured, {**old, "device": "cuda:0"})
    assert find_measured(compose(gpu), "sft", llama()) is not None


def test_a_measured_plan_says_so_and_follows_the_measurement() -> None:
    stage = planned(data=facts(prepared=PREPARED, measured=(MEASURED, "before")))
    assert stage.time.basis.startswith("measured by run before: 100,000 tokens/s over 48 steps; ")
    table = planned(data=facts(prepared=PREPARED))
    assert stage.time.step_seconds < table.time.step_seconds and stage.time.communication_seconds == 0
    assert stage.checkpointing.save_seconds == 3.5 and stage.time.startup_seconds == 100
    elsewhere = planned("cluster.nodes=2", data=facts(prepared=PREPARED, measured=(MEASURED, "before")))
    assert "on 8 ranks, communication estimated" in elsewhere.time.basis


def test_a_short_or_slow_measurement_is_held_against_the_probe() -> None:
    def basis(steps: int, gflops: float) -> tuple[str, float]:
        measured = MEASURED.model_copy(update={"steps": steps, "executed_tflops_per_device": 1.0})
        rate = Rate(flops_per_second=gflops * 1e9, is_whole=False, rollout_seconds=None, basis="probe")
        time = planned(data=facts(prepared=PREPARED, measured=(measured, "before"), probed=rate)).time
        return time.basis, time.step_seconds

    few, few_seconds = basis(3, 4000)
    assert few.startswith("probe (run before measured only 3 steps)")
    slow, slow_seconds = basis(48, 4000)
    assert "over 48 steps; but a measurement of the processor alone gives 4.0x that rate" in slow
    assert few_seconds < slow_seconds
    assert "processor alone gives 1/4.0 of that rate" in basis(48, 250)[0]
    assert basis(48, 1500)[0].startswith("measured by run before") and "alone" not in basis(48, 1500)[0]


def test_gather_finds_measurements_beside_the_run(tmp_path: Path) -> None:
    write_json(RunFolder(tmp_path / "before").stage("sft").measured, MEASURED.model_dump(mode="json"))
    _, data = inspect_inputs(resolve(compose([LLAMA, f"output_dir={tmp_path}", "name=next"]), tmp_path))
    assert data["sft"].measured is not None and data["sft"].measured[1] == "before"


# ---- the scaling table ---------------------------------------------------------------------------

SCALED = (LLAMA, "stages.sft.batch.global_size=256", "stages.sft.max_steps=1000", "stages.sft.epochs=null")


def test_the_scaling_table_keeps_the_global_batch_and_names_what_does_not_divide_it(ask: Asker) -> None:
    answer = ask("plan", *SCALED, "cluster.nodes=1,3,5,...,512", "format=json")
    assert answer.code == 2 and "three dots continue by the ratio" in answer.errors[0]
    rows = json.loads(ask("plan", *SCALED, "cluster.nodes=1,2,4,...,512", "format=json").out)
    assert [row["nodes"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    shared = [row for row in rows if row["micro_size"] is not None]
    assert [row["nodes"] for row in shared] == [1, 2, 4, 8, 16, 32]
    assert {row["micro_size"] * row["devices"] * row["accumulation_steps"] for row in shared} == {256}
    hours = [row["time"]["hours"] for row in shared]
    assert hours == sorted(hours, reverse=True)
    goodputs = [row["checkpointing"]["best_goodput"] for row in shared]
    assert goodputs == sorted(goodputs, reverse=True)
    assert all("cannot share a global batch of 256" in row["problem"] for row in rows if row["micro_size"] is None)


def test_the_scaling_table_for_a_person(ask: Asker) -> None:
    answer = ask("plan", *SCALED, "cluster.nodes=1,2,3", "cluster.hardware.dollars_per_hour=2")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[1].split() == [
        "nodes",
        "devices",
        "batch",
        "step",
        "tokens/s",
        "efficiency",
        "time",
        "device",
        "h",
        "$",
        "goodput",
    ]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert "256 cannot be shared" in lines[4] and "estimate from h100" in answer.out
    assert max(len(line.rstrip()) for line in lines) <= 120


@pytest.mark.parametrize("words", ["1,x", "0,2", "1,,2", "...,4"])
def test_node_counts_that_are_none(ask: Asker, words: str) -> None:
    assert "type cluster.nodes=1,2,4,...,512" in ask.refused("plan", LLAMA, f"cluster.nodes={words}")[0]


def test_other_faults_of_the_words_are_told_in_the_scaling_table_too(ask: Asker) -> None:
    assert ask.refused("plan", LLAMA, "cluster.nodes=1,2", "nmae=x") == ("nmae: unknown key; did you mean name?",)
