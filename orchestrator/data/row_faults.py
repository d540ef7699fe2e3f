"""Possible faults of training data, by code, and their report. Must not import torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.errors import DataError

SHOWN_FAULTS = 20

REMEDIES: Mapping[str, str] = {
    "unreadable": "correct or remove the row",
    "missing_field": "map the column with columns={field: column}, or fix the format with format=...",
    "wrong_type": "correct the row",
    "unknown_role": "roles are system, developer, user, assistant and tool",
    "empty_message": "remove the row or the message",
    "template_refused": "correct the order of roles, or give another template with chat_template=FILE",
    "lost_answer": "give a template with {% generation %} marks: chat_template=FILE",
    "bad_text": "remove the characters",
    "zero_trained_tokens": "a row without an answer teaches nothing: remove it",
    "untrained_turn_end": "the template closes the answer with no special token, so the model would not learn to stop: "
    "give one that does with chat_template=FILE",
    "trained_prompt": "the template marks more than the answer as generated, or tokens straddle the boundary: chat_template=FILE",
    "double_bos": "the text itself starts with the beginning-of-text token that the template also writes: remove one",
    "truncation": "raise max_length, shorten the rows, or set truncation=accept",
    "overlap": "remove the rows from one of the two sets, or set overlap=accept",
    "changed_answer": "the trained text is not the row's answer: give another template with chat_template=FILE",
}
"""Every code of a fault and what to do about it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that must not be trained on: its location, and what was found and expected."""

    code: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what} [{self.code}]"


@dataclass(slots=True)
class FaultList:
    """Collects faults: all are counted, the first of every code are kept."""

    kept: list[Fault] = field(default_factory=list[Fault])
    counts: Counter[str] = field(default_factory=Counter[str])

    def add(self, fault: Fault) -> None:
        self.counts[fault.code] += 1
        if self.counts[fault.code] <= SHOWN_FAULTS:
            self.kept.append(fault)

    def extend(self, faults: Iterable[Fault], counts: Mapping[str, int]) -> None:
        """Append another list's faults, in their order."""
        before = dict(self.counts)
        room = {code: SHOWN_FAULTS - before.get(code, 0) for code in counts}
        for fault in faults:
            if room.get(fault.code, 0) > 0:
                room[fault.code] -= 1
                self.kept.append(fault)
        self.counts.update(counts)

    def raise_if_any(self) -> None:
        """Raise DataError with all of them."""
        if self.counts:
            raise DataError(fault_sentences(self.kept, self.counts))


def fault_sentences(faults: Sequence[Fault], counts: Mapping[str, int]) -> list[str]:
    """Sentences: the first faults, how many more there are, and how to fix each kind."""
    sentences = [str(fault) for fault in faults[:SHOWN_FAULTS]]
    total = sum(counts.values())
    if total > len(sentences):
        rest = ", ".join(f"{count} x {code}" for code, count in sorted(counts.items()))
        sentences.append(f"... {total} faulty rows in all: {rest}")
    return sentences + [f"[{code}] {REMEDIES[code]}" for code in sorted(counts) if code in REMEDIES]
