"""The stages: what each kind trains. A new stage is a file here and one line below."""

STAGES = {
    "sft": "orchestrator.stages.sft",
    "reward": "orchestrator.stages.reward",
    "dpo": "orchestrator.stages.dpo",
    "grpo": "orchestrator.stages.grpo",
    "evaluate": "orchestrator.stages.evaluate",
    "interpolate": "orchestrator.stages.interpolate",
    "soup": "orchestrator.stages.soup",
    "merge": "orchestrator.stages.merge",
}
