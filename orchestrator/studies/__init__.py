"""Studies: several runs of one configuration, and what they tell together; must not import torch."""
