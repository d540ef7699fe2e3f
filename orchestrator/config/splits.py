"""How many rows are held out of train; must not import torch."""

from __future__ import annotations
