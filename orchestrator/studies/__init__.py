"""How are several runs of one configuration searched and compared? Must not import torch."""
