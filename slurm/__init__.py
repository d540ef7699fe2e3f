"""Slurm's own language: the job script, the client commands and the job states; imports nothing of ours."""

# Read as text, never imported, to recognise a package of the same name that another project installed over this one.
DISTRIBUTION = "finetune-orchestrator"
