"""Suggests the intended key: by other tools' names, then by a similar last part. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from orchestrator.errors import nearest

ALIKE = 0.65
"""Similarity of two last parts below which a hint would mislead more than it helps."""

ALIASES = {
    # transformers' TrainingArguments, TRL, PEFT, axolotl, LLaMA-Factory, torchtune, accelerate
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "peak_lr": "optimizer.lr",
    "per_device_train_batch_size": "batch.micro_size",
    "micro_batch_size": "batch.micro_size",
    "per_device_batch_size": "batch.micro_size",
    "batch_size": "batch.global_size",
    "train_batch_size": "batch.global_size",
    "global_batch_size": "batch.global_size",
    "gradient_accumulation_steps": "batch.global_size",
    "accumulation_steps": "batch.global_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "total_steps": "max_steps",
    "num_steps": "max_steps",
    "steps": "max_steps",
    "warmup": "schedule.warmup_ratio",
    "warmup_steps": "schedule.warmup_ratio",
    "warmup_ratio": "schedule.warmup_ratio",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "scheduler": "schedule.name",
    "optim": "optimizer.name",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.epsilon",
    "gradient_clipping": "optimizer.max_grad_norm",
    "grad_clip": "optimizer.max_grad_norm",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "lora_r": "tuning.rank",
    "lora_rank": "tuning.rank",
    "r": "tuning.rank",
    "lora_alpha": "tuning.alpha",
    "lora_dropout": "tuning.dropout",
    "lora_target_modules": "tuning.target_modules",
    "lora_target": "tuning.target_modules",
    "finetuning_type": "tuning",
    "peft_type": "tuning",
    "adapter": "tuning",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "sequence_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "dataset": "data.train.path",
    "datasets": "data.train.path",
    "dataset_name": "data.train.path",
    "dataset_path": "data.train.path",
    "data_path": "data.train.path",
    "train_file": "data.train.path",
    "eval_dataset": "data.eval.path",
    "eval_file": "data.eval.path",
    "validation_file": "data.eval.path",
    "val_set_size": "data.eval.fraction",
    "logging_steps": "log_every_steps",
    "eval_steps": "evaluate_every_steps",
    "eval_every": "evaluate_every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "early_stopping_patience": "early_stopping",
    "model_name_or_path": "model.base",
    "model_name": "model.base",
    "base_model": "model.base",
    "model_id": "model.base",
    "base": "model.base",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "mixed_precision": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "use_liger": "model.loss_head",
    "use_liger_kernel": "model.loss_head",
    "torch_compile": "model.compile",
    "load_in_4bit": "quantization=nf4",
    "load_in_8bit": "quantization=nf4",
    "qlora": "quantization=nf4",
    "deepspeed": "sharding=zero2",
    "fsdp": "sharding=zero3",
    "zero_stage": "sharding=zero2",
    "report_to": "tracking=wandb",
    "wandb_project": "tracking.project",
    "run_name": "name",
    "output": "output_dir",
    "output_folder": "output_dir",
    "num_gpus": "cluster.processes_per_node",
    "n_gpus": "cluster.processes_per_node",
    "gpus": "cluster.processes_per_node",
    "nproc_per_node": "cluster.processes_per_node",
    "num_processes": "cluster.processes_per_node",
    "nnodes": "cluster.nodes",
    "num_nodes": "cluster.nodes",
    "num_machines": "cluster.nodes",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "kl_coef": "kl_coefficient",
    "label_smoothing_factor": "label_smoothing",
}
"""Last part of a key as other tools call it -> the end of our key, or `group=choice`."""
CHOICE_HINTS = {
    ("tuning", "qlora"): "tuning=lora quantization=nf4",
    ("tuning", "none"): "tuning=full",
    ("quantization", "4bit"): "quantization=nf4",
    ("quantization", "int4"): "quantization=nf4",
    ("sharding", "fsdp"): "sharding=zero3",
    ("sharding", "ddp"): "sharding=none",
    ("sharding", "deepspeed"): "sharding=zero2",
    ("launcher", "sbatch"): "launcher=slurm",
    ("launcher", "accelerate"): "launcher=torchrun",
}
"""Group and choice as other tools call them -> what to type."""


def key_hint(key: str, keys: Sequence[str]) -> str:
    """The end of a sentence about an unknown key: `; did you mean KEY?`, or nothing where no key is like it."""
    target = _alias(key)
    if target is not None:
        meant = target if "=" in target else _closest(key, [known for known in keys if _ends_with(known, target)])
        if meant is not None:
            return f"; did you mean {meant}?"
        return f"; it would be {target} here, which this configuration does not have"
    meant = _similar(key, keys)
    return f"; did you mean {meant}?" if meant else ""


def field_hint(name: str, allowed: Iterable[str]) -> str | None:
    """The field of one section that an unknown name means; None where no field is like it."""
    names = sorted(allowed)
    target = ALIASES.get(name.lower(), "").rpartition(".")[2]
    return target if target in names else nearest(name, names)


def choice_hint(group: str, value: str) -> str | None:
    """What to type for a choice that other tools have under this name."""
    return CHOICE_HINTS.get((group, value.lower()))


def _alias(key: str) -> str | None:
    last = key.rpartition(".")[2].lower()
    return ALIASES.get(last)


def _ends_with(key: str, ending: str) -> bool:
    return f".{key}".endswith(f".{ending}")


def _closest(key: str, candidates: Sequence[str]) -> str | None:
    """The candidate most similar to the whole key; ties go to the first, so that the first stage of a pipeline wins."""
    return max(candidates, key=lambda known: _ratio(key, known), default=None)


def _similar(key: str, keys: Sequence[str]) -> str | None:
    """The key whose last part is most similar to the given one's; ties go to the most similar whole key."""
    last = key.rpartition(".")[2]
    scored = [((_ratio(last, known.rpartition(".")[2]), _ratio(key, known)), known) for known in keys]
    best = max(scored, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0][0] >= ALIKE else None


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
