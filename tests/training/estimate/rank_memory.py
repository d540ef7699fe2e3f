"""One rank of test_memory_states: trains one step of every cell, and writes the bytes that real tensors hold.

argv[1]: a JSON list of run folders. Each gets bytes-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.files.atomic import read_json, write_json
from orchestrator.run_folder.folder import RunFolder


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages, each counted once."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }
    return sum(found.values())


def weights(module: torch.nn.Module) -> Iterator[Any]:
    for parameter in module.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        yield parameter.data if partition is None else partition
        yield from quantisation(getattr(parameter, "quant_state", None))


def quantisation(state: Any) -> Iterator[Any]:
    """The constants of a 4-bit matrix."""
    if state is not None:
        yield from (state.absmax, state.code, getattr(state, "offset", None))
        yield from quantisation(state.state2)


def gradients(module: torch.nn.Module, engine: Any) -> Iterator[Any]:
    for parameter in module.parameters():
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    zero = getattr(engine, "optimizer", None)
    yield getattr(zero, "grad_partitions_flat_buffer", None)
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(zero, name, {}).values():
            yield from group or ()


def optimizer(base: torch.optim.Optimizer, masters: Iterable[torch.Tensor], uses_deepspeed: bool) -> Iterator[Any]:
    for state in base.state.values():
        yield from (value for key, value in state.items() if key != "step")
    yield from masters if uses_deepspeed else ()


def measure(run: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState

    from orchestrator.config.run import RunConfig
    from orchestrator.distributed.runtime import start_runtime
    from orchestrator.distributed.zero_fragments import base_optimizer, local_fragments
    from orchestrator.metrics.phases import Phases
    from orchestrator.models.tuning import build_policy
    from orchestrator.run_folder.stop_request import StopRequest
    from orchestrator.run_state.recorder import Recorder
    from orchestrator.run_state.stage_context import StageContext
    from orchestrator.stages.sft import make_recipe
    from orchestrator.training.faults import HEALTHY
    from orchestrator.training.loop import optimizer_step
    from orchestrator.training.session import assemble, open_session
    from orchestrator.worker import _bring_inputs

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE")]:
        del os.environ[name]
    config = RunConfig.model_validate(read_json(run / "run.json")["config"], strict=False)
    folder = RunFolder(run).stage("sft")
    inputs = _bring_inputs(config, "sft", run_directory=run, phases=Phases())
    context = StageContext(
        config=config,
        name="sft",
        stage=config.stages["sft"],
        folder=folder,
        run_file=run / "run.json",
        attempt=1,
        stop=StopRequest(folder.stop),
        base_folder=Path(inputs["base_folder"]),
        train_data=Path(inputs["train"]),
        evaluation_data=None,
    )
    runtime = start_runtime(config, context.stage)
    session = open_session(context, runtime, Recorder(context, rank=runtime.rank), build_policy)
    job, *_ = assemble(session, make_recipe)
    module = runtime.accelerator.unwrap_model(session.model)
    seen: list[int] = []

    def terms(model: Any, batch: Any) -> Any:
        seen.append(bytes_of(gradients(module, session.model if runtime.uses_deepspeed else None)))
        return job.objective.terms(model, batch)

    optimizer_step(replace(job, objective=replace(job.objective, terms=terms)), 1, HEALTHY, votes_to_stop=False)
    assert len(seen) == 2, "two micro-batches were planned"
    masters = [fragment.master for fragment in local_fragments(runtime, session.model)]
    found = {
        "weights": bytes_of(weights(module)),
        "gradients": seen[1],
        "optimizer": bytes_of(optimizer(base_optimizer(runtime, session.optimizer), masters, runtime.uses_deepspeed)),
    }
    write_json(run / f"bytes-{runtime.rank}.json", found)
    runtime.barrier()
    runtime.accelerator.free_memory()


if __name__ == "__main__":
    from orchestrator.models.loading import silence_libraries

    silence_libraries()
    for place in json.loads(sys.argv[1]):
        measure(Path(place))
    torch.distributed.destroy_process_group()
