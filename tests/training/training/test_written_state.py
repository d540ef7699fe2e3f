"""A checkpoint's files read by byte ranges: for every layout of the reader a rank reads its share, with the same values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from orchestrator.distributed.runtime import Runtime
from orchestrator.distributed.zero_fragments import Fragment
from orchestrator.errors import CheckpointError
from orchestrator.tensors.reader import TensorFolder
from orchestrator.training.checkpointing import written_state
from orchestrator.training.checkpointing.tensor_files import write_tensors
from orchestrator.training.checkpointing.training_state import collect, restore
from orchestrator.training.checkpointing.written_state import WEIGHT, WrittenState

SHAPES = {"a": (7, 9), "b": (30, 11), "c": (5,)}


def whole(name: str) -> torch.Tensor:
    torch.manual_seed(len(name) + ord(name))
    return torch.randn(SHAPES[name]).view(-1)


def layout(ranks: int, *, sharded: bool) -> list[list[Fragment]]:
    """The fragments of each rank: ZeRO-3's equal parts, the last one cut short, or every parameter on every rank."""
    found: list[list[Fragment]] = []
    for rank in range(ranks):
        fragments: list[Fragment] = []
        for name, shape in SHAPES.items():
            total = torch.Size(shape).numel()
            part = -(-total // ranks) if sharded else total
            start = min(rank * part, total) if sharded else 0
            length = min(part, total - start)
            if length:
                room = torch.empty(length)
                fragments.append(Fragment(name=name, shape=shape, start=start, length=length, master=room, offset=0))
        found.append(fragments)
    return found


def write(folder: Path, ranks: int, *, sharded: bool) -> list[Path]:
    files: list[Path] = []
    for rank, fragments in enumerate(layout(ranks, sharded=sharded)):
        own = fragments if sharded else fragments[rank::ranks]
        tensors = {f"{WEIGHT}:{f.name}": whole(f.name)[f.start : f.start + f.length] for f in own}
        ranges = {f.name: {"shape": f.shape, "start": f.start, "length": f.length} for f in own}
        numbers = {f.name: {} for f in own}
        files.append(folder / f"rank-{rank}.safetensors")
        write_tensors(files[-1], tensors, {"index": json.dumps({"fragments": ranges, "numbers": numbers})})
    return files


@pytest.mark.parametrize(
    ("before", "after"), [((2, True), (4, True)), ((2, True), (2, False)), ((3, False), (4, True))]
)
def test_a_rank_reads_the_bytes_of_its_fragments_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[int, bool], after: tuple[int, bool]
) -> None:
    files = write(tmp_path, before[0], sharded=before[1])
    counted: list[int] = []
    fill = TensorFolder._fill

    def counting(self: TensorFolder, view: memoryview, path: Path, offset: int) -> None:
        counted.append(len(view))
        fill(self, view, path, offset)

    monkeypatch.setattr(TensorFolder, "_fill", counting)
    monkeypatch.setattr(written_state, "PIECE_ELEMENTS", 16)
    for fragments in layout(after[0], sharded=after[1]):
        written, counted[:] = WrittenState(files), []
        for fragment in fragments:
            written.copy(WEIGHT, fragment, fragment.master)
            assert torch.equal(fragment.master, whole(fragment.name)[fragment.start :][: fragment.length])
        assert sum(counted) == 4 * sum(fragment.length for fragment in fragments)
        assert max(counted) <= 4 * 16, "a large tensor is copied piece by piece"


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    files = write(tmp_path, 2, sharded=True)
    (fragment,) = [f for f in layout(1, sharded=False)[0] if f.name == "b"]
    with pytest.raises(CheckpointError, match="b: the checkpoint holds elements up to 165, 330 are needed"):
        WrittenState(files[:1]).copy(WEIGHT, fragment, fragment.master)


@pytest.mark.parametrize("kind", ["PagedAdamW32bit", "PagedAdamW8bit"])
def test_a_paged_optimizer_is_paged_again_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """bitsandbytes pages only memory that it allocated itself; a processor has no pages to move, so they are marked here."""
    from bitsandbytes.optim import adamw
    from bitsandbytes.optim.optimizer import Optimizer8bit

    paged: list[torch.Tensor] = []

    def get_state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        paged.append(torch.zeros_like(p, dtype=dtype))
        return paged[-1]

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", get_state_buffer)
    runtime = cast("Runtime", SimpleNamespace(uses_deepspeed=False, rank=0, world_size=1, device=torch.device("cpu")))
    runtime.accelerator = SimpleNamespace(unwrap_model=lambda model: model)

    def trained() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(96, 64, bias=False)
        return model, getattr(adamw, kind)(model.parameters(), lr=1e-2)

    def step(model: torch.nn.Module, optimizer: Any) -> None:
        model(torch.ones(3, 96)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = trained()
    step(model, optimizer)
    state = collect(runtime, model, SimpleNamespace(optimizer=optimizer))
    write_tensors(tmp_path / "rank-0.safetensors", state.tensors, {"index": json.dumps(state.index)})
    step(model, optimizer)

    resumed, fresh = trained()
    paged.clear()
    restore([tmp_path / "rank-0.safetensors"], runtime, resumed, SimpleNamespace(optimizer=fresh), same_ranks=True)
    (parameter,) = resumed.parameters()
    own = fresh.state[parameter]
    assert [own["state1"] is paged[0], own["state2"] is paged[1], len(paged)] == [True, True, 2]
    step(resumed, fresh)
    assert len(paged) == 2, "the step goes on with the restored state"
    assert torch.equal(parameter, next(model.parameters()))
