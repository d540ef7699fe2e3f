"""Where the numbers of a run go: the record (jsonl), the console, W&B; must not import torch or any library of the training side."""
