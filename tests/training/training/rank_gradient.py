"""One rank of the gradient test: writes the gradient of one global batch, as rank 0 sees it, to a file.

argv: MODEL_FOLDER ROWS MICRO_SIZE OUT. World size and rank come from the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from orchestrator.composition.compose import compose
from orchestrator.data.order import BatchOrder
from orchestrator.data.preparation.prepare import ensure_prepared
from orchestrator.dataloader.prefetch import Batches
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.distributed.runtime import start_runtime
from orchestrator.models.loading import load_model
from orchestrator.planning.absolute_paths import resolve
from orchestrator.training.faults import FaultState
from orchestrator.training.loop import accumulate_gradients
from orchestrator.training.loop_state import LoopInputs
from orchestrator.training.objectives import sft_objective
from orchestrator.training.optimizer import build_optimizer


def main(model_folder: str, rows_file: str, micro_size: str, out: str) -> None:
    words = [
        "+experiment=llama_full",
        f"model.base={model_folder}",
        "model.dtype=float32",
        f"stages.sft.data.train.path={rows_file}",
        "stages.sft.data.eval.path=none",
        "stages.sft.batch.global_size=8",
        f"stages.sft.batch.micro_size={micro_size}",
        f"cluster.processes_per_node={os.environ.get('WORLD_SIZE', '1')}",
    ]
    config = resolve(compose(words), Path.cwd())
    stage = config.stages["sft"]
    cache = Path(out).parent / "cache"
    prepared = ensure_prepared(stage.data, tokenizer_folder=Path(model_folder), cache=cache, seed=0, say=print)
    rows = PreparedRows.open(prepared.train)
    runtime = start_runtime(config, stage)
    model = load_model(Path(model_folder), config, weights_dtype=torch.float32)
    model, optimizer = runtime.accelerator.prepare(model, build_optimizer(model, stage.optimizer))
    job = LoopInputs(
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        objective=sft_objective(runtime),
        stage=stage,
        rows=rows,
        batches=Batches(rows, runtime.device),
        order=BatchOrder(rows.rows, 8, 0),
        steps=1,
        flops_per_token=None,
        peak_flops=None,
    )
    indices = job.order.global_batch(0)
    trained = int(rows.trained_tokens[indices].sum())
    accumulate_gradients(job, 1, FaultState(), trained, votes_to_stop=False)
    if runtime.is_main:
        module = runtime.accelerator.unwrap_model(model)
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        save_file(gradients, out, metadata={"trained": str(trained)})
    runtime.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
