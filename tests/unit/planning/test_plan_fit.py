"""Every shipped recipe fits in every phase on its hardware; a run whose end cannot fit is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Asker

from orchestrator.architecture.zero_buckets import with_zero_buckets
from orchestrator.composition.compose import compose
from orchestrator.composition.overrides import CONF
from orchestrator.estimate.memory import memory_forecast
from orchestrator.estimate.memory_records import MemoryForecast

RECIPES = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
TRAINED = ["load", "forward", "backward", "optimizer step", "evaluation", "save", "resume", "write", "prove"]


def forecasts(*overrides: str) -> dict[str, MemoryForecast]:
    """The forecast of every stage of a recipe, by the shape that its model file states."""
    config = compose([*overrides, "model.dtype=bfloat16"])
    assert config.model.preset is not None
    model = config.model.preset.architecture
    config = with_zero_buckets(config, model)
    room = config.cluster.hardware.memory_gib
    return {
        name: memory_forecast(model, config.for_stage(name), config.stages[name], memory_gib=room)
        for name in config.pipeline
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_phase_of_a_recipe_fits_its_hardware(recipe: str) -> None:
    for name, forecast in forecasts(f"+experiment={recipe}").items():
        assert forecast.verdict in (None, "FIT"), (name, forecast.binding, forecast.expected)
        if forecast.memory_gib is not None:
            assert all(phase.high <= forecast.memory_gib for phase in forecast.phases), name


def test_the_proof_of_a_sharded_model_is_sharded_and_a_whole_one_binds() -> None:
    sharded = forecasts("+experiment=mixtral_8x7b_lora_zero3")["sft"]
    assert [phase.name for phase in sharded.phases] == TRAINED
    proof = sharded.phases[-1]
    assert proof.expected < 20, "a share and the layers at work, of 87 GiB"
    whole = forecasts("+experiment=mixtral_8x7b_lora_zero3", "sharding=none")["sft"]
    assert whole.phases[-1].low > 80 and whole.verdict == "NO"


def test_a_run_that_could_not_be_proven_is_refused_before_it_starts(ask: Asker, tmp_path: Path) -> None:
    words = [
        "+experiment=llama_lora",
        "cluster.hardware.memory_gib=0.2",
        "cluster.device=cpu",
        f"output_dir={tmp_path}",
    ]
    (problem,) = ask.refused("run", *words)
    assert problem.startswith("stages.sft: its artifact could not be written and proven: phase prove needs")
    assert "type sharding=zero3" in problem and not list(tmp_path.iterdir())
