"""The rows that ship with this tool. Must not import torch."""

from __future__ import annotations

from pathlib import Path

DEMONSTRATION = Path(__file__).resolve().parents[1] / "demonstration"


DEMONSTRATIONS = {
    "demonstration": ("train.jsonl", "held_out.jsonl"),
    "demonstration_preferences": ("preference.jsonl", "preference_held_out.jsonl"),
    "demonstration_requests": ("requests.jsonl", "requests_held_out.jsonl"),
}
"""The sets that ship with this tool, by keyword: rows to train on and held-out rows."""
