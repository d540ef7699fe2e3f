"""The stages: what each kind trains. A new stage is a file here and one line below."""

STAGES = {
    "sft": "orchestrator.stages.sft",
}
