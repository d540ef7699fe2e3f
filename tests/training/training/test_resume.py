"""A run that is cut and goes on, on real gloo ranks under real DeepSpeed: as if nothing had happened.

The whole grid (three methods x four shardings x five moves) is `benchmarks/resume.py`; here stand its representatives.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rank_runs import Cell, Place, largest_difference, make_place, train
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.config.run import RunConfig
from orchestrator.files.atomic import read_json
from orchestrator.run_folder import checkpoints
from orchestrator.run_state.resume_rules import may_differ
from orchestrator.tensors.reader import read_metadata

LORA = ("tuning=lora", "tuning.rank=4")
EIGHT_BIT = ("tuning=full", "optimizer@stages.sft.optimizer=adamw_8bit", "stages.sft.optimizer.lr=2e-3")
RUNS = {
    "full-none": ("tuning=full", "sharding=none"),
    "full-zero2": ("tuning=full", "sharding=zero2"),
    "full-zero3": ("tuning=full", "sharding=zero3", "sharding.persistence_elements=0"),
    "lora-zero1": (*LORA, "sharding=zero1"),
    "lora-zero3": (*LORA, "sharding=zero3"),
    "dropout-none": (*LORA, "tuning.dropout=0.2", "sharding=none"),
    "dropout-zero2": (*LORA, "tuning.dropout=0.2", "sharding=zero2"),
    "qlora-zero2": (*LORA, "quantization=nf4", "sharding=zero2"),
    "bfloat16-zero3": ("tuning=full", "model.dtype=bfloat16", "sharding=zero3"),
    "eight-none": (*EIGHT_BIT, "sharding=none"),
    "eight-zero2": (*EIGHT_BIT, "sharding=zero2"),
}
ELASTIC = [name for name in RUNS if not name.startswith(("dropout", "bfloat16", "eight-zero"))]
CUT = 4


def _sharding(place: Place, name: str) -> dict[str, object]:
    """The section of the configuration that `sharding=NAME` composes."""
    run = place.make(f"words-{name}", f"sharding={name}", ranks=2)
    return read_json(run / "run.json")["config"]["sharding"]


def _ranks(count: int) -> dict[str, int]:
    """Changes to another number of ranks, with the micro-batch that fits the same global batch."""
    return {"cluster__processes_per_node": count, "stages__sft__batch__micro_size": 2 if count < 4 else 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Every run of RUNS, straight, at two ranks."""
    place = make_place(tmp_path_factory.mktemp("resume"))
    cells = [Cell(run=str(place.make(name, *words, ranks=2))) for name, words in RUNS.items()]
    train(place, cells, ranks=2)
    assert all(sorted(place.rows(name)) == list(range(1, 9)) for name in RUNS)
    return place


@pytest.fixture(scope="module")
def same_ranks(place: Place) -> Place:
    """Every run again from step 4, at two ranks; and runs that must be refused."""
    cells = [Cell(run=str(place.branch(name, f"{name}-again", step=CUT)), attempt=2) for name in RUNS]
    lr = {"stages__sft__optimizer__lr": 1e-3}
    accepted = {**lr, "stages__sft__checkpoint__accept_changes": ["stages.sft.optimizer"]}
    other = make_place(place.root / "other", rows=50)
    rows = {"stages__sft__data__train__path": str(other.root / "rows.jsonl")}
    cells += [
        Cell(
            run=str(place.branch("full-none", "lr", step=CUT, **lr)),
            expect="optimizer.lr: 0.002 in the checkpoint, 0.001 now",
        ),
        Cell(run=str(place.branch("full-none", "lr-accepted", step=CUT, **accepted)), attempt=2),
        Cell(run=str(place.branch("full-none", "rows", step=CUT, **rows)), expect="stages.sft.data: "),
        Cell(run=str(_damaged(place)), attempt=2),
        Cell(run=str(_with_other_base(place)), expect="its loss on the probe's rows is"),
        Cell(
            run=str(place.branch("eight-zero2", "eight-moved", step=CUT, sharding=_sharding(place, "zero1"))),
            expect="8-bit optimizer states",
        ),
    ]
    train(place, cells, ranks=2, fresh=True)
    return place


def _damaged(place: Place) -> Path:
    """A run that finds the checkpoints of steps 4 and 6; one bit of the newer one has flipped."""
    run = place.branch("full-zero2", "damaged", step=CUT)
    newer = place.stage("damaged").checkpoint(6)
    shutil.copytree(place.stage("full-zero2").checkpoint(6), newer)
    content = bytearray((newer / checkpoints.rank_file(1)).read_bytes())
    content[-100] ^= 1
    (newer / checkpoints.rank_file(1)).write_bytes(content)
    return run


def _with_other_base(place: Place) -> Path:
    """A LoRA run whose base was replaced behind its back; the change of path was accepted."""
    import tiny_model

    tiny_model.write_llama(place.root / "other_model", seed=1)
    changes = {"model__base": str(place.root / "other_model")}
    accept = {"stages__sft__checkpoint__accept_changes": ["model.base", "stages.sft.data"]}
    return place.branch("lora-zero1", "base", step=CUT, **changes, **accept)


@pytest.fixture(scope="module")
def one_rank(place: Place) -> Place:
    """From two ranks to one; and to another sharding at the same time."""
    cells = [Cell(run=str(place.branch(name, f"{name}-on-1", step=CUT, **_ranks(1))), attempt=2) for name in ELASTIC]
    none, zero2 = _sharding(place, "none"), _sharding(place, "zero2")
    cells += [
        Cell(run=str(place.branch("full-zero3", "zero3-to-none", step=CUT, sharding=none, **_ranks(1))), attempt=2),
        Cell(run=str(place.branch("lora-zero3", "zero3-to-zero2", step=CUT, sharding=zero2, **_ranks(1))), attempt=2),
        Cell(run=str(place.branch("full-none", "none-to-zero2", step=CUT, sharding=zero2, **_ranks(1))), attempt=2),
        Cell(
            run=str(place.branch("eight-zero2", "eight-on-1", step=CUT, **_ranks(1))), expect="8-bit optimizer states"
        ),
    ]
    train(place, cells, ranks=1)
    return place


@pytest.fixture(scope="module")
def four_ranks(place: Place) -> Place:
    names = ("full-zero3", "lora-zero1", "full-none")
    cells = [Cell(run=str(place.branch(name, f"{name}-on-4", step=CUT, **_ranks(4))), attempt=2) for name in names]
    train(place, cells, ranks=4)
    return place


@pytest.fixture(scope="module")
def back_on_two(one_rank: Place, four_ranks: Place) -> Place:
    place = one_rank
    sources = (
        "full-zero3-on-1",
        "lora-zero1-on-1",
        "full-none-on-1",
        "full-zero3-on-4",
        "lora-zero1-on-4",
        "full-none-on-4",
    )
    cells = [Cell(run=str(place.branch(name, f"{name}-on-2", step=6, **_ranks(2))), attempt=3) for name in sources]
    train(place, cells, ranks=2)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_on_the_same_ranks_every_bit_comes_out_again(same_ranks: Place, name: str) -> None:
    straight, again = same_ranks.rows(name), same_ranks.rows(f"{name}-again")
    assert sorted(again) == [5, 6, 7, 8]
    for step, row in again.items():
        for key in ("loss", "grad_norm", "lr", "rows_digest", "tokens"):
            assert row[key] == straight[step][key], (step, key)
    one = load_file(same_ranks.run(name) / "weights-1.safetensors")
    other = load_file(same_ranks.run(f"{name}-again") / "weights-2.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ELASTIC)
def test_two_ranks_to_one(one_rank: Place, name: str) -> None:
    _assert_goes_on(one_rank, name, f"{name}-on-1", steps=[5, 6, 7, 8], ranks=[2, 1], micro_batches=4)


@pytest.mark.parametrize("name", ["full-zero3", "lora-zero1", "full-none"])
def test_two_ranks_to_four(four_ranks: Place, name: str) -> None:
    _assert_goes_on(four_ranks, name, f"{name}-on-4", steps=[5, 6, 7, 8], ranks=[2, 4], micro_batches=2)


def test_each_of_four_ranks_reads_its_share_of_what_two_wrote(four_ranks: Place) -> None:
    """Under ZeRO-3 a quarter (and its share of the padding), from one of the two files; everything where each rank holds everything."""
    written = sum(
        entry["length"] * 3 * 4  # weight and both moments, fp32
        for file in four_ranks.stage("full-zero3").checkpoint(CUT).glob("rank-*.safetensors")
        for entry in json.loads(read_metadata(file)["index"])["fragments"].values()
    )
    for name, share in (("full-zero3", 0.25), ("full-none", 1.0)):
        shares = [size / written for size in four_ranks.bytes_read(f"{name}-on-4", 2)]
        assert len(shares) == 4 and all(0.9 * share <= part <= 1.02 * share for part in shares), shares
    assert sum(four_ranks.bytes_read("full-zero3-on-4", 2)) == written


@pytest.mark.parametrize("before", [1, 4])
@pytest.mark.parametrize("name", ["full-zero3", "lora-zero1", "full-none"])
def test_one_and_four_ranks_to_two(back_on_two: Place, name: str, before: int) -> None:
    _assert_goes_on(back_on_two, name, f"{name}-on-{before}-on-2", steps=[7, 8], ranks=[before, 2], micro_batches=2)


@pytest.mark.parametrize(
    ("name", "run"), [("full-zero3", "zero3-to-none"), ("lora-zero3", "zero3-to-zero2"), ("full-none", "none-to-zero2")]
)
def test_to_another_sharding(one_rank: Place, name: str, run: str) -> None:
    _assert_goes_on(one_rank, name, run, steps=[5, 6, 7, 8], ranks=[2, 1], micro_batches=4)
    (event,) = one_rank.events(run, "resume")
    assert event["sharding"] == [name.split("-")[1], run.split("-")[-1]]


def _assert_goes_on(
    place: Place, name: str, run: str, *, steps: list[int], ranks: list[int], micro_batches: int
) -> None:
    straight, moved = place.rows(name), place.rows(run)
    assert sorted(moved) == steps
    assert largest_difference(moved, straight, "loss") < 1e-6
    assert largest_difference(moved, straight, "grad_norm") < 1e-5
    assert all(moved[step][key] == straight[step][key] for step in steps for key in ("lr", "rows_digest"))
    (event,) = place.events(run, "resume")
    assert (event["world_size"], event["micro_batches_per_rank"]) == (ranks, micro_batches)


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_taken(same_ranks: Place) -> None:
    rows, straight = same_ranks.rows("damaged"), same_ranks.rows("full-zero2")
    assert sorted(rows) == [5, 6, 7, 8] and all(rows[step]["loss"] == straight[step]["loss"] for step in rows)
    (event,) = same_ranks.events("damaged", "quarantine")
    assert event["step"] == 6 and "rank-00001.safetensors: its sha256" in str(event["why"])
    assert (same_ranks.stage("damaged").quarantine / "step-00000006.1").is_dir()
    assert checkpoints.saved_steps(same_ranks.stage("damaged")) == [4, 6, 8], "6 and 8 are new ones"


def test_an_accepted_change_goes_on_with_the_new_value(same_ranks: Place) -> None:
    straight, changed = same_ranks.rows("full-none"), same_ranks.rows("lr-accepted")
    assert changed[5]["lr"] == pytest.approx(float(str(straight[5]["lr"])) / 2)
    assert changed[5]["loss"] == straight[5]["loss"] and changed[6]["loss"] != straight[6]["loss"]


def test_a_lora_checkpoint_holds_no_frozen_weight(place: Place) -> None:
    adapter = load_file(place.run("lora-zero3") / "weights-1.safetensors")
    checkpoint = checkpoints.verify(place.stage("lora-zero3").checkpoint(8))
    names: set[str] = set()
    for path in checkpoint.rank_files:
        with safe_open(path, framework="pt") as handle:
            names |= {key.partition(":")[2] for key in handle.keys() if key.startswith("weight:")}  # noqa: SIM118
    assert names == adapter.keys() and all("lora_" in name for name in names)
    trained = sum(tensor.numel() for tensor in adapter.values())
    held = sum(entry["bytes"] for name, entry in checkpoint.manifest["files"].items() if name.startswith("rank"))
    random_states = 2 * 25_000
    assert 12 * trained < held < 12 * trained + random_states + 40_000


def test_what_a_checkpoint_says_of_itself(place: Place) -> None:
    found, refused = checkpoints.newest_valid(place.stage("dropout-zero2"))
    assert found is not None and (found.step, refused) == (8, {})
    assert checkpoints.newest_valid(place.stage("dropout-zero2"), read_files=False)[0] == found
    assert "step 8, saved " in checkpoints.describe(
        found
    ) and "on 2 ranks under sharding=zero2" in checkpoints.describe(found)
    facts = found.manifest
    assert (facts["world_size"], facts["sharding"], facts["attempt"]) == (2, "zero2", 1)
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )
    assert found.state["progress"]["step"] == 8 and math.isfinite(found.state["probe"])
    assert found.state["settings"]["stages.sft.optimizer.lr"] == 2e-3
    assert not [
        key for key in found.state["settings"] if key.startswith(("cluster", "launcher", "tracking", "sharding"))
    ]
    saves = place.events("dropout-zero2", "save")
    assert [event["step"] for event in saves] == [2, 4, 6, 8]
    assert all(float(str(event[key])) > 0 for event in saves for key in ("save_seconds", "save_stall_seconds"))


def test_what_may_differ_between_attempts(place: Place) -> None:
    config = RunConfig.model_validate(read_json(place.run("full-none") / "run.json")["config"], strict=False)
    free = may_differ(config)
    assert {"cluster", "sharding", "stages.sft.checkpoint", "stages.sft.batch.micro_size"} <= free
    assert not {"stages.sft.optimizer", "seeds", "model", "stages.sft.batch.global_size"} & free
    stage = config.stages["sft"]
    accepting = stage.model_copy(
        update={"checkpoint": stage.checkpoint.model_copy(update={"accept_changes": ("seeds",)})}
    )
    assert "seeds" in may_differ(config.model_copy(update={"stages": {"sft": accepting}}))
