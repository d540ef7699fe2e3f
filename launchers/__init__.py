"""Run one argv on N nodes x G processes: here (local), under torchrun, or as a Slurm job; knows nothing of models."""
