"""Adapts presets to typed values: recipes of the demonstration, lengths, batch sizes. Must not import torch.

A typed value is used, or refused by the rules; a preset's value yields to it, and a note names every such change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from omegaconf import DictConfig, OmegaConf, open_dict

from orchestrator.composition.overrides import CONF, RECIPE
from orchestrator.config.alignment import PolicyStage
from orchestrator.config.demonstration import DEMONSTRATIONS
from orchestrator.config.run import RunConfig, fitting_micro_size, training_pipeline
from orchestrator.config.training import BatchConfig, TrainingStage


class Origin(IntEnum):
    """The origin of a key's value; a higher one wins over a lower one."""

    PRESET = 0
    FILE = 1
    TYPED = 2


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the values of a composed configuration come from."""

    typed: tuple[str, ...]
    """Keys of the command line."""
    find_locations: Callable[[], Mapping[str, str]] | None
    """FILE:LINE of every key, at the cost of a second composition; None if no folder of the user's takes part."""

    def of(self, key: str) -> Origin:
        """The origin of a leaf; a typed section (batch={...}) applies to all keys below it."""
        if any(f"{key}.".startswith(f"{word}.") for word in self.typed):
            return Origin.TYPED
        if self.find_locations is None:
            return Origin.PRESET
        location = self.find_locations().get(key)
        return Origin.PRESET if location is None or location.startswith(f"{CONF}/") else Origin.FILE


def take_recipes(tree: DictConfig, origins: Origins) -> dict[str, str]:
    """Remove every stage's recipe for the demonstration, and apply it if the stage trains only on that set.

    Returns the keys that were set, each with the recipe key that its value comes from.

    A recipe that learns 272 short rows in two minutes is wrong for rows of other number and length, so the stage's own
    values are those for a user's rows.
    """
    stages = OmegaConf.select(tree, "stages", default=None)
    moved: dict[str, str] = {}
    if not isinstance(stages, DictConfig):
        return moved
    for name in map(str, stages):
        recipe = OmegaConf.select(tree, f"stages.{name}.{RECIPE}", default=None)
        if not isinstance(recipe, DictConfig):
            continue
        values = _leaves(recipe)
        with open_dict(tree):
            del stages[name][RECIPE]
        if not _is_demonstration(tree, name):
            continue
        for key, value in values.items():
            target, own = _target(tree, name, key), f"stages.{name}.{RECIPE}.{key}"
            if target is not None and origins.of(target) <= origins.of(own):
                OmegaConf.update(tree, target, value, force_add=True)
                moved[target] = own
    return moved


def fit(config: RunConfig, origins: Origins) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration with the presets' lengths and batch sizes adapted to typed values, and a note for every
    change.
    """
    notes: list[str] = []
    stages = dict(config.stages)
    for name, stage in training_pipeline(config).items():
        fitted, changes = _with_length(name, stage, origins)
        notes += changes
        fitted, changes = _with_batch(name, fitted, origins, ranks=config.world_size)
        notes += changes
        stages[name] = fitted  # pyright: ignore[reportArgumentType]  # a copy of the same class
    return (config.model_copy(update={"stages": stages}) if notes else config), tuple(notes)


def _leaves(recipe: DictConfig, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key in map(str, recipe):
        value = recipe[key]
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else {prefix + key: value}
    return leaves


def _target(tree: DictConfig, stage: str, key: str) -> str | None:
    """The key that a recipe's key sets, in its stage or below the run's `tuning`; None if the chosen alternative does
    not have it.
    """
    packing = OmegaConf.select(tree, f"stages.{stage}.data.packing", default="none")
    if key == "data.group_by_length" and packing != "none":
        return None  # packed rows have one length
    if not key.startswith("tuning."):
        return f"stages.{stage}.{key}"
    # Another tuning may have been chosen on top of the preset: full fine-tuning has no ratio of LoRA+.
    tuning = OmegaConf.select(tree, "tuning", default=None)
    return key if isinstance(tuning, DictConfig) and key.removeprefix("tuning.") in tuning else None


def _is_demonstration(tree: DictConfig, stage: str) -> bool:
    path = OmegaConf.select(tree, f"stages.{stage}.data.train.path", default=None)
    mix = OmegaConf.select(tree, f"stages.{stage}.data.mix", default=None)
    return path in DEMONSTRATIONS and not mix


def _with_length(name: str, stage: TrainingStage, origins: Origins) -> tuple[TrainingStage, Sequence[str]]:
    """Whichever of `max_steps` and `epochs` has the higher origin; `max_steps` if both have the same."""
    steps, epochs = stage.max_steps, stage.epochs
    if steps is None or epochs is None:
        return stage, ()
    of_steps, of_epochs = (origins.of(f"stages.{name}.{key}") for key in ("max_steps", "epochs"))
    if of_epochs > of_steps:
        note = f"stages.{name}.epochs={epochs:g} replaces max_steps={steps} {_from(of_steps)}"
        return stage.model_copy(update={"max_steps": None}), [note]
    if of_steps > of_epochs:
        note = f"stages.{name}.max_steps={steps} replaces epochs={epochs:g} {_from(of_epochs)}"
        return stage.model_copy(update={"epochs": None}), [note]
    return stage, [f"stages.{name}: max_steps={steps} and epochs={epochs:g} are both set; max_steps decides"]


def _from(origin: Origin) -> str:
    return "of the experiment file" if origin is Origin.FILE else "of the preset"


def _with_batch(
    name: str, stage: TrainingStage, origins: Origins, *, ranks: int
) -> tuple[TrainingStage, Sequence[str]]:
    """Adapt preset batch sizes to the available ranks.

    The micro-batch shrinks first, since accumulation gives the same gradient. The global batch, on which the result
    depends, grows only if it holds fewer rows than the ranks can share.
    """
    key = f"stages.{name}.batch"
    is_open = {field: origins.of(f"{key}.{field}") is Origin.PRESET for field in ("global_size", "micro_size")}
    fitted = _fitted(stage.batch, ranks=ranks, is_open=is_open)
    changed: dict[str, object] = {} if fitted == stage.batch else {"batch": fitted}
    notes = [_batch_note(stage, key, fitted, ranks=ranks)] if changed else []
    if isinstance(stage, PolicyStage) and origins.of(f"stages.{name}.rollout.prompts") is Origin.PRESET:
        prompts = _fitted_prompts(stage, fitted, ranks=ranks)
        if prompts != stage.rollout.prompts:
            changed["rollout"] = stage.rollout.model_copy(update={"prompts": prompts})
            notes.append(
                f"stages.{name}.rollout.prompts={prompts} (preset: {stage.rollout.prompts}), the fewest that {ranks} ranks and "
                f"a global batch of {fitted.global_size} can share; results differ from those with {stage.rollout.prompts}"
            )
    return (stage.model_copy(update=changed) if changed else stage), notes


def _batch_note(stage: TrainingStage, key: str, fitted: BatchConfig, *, ranks: int) -> str:
    """What changed, the arithmetic, and whether the result changes with it."""
    preset = stage.batch
    sizes = (f"global_size={fitted.global_size} (preset: {preset.global_size})",) * (
        fitted.global_size != preset.global_size
    )
    sizes += (f"micro_size={fitted.micro_size} (preset: {preset.micro_size})",) * (
        fitted.micro_size != preset.micro_size
    )
    steps = fitted.global_size // (fitted.micro_size * ranks)
    if fitted.global_size != preset.global_size:
        effect = f"the learning rate is unchanged, so results differ from those with {preset.global_size} rows a step"
    elif stage.compares_rows:
        effect = f"results differ from those with pairs among {preset.micro_size} rows"
    else:
        effect = "the global batch is unchanged"
    return (
        f"{key}: {', '.join(sizes)}: {fitted.global_size} rows a step = {fitted.micro_size} x {ranks} "
        f"{'rank' if ranks == 1 else 'ranks'} x {steps} accumulation; {effect}"
    )


def _fitted(batch: BatchConfig, *, ranks: int, is_open: Mapping[str, bool]) -> BatchConfig:
    """The first batch sizes that fit, of those that may change; unchanged if none fits, so that the rules refuse
    them.
    """
    size, micro = batch.global_size, batch.micro_size
    if size % (micro * ranks) == 0:
        return batch
    if is_open["global_size"] and (size % ranks or not is_open["micro_size"]):
        unit = ranks if is_open["micro_size"] else ranks * micro
        size = -(-size // unit) * unit
    if is_open["micro_size"]:
        micro = fitting_micro_size(global_size=size, micro_size=micro, world_size=ranks) or micro
    return batch.model_copy(update={"global_size": size, "micro_size": micro})


def _fitted_prompts(stage: PolicyStage, batch: BatchConfig, *, ranks: int) -> int:
    """The smallest number of prompts, at least the preset's, that the ranks can share and whose completions fill whole
    global batches.
    """
    rollout = stage.rollout
    if rollout.prompts % ranks == 0 and batch.global_size == stage.batch.global_size:
        return rollout.prompts  # what does not fit then was typed, and is refused
    first = -(-rollout.prompts // ranks) * ranks
    candidates = range(first, first + ranks * batch.global_size, ranks)
    return next((n for n in candidates if n * rollout.group_size % batch.global_size == 0), rollout.prompts)
