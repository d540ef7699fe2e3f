"""What does each kind of stage train? A new kind is a file here and one line below."""

STAGES = {
    "sft": "orchestrator.stages.sft",
    "reward": "orchestrator.stages.reward",
    "dpo": "orchestrator.stages.dpo",
    "grpo": "orchestrator.stages.grpo",
    "classify": "orchestrator.stages.classify",
    "self_training": "orchestrator.stages.self_training",
    "evaluate": "orchestrator.stages.evaluate",
    "interpolate": "orchestrator.stages.interpolate",
    "soup": "orchestrator.stages.soup",
    "merge": "orchestrator.stages.merge",
}
