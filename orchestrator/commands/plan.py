"""The verb plan. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.commands.plan_from_overrides import compose_overrides, plans_of, take_config_directory
from orchestrator.composition.compose import examine
from orchestrator.composition.node_counts import take_node_counts
from orchestrator.config.run import RunConfig
from orchestrator.config.study import NoStudy
from orchestrator.display.plan_table import print_plan, print_plans, print_scaling
from orchestrator.errors import EXIT_DONE, ConfigError
from orchestrator.planning.absolute_paths import resolve
from orchestrator.planning.inspect_inputs import inspect_inputs
from orchestrator.planning.records import Plan
from orchestrator.planning.scaling import scaling_rows

SHARED = (".batch: global_size", ".rollout.prompts:")
"""Rules on splitting rows among ranks, which the scaling table reports row by row."""


def plan(arguments: Sequence[str], *, advise: bool, as_json: bool, everything: bool = False) -> int:
    """Print the plan, other settings that would fit, or a comparison of node counts; writes nothing."""
    if advise:
        from orchestrator.commands.advise import print_advice

        overrides, config_directory = take_config_directory(arguments)
        print_advice(compose_overrides(overrides, config_directory), config_directory, as_json=as_json)
        return EXIT_DONE
    overrides, counts = take_node_counts(arguments)
    if counts is not None:
        return _scaling(overrides, counts, as_json=as_json)
    runs = plans_of(overrides, measures=True)
    if not as_json and not everything and len(runs) > 1:
        print_plans(runs)
        return EXIT_DONE
    for config, planned in runs:
        if as_json:
            print(planned.model_dump_json(indent=2))
        else:
            print_plan(planned, config, everything=everything)
            _tell_study(config, planned)
    return EXIT_DONE


def _tell_study(config: RunConfig, planned: Plan) -> None:
    if not isinstance(config.study, NoStudy):
        from orchestrator.studies.run_study import outlook

        print("\n".join(outlook(config, planned)))


def _scaling(arguments: Sequence[str], counts: Sequence[int], *, as_json: bool) -> int:
    """Plans for several numbers of nodes, side by side; arithmetic only, so no launcher has to be able to start
    them.
    """
    overrides, config_directory = take_config_directory(arguments)
    composed = examine([*overrides, f"cluster.nodes={counts[0]}"], config_directory=config_directory)
    problems = [problem for problem in composed.problems if not any(rule in problem for rule in SHARED)]
    problems += [
        f"{key}: auto is resolved for one number of nodes at a time; give a value here" for key in composed.autos
    ]
    if problems:
        raise ConfigError(problems)
    config = resolve(composed.config, Path.cwd())
    base, data = inspect_inputs(config)
    rows = scaling_rows(config, counts, base=base, data=data)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
    else:
        print_scaling(rows, config)
    return EXIT_DONE
