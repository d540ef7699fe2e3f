"""Run one argv on N nodes x G processes: here (local), under torchrun, or as a Slurm job; knows nothing of models."""

# Read as text, never imported, to recognise a package of the same name that another project installed over this one.
DISTRIBUTION = "finetune-orchestrator"
