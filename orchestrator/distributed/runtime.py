"""The ranks of a job: Accelerator, devices, agreement between ranks, orderly shutdown. Must not know models or data."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, KwargsHandler

from orchestrator.architecture.deepspeed import deepspeed_dict, scoring_dict
from orchestrator.architecture.kernels import liger_is_installed, liger_problem
from orchestrator.config.run import RunConfig, accumulation_steps
from orchestrator.config.sharding import ZeroSharding
from orchestrator.config.training import TrainingStage
from orchestrator.errors import ConfigError
from orchestrator.files.cache import compiled_folder
from orchestrator.metrics.phases import Phases


def environment_rank() -> int:
    """This process's rank, before any process group exists."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The process group as a stage sees it."""

    accelerator: Accelerator
    uses_deepspeed: bool
    autocast_dtype: torch.dtype | None
    """16-bit dtype of the forward pass over fp32 weights; None if the weights' own dtype is used."""
    phases: Phases = field(default_factory=Phases)
    """Where loops over rows report their progress."""
    scoring: Mapping[str, Any] | None = None
    """DeepSpeed's settings where models that are not trained are sharded over the ranks; None: every rank holds them
    whole."""

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    generates_by_layer: bool = False
    """Whether generation gathers each layer of a sharded model for each token, on all ranks together."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """The precision of every forward pass: the same in training, evaluation and proof."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def hold(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model for forward passes without gradients: sharded over the ranks, or whole on this rank's device.

        Every rank must call it, in the same order for several models.
        """
        if self.scoring is None:
            model = model.requires_grad_(False).eval()
            return model if is_spread(model) else model.to(self.device)
        import deepspeed

        # Without an optimizer ZeRO-3 only gathers a layer's parameters before its forward pass.
        engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=dict(self.scoring))
        engine.eval()  # its own `eval` returns nothing
        return engine

    def release(self, model: torch.nn.Module) -> None:
        """Free a held model's memory, whoever still refers to it; it cannot be used afterwards."""
        if self.scoring is None:
            # Not `.to("meta")`, which bitsandbytes' 4-bit parameters refuse.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        else:
            engine: Any = model
            engine.destroy()
            for parameter in engine.module.parameters():
                del parameter.ds_tensor
                parameter.data = torch.empty(0)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def module_of(self, model: torch.nn.Module) -> Any:
        """The module inside the wrappers of Accelerate and DeepSpeed."""
        return self.accelerator.unwrap_model(model)

    def turns(self, count: int) -> list[int | None]:
        """This rank's share of `count` things, by index: equally many on every rank, so that each enters every collective.

        None is a turn in which the rank has nothing of its own left.
        """
        mine = range(self.rank, self.rank + -(-count // self.world_size) * self.world_size, self.world_size)
        return [index if index < count else None for index in mine]

    def largest_over_ranks(self, count: int) -> int:
        """The largest count of any rank; every rank must call it."""
        own = [0.0] * self.world_size
        own[self.rank] = float(count)
        return int(max(self.sum_over_ranks(own)))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in fp64; every rank must call it."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()

    def peak_memory_gib(self) -> float:
        """Peak of the device's allocator, or of the process's resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        # Linux counts ru_maxrss in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def end(self) -> None:
        """Tear down in order: two gloo ranks under ZeRO-3 abort occasionally if the interpreter does it."""
        self.accelerator.free_memory()
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def start_runtime(config: RunConfig, stage: TrainingStage, phases: Phases | None = None) -> Runtime:
    """Build the Accelerator with its DeepSpeed dict, and assert that it matches the configuration."""
    uses_cpu = uses_cpu_only(config)
    sharding = config.sharding
    if uses_cpu and isinstance(sharding, ZeroSharding) and (sharding.quantized_weights or sharding.quantized_gradients):
        raise ConfigError(
            "sharding.quantized_weights, sharding.quantized_gradients: their kernels need GPUs, and torch sees none here; "
            "set both to false"
        )
    refused = liger_problem(config.model.loss_head, ("cpu" if uses_cpu else "cuda",), has_liger=liger_is_installed())
    if refused is not None:
        raise ConfigError(refused)
    settings = deepspeed_dict(config, stage)
    accelerator = _accelerator(config, settings, micro_batches=accumulation_steps(config, stage))
    return Runtime(
        accelerator=accelerator,
        uses_deepspeed=settings is not None,
        autocast_dtype=torch.bfloat16 if config.model.dtype == "bfloat16" and settings is None else None,
        phases=phases or Phases(),
        scoring=scoring_dict(config),
        generates_by_layer=isinstance(sharding, ZeroSharding)
        and sharding.shards_parameters
        and sharding.generate_by_layer,
    )


def start_scoring_runtime(config: RunConfig, *, autocast: bool, phases: Phases | None = None) -> Runtime:
    """All ranks of a job that trains nothing: rows are split over them, and under ZeRO-3 the models too.

    ZeRO 1 and 2 shard no parameters: there, as without sharding, every rank holds a model whole.
    """
    settings = scoring_dict(config)
    return Runtime(
        accelerator=_accelerator(config, settings),
        uses_deepspeed=False,
        autocast_dtype=torch.bfloat16 if autocast else None,
        phases=phases or Phases(),
        scoring=settings,
        generates_by_layer=settings is not None,
    )


def _accelerator(config: RunConfig, settings: Mapping[str, Any] | None, *, micro_batches: int = 1) -> Accelerator:
    uses_cpu, uses_deepspeed = uses_cpu_only(config), settings is not None
    # Without a named backend, accelerate 1.15 sets up no distributed DeepSpeed on a machine without GPU.
    handlers: list[KwargsHandler] = (
        [InitProcessGroupKwargs(backend="gloo")] if uses_cpu and "RANK" in os.environ else []
    )
    accelerator = Accelerator(
        cpu=uses_cpu and not uses_deepspeed,
        # Without DeepSpeed `Runtime.forward_context` casts: in training, evaluation and proof alike.
        mixed_precision="bf16" if config.model.dtype == "bfloat16" and uses_deepspeed else "no",
        gradient_accumulation_steps=micro_batches,
        deepspeed_plugin=_deepspeed_plugin(settings) if uses_deepspeed else None,
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
    )
    _assert_as_configured(accelerator, config, uses_deepspeed=uses_deepspeed)
    return accelerator


def start_single_runtime(config: RunConfig, *, autocast: bool, phases: Phases | None = None) -> Runtime:
    """A single process without sharding, for generation and export."""
    return Runtime(
        accelerator=Accelerator(cpu=uses_cpu_only(config), mixed_precision="no"),
        uses_deepspeed=False,
        autocast_dtype=torch.bfloat16 if autocast else None,
        phases=phases or Phases(),
    )


def is_spread(model: torch.nn.Module) -> bool:
    """Whether transformers has put the layers of a model on several devices, and moves activations between them."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def uses_cpu_only(config: RunConfig) -> bool:
    """Whether the ranks compute on processors. ConfigError if GPUs are configured and torch sees none."""
    available = torch.cuda.is_available()
    if config.cluster.device == "cuda" and not available:
        raise ConfigError(
            "cluster.device: cuda, but torch sees no GPU here; type cluster.device=cpu or see `orchestrator doctor`"
        )
    return config.cluster.device == "cpu" or not available


def _deepspeed_plugin(settings: Any) -> Any:
    # DeepSpeed compiles its CPU helpers at first use (37 s and 57 s with g++): in our cache, a machine pays once.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(compiled_folder()))
    from accelerate.utils import DeepSpeedPlugin

    # By the flag transformers, PEFT and `load_streamed` know that a model lies in shards: no rank holds it whole.
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=settings["zero_optimization"]["stage"] == 3)


def _assert_as_configured(accelerator: Accelerator, config: RunConfig, *, uses_deepspeed: bool) -> None:
    """Without this check, accelerate on a CPU lets every rank silently believe that it is rank 0 of 1."""
    expected_type = DistributedType.DEEPSPEED if uses_deepspeed else None
    facts = {
        "world size": (accelerator.num_processes, config.world_size),
        "rank": (accelerator.process_index, environment_rank()),
        "distributed type": (accelerator.distributed_type, expected_type or accelerator.distributed_type),
        "process group": (dist.is_initialized(), config.world_size > 1 or uses_deepspeed or dist.is_initialized()),
    }
    wrong = [
        f"{name} is {real}, but {wanted} was configured" for name, (real, wanted) in facts.items() if real != wanted
    ]
    if not uses_deepspeed and config.world_size > 1:
        ddp = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if accelerator.distributed_type not in ddp:
            wrong.append(f"distributed type is {accelerator.distributed_type}, but DDP was configured")
    if wrong:
        raise ConfigError([f"the process group is not what was configured: {fault}" for fault in wrong])
