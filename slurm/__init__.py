"""Slurm's own language: the job script, the client commands and the job states; imports nothing of ours."""
