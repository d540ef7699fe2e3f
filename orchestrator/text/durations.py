"""Formats durations: estimates, measurements, seconds. Must not import anything of ours."""

from __future__ import annotations


def duration_words(hours: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `42 days`."""
    if hours * 3600 < 90:
        return seconds_words(hours * 3600)
    if hours < 1.5:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:,.0f} days"


def exact_words(seconds: float) -> str:
    """A measured time: `4.2 s`, `48 s`, `4 min 31 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def seconds_words(seconds: float) -> str:
    """`0.012 s`, `4.20 s`, `15 s`, `12 min`."""
    if seconds >= 90:
        return duration_words(seconds / 3600)
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds:.1g} s"
