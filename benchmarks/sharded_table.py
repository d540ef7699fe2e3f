"""The table of benchmarks/sharded.py: peaks by phase, less a bare worker, against the rank's share and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resident import COMMAND, STARTING
from wide_llama import FLOAT_BYTES, Shape

from orchestrator.metrics import phases as phase

GIB = 1 << 30
HEADROOM = 1.1
QUANTISED_BYTES = 0.5 + 4 / 64
"""Bytes of an nf4 element with its block's scale."""
STATE_BYTES = 16
"""Of a trained element under ZeRO-3 in fp32, besides its weight: master, gradient and two moments."""
SNAPSHOT_BYTES = 12
"""Of a trained element in the host's copy for a checkpoint, which stays from the first save on."""
ADAPTER_RANK = 8
PLANNED = {
    phase.LOADING: ("load",),
    phase.FIRST_EVALUATION: ("evaluation", "evaluate"),
    phase.EVALUATION: ("evaluation", "evaluate"),
    phase.LAST_EVALUATION: ("evaluation", "evaluate"),
    phase.SCORING: ("evaluation", "evaluate"),
    phase.FIRST_STEP: ("train", "forward", "backward", "optimizer step"),
    phase.TRAINING: ("train", "forward", "backward", "optimizer step"),
    phase.TRIAL: ("save",),
    phase.SAVING: ("save",),
    phase.WRITING: ("write", "save"),
    phase.PROOF: ("prove", "proof"),
    phase.ROLLOUTS: ("rollout", "rollouts"),
    phase.MERGING: ("merge", "save"),
}
"""Phase of a run -> names of the plan's phases; of several that are there the largest counts, `write` before `save`."""
FIRST_OF = (phase.WRITING, phase.MERGING)
TRAINED = (phase.FIRST_STEP, phase.TRAINING, phase.TRIAL, phase.SAVING, phase.EVALUATION, phase.LAST_EVALUATION, phase.WRITING)  # fmt: skip
SCORING_STEPS = ("evaluate", "merge")
UNUSED = (COMMAND, STARTING, phase.STARTING, phase.FETCHING, phase.PREPARING, phase.IMPORTING)


def table(known: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Shape]], ranks: int) -> str:
    """Markdown: GiB less those of a bare worker, the bound, and the plan with its error."""
    lines = [
        *(
            f"Bare, {kind}: {size['resident'] / GIB:.3f} GiB resident, {size['anonymous'] / GIB:.3f} of them anonymous."
            for kind, size in known["bare"].items()
        ),
        "",
        "| cell | step | phase | resident | anonymous | bound | within | plan | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in known["steps"].values():
        shape = sizes[found["size"]][found["cell"]]
        for name, peak in found["peaks"].items():
            bare = known["bare"]["scoring" if found["step"] in SCORING_STEPS or name == phase.PROOF else "training"]
            own, anonymous = (max(0, peak[kind] - bare[kind]) for kind in ("resident", "anonymous"))
            if name in UNUSED and not own:
                continue
            limit = bound(found["cell"], found["step"], name, shape, ranks)
            planned = planned_for(name, found["planned"])
            error = "" if not planned or not own else f"{100 * (planned - own) / own:+.0f} %"
            lines.append(
                f"| {found['cell']} | {found['step']} | {name} | {own / GIB:.3f} | {anonymous / GIB:.3f} | {limit / GIB:.3f} | "
                f"{'yes' if own <= limit else 'no'} | {'' if planned is None else f'{planned / GIB:.3f}'} | {error} |"
            )
    return "\n".join(lines)


def planned_for(name: str, planned: Mapping[str, int]) -> int | None:
    """The plan's bytes for a phase of a run; None where the plan has no such phase."""
    found = [planned[key] for key in PLANNED.get(name, ()) if key in planned]
    if not found:
        return None
    return found[0] if name in FIRST_OF else max(found)


def bound(cell: str, step: str, name: str, shape: Shape, ranks: int) -> float:
    """The rank's share of the states of a phase, two of the largest layers and 10 %."""
    linear = shape.layers * shape.linear
    weight_bytes = QUANTISED_BYTES if cell == "qlora" else FLOAT_BYTES
    weights = weight_bytes * linear + FLOAT_BYTES * (shape.elements - linear)
    trained = shape.elements if cell == "full" else _adapter_elements(shape)
    states = 0.0 if name in UNUSED else weights
    if (name in TRAINED and step in ("train", "resume", "grpo")) or name == phase.ROLLOUTS:
        states += (STATE_BYTES + SNAPSHOT_BYTES) * trained
    # A full policy's reference is a second model; a merge is compared with what it was made of.
    if (step == "grpo" and cell == "full") or step in ("merge", "export"):
        states += FLOAT_BYTES * shape.elements
    # Export measures in one process, outside the job.
    return HEADROOM * (states / (1 if step == "export" else ranks) + 2 * shape.largest_layer_bytes)


def _adapter_elements(shape: Shape) -> int:
    kv = shape.hidden // shape.heads * shape.kv_heads
    sides = 4 * shape.hidden + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.intermediate)
    return shape.layers * ADAPTER_RANK * sides
