"""Data sets as files, rows and order: what the login side may know of them; must not import torch, transformers or datasets."""
