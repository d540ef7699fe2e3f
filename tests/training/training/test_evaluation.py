"""Evaluation in passes of like length, against one row at a time, over ranks, and cut into the part that a proof scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from data_parts import data_config, write_jsonl
from transformers import AutoModelForCausalLM

from orchestrator.composition.compose import compose
from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.dataloader.passes import CPU_PASS_TOKENS, passes
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import Runtime, start_single_runtime
from orchestrator.models.causal_lm import attach_head
from orchestrator.training.evaluation import evaluate
from orchestrator.training.objectives import sft_objective

ROWS = [{"instruction": f"{i} " + "ab " * (i * 37 % 80), "output": "cd " * (1 + i * 11 % 9)} for i in range(50)]


@dataclass(frozen=True)
class Shared:
    """A rank among several."""

    rank: int
    world_size: int
    device: torch.device


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model.write_llama(folder / "model")
    write_jsonl(folder / "rows.jsonl", ROWS)
    pairs = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "no"} for row in ROWS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def prepared(place: Path, name: str = "rows", **changes: Any) -> PreparedRows:
    settings = {"train__path": str(place / f"{name}.jsonl"), "eval__path": "none", "max_length": 512, **changes}
    found = ensure_prepared(
        data_config(**settings), tokenizer_folder=place / "model", cache=place / "cache", seed=0, say=lambda _: None
    )
    return PreparedRows.open(found.train)


@pytest.fixture(scope="module")
def model(place: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    attach_head(model)
    return model


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_single_runtime(compose(["+experiment=llama_lora", "model.dtype=float32"]), autocast=False)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("micro_size", [1, 7])
def test_the_loss_is_that_of_the_rows_one_by_one(
    place: Path, model: torch.nn.Module, runtime: Runtime, packing: str, micro_size: int
) -> None:
    rows = prepared(place, packing=packing)
    objective = sft_objective(runtime)
    with torch.no_grad():
        alone = [float(objective.terms(model, rows.batch([index]))[0]) for index in range(rows.rows)]
    scored = evaluate(runtime, model, objective, rows, micro_size=micro_size, first=3)
    trained = rows.trained_tokens.tolist()
    assert scored.loss == pytest.approx(sum(alone) / sum(trained), rel=1e-6)
    assert (scored.rows, scored.trained_tokens) == (rows.rows, sum(trained))
    assert scored.first is not None and scored.first.rows == 3
    assert scored.first.loss == pytest.approx(sum(alone[:3]) / sum(trained[:3]), rel=1e-6)
    # Equal to the bit: the proof scores these rows alone and in another process.
    assert scored.first.loss == evaluate(runtime, model, objective, rows, micro_size=micro_size, limit=3).loss


def test_more_than_all_rows_are_all_rows(place: Path, model: torch.nn.Module, runtime: Runtime) -> None:
    scored = evaluate(runtime, model, sft_objective(runtime), prepared(place), micro_size=4, first=64)
    assert scored.first is not None and scored.first.loss == scored.loss and scored.first.rows == len(ROWS)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_size", [1, 4])
def test_every_row_is_in_one_pass_of_one_rank(place: Path, world_size: int, micro_size: int) -> None:
    rows = prepared(place)
    cpu = torch.device("cpu")
    shares = [
        list(passes(Shared(rank, world_size, cpu), rows, range(5, 47), micro_size=micro_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1, "ranks with fewer passes would leave the others waiting"
    taken = [index for share in shares for indices, _ in share for index in indices if index >= 0]
    assert sorted(taken) == list(range(5, 47))
    assert [done for _, done in shares[0]][-1] == 42


def test_passes_hold_as_many_tokens_as_their_device_takes(place: Path) -> None:
    """On a CPU what its caches take; on a GPU what the plan reserves, and rows of like length."""
    rows = prepared(place)
    for device, most in (("cpu", CPU_PASS_TOKENS), ("cuda", 2 * 512)):
        found = [indices for indices, _ in passes(Shared(0, 1, torch.device(device)), rows, range(50), micro_size=2)]
        padded = [len(indices) * max(int(rows.lengths[i]) for i in indices) for indices in found]
        assert max(padded) <= most and len(found) < 25
        assert sum(padded) < 1.2 * rows.lengths.sum()


def test_a_pair_counts_as_two_sequences(place: Path) -> None:
    rows = prepared(place, "pairs")
    for indices, _ in passes(Shared(0, 1, torch.device("cuda")), rows, range(50), micro_size=1):
        assert rows.batch(indices).input_ids_BT.numel() <= 2 * 512
