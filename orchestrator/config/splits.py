"""How many rows are held out of train. Must not import torch."""

from __future__ import annotations
