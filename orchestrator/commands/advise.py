"""`plan --advise`: other settings that would fit. Must not import torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from orchestrator.composition.compose import Composed
from orchestrator.display.settings_table import explanation, settings_table
from orchestrator.machine.this_machine import this_machine
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.auto_settings import choices_of, found_advice, judge_of, nearest_sentences
from orchestrator.planning.host_hardware import as_seen
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.processor_speed import with_speeds
from orchestrator.planning.settings_search import axes_of


def print_advice(composed: Composed, config_directory: Path | None, *, as_json: bool) -> None:
    """Print the settings that fit, the fastest first, and why the first wins; as JSON all of them, with the nearest
    changes.
    """
    machine = this_machine(composed.config.cluster.environment)
    config = as_seen(resolve(composed.config, Path.cwd()), machine, config_directory, assumes_speed=True)
    base, data = inspect_inputs(config)
    data = with_speeds(config, machine, base, data, may_measure=True)
    choices = choices_of(config, config_directory)
    axes = axes_of(config, shardings=choices.shardings, quantizations=choices.quantizations)
    advice = found_advice(config, axes, judge_of(base, data), choices)
    if as_json:
        print(json.dumps({"fitting": [asdict(one) for one in advice.fitting], "nearest": advice.nearest}, indent=2))
        return
    console = Console()
    if advice.best is None:
        console.print("\n".join(["nothing fits at this global batch", *nearest_sentences(advice, config)]))
        return
    console.print(settings_table(advice, config))
    for sentence in explanation(advice):
        console.print(sentence)
